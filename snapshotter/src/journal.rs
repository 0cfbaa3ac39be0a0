//! The journal: transactions that the database does not hold on disk yet.
//!
//! A durable transaction of redb writes a dozen pages all over its file. Most transactions are therefore
//! made in redb without durability, and what makes them durable is a record appended here: one write and
//! one sync of a few hundred bytes in blocks that the file has already. Every now and then, when the
//! journal is full, a transaction is made durable in redb itself, and with it all before; then the journal
//! begins anew at its start.
//!
//! The file `metadata.journal` has [`LENGTH`] bytes. Records follow one another, each at the begin of a
//! sector, so that no write touches a sector of an older record:
//!
//! ```text
//! | record, zeros | record, zeros | ... | records of an earlier pass, or zeros |
//! 0               512 x n
//!
//! record    0  "TSJ1"
//!           4  u32   length of the changes
//!           8  u64   database: its "journal" counter, so that no other database takes them for its own
//!          16  u64   base: the transaction after which the journal began anew
//!          24  u64   number of this transaction: base + 1, base + 2, ...
//!          32  SHA-256 of 0..32 and of the changes
//!          64  changes: a protobuf message, drawn at [`Changes`]     (numbers before it: little endian)
//! ```
//!
//! A database whose last durable transaction is `base` is brought up to date by the records with that base
//! that lie at the start, up to the first that is none: torn, of an earlier pass, or out of turn. Records of
//! a pass that ended are never taken again, because the number of the last durable transaction only grows.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use prost::Message;
use redb::StorageBackend;
use sha2::{Digest, Sha256};

/// Bytes of the file: some 1500 transactions, whose pages redb then writes at once.
const LENGTH: u64 = 1 << 20;
const SECTOR: usize = 512;
const MAGIC: &[u8; 4] = b"TSJ1";
const HEADER: usize = 64;
const SUM: std::ops::Range<usize> = 32..64;

/// What one transaction does, in order.
///
/// ```text
/// 1 changes  repeated {1 put {1 key string, 2 record bytes} | 2 delete string (key)
///                      | 3 link {1 parent uint64, 2 child uint64} | 4 unlink (as link)
///                      | 5 counter {1 name string, 2 value uint64}}
/// ```
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Changes {
    #[prost(message, repeated, tag = "1")]
    pub(crate) changes: Vec<AnyChange>,
}

/// Holds a [`TableChange`], as protobuf has no bare alternatives.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct AnyChange {
    #[prost(oneof = "TableChange", tags = "1, 2, 3, 4, 5")]
    pub(crate) change: Option<TableChange>,
}

/// One change of one table of the database.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub(crate) enum TableChange {
    #[prost(message, tag = "1")]
    Put(Put),
    #[prost(string, tag = "2")]
    Delete(String),
    #[prost(message, tag = "3")]
    Link(Link),
    #[prost(message, tag = "4")]
    Unlink(Link),
    #[prost(message, tag = "5")]
    Counter(Counter),
}

/// A record under a key.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Put {
    #[prost(string, tag = "1")]
    pub(crate) key: String,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) record: Vec<u8>,
}

/// A child and what it is built on.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(crate) struct Link {
    #[prost(uint64, tag = "1")]
    pub(crate) parent: u64,
    #[prost(uint64, tag = "2")]
    pub(crate) child: u64,
}

/// A counter's new value.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(crate) struct Counter {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(uint64, tag = "2")]
    pub(crate) value: u64,
}

/// The journal of a database that is open.
pub(crate) struct Journal {
    file: Box<dyn StorageBackend>,
    database: u64,
    base: u64,
    /// Number of the last transaction.
    last: u64,
    /// Where the next record goes.
    end: u64,
}

impl Journal {
    /// Takes the file; it gets its length if it has another.
    ///
    /// # Errors
    /// I/O errors, such as no room; the file is empty then.
    pub(crate) fn open(file: Box<dyn StorageBackend>) -> io::Result<Self> {
        if file.len()? != LENGTH {
            // Written and not just made long: later writes must find blocks.
            let fill = || {
                file.set_len(LENGTH)?;
                let zeros = vec![0; 1 << 16];
                for offset in (0..LENGTH).step_by(zeros.len()) {
                    file.write(offset, &zeros)?;
                }
                file.sync_data()
            };
            if let Err(error) = fill() {
                file.set_len(0)?;
                return Err(error);
            }
        }
        Ok(Self {
            file,
            database: 0,
            base: 0,
            last: 0,
            end: LENGTH,
        })
    }

