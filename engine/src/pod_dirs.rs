//! The directories that the containers of a pod share, on the source: /dev/shm and emptyDirs.
//!
//! ```text
//!  find: specs --> which there are (a container with a part of one only is refused)
//!  check: is anything open in one that is left behind? (`transship check --pod` tells the same of each container)
//!  export, while all containers stand still: each --> <draft>/.shared/<file>
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::statfs::{HUGETLBFS_MAGIC, statfs};
use transship_checkpoint::manifest::{Shared, Volume};
use transship_checkpoint::shared_dirs::{SHARED_DIR, SharedDir};
use transship_checkpoint::spec::Spec;
use transship_containerd::Containerd;
use transship_layer::{
    ExportOptions, KnownContents, OverlayStack, export_upperdir_to_file, mounted_below,
    upperdir_usage,
};
use transship_sandbox::admission::resolve_within;
use transship_sandbox::read_proc;
use transship_sandbox::shared_dirs::{SharedMount, shared_mounts};

use crate::conditions::{Found, paths_of_inodes, watched_inodes};
use crate::error::{Context, Error, Result};
use crate::source::SourceContainer;

/// What is to be exported: each directory with its path on the node and the containers that have it.
#[derive(Debug, Clone, Default)]
pub struct SharedDirs(BTreeMap<SharedDir, (PathBuf, Vec<String>)>);

/// Finds the directories that these containers of the sandbox share; emptyDirs only if asked for.
pub fn find(containers: &[SourceContainer], sandbox: &str, empty_dirs: bool) -> Result<SharedDirs> {
    let mut dirs: BTreeMap<_, (PathBuf, Vec<String>)> = BTreeMap::new();
    for source in containers {
        let name = &source.container.name;
        let spec = Spec::parse(&source.spec)
            .with_context(|| format!("the spec of {name:?} is no OCI runtime spec"))?;
        for mount in shared_mounts(&spec, sandbox) {
            if let SharedDir::EmptyDir(volume) = &mount.dir {
                if !empty_dirs {
                    continue;
                }
                let hinders = match mount.part {
                    true => Some("sub-path"),
                    false if has_huge_files(&mount.source) => Some("huge-volume"),
                    false => has_mounts(&mount.source).then_some("mounted-volume"),
                };
                if let Some(condition) = hinders {
                    let found = Found::new(condition, [volume.clone()]);
                    return Err(Error::refused(format!("{name:?}: {}", found.line())));
                }
            }
            let (_, users) = dirs.entry(mount.dir).or_insert((mount.source, Vec::new()));
            if !users.contains(name) {
                users.push(name.clone());
            }
        }
    }
    Ok(SharedDirs(dirs))
}

/// Refuses containers that have something open in an emptyDir which is left behind: the new pod has an empty
/// one, and CRIU would not find it there.
///
/// # Errors
/// [`crate::Kind::Refused`] with the first file of each container.
pub async fn check_left_behind(
    node: &Containerd,
    containers: &[SourceContainer],
    sandbox: &str,
    exported: &SharedDirs,
) -> Result<()> {
    let mut reasons = Vec::new();
    for source in containers {
        if let Some((path, volume)) = open_in_left(node, source, sandbox, exported).await? {
            reasons.push(format!(
                "{} has {path:?} open, which is in the emptyDir {volume:?}",
                source.called
            ));
        }
    }
    if reasons.is_empty() {
        return Ok(());
    }
    let reasons = reasons.join("; ");
    let message = format!("the pod cannot be restored from a checkpoint without it: {reasons}");
    Err(Error::refused(message).hint("--volumes emptydir takes the content of emptyDirs along"))
}

