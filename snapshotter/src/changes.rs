//! The changes of the metadata: each is one closure inside a (shared) write transaction, which first
//! decides whether it is allowed and only then writes.
//!
//! The order in which reasons to refuse are found is containerd's (core/snapshots/storage/bolt.go of
//! 2.1.9), so that a request with two faults gets the same answer from both.

use std::collections::BTreeMap;

use crate::error::{Result, SnapshotError};
use crate::metadata::Metadata;
use crate::record::{Kind, Record, Usage};

impl Metadata {
    /// Records a new active snapshot or view.
    ///
    /// # Errors
    /// A missing, uncommitted or replaced parent; a key that is taken; I/O errors.
    pub fn create(&self, key: &str, record: Record) -> Result<()> {
        self.require_room()?;
        let key = key.to_owned();
        self.write(move |batch| {
            if !record.parent.is_empty() {
                let parent = match batch.get(&record.parent)? {
                    Ok(parent) => parent,
                    Err(damaged) => return Ok(Err(damaged)),
                };
                let name = || record.parent.clone();
                // A parent with another id was removed and made again since its chain was read.
                let parent = parent.filter(|p| record.ancestors.first() == Some(&p.id));
                let Some(parent) = parent else {
                    return Ok(Err(SnapshotError::ParentNotFound { parent: name() }));
                };
                if parent.kind() != Some(Kind::Committed) {
                    return Ok(Err(SnapshotError::ParentNotCommitted { parent: name() }));
                }
            }
            if batch.contains(&key)? {
                return Ok(Err(SnapshotError::AlreadyExists { key }));
            }
            batch.put(&key, &record)?;
            Ok(Ok(()))
        })
    }

    /// Turns the active snapshot `key` into the committed snapshot `name`. `id` is the one that the
    /// caller looked at; `usage` may be missing and follow with [`Metadata::set_usage`].
    ///
    /// # Errors
    /// A name that is taken, a missing or not active snapshot, I/O errors.
    pub fn commit(
        &self,
        key: &str,
        name: &str,
        id: u64,
        usage: Option<Usage>,
        labels: BTreeMap<String, String>,
        now: i64,
    ) -> Result<Record> {
        self.require_room()?;
        let (key, name) = (key.to_owned(), name.to_owned());
        self.write(move |batch| {
            if batch.contains(&name)? {
                return Ok(Err(SnapshotError::AlreadyExists { key: name }));
            }
            let mut record = match batch.get(&key)? {
                Ok(Some(record)) if record.id == id => record,
                Ok(_) => return Ok(Err(SnapshotError::NotFound { key })),
                Err(damaged) => return Ok(Err(damaged)),
            };
            if record.kind() != Some(Kind::Active) {
                return Ok(Err(SnapshotError::NotActive { key }));
            }
            record.kind_number = Kind::Committed as u32;
            (record.created, record.updated) = (now, now);
            record.labels = labels;
            record.usage = usage;
            batch.delete(&key)?;
            batch.put(&name, &record)?;
            Ok(Ok(record))
        })
    }

    /// Deletes the record of a snapshot and returns its id.
    ///
    /// # Errors
    /// A missing snapshot or one with children, I/O errors.
    pub fn remove(&self, key: &str) -> Result<u64> {
        let key = key.to_owned();
        self.write_urgently(move |batch| {
            let record = match batch.get(&key)? {
                Ok(Some(record)) => record,
                Ok(None) => return Ok(Err(SnapshotError::NotFound { key })),
                Err(damaged) => return Ok(Err(damaged)),
            };
            if batch.has_children(record.id)? {
                return Ok(Err(SnapshotError::HasChildren { key }));
            }
            batch.delete(&key)?;
            Ok(Ok(record.id))
        })
    }

    /// Replaces labels: all of them without `fields`, else those that `fields` name.
    ///
    /// # Errors
    /// A missing snapshot, a field other than labels, I/O errors.
    pub fn update(
        &self,
        key: &str,
        labels: BTreeMap<String, String>,
        fields: Vec<String>,
        now: i64,
    ) -> Result<Record> {
        self.require_room()?;
        let key = key.to_owned();
        self.write(move |batch| {
            let mut record = match batch.get(&key)? {
                Ok(Some(record)) => record,
                Ok(None) => return Ok(Err(SnapshotError::NotFound { key })),
                Err(damaged) => return Ok(Err(damaged)),
            };
            if fields.is_empty() {
                record.labels = labels;
            } else {
                for field in fields {
                    if field == "labels" {
                        record.labels.clone_from(&labels);
                    } else if let Some(label) = field.strip_prefix("labels.") {
                        let value = labels.get(label).cloned().unwrap_or_default();
                        record.labels.insert(label.to_owned(), value);
                    } else {
                        return Ok(Err(SnapshotError::ImmutableField { field, key }));
                    }
                }
            }
            record.labels.retain(|_, value| !value.is_empty());
            record.updated = now;
            batch.put(&key, &record)?;
            Ok(Ok(record))
        })
    }

    /// Stores records as they are, for `fsck`.
    ///
    /// # Errors
    /// I/O errors.
    pub fn restore(&self, records: Vec<(String, Record)>) -> Result<()> {
        self.write(move |batch| {
            for (key, record) in &records {
                batch.put(key, record)?;
            }
            Ok(Ok(()))
        })
    }

    /// Drops a record unread, for `fsck`.
    ///
    /// # Errors
    /// I/O errors.
    pub fn forget(&self, key: &str) -> Result<()> {
        let key = key.to_owned();
        self.write(move |batch| {
            batch.delete(&key)?;
            Ok(Ok(()))
        })
    }

    /// Records the disk use of a committed snapshot, if `name` still is the snapshot `id`.
    ///
    /// # Errors
    /// I/O errors.
    pub fn set_usage(&self, name: &str, id: u64, usage: Usage) -> Result<()> {
        let name = name.to_owned();
        self.write(move |batch| {
            match batch.get(&name)? {
                Ok(Some(mut record)) if record.id == id => {
                    record.usage = Some(usage);
                    batch.put(&name, &record)?;
                }
                Ok(_) => {}
                Err(damaged) => return Ok(Err(damaged)),
            }
            Ok(Ok(()))
        })
    }
}
