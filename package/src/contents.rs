//! What is in a checkpoint, for people and programs. docs/format.md has the JSON.
//!
//! ```text
//!  manifest ──────────────────────────────┐
//!  checkpoint/*.img  (criu_images)        ├─> Contents
//!  spec.dump         (requirements)       │
//!  rootfs-diff.tar   (layer_changes) ─────┘
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use serde::Serialize;
use transship_checkpoint::beneath::{Links, open_regular, read_regular};
use transship_checkpoint::criu_images::descriptors::{self, Descriptor, Open};
use transship_checkpoint::criu_images::processes::{self, Mapping, Process};
use transship_checkpoint::criu_images::{dump_stats, mounts};
use transship_checkpoint::manifest::{
    Container, DUMP_STATS_FILE, IMAGES_DIR, Manifest, ROOTFS_DIFF_FILE, SPEC_FILE,
};
use transship_checkpoint::store::Checkpoint;
use transship_path_error::During as _;

use crate::error::PackageError;
use crate::layer_changes::{Digests, LayerChanges, layer_changes};
use crate::requirements::{Requirement, requirements};

pub use crate::socket::Socket;

/// Longest spec that is read, in bytes.
const SPEC_LIMIT: u64 = 16 << 20;
/// The version of what programs get.
const FORMAT: u32 = 1;
/// A dump that does not say how long a page is comes from a machine with this one.
pub(crate) const USUAL_PAGE: u64 = 4096;

/// What is in a checkpoint.
#[derive(Debug, Clone, Serialize)]
pub struct Contents {
    /// The version of this format.
    pub format: u32,
    /// Bytes of all files.
    pub bytes: u64,
    /// `transship.json`.
    pub manifest: Manifest,
    /// What is in each container.
    pub containers: Vec<ContainerContents>,
}

/// What is in one container.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ContainerContents {
    /// Its name.
    pub name: String,
    /// Bytes of its pages.
    pub memory_bytes: u64,
    /// Bytes of CRIU's other images.
    pub image_bytes: u64,
    /// Bytes of the layer with its files.
    pub layer_bytes: u64,
    /// How long the dump took; none where CRIU's figures are not there.
    pub dump: Option<DumpTimes>,
    /// Its processes, parents before their children.
    pub processes: Vec<ProcessContents>,
    /// What memory is mapped for, the largest first.
    pub mappings: Vec<MappingContents>,
    /// Files that are open.
    pub files: Vec<OpenFile>,
    /// Sockets.
    pub sockets: Vec<Socket>,
    /// Other things that are open, with how many there are.
    pub other: BTreeMap<&'static str, usize>,
    /// Its mounts.
    pub mounts: Vec<MountContents>,
    /// What must be there where it is restored.
    pub requirements: Vec<Requirement>,
    /// Its changed files.
    pub changes: LayerChanges,
}

/// How long the dump took, in microseconds, as CRIU measured it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct DumpTimes {
    /// Until all tasks stood still.
    pub freezing_us: u32,
    /// For which they did.
    pub frozen_us: u32,
    /// For finding and taking the memory.
    pub memory_dump_us: u32,
    /// For writing it.
    pub memory_write_us: u32,
    /// Pages that were looked at.
    pub pages_scanned: u64,
    /// Pages that are in the dump.
    pub pages_written: u64,
}

/// A process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ProcessContents {
    /// Its id in the container.
    pub pid: u32,
    /// Its parent's; 0 for the first one.
    pub parent: u32,
    /// Name of the program.
    pub name: String,
    /// Its command line.
    pub arguments: Vec<String>,
    /// The file that it executes.
    pub executable: Option<String>,
    /// `running`, `stopped` or `zombie`.
    pub state: &'static str,
    /// User id.
    pub uid: u32,
    /// How many threads.
    pub threads: usize,
    /// Bytes of its memory in the dump.
    pub memory_bytes: u64,
}

/// What memory is mapped for, of one process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MappingContents {
    /// The process.
    pub pid: u32,
    /// A path, `[heap]`, `[stack]`, `[anonymous]`, ...
    pub what: String,
    /// Where the first of them begins.
    pub start: u64,
    /// Bytes of addresses.
    pub bytes: u64,
    /// Bytes of them in the dump.
    pub memory_bytes: u64,
    /// As in `/proc/PID/maps`.
    pub rights: String,
}

