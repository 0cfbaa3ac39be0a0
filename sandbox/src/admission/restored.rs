//! All that is compared of a directory of images.

use std::io;
use std::path::{Path, PathBuf};

use transship_checkpoint::beneath::{Links, read_regular};
use transship_checkpoint::criu_images::addresses::{self, Addresses};
use transship_checkpoint::criu_images::cgroups::{self, Cgroups};
use transship_checkpoint::criu_images::conntrack;
use transship_checkpoint::criu_images::inventory::{self, Inventory};
use transship_checkpoint::criu_images::mounts::{self, Mount};
use transship_checkpoint::criu_images::named_files::{self, NamedFile, Remap};
use transship_checkpoint::criu_images::open_files::{self, PrivilegedFile};
use transship_checkpoint::criu_images::seccomp::{self, Filter};
use transship_checkpoint::criu_images::threads::{self, Process, Thread};
use transship_checkpoint::criu_images::user_namespace::{self, IdMappings};
use transship_checkpoint::criu_images::{ImageError, file_names, pipe_data};

/// The runtime's list of what the descriptors 0, 1 and 2 were.
const DESCRIPTORS_FILE: &str = "descriptors.json";
/// Most bytes of it: three paths.
const DESCRIPTORS_LIMIT: u64 = 16 << 10;
/// The runtime passes one descriptor of its own for each entry.
const MOST_DESCRIPTORS: usize = 3;

/// What CRIU would restore.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Restored {
    /// Files that are no images.
    pub strangers: Vec<String>,
    /// What is said of the whole dump.
    pub inventory: Inventory,
    /// The processes.
    pub processes: Vec<Process>,
    /// All their threads.
    pub threads: Vec<Thread>,
    /// The mounts of each mount namespace.
    pub mounts: Vec<Vec<Mount>>,
    /// The seccomp filters.
    pub filters: Vec<Filter>,
    /// Cgroups.
    pub cgroups: Cgroups,
    /// Mappings of user namespaces.
    pub id_mappings: Vec<IdMappings>,
    /// Open files that take a capability to make.
    pub privileged_files: Vec<PrivilegedFile>,
    /// Files and sockets that are looked for by their names.
    pub named_files: Vec<NamedFile>,
    /// Those of the files that have no name.
    pub remaps: Vec<Remap>,
    /// Where the processes have memory.
    pub addresses: Vec<Addresses>,
}

/// Images that cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoredError {
    /// One of them.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The list of descriptors.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The list of descriptors says what none does.
    #[error("{path} is no list of at most three descriptors")]
    Descriptors {
        /// The file.
        path: PathBuf,
    },
}

impl Restored {
    /// Reads it, each file up to a limit.
    ///
    /// # Errors
    /// A file that cannot be read, or is damaged.
    pub fn read(dir: &Path) -> Result<Self, RestoredError> {
        let strangers = file_names::strangers(dir)?;
        if !strangers.is_empty() {
            // Nothing is opened that may be no regular file.
            return Ok(Self {
                strangers,
                ..Self::default()
            });
        }
        check_descriptors(dir)?;
        conntrack::check(dir)?;
        let mut privileged_files = open_files::privileged(dir)?;
        privileged_files.push(PrivilegedFile::Pipe(pipe_data::largest_pipe(dir)?));
        Ok(Self {
            strangers,
            inventory: inventory::read(dir)?,
            processes: threads::processes(dir)?,
            threads: threads::threads(dir)?,
            mounts: mounts::mounts(dir)?,
            filters: seccomp::filters(dir)?,
            cgroups: cgroups::read(dir)?,
            id_mappings: user_namespace::mappings(dir)?,
            privileged_files,
            named_files: named_files::named_files(dir)?,
            remaps: named_files::remaps(dir)?,
            addresses: addresses::addresses(dir)?,
        })
    }
}

fn check_descriptors(dir: &Path) -> Result<(), RestoredError> {
    let file = Path::new(DESCRIPTORS_FILE);
    let path = dir.join(file);
    let json = match read_regular(dir, file, Links::Refused, DESCRIPTORS_LIMIT) {
        Ok(json) => json,
        // crun writes none without descriptors.
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(RestoredError::Read { path, source }),
    };
    let list = serde_json::from_slice::<Vec<String>>(&json);
    if list.is_ok_and(|list| list.len() <= MOST_DESCRIPTORS) {
        return Ok(());
    }
    Err(RestoredError::Descriptors { path })
}
