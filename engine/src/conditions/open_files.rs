//! Open and mapped files: kinds that CRIU does not know, and files that have lost their names.
//!
//! ```text
//!  /proc/PID/fd/N     -> anon_inode:[io_uring]    a kind
//!  /proc/PID/fd/N     -> /data/x (deleted)        no link left: a ghost file, up to a limit
//!                        the same, on a read-only mount    cannot be made again, nor can a directory (cwd, root)
//!  /proc/PID/maps     /dev/shm/sem.y (deleted)    links left: found by another name (link-remap)
//! ```
//!
//! A ghost file is kept in the images. For one that has another name CRIU makes a link beside it for
//! the time of the dump; it comes along where the files are exported within that time (the upperdir),
//! dumped by CRIU (a tmpfs of the container) or the link is written down ([`crate::dump_links`]: `/dev/shm` of a
//! pod), and not on another bind mount.

use std::cell::LazyCell;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{FsType, statfs};
use nix::sys::statvfs::{FsFlags, statvfs};
use procfs::process::{FDTarget, MMapPath};
use transship_checkpoint::cri_names::annotations::SANDBOX_ID;
use transship_checkpoint::shared_dirs::SharedDir;
use transship_checkpoint::spec::Spec;
use transship_sandbox::privileged_files::{Opened, Opener, OwnProcesses, lacking_to_open};
use transship_sandbox::shared_dirs::shared_mounts;

use super::processes::{Processes, Seen};
use super::{Hit, Subject};
use crate::process_files;
use crate::version::Version;

const DELETED: &str = " (deleted)";
/// CRIU's own `ghost-limit`.
const GHOST_LIMIT: u64 = 1 << 20;
/// More mappings of one process than this are not looked at.
const MAPPINGS: usize = 1 << 20;
/// Anonymous inodes that CRIU dumps.
const KNOWN_KINDS: [&str; 7] = [
    "[eventfd]",
    "[eventpoll]",
    "inotify",
    "[fanotify]",
    "[signalfd]",
    "[timerfd]",
    "[pidfd]",
];
const PIDFDS_FROM: Version = Version(4, 1, 0);
/// What memfd_secret(2) is called, which looks like a removed file that has another name.
const SECRET_MEMORY: &str = "/secretmem";
/// From `linux/magic.h`; nix does not have it.
const SECRETMEM_MAGIC: FsType = FsType(0x5345_434d);
/// Names of memory that has none, and of which CRIU knows better.
const MEMORY: [&str; 5] = ["/memfd:", "/SYSV", "/dev/zero", "/anon_hugepage", "/[aio]"];

pub(super) fn hits(subject: &Subject, processes: &Processes) -> Vec<Hit> {
    let mut hits = Vec::new();
    // Asked of CRIU once, and only where there is one.
    let knows_pidfds = LazyCell::new(knows_pidfds);
    for (seen, number, target) in processes.descriptors() {
        match target {
            FDTarget::AnonInode(kind) if kind == "[pidfd]" && !*knows_pidfds => {
                hits.push(("open-file-kind", format!("{kind} of {}", seen.called())));
            }
            FDTarget::AnonInode(kind) => hits.extend(unknown_kind(seen, kind)),
            FDTarget::Path(path) => {
                let link = seen.descriptor(number);
                let is_secret = || is_secret_memory(&link);
                let found = || found_at(&link);
                hits.extend(without_its_name(subject, seen, path, found, is_secret));
            }
            _ => {}
        }
    }
    for seen in &processes.tree {
        hits.extend(mapped(subject, seen));
        hits.extend(["cwd", "root"].iter().filter_map(|name| {
            let link = format!("/proc/{}/{name}", seen.pid);
            let path = fs::read_link(&link).ok()?;
            without_its_name(subject, seen, &path, || found_at(&link), || false)
        }));
    }
    hits
}

/// Files that show more to who has a capability than the process may see: CRIU has all, and opens them again.
pub(super) fn privileged(processes: &Processes) -> Vec<Hit> {
    let pids = processes.tree.iter().map(|seen| seen.pid.cast_signed());
    let own = OwnProcesses::of(pids).unwrap_or_default();
    let descriptors = processes
        .descriptors()
        .filter_map(|(seen, number, target)| {
            // Namespaces have no path.
            if !matches!(target, FDTarget::Path(_) | FDTarget::Other(..)) {
                return None;
            }
            let link = PathBuf::from(seen.descriptor(number));
            // One that was closed meanwhile is none.
            let path = fs::read_link(&link).ok()?;
            let found = fs::metadata(&link).ok()?;
            let process = PathBuf::from(format!("/proc/{}", seen.pid));
            let opener = Opener::of(&process).ok()?;
            let file = Opened {
                link: &link,
                target: &path,
                inside: None,
                found: &found,
            };
            let needed = lacking_to_open(&file, &own, &opener).ok()??;
            let (path, name) = (path.display().to_string(), needed.name);
            let what = format!("{} of {}, {name}", path.escape_debug(), seen.called());
            Some(("privileged-file", what))
        });
    descriptors.collect()
}