/// What keeps a container of a pod from being restored because of its volumes.
///
/// # Errors
/// The answer of containerd, or the spec is none.
pub async fn conditions(
    node: &Containerd,
    source: &SourceContainer,
    sandbox: &str,
    empty_dirs: bool,
) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    let mut exported = SharedDirs::default();
    let (mut parts, mut huge, mut mounted) = (Vec::new(), Vec::new(), Vec::new());
    let spec = spec_of(source)?;
    for mount in shared_mounts(&spec, sandbox)
        .into_iter()
        .filter(|_| empty_dirs)
    {
        match mount.dir {
            SharedDir::EmptyDir(volume) if mount.part => parts.push(volume),
            SharedDir::EmptyDir(volume) if has_huge_files(&mount.source) => huge.push(volume),
            SharedDir::EmptyDir(volume) if has_mounts(&mount.source) => mounted.push(volume),
            dir => drop(exported.0.insert(dir, (mount.source, Vec::new()))),
        }
    }
    if !huge.is_empty() {
        found.push(Found::new("huge-volume", huge));
    } else if !parts.is_empty() {
        found.push(Found::new("sub-path", parts));
    } else if !mounted.is_empty() {
        found.push(Found::new("mounted-volume", mounted));
    } else if let Some((path, volume)) = open_in_left(node, source, sandbox, &exported).await? {
        let what = format!(
            "{} in {volume:?}",
            path.display().to_string().escape_debug()
        );
        found.push(Found::new("left-in-volume", [what]));
    }
    Ok(found)
}

/// Whether something is mounted below it; of what is not there nothing is said here.
fn has_mounts(dir: &Path) -> bool {
    mounted_below(dir).is_ok_and(|mounted| !mounted.is_empty())
}

fn spec_of(source: &SourceContainer) -> Result<Spec> {
    Spec::parse(&source.spec)
        .with_context(|| format!("the spec of {:?} is no OCI runtime spec", source.id()))
}

/// A file that a container has open in an emptyDir that is not exported, and the name of that.
async fn open_in_left(
    node: &Containerd,
    source: &SourceContainer,
    sandbox: &str,
    exported: &SharedDirs,
) -> Result<Option<(PathBuf, String)>> {
    let spec = spec_of(source)?;
    let left: Vec<_> = { shared_mounts(&spec, sandbox).into_iter() }
        .filter(|mount| mount.dir != SharedDir::Shm && !exported.contains(&mount.dir))
        .collect();
    if left.is_empty() {
        return Ok(None);
    }
    let places: Vec<PathBuf> = spec.mount_destinations();
    let pids = node.pids(source.id()).await?;
    let sockets = bound_sockets(source.pid);
    let found = pids.iter().find_map(|pid| {
        open_below(*pid, &sockets, &places, &|place| {
            left.iter().find(|it| it.destination == place).cloned()
        })
    });
    let found = found.or_else(|| watched_below(&pids, &left));
    Ok(found.and_then(|(path, mount)| match mount.dir {
        SharedDir::EmptyDir(volume) => Some((path, volume)),
        SharedDir::Shm => None,
    }))
}

/// Whether there are files that only memory of huge pages can have.
fn has_huge_files(dir: &Path) -> bool {
    let is_huge = statfs(dir).is_ok_and(|it| it.filesystem_type() == HUGETLBFS_MAGIC);
    is_huge && fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some())
}

/// Something that is watched in one of these directories. The directory itself is there again.
fn watched_below(pids: &[u32], left: &[SharedMount]) -> Option<(PathBuf, SharedMount)> {
    left.iter().find_map(|mount| {
        let device = fs::metadata(&mount.source).ok()?.dev();
        let inodes: BTreeSet<u64> = { pids.iter() }
            .flat_map(|pid| watched_inodes(*pid, device))
            .collect();
        let paths = paths_of_inodes(&mount.source, device, &inodes);
        let mut below = paths.values().filter(|path| *path != "/");
        let path = mount
            .destination
            .join(below.next()?.trim_start_matches('/'));
        Some((path, mount.clone()))
    })
}

/// The path that each unix socket of the network of a process is bound to.
fn bound_sockets(pid: u32) -> BTreeMap<String, PathBuf> {
    let sockets = read_proc(format!("/proc/{pid}/net/unix")).unwrap_or_default();
    // "0000000000000000: 00000002 00000000 00010000 0001 01 12345 /run/x.sock"
    let bound = sockets.lines().skip(1).filter_map(|line| {
        let (numbers, path) = line.split_at(line.find('/')?);
        let inode = numbers.split_whitespace().nth(6)?;
        Some((format!("socket:[{inode}]"), PathBuf::from(path)))
    });
    bound.collect()
}

