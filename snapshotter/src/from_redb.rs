//! Takes over the metadata of releases that kept it in redb, with a journal before it.
//!
//! ```text
//! metadata.redb      tables   snapshots  key (str) -> record (bytes, drawn in record.rs)
//!                             counters   "next_id", and what belongs to the journal:
//!                                        "journal" the name of this database, "batch" its last transaction
//! metadata.journal   transactions that redb does not have, one after the other, each at a multiple of 512 bytes
//!
//! transaction   0  "TSJ1"
//!               4  u32   length of the changes                         (numbers: little endian)
//!               8  u64   name of the database
//!              16  u64   base: "batch" of the database to which these transactions are to be added
//!              24  u64   number: base + 1, base + 2, ...
//!              32  SHA-256 of bytes 0..32 and of the changes
//!              64  changes: a protobuf message, drawn at [`Changes`]
//! ```
//!
//! The first transaction that is torn, of another database or out of turn ends the journal.
//!
//! All goes into SQLite in one transaction, which also gives the database its layout number. Then the old files are
//! deleted; when the daemon dies before that, they are deleted at the next start.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use prost::Message;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, TableError};

use transship_digest::Sha256;
use transship_path_error::During as _;

use crate::error::{Result, SnapshotError, one_line};
use crate::metadata::{FILE, Metadata};
use crate::record::Record;

const SNAPSHOTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");
const COUNTERS: TableDefinition<'_, &str, u64> = TableDefinition::new("counters");
const DATABASE: &str = "metadata.redb";
const SECTOR: usize = 512;
const HEADER: usize = 64;
const MAGIC: &[u8; 4] = b"TSJ1";

/// What one transaction of the journal does, in order; other changes than these are of indexes.
///
/// ```text
/// 1 changes  repeated {1 put {1 key string, 2 record bytes} | 2 delete string (key)
///                      | 5 counter {1 name string, 2 value uint64}}
/// ```
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Changes {
    #[prost(message, repeated, tag = "1")]
    changes: Vec<AnyChange>,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
struct AnyChange {
    #[prost(oneof = "Change", tags = "1, 2, 5")]
    change: Option<Change>,
}

#[derive(Clone, PartialEq, Eq, prost::Oneof)]
enum Change {
    #[prost(message, tag = "1")]
    Put(Put),
    #[prost(string, tag = "2")]
    Delete(String),
    #[prost(message, tag = "5")]
    Counter(Counter),
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Put {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(bytes = "vec", tag = "2")]
    record: Vec<u8>,
}

#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Counter {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(uint64, tag = "2")]
    value: u64,
}

/// The content of the old database.
#[derive(Debug, Default)]
struct Content {
    snapshots: BTreeMap<String, Vec<u8>>,
    counters: BTreeMap<String, u64>,
}

/// Whether `root` holds the metadata of an earlier release.
///
/// # Errors
/// I/O errors.
pub(crate) fn is_in(root: &Path) -> Result<bool> {
    let database = root.join(DATABASE);
    Ok(database.try_exists().during("look for", database)?)
}

/// Fills the empty `metadata` from `metadata.redb` in `root`, if that is there, and deletes it. One that is there beside
/// `metadata` that is not empty has to say the same: whoever took it over was killed before he had renamed it.
///
/// # Errors
/// A database that cannot be read, a record that is damaged, I/O errors; an earlier release has run since. Nothing is
/// changed then.
pub(crate) fn take_over(root: &Path, metadata: &mut Metadata) -> Result<()> {
    let (database, journal) = (root.join(DATABASE), root.join("metadata.journal"));
    let taken_over = root.join("metadata.redb.taken-over");
    if is_in(root)? {
        if metadata.is_fresh() {
            let (records, next_id) = read_all(&database, &journal)?;
            tracing::info!(
                snapshots = records.len(),
                "taking over the metadata of an earlier release"
            );
            metadata.fill(records.into_iter().collect(), next_id)?;
        } else {
            check_same(&database, &journal, metadata)?;
        }
        // Whole, before a part of it goes.
        fs::rename(&database, &taken_over).during("rename", &database)?;
    }
    for path in [journal, taken_over] {
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            outcome => outcome.during("delete", path)?,
        }
    }
    Ok(())
}

