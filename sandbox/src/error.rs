//! What can go wrong with the directories and namespaces of a sandbox.

use std::path::PathBuf;

use transship_checkpoint::criu_images::ImageError;
use transship_checkpoint::manifest::ManifestError;
use transship_checkpoint::store::StoreError;
use transship_path_error::PathError;

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
    /// Somebody else has restored it, and nobody is to do so a second time.
    #[error(
        "the checkpoint {checkpoint:?} has been restored on this node by another pod or container, and it was to \
         be restored once (dev.transship/once)"
    )]
    Spent {
        /// Name of the checkpoint.
        checkpoint: String,
    },
    /// Somebody in the sandbox may use what the checkpoint has, too.
    #[error(
        "the sandbox has a System V object with the id or key of one of the checkpoint ({kind} {id}, key {key:#x}), and \
         another container of it may use it: restore into a new sandbox, or remove it there (ipcs, ipcrm)"
    )]
    IpcInUse {
        /// What it is.
        kind: &'static str,
        /// Its id.
        id: u32,
        /// Its key.
        key: u32,
    },
    /// A file in the staged restore that this program has not written.
    #[error("{path} is damaged: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// What was to stay in memory could come onto a disk.
    #[error(
        "this kernel cannot keep a tmpfs out of its swap (noswap, Linux 6.4), so that memory would come onto a disk \
         in clear"
    )]
    Swapped,
    /// The directory of checkpoints.
    #[error(transparent)]
    Store(#[from] Box<StoreError>),
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] PathError),
}