/// A file that is open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OpenFile {
    /// Its path in the container.
    pub path: String,
    /// Who has it open: process and descriptor.
    pub by: Vec<(u32, u32)>,
}

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MountContents {
    /// Where, in the container.
    pub destination: String,
    /// Type of the file system.
    pub kind: String,
    /// Whether it comes from outside of the container.
    pub external: bool,
    /// Whether nothing can be written there.
    pub read_only: bool,
}

impl Contents {
    /// Looks into a checkpoint.
    ///
    /// # Errors
    /// A part of it cannot be read.
    pub fn of(checkpoint: &Checkpoint, digests: Digests) -> Result<Self, PackageError> {
        let manifest = &checkpoint.manifest;
        let containers = manifest.containers.iter().map(|container| {
            // Whoever writes into a store puts there what he likes.
            checkpoint.check_lengths(container)?;
            let dir = checkpoint.container_dir(container);
            let path = dir.join(ROOTFS_DIFF_FILE);
            let layer = open_regular(&dir, Path::new(ROOTFS_DIFF_FILE), Links::Refused);
            let changes = match layer {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    LayerChanges::default()
                }
                file => layer_changes(file.during("open", &path)?, digests).map_err(|source| {
                    PackageError::Layer {
                        container: container.name.clone(),
                        source,
                    }
                })?,
            };
            ContainerContents::of(manifest, container, &dir, changes)
        });
        let containers = containers.collect::<Result<_, _>>()?;
        Ok(Self::from_parts(manifest, containers))
    }

    pub(crate) fn from_parts(manifest: &Manifest, containers: Vec<ContainerContents>) -> Self {
        Self {
            format: FORMAT,
            bytes: manifest.size(),
            containers,
            manifest: manifest.clone(),
        }
    }
}

impl ContainerContents {
    /// Looks into one container, whose files lie in `dir`; `changes` is what its layer changes.
    pub(crate) fn of(
        manifest: &Manifest,
        container: &Container,
        dir: &Path,
        changes: LayerChanges,
    ) -> Result<Self, PackageError> {
        let images = dir.join(IMAGES_DIR);
        let page = manifest.source.page_size.unwrap_or(USUAL_PAGE);
        let size = |is: &dyn Fn(&str) -> bool| -> u64 {
            let files = container.files.iter().filter(|file| is(&file.path));
            files.fold(0, |sum: u64, file| sum.saturating_add(file.size))
        };
        let is_image = |path: &str| path.starts_with("checkpoint/");
        let is_pages = |path: &str| path.starts_with("checkpoint/pages-");
        let all = processes::processes(&images, page)?;
        let open = descriptors::descriptors(&images)?;
        let (files, sockets, other) = by_kind(&open);
        let stats = dir.join(DUMP_STATS_FILE);
        let dump = match stats.symlink_metadata() {
            Ok(_) => dump_stats::read(&stats)?,
            Err(_) => None,
        };
        let spec = read_regular(dir, Path::new(SPEC_FILE), Links::Refused, SPEC_LIMIT);
        let spec = spec.during("read", dir.join(SPEC_FILE))?;
        Ok(Self {
            name: container.name.clone(),
            memory_bytes: size(&is_pages),
            image_bytes: size(&|path| is_image(path) && !is_pages(path)),
            layer_bytes: size(&|path| path == ROOTFS_DIFF_FILE),
            dump: dump.map(|it| DumpTimes {
                freezing_us: it.freezing,
                frozen_us: it.frozen,
                memory_dump_us: it.memory_dump,
                memory_write_us: it.memory_write,
                pages_scanned: it.pages_scanned,
                pages_written: it.pages_written,
            }),
            mappings: largest_mappings(&all),
            processes: all.into_iter().map(ProcessContents::from).collect(),
            requirements: requirements(manifest, container, &spec, &sockets),
            files,
            sockets,
            other,
            mounts: mounts_of(&images)?,
            changes,
        })
    }
}

impl From<Process> for ProcessContents {
    fn from(process: Process) -> Self {
        Self {
            pid: process.pid,
            parent: process.parent,
            name: process.name,
            arguments: process.arguments,
            executable: process.executable,
            state: process.state,
            uid: process.uid,
            threads: process.threads,
            memory_bytes: process.memory,
        }
    }
}