/// Whether both have the same snapshots; else nobody can know here which of them are there.
fn check_same(database: &Path, journal: &Path, metadata: &Metadata) -> Result<()> {
    let known = metadata.walk()?.collect::<Result<BTreeMap<_, _>>>()?;
    let newest = |of: &BTreeMap<String, Record>| of.values().map(|it| it.id).max().unwrap_or(0);
    let both = || {
        let other = database.with_file_name(FILE);
        format!("{} and {}", database.display(), other.display())
    };
    let reason = match read_all(database, journal) {
        Ok((records, _)) if records == known => return Ok(()),
        Ok((records, _)) => format!(
            "{} have different snapshots (up to number {} and {}), because an earlier release has run since: rename the \
             one that is out of date",
            both(),
            newest(&records),
            newest(&known)
        ),
        Err(error) => format!(
            "both {} are there, and the first one cannot be read ({}): rename the one that is out of date",
            both(),
            one_line(&error)
        ),
    };
    Err(SnapshotError::Invalid { reason })
}

/// The records, and the next free id.
fn read_all(database: &Path, journal: &Path) -> Result<(BTreeMap<String, Record>, u64)> {
    let mut content = read(database).during("read", database)?;
    let from_journal = match fs::read(journal) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        outcome => outcome.during("read", journal)?,
    };
    content.add(&from_journal);
    let next_id = content.counters.get("next_id").copied().unwrap_or(1);
    let decode = |(key, bytes): (String, Vec<u8>)| match Record::decode(&bytes[..]) {
        Ok(record) => Ok((key, record)),
        Err(error) => Err(SnapshotError::Damaged {
            key,
            reason: error.to_string(),
        }),
    };
    let records = content.snapshots.into_iter().map(decode);
    Ok((records.collect::<Result<_>>()?, next_id))
}

fn read(path: &Path) -> io::Result<Content> {
    let to_io = |error: redb::Error| match error {
        redb::Error::Io(error) => error,
        error => io::Error::new(io::ErrorKind::InvalidData, error),
    };
    let read = || -> Result<Content, redb::Error> {
        let database = Database::open(path)?;
        let transaction = database.begin_read()?;
        let mut content = Content::default();
        match transaction.open_table(SNAPSHOTS) {
            // Killed before its first transaction.
            Err(TableError::TableDoesNotExist(_)) => return Ok(content),
            table => {
                for entry in table?.iter()? {
                    let (key, record) = entry?;
                    let (key, record) = (key.value().to_owned(), record.value().to_owned());
                    content.snapshots.insert(key, record);
                }
            }
        }
        for entry in transaction.open_table(COUNTERS)?.iter()? {
            let (name, value) = entry?;
            content
                .counters
                .insert(name.value().to_owned(), value.value());
        }
        Ok(content)
    };
    read().map_err(to_io)
}

impl Content {
    /// Adds the transactions of the journal that are not in the database yet.
    fn add(&mut self, journal: &[u8]) {
        let counter = |name| self.counters.get(name).copied().unwrap_or(0);
        let (name, base) = (counter("journal"), counter("batch"));
        let (mut rest, mut number) = (journal, base);
        while let Some(transaction) = Transaction::read(rest) {
            if (transaction.database, transaction.base) != (name, base)
                || transaction.number != number + 1
            {
                break;
            }
            number += 1;
            let length = (HEADER + transaction.changes.len()).next_multiple_of(SECTOR);
            rest = rest.get(length..).unwrap_or_default();
            // What its checksum vouches for was written by the daemon.
            let changes = Changes::decode(transaction.changes).unwrap_or_default();
            for change in changes.changes.into_iter().filter_map(|any| any.change) {
                match change {
                    Change::Put(put) => drop(self.snapshots.insert(put.key, put.record)),
                    Change::Delete(key) => drop(self.snapshots.remove(&key)),
                    Change::Counter(counter) => {
                        self.counters.insert(counter.name, counter.value);
                    }
                }
            }
        }
    }
}

struct Transaction<'a> {
    database: u64,
    base: u64,
    number: u64,
    changes: &'a [u8],
}

impl<'a> Transaction<'a> {
    /// The whole transaction at the start of `journal`.
    fn read(journal: &'a [u8]) -> Option<Self> {
        let (header, rest) = journal.split_at_checked(HEADER)?;
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&header[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let length = usize::try_from(number(0) >> 32).ok()?;
        let changes = rest.get(..length)?;
        let mut sum = Sha256::new();
        sum.update(&header[..32]);
        sum.update(changes);
        let is_whole = header[..4] == *MAGIC && header[32..] == sum.finish();
        is_whole.then(|| Self {
            database: number(8),
            base: number(16),
            number: number(24),
            changes,
        })
    }
}
