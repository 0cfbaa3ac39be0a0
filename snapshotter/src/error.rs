//! What can go wrong with a snapshot, told so that a caller can act on it.
//!
//! The domain code returns these; `service.rs` turns them into gRPC codes in one place. Display
//! never prints the source: whoever shows an error calls [`one_line`].

use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::sync::Arc;

use transship_path_error::PathError;
pub use transship_path_error::one_line;

/// An act on a snapshot that was refused or failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// No snapshot has this key.
    #[error("snapshot {key:?} does not exist")]
    NotFound {
        /// The key that was asked for.
        key: String,
    },
    /// The parent named by a Prepare or View is not there.
    #[error("parent snapshot {parent:?} does not exist")]
    ParentNotFound {
        /// The name that was asked for.
        parent: String,
    },
    /// Only committed snapshots can be parents.
    #[error("parent snapshot {parent:?} is not committed")]
    ParentNotCommitted {
        /// The name that was asked for.
        parent: String,
    },
    /// The key or name is taken.
    #[error("snapshot {key:?} already exists")]
    AlreadyExists {
        /// The key or name.
        key: String,
    },
    /// Commit of a view or of a committed snapshot.
    #[error("cannot commit snapshot {key:?}: it is not active")]
    NotActive {
        /// The key that was asked for.
        key: String,
    },
    /// Commit with a parent that the snapshot was not prepared on. Its content was made without knowing what lies below:
    /// deletions would be missing.
    #[error(
        "snapshot {key:?} was not prepared on {parent:?}, so it cannot be committed on it: take \"rebase\" out of the \
         capabilities of this snapshotter in containerd's configuration, and layers are unpacked one on the other"
    )]
    ParentAtCommit {
        /// The key of the active snapshot.
        key: String,
        /// The parent that the Commit names.
        parent: String,
    },
    /// Mounts of a committed snapshot.
    #[error("snapshot {key:?} is committed: only active snapshots and views have mounts")]
    NoMounts {
        /// The key that was asked for.
        key: String,
    },
    /// Remove of a snapshot that others are built on.
    #[error("cannot remove snapshot {key:?}: it has children")]
    HasChildren {
        /// The key that was asked for.
        key: String,
    },
    /// Update of something that is fixed once a snapshot exists.
    #[error("cannot update field {field:?} of snapshot {key:?}: only labels can change")]
    ImmutableField {
        /// The field path as it was sent.
        field: String,
        /// The key that was asked for.
        key: String,
    },
    /// A request that can never succeed as it is.
    #[error("{reason}")]
    Invalid {
        /// What is wrong with the request.
        reason: String,
    },
    /// A file system call failed.
    #[error(transparent)]
    Io(#[from] PathError),
    /// The metadata database failed.
    #[error("cannot {act} the snapshot metadata")]
    Database {
        /// What was being done, as in "read".
        act: &'static str,
        /// Why it failed.
        source: Arc<rusqlite::Error>,
    },
    /// A write failed when it was being made durable: whether it is there is known after the next start.
    #[error("cannot tell whether the snapshot metadata was written")]
    UnknownOutcome {
        /// Why the write failed.
        source: Arc<rusqlite::Error>,
    },
    /// The metadata database may not grow.
    #[error("cannot write the snapshot metadata: the quota of the disk is spent")]
    OverQuota,
    /// The file of the metadata database is damaged.
    #[error("{path} is damaged: {fault}")]
    DamagedDatabase {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        fault: String,
    },
    /// The call in whose thread the transaction was made has panicked.
    #[error("another call panicked while it wrote the snapshot metadata")]
    LeaderPanicked,
    /// What is stored cannot be understood.
    #[error("the stored record of snapshot {key:?} is damaged: {reason}")]
    Damaged {
        /// The key of the record.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// The result of an act on a snapshot.
pub type Result<T, E = SnapshotError> = std::result::Result<T, E>;

impl SnapshotError {
    /// Wraps a database error with the act during which it happened.
    pub(crate) fn database(act: &'static str, source: rusqlite::Error) -> Self {
        Self::Database {
            act,
            source: Arc::new(source),
        }
    }

    /// Whether it says that the database itself is damaged, and not that it cannot be read now.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
        match self {
            Self::Database { source, .. } => {
                let code = source.sqlite_error_code();
                matches!(code, Some(DatabaseCorrupt | NotADatabase))
            }
            // Of redb's file.
            Self::Io(error) => error.source.kind() == ErrorKind::InvalidData,
            Self::DamagedDatabase { .. } | Self::Damaged { .. } => true,
            _ => false,
        }
    }

    /// Whether the disk has no room, or the user no quota left.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        match self {
            Self::Database { source, .. } | Self::UnknownOutcome { source } => {
                // The second: no room for the WAL's index.
                matches!(
                    source.sqlite_error(),
                    Some(error) if error.code == rusqlite::ErrorCode::DiskFull
                        || error.extended_code == rusqlite::ffi::SQLITE_IOERR_SHMSIZE
                )
            }
            Self::OverQuota => true,
            _ => self.io_source().is_some_and(|io| {
                matches!(
                    io.kind(),
                    io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
                )
            }),
        }
    }

    /// The I/O error at the root of this error, when there is one.
    #[must_use]
    pub fn io_source(&self) -> Option<&io::Error> {
        match self {
            Self::Io(error) => Some(&error.source),
            _ => None,
        }
    }
}
