//! What keeps a layer from being written or applied, and which gRPC code says so.

use std::path::PathBuf;

use containerd_client::tonic::{Code, Status};
use transship_containerd::ContainerdError;
use transship_layer::{ExportError, ImportError, LowerError};

use super::pack::PackError;
use super::plan::NotOurs;
use crate::error::one_line;

/// A call that was not done.
#[derive(Debug, thiserror::Error)]
pub(super) enum DiffError {
    /// Another differ can do it.
    #[error(transparent)]
    NotOurs(#[from] NotOurs),
    /// A request that can never succeed as it is.
    #[error("{0}")]
    Invalid(&'static str),
    /// The layer could not be made.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// The layer could not be applied.
    #[error("cannot apply the layer {digest}")]
    Import {
        /// Of the blob.
        digest: String,
        /// Why.
        source: ImportError,
    },
    /// A directory could not be looked at.
    #[error("cannot {act} {}", path.display())]
    Io {
        /// What was being done.
        act: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// containerd refused.
    #[error(transparent)]
    Call(#[from] ContainerdError),
    /// containerd's next differ could not apply the layer either.
    #[error(transparent)]
    NextDiffer(ContainerdError),
    /// Nobody waits for the answer any more, or the daemon stops.
    #[error("given up")]
    GivenUp,
    /// A thread of ours died.
    #[error("{0}")]
    Internal(String),
}

impl DiffError {
    /// containerd asks the next differ after `Unimplemented` only.
    pub(super) fn code(&self) -> Code {
        match self {
            // A mounted overlay shows what its upperdir alone does not. Of a container that goes on writing the walking
            // differ makes a layer, too, with what it finds.
            Self::NotOurs(_)
            | Self::Pack(PackError::Export(
                ExportError::Inexact { .. }
                | ExportError::Changed { .. }
                | ExportError::Lower(LowerError::Redirected { .. }),
            )) => Code::Unimplemented,
            Self::Invalid(_) => Code::InvalidArgument,
            Self::GivenUp => Code::Aborted,
            Self::Pack(PackError::Export(
                ExportError::ReservedName { .. } | ExportError::HeaderTooLarge { .. },
            )) => Code::FailedPrecondition,
            // As containerd's own differ answers when a layer is damaged or its target fails: its
            // errors are untyped there (`archive.Apply`), and gRPC makes `Unknown` of those.
            Self::Import { .. } => Code::Unknown,
            Self::NextDiffer(error) => error.code(),
            Self::Call(error) => match error.code() {
                // The blob is no concern of the next differ's either.
                Code::Unimplemented => Code::Internal,
                code => code,
            },
            Self::Pack(_) | Self::Io { .. } | Self::Internal(_) => Code::Internal,
        }
    }
}

impl From<DiffError> for Status {
    fn from(error: DiffError) -> Self {
        Self::new(error.code(), one_line(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_another_differ_can_do_is_left_to_it() {
        let inexact = ExportError::Inexact {
            path: "a".into(),
            reason: "metacopy=on",
        };
        let changed = ExportError::Changed { path: "b".into() };
        let pack = |error| DiffError::from(PackError::Export(error));
        for (error, code, message) in [
            (
                NotOurs::because("2 mounts").into(),
                Code::Unimplemented,
                "not for this differ: 2 mounts",
            ),
            (
                pack(inexact),
                Code::Unimplemented,
                "cannot export the layer: \"a\" cannot be exported exactly: metacopy=on",
            ),
            (
                pack(changed),
                Code::Unimplemented,
                "cannot export the layer: \"b\" changed while it was being exported; pause the \
                 container first",
            ),
            (
                ContainerdError {
                    act: "write".to_owned(),
                    source: Status::resource_exhausted("no space left on device").into(),
                }
                .into(),
                Code::ResourceExhausted,
                "cannot write: no space left on device",
            ),
            (
                DiffError::Import {
                    digest: "sha256:00".to_owned(),
                    source: ImportError::Read {
                        source: std::io::ErrorKind::UnexpectedEof.into(),
                    },
                },
                Code::Unknown,
                "cannot apply the layer sha256:00: cannot read the layer: unexpected end of file",
            ),
        ] {
            assert_eq!(error.code(), code);
            assert_eq!(Status::from(error).message(), message);
        }
    }
}
