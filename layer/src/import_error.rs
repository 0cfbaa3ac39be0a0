//! Why a layer cannot be imported.

use std::io;
use std::path::PathBuf;

use crate::lower_view::LowerError;
use crate::path_bytes::to_path_buf;

/// A failed import. The upperdir is half made and must be thrown away.
///
/// Paths are relative to the root of the layer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// A system call on the upperdir failed.
    #[error("cannot {act} {path:?}")]
    Io {
        /// What was being done.
        act: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The place that the tar comes from failed.
    #[error("cannot read the layer")]
    Read {
        /// What the reader said.
        source: io::Error,
    },
    /// The tar is damaged, cut off or none at all.
    #[error("the layer is damaged at byte {offset}: {reason}")]
    Malformed {
        /// Where in the uncompressed tar.
        offset: u64,
        /// What is wrong there.
        reason: &'static str,
    },
    /// The tar is well formed, but an entry asks for what no layer may do.
    #[error("the layer is refused because of its entry {path:?}: {reason}")]
    Refused {
        /// The entry.
        path: PathBuf,
        /// What it asks for.
        reason: &'static str,
    },
    /// The tar is larger than the caller allows.
    #[error(
        "the uncompressed layer, with what it copies from lower ones, has more than {limit} bytes"
    )]
    TooLarge {
        /// The limit that was set.
        limit: u64,
    },
    /// The file system below the upperdir refused an extended attribute.
    #[error("cannot set the extended attribute {name:?} of {path:?}")]
    Xattr {
        /// On which file.
        path: PathBuf,
        /// Which attribute, bytes that are no UTF-8 replaced.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The layers below could not be asked.
    #[error("cannot look into the lower layers")]
    Lower(#[from] LowerError),
}

impl ImportError {
    /// Whether the layer is whole, and another reader may take it: it has what this one refuses or has no room
    /// for.
    pub fn is_beyond_this_reader(&self) -> bool {
        match self {
            ImportError::Refused { .. }
            | ImportError::TooLarge { .. }
            | ImportError::Lower(LowerError::Redirected { .. }) => true,
            ImportError::Read { source } => source.kind() == io::ErrorKind::Unsupported,
            _ => false,
        }
    }

    pub(crate) fn io(act: &'static str, path: &[u8], source: impl Into<io::Error>) -> Self {
        ImportError::Io {
            act,
            path: to_path_buf(path),
            source: source.into(),
        }
    }

    pub(crate) fn refused(path: &[u8], reason: &'static str) -> Self {
        ImportError::Refused {
            path: to_path_buf(path),
            reason,
        }
    }
}