fn unknown_kind(seen: &Seen, kind: &str) -> Option<Hit> {
    let name = match kind {
        "[io_uring]" => "io-uring",
        "[landlock-ruleset]" => "landlock-ruleset",
        // With or without the bracket of older kernels; BPF maps are dumped.
        kind if KNOWN_KINDS.contains(&kind) || kind == "bpf-map" => return None,
        _ => "open-file-kind",
    };
    let of = match name {
        "open-file-kind" => format!("{kind} of {}", seen.called()),
        _ => seen.called(),
    };
    Some((name, of))
}

/// CRIU has them since 4.1.
fn knows_pidfds() -> bool {
    Version::of_criu().is_none_or(|version| version >= PIDFDS_FROM)
}

fn mapped(subject: &Subject, seen: &Seen) -> Vec<Hit> {
    let maps = process_files::maps(seen.pid)
        .into_iter()
        .flatten()
        .take(MAPPINGS);
    let hits = maps.filter_map(|map| {
        let MMapPath::Path(path) = &map.pathname else {
            return None;
        };
        let (from, to) = map.address;
        let link = format!("/proc/{}/map_files/{from:x}-{to:x}", seen.pid);
        let is_secret = || is_secret_memory(&link);
        without_its_name(subject, seen, path, || found_at(&link), is_secret)
    });
    hits.collect()
}

fn without_its_name(
    subject: &Subject,
    seen: &Seen,
    path: &Path,
    found: impl FnOnce() -> Option<(Metadata, bool)>,
    is_secret_memory: impl FnOnce() -> bool,
) -> Option<Hit> {
    let name = path.to_str()?.strip_suffix(DELETED)?;
    if is_kernel_memory(name) {
        return None;
    }
    if name == SECRET_MEMORY && is_secret_memory() {
        return Some(("open-file-kind", format!("secretmem of {}", seen.called())));
    }
    let (file, is_read_only) = found().filter(|(file, _)| file.is_file() || file.is_dir())?;
    if is_its_name(seen, path, &file) {
        return None;
    }
    // A directory has no other name, and its ghost no contents.
    if file.is_dir() && (file.nlink() != 0 || !is_read_only) {
        return None;
    }
    let limit = subject.criu.ghost_limit.unwrap_or(GHOST_LIMIT);
    let shown = name.escape_debug();
    match file.nlink() {
        0 if is_read_only => Some(("deleted-read-only", shown.to_string())),
        0 => {
            let size = file.len().min(file.blocks() * 512);
            (size > limit).then(|| ("ghost-limit", format!("{shown}, {size} bytes")))
        }
        _ if is_left_behind(&subject.spec, Path::new(name)) => {
            Some(("shared-link-remap", shown.to_string()))
        }
        _ => (!subject.criu.link_remap).then(|| ("link-remap", shown.to_string())),
    }
}

fn is_kernel_memory(name: &str) -> bool {
    MEMORY.iter().any(|memory| name.starts_with(memory))
}

/// Whether this is the name of memory that has none.
pub(super) fn is_memory(path: &Path) -> bool {
    let is_one = |name: &str| is_kernel_memory(name) || name.starts_with(SECRET_MEMORY);
    path.to_str().is_some_and(is_one)
}

/// A file that is open, and whether it was opened on a read-only mount.
fn found_at(link: &str) -> Option<(Metadata, bool)> {
    let file = fs::metadata(link).ok()?;
    let flags = statvfs(link).ok()?.flags();
    Some((file, flags.contains(FsFlags::ST_RDONLY)))
}

/// Whether it is of memfd_secret(2): an ordinary file may have its name.
fn is_secret_memory(link: &str) -> bool {
    statfs(link).is_ok_and(|it| it.filesystem_type() == SECRETMEM_MAGIC)
}

/// Whether the file is called so: that it ends as the kernel's names of removed files do is chance.
fn is_its_name(seen: &Seen, path: &Path, file: &Metadata) -> bool {
    let Ok(below) = path.strip_prefix("/") else {
        return false;
    };
    let named = fs::symlink_metadata(Path::new(&format!("/proc/{}/root", seen.pid)).join(below));
    named.is_ok_and(|named| (named.dev(), named.ino()) == (file.dev(), file.ino()))
}

