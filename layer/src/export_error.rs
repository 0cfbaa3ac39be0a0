//! Why an upperdir cannot be exported.

use std::io;
use std::path::PathBuf;

use crate::lower_view::LowerError;
use crate::path_bytes::to_path_buf;

/// A failed export. What was written so far is no layer and must be thrown away.
///
/// Paths are relative to the root of the layer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// A system call on the upperdir or a lowerdir failed.
    #[error("cannot {act} {path:?}")]
    Io {
        /// What was being done.
        act: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The place that the tar goes to failed.
    #[error("cannot write the layer")]
    Write {
        /// What the writer said.
        source: io::Error,
    },
    /// The tree was written to during the export.
    #[error("{path:?} changed while it was being exported; pause the container first")]
    Changed {
        /// The file or directory that is not what it was.
        path: PathBuf,
    },
    /// The name means a deletion in an OCI layer; a checkpoint's can have it.
    #[error(
        "{path:?} cannot be part of an OCI layer: names that begin with \".wh.\" mean deletions there"
    )]
    ReservedName {
        /// The file of that name.
        path: PathBuf,
    },
    /// The overlay was mounted in a way that leaves something that a layer cannot say.
    #[error("{path:?} cannot be exported exactly: {reason}")]
    Inexact {
        /// The file in question.
        path: PathBuf,
        /// What is in the way, and what would help.
        reason: &'static str,
    },
    /// Name and attributes together are more than readers of layers accept.
    #[error("the tar header of {path:?} needs {bytes} bytes, readers accept {limit}")]
    HeaderTooLarge {
        /// The file in question.
        path: PathBuf,
        /// Size of its PAX header.
        bytes: usize,
        /// The limit that containerd, Docker and podman have in common.
        limit: usize,
    },
    /// The layers below could not be asked.
    #[error("cannot compare with the lower layers")]
    Lower(#[from] LowerError),
}

impl ExportError {
    pub(crate) fn io(act: &'static str, path: &[u8], source: impl Into<io::Error>) -> Self {
        ExportError::Io {
            act,
            path: to_path_buf(path),
            source: source.into(),
        }
    }

    pub(crate) fn changed(path: &[u8]) -> Self {
        ExportError::Changed {
            path: to_path_buf(path),
        }
    }

    pub(crate) fn reserved_name(path: &[u8]) -> Self {
        ExportError::ReservedName {
            path: to_path_buf(path),
        }
    }

    pub(crate) fn inexact(path: &[u8], reason: &'static str) -> Self {
        ExportError::Inexact {
            path: to_path_buf(path),
            reason,
        }
    }
}
