//! All that is compared of a directory of images.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use transship_checkpoint::beneath::{Links, read_regular};
use transship_checkpoint::criu_images::addresses::{self, Addresses};
use transship_checkpoint::criu_images::cgroups::{self, Cgroups};
use transship_checkpoint::criu_images::conntrack;
use transship_checkpoint::criu_images::inventory::{self, Inventory};
use transship_checkpoint::criu_images::ipcns;
use transship_checkpoint::criu_images::mounts::{self, Mount};
use transship_checkpoint::criu_images::named_files::{self, NamedFile, Remap};
use transship_checkpoint::criu_images::network_images;
use transship_checkpoint::criu_images::open_files::{self, PrivilegedFile};
use transship_checkpoint::criu_images::packet_rules;
use transship_checkpoint::criu_images::queued_files::{self, QueuedFiles};
use transship_checkpoint::criu_images::seccomp::{self, Filter};
use transship_checkpoint::criu_images::terminals::{self, Terminal};
use transship_checkpoint::criu_images::threads::{self, Process, TASK_ALIVE, TASK_STOPPED, Thread};
use transship_checkpoint::criu_images::user_namespace::{self, IdMappings};
use transship_checkpoint::criu_images::watches;
use transship_checkpoint::criu_images::{ImageError, c_strings, file_names, pipe_data};

/// The runtime's list of what the descriptors 0, 1 and 2 were.
const DESCRIPTORS_FILE: &str = "descriptors.json";
/// Most bytes of it: three paths.
const DESCRIPTORS_LIMIT: u64 = 16 << 10;
/// The runtime passes one descriptor of its own for each entry.
const MOST_DESCRIPTORS: usize = 3;

/// Most pairs that are compared, in about a second: those of 32768 threads.
const MOST_COMPARED: usize = 1 << 30;
/// Each mount is compared with all others for several reasons: 4096 are the most.
const MOUNTS_WEIGHT: usize = 64;

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
    /// Terminals that are opened by the name of one of these files.
    pub terminals: Vec<Terminal>,
    /// Those of the files that have no name.
    pub remaps: Vec<Remap>,
    /// Files that are watched, by their names.
    pub watched_files: Vec<NamedFile>,
    /// Files without a name that are watched, by device and inode.
    pub watched_inodes: Vec<(u32, u64)>,
    /// What no process has open.
    pub queued_files: QueuedFiles,
    /// The networks that CRIU does not make, by the numbers that processes have them by.
    pub external_networks: BTreeSet<u32>,
    /// Whether those that it makes have rules for packets.
    pub has_packet_rules: bool,
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
    /// So many things that they are no container's, and that to compare each with each takes for ever.
    #[error("the images have {count} {what}, which is more than a container has")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How many.
        count: usize,
    },
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
        c_strings::check(dir)?;
        conntrack::check(dir)?;
        network_images::check(dir)?;
        let watches = watches::watches(dir)?;
        let watched = watches.paths.into_iter().map(|path| NamedFile {
            path,
            ..NamedFile::default()
        });
        let mut privileged_files = open_files::privileged(dir)?;
        privileged_files.push(PrivilegedFile::Pipe(pipe_data::largest_pipe(dir)?));
        privileged_files.extend(ipcns::has_huge_segment(dir)?.then_some(PrivilegedFile::HugePages));
        let external_networks = network_images::external(dir)?;
        let (processes, threads) = (threads::processes(dir)?, threads::threads(dir)?);
        let tables = tables_of_the_living(&processes, &threads);
        let restored = Self {
            strangers,
            inventory: inventory::read(dir)?,
            processes,
            threads,
            mounts: mounts::mounts(dir)?,
            filters: seccomp::filters(dir)?,
            cgroups: cgroups::read(dir)?,
            id_mappings: user_namespace::mappings(dir)?,
            privileged_files,
            named_files: named_files::named_files(dir)?,
            terminals: terminals::terminals(dir)?,
            remaps: named_files::remaps(dir)?,
            watched_files: watched.collect(),
            watched_inodes: watches.inodes,
            queued_files: queued_files::queued_files(dir, &tables)?,
            has_packet_rules: packet_rules::has_rules(dir, &external_networks)?,
            external_networks,
            addresses: addresses::addresses(dir)?,
        };
        restored.check_counts()?;
        Ok(restored)
    }

    /// Of some each is compared with each of the same or another kind.
    fn check_counts(&self) -> Result<(), RestoredError> {
        let mounts = self.mounts.iter().flatten().count();
        let files = self.named_files.len() + self.watched_files.len();
        let ghosts = self.remaps.len() + self.queued_files.sent.len();
        let tops = self.cgroups.hierarchies.iter().map(|it| it.tops.len());
        let tops = tops.sum::<usize>() + self.cgroups.hierarchies.len();
        for (what, count, others) in [
            ("threads", self.threads.len(), self.threads.len()),
            ("mounts", mounts, mounts.saturating_mul(MOUNTS_WEIGHT)),
            ("files in its mounts", files, mounts),
            ("files and processes", files, self.processes.len()),
            ("terminals", self.terminals.len(), files + ghosts + mounts),
            ("deleted files", ghosts, files),
            ("watches", self.watched_inodes.len(), self.remaps.len()),
            ("cgroups", tops, tops),
            ("members of cgroups", self.cgroups.members.len(), tops),
        ] {
            if count.saturating_mul(others) > MOST_COMPARED {
                return Err(RestoredError::TooMany { what, count });
            }
        }
        Ok(())
    }
}

/// The tables of open files that CRIU gives to processes. One that a process without life has, too, may be given to
/// nobody: of those that share one the first opens the files.
fn tables_of_the_living(processes: &[Process], threads: &[Thread]) -> BTreeSet<u32> {
    let lives = |thread: &&Thread| {
        { thread.task.as_ref() }.is_some_and(|it| matches!(it.state, TASK_ALIVE | TASK_STOPPED))
    };
    let alive: BTreeSet<u32> = threads.iter().filter(lives).map(|it| it.tid).collect();
    let (mut living, mut others) = (BTreeSet::new(), BTreeSet::new());
    for process in processes {
        match alive.contains(&process.pid) {
            true => living.extend(process.files),
            false => others.extend(process.files),
        }
    }
    &living - &others
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_compared_with_each_other_is_bounded() {
        let with = |threads: usize, files: usize, ghosts: usize| {
            let restored = Restored {
                threads: vec![Thread::default(); threads],
                named_files: vec![NamedFile::default(); files],
                remaps: vec![Remap::default(); ghosts],
                ..Restored::default()
            };
            restored.check_counts()
        };
        assert!(with(32_768, 100_000, 1000).is_ok());
        for (threads, files, ghosts) in [(40_000, 0, 0), (0, 400_000, 4000)] {
            let found = with(threads, files, ghosts);
            assert!(
                matches!(found, Err(RestoredError::TooMany { .. })),
                "{found:?}"
            );
        }
    }
}