/// Whether a file is in a bind mount whose links are not in the checkpoint: all but `/dev/shm` of the pod.
fn is_left_behind(spec: &Spec, path: &Path) -> bool {
    let annotations = spec.annotations();
    let sandbox = annotations.get(SANDBOX_ID).map(String::as_str);
    let shared = shared_mounts(spec, sandbox.unwrap_or_default());
    let shm: Vec<&PathBuf> = { shared.iter() }
        .filter(|it| it.dir == SharedDir::Shm)
        .map(|it| &it.destination)
        .collect();
    let mut binds: Vec<PathBuf> = spec.bind_mounts().into_iter().map(|(at, _)| at).collect();
    binds.retain(|at| !shm.contains(&at));
    let mounts = spec.mount_destinations();
    let longest = mounts
        .iter()
        .filter(|at| path.starts_with(at))
        .max_by_key(|at| at.components().count());
    longest.is_some_and(|at| binds.contains(at))
}

#[cfg(test)]
mod tests {
    use transship_checkpoint::criu_options::CriuOptions;

    use super::*;

    fn subject(criu: CriuOptions) -> Subject {
        let spec = br#"{"mounts":[{"destination":"/dev","type":"tmpfs"},
            {"destination":"/vol","type":"bind","source":"/run/vol","options":["rbind"]},
            {"destination":"/dev/shm","type":"bind","source":"/run/x/sandboxes/s1/shm","options":["rbind"]}],
            "annotations":{"io.kubernetes.cri.sandbox-id":"s1"}}"#;
        Subject {
            id: String::new(),
            init: 1,
            pids: Vec::new(),
            spec: Spec::parse(spec).unwrap(),
            criu,
        }
    }

    #[test]
    fn a_removed_directory_counts_where_none_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        fs::create_dir(&path).unwrap();
        let open = fs::File::open(&path).unwrap();
        let there = open.metadata().unwrap();
        fs::remove_dir(&path).unwrap();
        let gone = open.metadata().unwrap();
        let own = std::process::id();
        let processes = Processes::read(own, &[own]);
        let name = |of: &Metadata, is_read_only| {
            let subject = subject(CriuOptions::default());
            let seen = &processes.tree[0];
            let found = || Some((of.clone(), is_read_only));
            let path = Path::new("/config/x (deleted)");
            without_its_name(&subject, seen, path, found, || false).map(|(name, _)| name)
        };
        assert_eq!(name(&gone, true), Some("deleted-read-only"));
        assert_eq!(name(&gone, false), None);
        assert_eq!(name(&there, true), None);
    }

    #[test]
    fn a_name_that_is_lost_counts_by_the_mount_and_the_links() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        fs::write(&path, vec![1; 3 << 20]).unwrap();
        let linked = fs::metadata(&path).unwrap();
        let file = fs::File::open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let ghost = file.metadata().unwrap();
        let own = std::process::id();
        let processes = Processes::read(own, &[own]);
        let name = |path: &str, of: &Metadata, criu: &CriuOptions| {
            let (subject, seen) = (subject(criu.clone()), &processes.tree[0]);
            let found = || Some((of.clone(), false));
            let hit = without_its_name(&subject, seen, Path::new(path), found, || {
                path == "/secretmem (deleted)"
            });
            hit.map(|(name, _)| name)
        };
        let called_so = dir.path().join("y (deleted)");
        fs::write(&called_so, "").unwrap();
        let metadata = fs::metadata(&called_so).unwrap();
        assert_eq!(
            name(
                called_so.to_str().unwrap(),
                &metadata,
                &CriuOptions::default()
            ),
            None
        );
        assert_eq!(
            name(
                called_so.to_str().unwrap(),
                &linked,
                &CriuOptions::default()
            ),
            Some("link-remap")
        );
        let none = CriuOptions::default();
        let all = CriuOptions {
            link_remap: true,
            ghost_limit: Some(4 << 20),
            ..CriuOptions::default()
        };
        for (path, of, told, untold) in [
            ("/data/x (deleted)", &ghost, Some("ghost-limit"), None),
            ("/data/x (deleted)", &linked, Some("link-remap"), None),
            ("/dev/x (deleted)", &linked, Some("link-remap"), None),
            (
                "/dev/shm/sem.x (deleted)",
                &linked,
                Some("link-remap"),
                None,
            ),
            ("/data/x", &linked, None, None),
            ("/memfd:x (deleted)", &ghost, None, None),
            (
                "/secretmem (deleted)",
                &linked,
                Some("open-file-kind"),
                Some("open-file-kind"),
            ),
        ] {
            assert_eq!(name(path, of, &none), told, "{path}");
            assert_eq!(name(path, of, &all), untold, "{path}");
        }
        let shared = name("/vol/x (deleted)", &linked, &all);
        assert_eq!(shared, Some("shared-link-remap"));
    }
}
