//! The directories that the containers of a pod share, and where they are in a checkpoint.
//!
//! ```text
//! <checkpoint>/.shared/
//!     shm.tar                 content of /dev/shm
//!     emptydir-<volume>.tar   content of one emptyDir volume
//!     (each an OCI layer tar without whiteouts)
//! ```

/// Directory of the shared directories inside of a checkpoint. No container is called so.
pub const SHARED_DIR: &str = ".shared";

/// A directory that all containers of a pod can share.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum SharedDir {
    /// `/dev/shm` of the sandbox.
    Shm,
    /// An emptyDir volume, by its name in the pod.
    EmptyDir(String),
}

impl SharedDir {
    /// Name of its file in [`SHARED_DIR`].
    #[must_use]
    pub fn file_name(&self) -> String {
        match self {
            Self::Shm => "shm.tar".to_owned(),
            Self::EmptyDir(volume) => format!("emptydir-{volume}.tar"),
        }
    }
}
