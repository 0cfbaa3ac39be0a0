//! What can go wrong with the directories and namespaces of a sandbox.

use std::io;
use std::path::{Path, PathBuf};

use transship_checkpoint::criu_images::ImageError;
use transship_checkpoint::manifest::ManifestError;

/// A failure around a sandbox.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SandboxError {
    /// A name that could lead elsewhere.
    #[error(transparent)]
    Name(#[from] ManifestError),
    /// An image of CRIU that cannot be edited.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The same container is being restored by another process.
    #[error("{path} is being restored by another process")]
    Busy {
        /// The staged restore.
        path: PathBuf,
    },
    /// Two containers of a pod want the same one.
    #[error(
        "the container {container:?} of the checkpoint {checkpoint:?} is restored as {owner:?} of \
         this pod, so {asker:?} cannot be it, too"
    )]
    Twice {
        /// Name of the checkpoint.
        checkpoint: String,
        /// The container in it.
        container: String,
        /// Who has it.
        owner: String,
        /// Who asks for it.
        asker: String,
    },
    /// A file in the staged restore that this program has not written.
    #[error("{path} is damaged: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A system call failed.
    #[error("cannot {act} {path}")]
    Io {
        /// The act.
        act: &'static str,
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

pub(crate) trait SandboxContext<T> {
    fn staging(self, act: &'static str, path: impl AsRef<Path>) -> Result<T, SandboxError>;
}

impl<T, E: Into<io::Error>> SandboxContext<T> for Result<T, E> {
    fn staging(self, act: &'static str, path: impl AsRef<Path>) -> Result<T, SandboxError> {
        self.map_err(|error| SandboxError::Io {
            act,
            path: path.as_ref().to_path_buf(),
            source: error.into(),
        })
    }
}
