//! The tables of the metadata database as a change sees them, which metadata.rs draws.

use prost::Message as _;
use rusqlite::{Connection, OptionalExtension as _};

use crate::error::{Result, SnapshotError};
use crate::record::Record;

/// The layout that is written.
pub(crate) const FORMAT: u32 = 3;

/// The tables inside a write transaction.
pub(crate) struct Batch<'t> {
    connection: &'t Connection,
    /// Whether anything was written: else there is nothing to commit.
    pub(crate) has_changes: bool,
}

/// How a change ended inside its transaction, before the transaction is durable.
pub(crate) type Change<T> = Result<Result<T>, rusqlite::Error>;

impl<'t> Batch<'t> {
    /// That of the transaction in which `connection` is.
    pub(crate) fn of(connection: &'t Connection) -> Self {
        Self {
            connection,
            has_changes: false,
        }
    }
}

impl Batch<'_> {
    /// The record under `key`.
    pub(crate) fn get(&self, key: &str) -> Change<Option<Record>> {
        let found = find(self.connection, key)?;
        Ok(found.map(|bytes| decode(key, &bytes)).transpose())
    }

    /// Whether `key` is taken.
    pub(crate) fn contains(&self, key: &str) -> Result<bool, rusqlite::Error> {
        self.connection
            .prepare_cached("SELECT 1 FROM snapshots WHERE key = ?1")?
            .exists([key])
    }

    /// Stores `record` under `key`.
    pub(crate) fn put(&mut self, key: &str, record: &Record) -> Result<(), rusqlite::Error> {
        self.has_changes = true;
        let parent = record
            .ancestors
            .first()
            .copied()
            .map(to_stored)
            .transpose()?;
        self.connection
            .prepare_cached(
                "INSERT OR REPLACE INTO snapshots (key, parent, record) VALUES (?1, ?2, ?3)",
            )?
            .execute((key, parent, record.encode_to_vec()))
            .map(drop)
    }

    /// Removes the record under `key`.
    pub(crate) fn delete(&mut self, key: &str) -> Result<(), rusqlite::Error> {
        self.has_changes = true;
        self.connection
            .prepare_cached("DELETE FROM snapshots WHERE key = ?1")?
            .execute([key])
            .map(drop)
    }

    /// Whether anything is built on `parent`.
    pub(crate) fn has_children(&self, parent: u64) -> Result<bool, rusqlite::Error> {
        self.connection
            .prepare_cached("SELECT 1 FROM snapshots WHERE parent = ?1")?
            .exists([to_stored(parent)?])
    }

    /// Notes which layout this is.
    pub(crate) fn set_format(&mut self) -> Result<(), rusqlite::Error> {
        self.has_changes = true;
        self.connection.pragma_update(None, "user_version", FORMAT)
    }

    /// The counter `name`; 0 where there is none.
    pub(crate) fn counter(&self, name: &str) -> Result<u64, rusqlite::Error> {
        let value: Option<i64> = self
            .connection
            .prepare_cached("SELECT value FROM counters WHERE name = ?1")?
            .query_row([name], |row| row.get(0))
            .optional()?;
        Ok(value.map_or(0, i64::unsigned_abs))
    }

    /// Sets the counter `name`.
    pub(crate) fn set_counter(&mut self, name: &str, value: u64) -> Result<(), rusqlite::Error> {
        self.has_changes = true;
        self.connection
            .prepare_cached("INSERT OR REPLACE INTO counters (name, value) VALUES (?1, ?2)")?
            .execute((name, to_stored(value)?))
            .map(drop)
    }
}

/// The bytes of the record under `key`.
pub(crate) fn find(connection: &Connection, key: &str) -> Result<Option<Vec<u8>>, rusqlite::Error> {
    connection
        .prepare_cached("SELECT record FROM snapshots WHERE key = ?1")?
        .query_row([key], |row| row.get(0))
        .optional()
}

/// The record under `key`, of its bytes.
pub(crate) fn decode(key: &str, bytes: &[u8]) -> Result<Record> {
    Record::decode(bytes).map_err(|error| SnapshotError::Damaged {
        key: key.to_owned(),
        reason: error.to_string(),
    })
}

/// SQLite's integers have a sign.
fn to_stored(number: u64) -> Result<i64, rusqlite::Error> {
    i64::try_from(number).map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))
}