/// Something that a process has open, mapped, as its working directory or as the name of one of `sockets`, in a mount that
/// `wanted` knows;
/// `places` are where the container has mounts.
fn open_below<M>(
    pid: u32,
    sockets: &BTreeMap<String, PathBuf>,
    places: &[PathBuf],
    wanted: &dyn Fn(&Path) -> Option<M>,
) -> Option<(PathBuf, M)> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let root = proc.join("root");
    // As the kernel shows it: without symbolic links.
    let resolved: Vec<_> = { places.iter() }
        .map(|place| (resolve_within(&root, place), place))
        .collect();
    let fds = fs::read_dir(proc.join("fd"))
        .into_iter()
        .flatten()
        .flatten();
    let links = fds.map(|fd| fd.path()).chain([proc.join("cwd")]);
    let open = links.filter_map(|link| {
        let target = fs::read_link(link).ok()?;
        let bound = target.to_str().and_then(|target| sockets.get(target));
        Some(bound.map_or((target.clone(), false), |path| (path.clone(), true)))
    });
    let maps = read_proc(proc.join("maps")).unwrap_or_default();
    let mapped = maps
        .lines()
        .filter_map(|line| line.find('/').map(|at| (line[at..].into(), false)));
    open.chain(mapped)
        .find_map(|(path, is_socket): (PathBuf, bool)| {
            let holds = |(place, _): &&(PathBuf, &PathBuf)| path.starts_with(place);
            let holder = resolved.iter().filter(holds);
            let (place, name) = holder.max_by_key(|(place, _)| place.components().count())?;
            // The volume itself is there again, and files without a name come along by themselves.
            let is_removed = || {
                let is_name = || {
                    root.join(path.strip_prefix("/").unwrap_or(&path))
                        .symlink_metadata()
                };
                path.to_string_lossy().ends_with(" (deleted)") && is_name().is_err()
            };
            // CRIU binds it again, where there is a directory for it.
            let is_bound_again = is_socket && path.parent() == Some(place);
            if path == *place || is_bound_again || is_removed() {
                return None;
            }
            Some((path, wanted(name)?))
        })
}

impl SharedDirs {
    /// Whether the content of a directory comes along.
    pub fn contains(&self, dir: &SharedDir) -> bool {
        self.0.contains_key(dir)
    }

    /// Each with its path on the node.
    pub fn paths(&self) -> impl Iterator<Item = (&SharedDir, &Path)> {
        self.0.iter().map(|(dir, (path, _))| (dir, &**path))
    }

    /// Bytes of the files in them, roughly: what cannot be counted while it is in use is left out.
    pub fn estimate(&self) -> u64 {
        let sizes = { self.paths() }.map(|(_, path)| upperdir_usage(path).map_or(0, |it| it.size));
        sizes.sum()
    }

    /// Exports all into the draft, but for files whose contents are known, and says what is there now. Nothing may change
    /// meanwhile.
    pub fn export(
        &self,
        draft: &Path,
        known: &BTreeMap<SharedDir, Arc<KnownContents>>,
    ) -> Result<Shared> {
        let mut shared = Shared::default();
        let to = draft.join(SHARED_DIR);
        for (dir, (path, containers)) in &self.0 {
            let containers = containers.clone();
            match dir {
                SharedDir::Shm => {
                    let mut entries = fs::read_dir(path)
                        .with_context(|| format!("cannot list {}", path.display()))?;
                    if entries.next().is_none() {
                        // As it is in any new sandbox.
                        continue;
                    }
                    shared.shm = containers;
                }
                SharedDir::EmptyDir(volume) => shared.volumes.push(Volume {
                    name: volume.clone(),
                    containers,
                }),
            }
            fs::create_dir_all(&to).with_context(|| format!("cannot make {}", to.display()))?;
            export(path, &to.join(dir.file_name()), known.get(dir).cloned())?;
        }
        Ok(shared)
    }
}

fn export(dir: &Path, to: &Path, known: Option<Arc<KnownContents>>) -> Result<()> {
    let file = File::create_new(to).with_context(|| format!("cannot make {}", to.display()))?;
    let stack = OverlayStack::new(dir, []);
    // A container that kubelet starts meanwhile may have it, too.
    let options = ExportOptions {
        known,
        in_use: true,
        ..ExportOptions::default()
    };
    let stats = export_upperdir_to_file(&stack, &file, &options)
        .with_context(|| format!("cannot export {}", dir.display()))?;
    // A socket leaves a whiteout without meaning; CRIU makes those again that somebody has bound.
    if stats.whiteouts > stats.sockets || stats.opaque_directories > 0 || stats.lost_xattrs > 0 {
        let message = format!(
            "{} holds the layers of another container engine, whose overlay marks cannot come along",
            dir.display()
        );
        return Err(Error::failed(message));
    }
    Ok(())
}