    /// The transactions that the database lacks on disk when its last durable one is `base`, with the
    /// number of the last.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn read(&self, database: u64, base: u64) -> io::Result<(Vec<Changes>, u64)> {
        let (mut found, mut last, mut offset) = (Vec::new(), base, 0);
        while let Some(record) = self.read_record(offset)? {
            if record.database != database || record.base != base || record.number != last + 1 {
                break;
            }
            // What its checksum vouches for was written by this program.
            let changes = Changes::decode(&record.payload[..])
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            found.push(changes);
            last = record.number;
            offset += sectors(record.payload.len());
        }
        Ok((found, last))
    }

    fn read_record(&self, offset: u64) -> io::Result<Option<Record>> {
        if offset + HEADER as u64 > LENGTH {
            return Ok(None);
        }
        let mut header = [0; HEADER];
        self.file.read(offset, &mut header)?;
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&header[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let length = number(0) >> 32;
        if header[..4] != *MAGIC || offset + HEADER as u64 + length > LENGTH {
            return Ok(None);
        }
        let mut payload = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        self.file.read(offset + HEADER as u64, &mut payload)?;
        let is_whole = checksum(&header, &payload) == header[SUM];
        Ok(is_whole.then(|| Record {
            database: number(8),
            base: number(16),
            number: number(24),
            payload,
        }))
    }

    /// Begins for a database that was opened and whose last transaction, now durable in it, is `base`.
    pub(crate) fn begin(&mut self, database: u64, base: u64) {
        self.database = database;
        self.restart(base);
    }

    /// Begins anew, when everything through the transaction `base` is durable in the database.
    pub(crate) fn restart(&mut self, base: u64) {
        (self.base, self.last, self.end) = (base, base, 0);
    }

    /// Makes a transaction durable; `false`: there is no room.
    ///
    /// # Errors
    /// I/O errors; then only [`Journal::read`] can tell whether the record is there.
    pub(crate) fn append(&mut self, number: u64, changes: &Changes) -> io::Result<bool> {
        let length = changes.encoded_len();
        let whole = sectors(length);
        if number != self.last + 1 || self.end + whole > LENGTH {
            return Ok(false);
        }
        let size = usize::try_from(whole).map_err(io::Error::other)?;
        let mut record = Vec::with_capacity(size);
        record.extend_from_slice(MAGIC);
        let length = u32::try_from(length).map_err(io::Error::other)?;
        record.extend_from_slice(&length.to_le_bytes());
        for number in [self.database, self.base, number] {
            record.extend_from_slice(&number.to_le_bytes());
        }
        record.resize(HEADER, 0);
        changes.encode(&mut record).map_err(io::Error::other)?;
        let (header, payload) = record.split_at(HEADER);
        let sum = checksum(header, payload);
        record[SUM].copy_from_slice(&sum);
        record.resize(size, 0);
        self.file.write(self.end, &record)?;
        self.file.sync_data()?;
        self.end += whole;
        self.last = number;
        Ok(true)
    }
}

struct Record {
    database: u64,
    base: u64,
    number: u64,
    payload: Vec<u8>,
}

/// Bytes that a record takes.
fn sectors(payload: usize) -> u64 {
    (HEADER + payload).next_multiple_of(SECTOR) as u64
}

fn checksum(header: &[u8], payload: &[u8]) -> [u8; 32] {
    let mut sum = Sha256::new();
    sum.update(&header[..SUM.start]);
    sum.update(payload);
    sum.finalize().into()
}

/// The journal's file.
#[derive(Debug)]
pub(crate) struct JournalFile(pub(crate) File);

impl StorageBackend for JournalFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(out, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal(dir: &tempfile::TempDir) -> Journal {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(dir.path().join("journal"))
            .unwrap();
        Journal::open(Box::new(JournalFile(file))).unwrap()
    }

    fn put(key: &str) -> Changes {
        let put = Put {
            key: key.to_owned(),
            record: vec![1, 2, 3],
        };
        let change = Some(TableChange::Put(put));
        Changes {
            changes: vec![AnyChange { change }],
        }
    }

    #[test]
    fn what_was_appended_is_read_by_its_database_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = journal(&dir);
        assert!(!first.append(1, &put("unused")).unwrap(), "not begun");
        first.begin(7, 40);
        let long = put(&"k".repeat(2000));
        assert!(first.append(41, &put("a")).unwrap());
        assert!(first.append(42, &long).unwrap());
        assert!(!first.append(44, &put("out of turn")).unwrap());
        drop(first);
        let again = journal(&dir);
        let both = vec![put("a"), long];
        assert_eq!(again.read(7, 40).unwrap(), (both, 42));
        for (database, base) in [(8, 40), (7, 41), (7, 39), (7, 42)] {
            assert_eq!(again.read(database, base).unwrap(), (Vec::new(), base));
        }
    }

    #[test]
    fn an_earlier_pass_and_a_torn_record_are_none() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = journal(&dir);
        journal.begin(7, 0);
        for number in 1..=3 {
            journal.append(number, &put("old")).unwrap();
        }
        journal.restart(3);
        journal.append(4, &put("new")).unwrap();
        assert_eq!(journal.read(7, 3).unwrap(), (vec![put("new")], 4));
        assert_eq!(journal.read(7, 0).unwrap(), (Vec::new(), 0));
        journal.append(5, &put("torn")).unwrap();
        journal.file.write(512 + 70, &[0xff]).unwrap();
        assert_eq!(journal.read(7, 3).unwrap(), (vec![put("new")], 4));
    }

    #[test]
    fn a_full_journal_takes_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = journal(&dir);
        journal.begin(7, 0);
        let big = put(&"k".repeat(400_000));
        assert!(journal.append(1, &big).unwrap());
        assert!(journal.append(2, &big).unwrap());
        assert!(!journal.append(3, &big).unwrap());
        assert_eq!(journal.read(7, 0).unwrap().1, 2);
        journal.restart(3);
        assert!(journal.append(4, &big).unwrap());
    }
}
