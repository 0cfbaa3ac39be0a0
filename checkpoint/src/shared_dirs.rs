//! The directories that the containers of a pod share, and where they are in a checkpoint.
//!
//! ```text
//! <checkpoint>/.shared/
//!     shm.tar                 content of /dev/shm
//!     emptydir-<volume>.tar   content of one emptyDir volume
//!     (each an OCI layer tar without whiteouts)
//! <checkpoint>/<container>/
//!     shared-links.json       [{ "link": "link_remap.3", "name": "sem.jobs" }]
//! ```

use serde::{Deserialize, Serialize};

/// Directory of the shared directories inside of a checkpoint. No container is called so.
pub const SHARED_DIR: &str = ".shared";
/// In a migration: contents of files that come before the layer of the container, `0`, `1`, ...; see
/// `transship_layer::send_contents`. They get their places with the layer, and are in no checkpoint. Those of an emptyDir
/// are in a directory with its name in that of [`SHARED_DIR`].
pub const CONTENTS_DIR: &str = "contents";

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

    /// Directory in [`SHARED_DIR`] of the contents of its files that come before the freeze; none of memory.
    #[must_use]
    pub fn contents_dir(&self) -> Option<String> {
        match self {
            Self::Shm => None,
            Self::EmptyDir(volume) => Some(format!("{CONTENTS_DIR}/{volume}")),
        }
    }
}

/// Links that CRIU has made for a dump (`link-remap`), in a container's directory of the checkpoint: JSON, a list
/// of [`DumpLink`].
pub const LINKS_FILE: &str = "shared-links.json";
/// Largest such file that is read, in bytes.
pub const LINKS_LIMIT: u64 = 1 << 20;
/// What CRIU calls its links; a number follows.
pub const LINK_PREFIX: &str = "link_remap.";

/// A name that CRIU gave a file of `/dev/shm` for the time of a dump, because the one by which it was opened is
/// gone. The images know the file by it, so it must be there at the restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpLink {
    /// CRIU's name, in `/dev/shm`.
    pub link: String,
    /// Another name of the same file there.
    pub name: String,
}

impl DumpLink {
    /// Whether both are plain names, and the first is one of CRIU's.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        let plain = |name: &str| !name.contains('/') && !matches!(name, "" | "." | "..");
        self.link.starts_with(LINK_PREFIX) && plain(&self.link) && plain(&self.name)
    }
}