/// What is mapped for one thing by one process, together; the largest first.
fn largest_mappings(processes: &[Process]) -> Vec<MappingContents> {
    let mut all: BTreeMap<(u32, String), MappingContents> = BTreeMap::new();
    let each = processes.iter().flat_map(|process| {
        let pid = process.pid;
        process.mappings.iter().map(move |it| (pid, it))
    });
    for (
        pid,
        Mapping {
            what,
            start,
            length,
            memory,
            rights,
        },
    ) in each
    {
        let entry = all
            .entry((pid, what.clone()))
            .or_insert_with(|| MappingContents {
                pid,
                what: what.clone(),
                start: *start,
                bytes: 0,
                memory_bytes: 0,
                rights: rights.clone(),
            });
        entry.bytes = entry.bytes.saturating_add(*length);
        entry.memory_bytes = entry.memory_bytes.saturating_add(*memory);
    }
    let mut all: Vec<_> = all.into_values().collect();
    all.sort_by_key(|it| std::cmp::Reverse((it.memory_bytes, it.bytes)));
    all
}

type ByKind = (Vec<OpenFile>, Vec<Socket>, BTreeMap<&'static str, usize>);

fn by_kind(open: &[Descriptor]) -> ByKind {
    let mut files: BTreeMap<String, Vec<(u32, u32)>> = BTreeMap::new();
    let (mut sockets, mut known): (Vec<Socket>, HashMap<_, usize>) = Default::default();
    let mut other = BTreeMap::new();
    for descriptor in open {
        let by = (descriptor.pid, descriptor.fd);
        let socket = match &descriptor.open {
            Open::File { path } => {
                files.entry(path.clone()).or_default().push(by);
                continue;
            }
            Open::Other(kind) => {
                *other.entry(*kind).or_default() += 1;
                continue;
            }
            Open::Inet(socket) => Socket {
                protocol: socket.protocol,
                state: socket.state,
                local: socket.local.to_string(),
                peer: socket.peer.map(|peer| peer.to_string()),
                by: vec![by],
            },
            Open::Unix(socket) => Socket {
                protocol: "unix",
                state: socket.state,
                local: socket.name.clone().unwrap_or_default(),
                peer: None,
                by: vec![by],
            },
        };
        let (local, peer) = (socket.local.clone(), socket.peer.clone());
        let at = *known
            .entry((socket.protocol, socket.state, local, peer))
            .or_insert(sockets.len());
        match sockets.get_mut(at) {
            Some(known) => known.by.push(by),
            None => sockets.push(socket),
        }
    }
    let files = files.into_iter().map(|(path, by)| OpenFile { path, by });
    (files.collect(), sockets, other)
}

fn mounts_of(images: &Path) -> Result<Vec<MountContents>, PackageError> {
    let mut seen = BTreeSet::new();
    let all = mounts::mounts(images)?.into_iter().flatten();
    let all = all.filter(|it| seen.insert((it.destination.clone(), it.id)));
    let shown = all.map(|it| MountContents {
        kind: match it.fs_type {
            mounts::FsType::Unsupported if it.external.is_some() => "bind".to_owned(),
            mounts::FsType::Unsupported => "root".to_owned(),
            mounts::FsType::Other(number) => format!("type {number}"),
            known => format!("{known:?}").to_lowercase(),
        },
        external: it.external.is_some(),
        read_only: (it.flags | it.fs_flags) & mounts::flags::READ_ONLY != 0,
        destination: it.destination,
    });
    let mut shown: Vec<MountContents> = shown.collect();
    // What comes from the node says most.
    shown.sort_by_key(|it| (it.kind != "bind", it.destination.clone()));
    Ok(shown)
}

#[cfg(test)]
mod tests {
    use transship_checkpoint::criu_images::descriptors::UnixSocket;

    use super::*;

    #[test]
    fn each_of_very_many_sockets_is_there_once() {
        let of = |pid, fd: u32| Descriptor {
            pid,
            fd,
            open: Open::Unix(UnixSocket {
                state: "listening",
                name: Some(fd.to_string()),
            }),
        };
        let open: Vec<_> = (0..200_000).flat_map(|fd| [of(1, fd), of(2, fd)]).collect();
        let (_, sockets, _) = by_kind(&open);
        assert_eq!(sockets.len(), 200_000);
        assert!(sockets.iter().all(|it| it.by.len() == 2));
    }
}
