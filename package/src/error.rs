//! Why a package cannot be written, read or looked into.

use std::io;

use transship_checkpoint::criu_images::ImageError;
use transship_checkpoint::manifest::ManifestError;
use transship_checkpoint::store::StoreError;
use transship_layer::{ImportError, RewriteError};
use transship_path_error::PathError;

use crate::encryption::EncryptionError;
use crate::registry_error::RegistryError;
use crate::signature::SignatureError;

/// A failure of a package.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PackageError {
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] PathError),
    /// The package itself cannot be read or written.
    #[error("cannot {act} the package")]
    Stream {
        /// The act.
        act: &'static str,
        /// Why.
        source: io::Error,
    },
    /// What was to be sent to a registry cannot be read.
    #[error("what was to be sent cannot be read")]
    Unread {
        /// Why.
        source: io::Error,
    },
    /// It is none, or it is damaged.
    #[error("the package is damaged at byte {offset} of its tar: {reason}")]
    Damaged {
        /// Where.
        offset: u64,
        /// What is wrong there.
        reason: &'static str,
    },
    /// It has a member that it must not have.
    #[error("the package has {member:?}: {reason}")]
    Member {
        /// The member.
        member: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A member is not what the manifest says.
    #[error("{member} of the package is damaged: {reason}")]
    Differs {
        /// The member.
        member: String,
        /// What differs.
        reason: &'static str,
    },
    /// It ends before everything has come.
    #[error("the package ends before {member}")]
    Missing {
        /// What has not come.
        member: String,
    },
    /// It is the archive of no engine that is known.
    #[error("this is no package: {reason}")]
    Unknown {
        /// What was found.
        reason: String,
    },
    /// It was made on another machine.
    #[error("the package is of {found}, and this machine is {here}")]
    Architecture {
        /// That of the package.
        found: String,
        /// That of this machine.
        here: String,
    },
    /// More than is taken.
    #[error("the package holds {bytes} bytes, and {limit} are taken at most: {of}")]
    TooLarge {
        /// What it holds.
        bytes: u64,
        /// What is taken.
        limit: u64,
        /// What limits it.
        of: &'static str,
    },
    /// The checkpoint cannot be written in that format.
    #[error("the checkpoint {name:?} cannot be written for {format}: {reason}")]
    Format {
        /// Name of the checkpoint.
        name: String,
        /// The format.
        format: &'static str,
        /// Why.
        reason: String,
    },
    /// Somebody else fetches the same.
    #[error("another process fetches the same checkpoint at this moment")]
    InTransfer,
    /// Its manifest cannot be used.
    #[error("the manifest of the package cannot be used")]
    Manifest(#[from] ManifestError),
    /// An image of CRIU cannot be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The layer with the changed files cannot be read.
    #[error("the layer of {container:?} cannot be read")]
    Layer {
        /// The container.
        container: String,
        /// Why.
        source: ImportError,
    },
    /// The layer with the changed files cannot be made one of an image.
    #[error("the layer of {container:?} cannot be made one of an image")]
    ImageLayer {
        /// The container.
        container: String,
        /// Why.
        source: RewriteError,
    },
    /// There are several checkpoints, and one is wanted.
    #[error("{name} has {} checkpoints: name one by its digest: {}", digests.len(), digests.join(", "))]
    Several {
        /// What was asked for.
        name: String,
        /// Their digests.
        digests: Vec<String>,
    },
    /// It is encrypted, or cannot be.
    #[error(transparent)]
    Encryption(#[from] EncryptionError),
    /// It is not signed as it has to be.
    #[error(transparent)]
    Signature(#[from] SignatureError),
    /// A registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The directory of checkpoints.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl PackageError {
    /// Whether the same may go well later: a registry that cannot be reached, or has no time.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Registry(RegistryError::Failed { .. }))
    }

    /// What the tar reader says, of a package instead of a layer.
    pub(crate) fn of_archive(error: ImportError) -> Self {
        match error {
            ImportError::Malformed { offset, reason } => Self::Damaged { offset, reason },
            ImportError::Refused { path, reason } => Self::Member {
                member: path.display().to_string(),
                reason: reason.to_owned(),
            },
            ImportError::Read { source } => Self::reading(source),
            other => Self::Stream {
                act: "read",
                source: io::Error::other(other),
            },
        }
    }

    /// That a package cannot be read; of a source that is another one of this crate, its own error.
    #[must_use]
    pub fn reading(source: io::Error) -> Self {
        source.downcast().unwrap_or_else(|source| Self::Stream {
            act: "read",
            source,
        })
    }

    pub(crate) fn writing(source: io::Error) -> Self {
        Self::Stream {
            act: "write",
            source,
        }
    }
}
