//! The names by which CRIU finds the files of the images.
//!
//! It opens them as root of the node, while it still has descriptors of the node's directories: a name through
//! `/proc/self/fd`, or through a link that leads there, is one of the node's files. And where a file has no name
//! any more, CRIU makes it again beside the name that it had, by a path that begins at the root of the node: there
//! a link with an absolute target leads to the node's directories.
//!
//! The kernel gave the names at the dump, without `..` and without links. So a name has none of them here either.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use transship_checkpoint::criu_images::mounts::{FsType, Mount};
use transship_checkpoint::criu_images::named_files::NamedFile;

use super::allowance::Allowance;
use super::capabilities::SYS_PTRACE;
use super::environment::{is_plain, resolve_within};
use super::mount_ways::MadeLinks;
use super::{Admission, Refusal, Restored};

/// What a process in `/proc/<pid>` shows to who may trace it when it is opened.
const OF_TRACERS: [&str; 11] = [
    "auxv",
    "clear_refs",
    "environ",
    "io",
    "maps",
    "mem",
    "numa_maps",
    "personality",
    "smaps",
    "smaps_rollup",
    "syscall",
];
/// Links of `/proc/<pid>` that lead where no path does.
const LINKS_TO_DIRECTORIES: [&str; 3] = ["root", "cwd", "exe"];
/// Directories of such links.
const DIRECTORIES_OF_LINKS: [&str; 3] = ["fd", "map_files", "ns"];

const ELSEWHERE: &str = "whose name leads out of the container";
pub(super) const LINK: &str = "whose name leads through a symbolic link, as none did at the dump";

/// Whether open(2) with these flags does more than to open what there is: CRIU opens with those of the images, as root.
/// It leaves `O_TMPFILE` out, which a file without a name keeps for ever (CRIU 3.10, `do_open_reg_noseek_flags`).
pub(super) fn makes_or_empties(flags: u32) -> bool {
    let makes = OFlag::O_CREAT | OFlag::O_TRUNC;
    flags & makes.bits().cast_unsigned() != 0
}

/// Compares what the images alone say.
pub(super) fn compare(restored: &Restored, allowed: &Allowance, admission: &mut Admission) {
    let mut refuse = |file: &NamedFile, why| {
        let path = file.path.clone();
        admission.refuse(Refusal::File { path, why });
    };
    for file in looked_for(restored) {
        let leads_elsewhere = leads_through_proc(restored, &file.path)
            || leads_through_foreign_proc(allowed, &file.path);
        if !is_plain(&file.path) || leads_elsewhere {
            refuse(file, ELSEWHERE);
        }
        if makes_or_empties(file.flags) {
            refuse(file, "which is to be made or emptied when it is opened");
        }
    }
    let mut ids = BTreeSet::new();
    for file in { restored.named_files.iter() }.filter(|it| !it.is_socket) {
        // CRIU takes one of them, and what is compared may be the other.
        if !ids.insert(file.id) {
            refuse(file, "with the number of another one");
        }
    }
}

/// Compares them with what there is.
pub(super) fn refuse_links(
    restored: &Restored,
    allowed: &Allowance,
    rootfs: &Path,
    made: &dyn Fn(&Mount) -> MadeLinks,
    admission: &mut Admission,
) {
    let mut refuse = |path: &Path| {
        let path = path.to_path_buf();
        admission.refuse(Refusal::File { path, why: LINK });
    };
    for file in &restored.watched_files {
        // Nothing shows afterwards what a watch has been put on, so it is no link itself, as what is below it shows.
        let below = file.path.join("x");
        let mount = deepest(restored.mounts.iter().flatten(), &file.path);
        if mount.is_some_and(|mount| leads_through_made(mount, &below, made)) {
            refuse(&file.path);
        }
    }
    for file in looked_for(restored) {
        // The name of a link that is open itself.
        let itself = (OFlag::O_PATH | OFlag::O_NOFOLLOW).bits().cast_unsigned();
        let path = match file.flags & itself == itself || file.is_socket {
            true => file.path.parent().unwrap_or(&file.path),
            false => &file.path,
        };
        if deepest(restored.mounts.iter().flatten(), &file.path).is_some_and(|mount| {
            leads_through_link(mount, path, allowed, rootfs)
                || leads_through_made(mount, &file.path, made)
        }) {
            refuse(&file.path);
        }
    }
    for remap in &restored.remaps {
        let Some(file) = with_id(restored, remap.file) else {
            continue;
        };
        let Some(mount) = mount_of(restored, file) else {
            refuse(&file.path);
            continue;
        };
        let other = remap.linked.and_then(|id| with_id(restored, id));
        for path in [Some(file), other].into_iter().flatten().map(|it| &it.path) {
            let parent = path.parent().unwrap_or(path);
            if leads_through_link(mount, parent, allowed, rootfs)
                || leads_through_made(mount, path, made)
            {
                refuse(path);
            }
        }
    }
}

/// Whether `path` is not in the mount, or a link in it is followed on the way. What CRIU makes is not there yet.
fn leads_through_link(mount: &Mount, path: &Path, allowed: &Allowance, rootfs: &Path) -> bool {
    let Ok(below) = path.strip_prefix(&mount.destination) else {
        // The name of the mount itself, whose parent is not in it.
        return Path::new(&mount.destination).parent() != Some(path);
    };
    let root: PathBuf = match &mount.external {
        _ if mount.destination == "/" => rootfs.to_path_buf(),
        Some(_) => {
            let mut there = allowed.mounts.iter();
            let there = there.find(|it| it.destination == Path::new(&mount.destination));
            match there {
                Some(there) => there.source.clone(),
                None => return false,
            }
        }
        None => return false,
    };
    let below = Path::new("/").join(below);
    resolve_within(&root, &below) != below
}

/// The same of the directories on the way, in a file system that CRIU makes and fills.
fn leads_through_made(mount: &Mount, path: &Path, made: &dyn Fn(&Mount) -> MadeLinks) -> bool {
    let is_made = mount.fs_type == FsType::Tmpfs && mount.external.is_none();
    let Some(below) = within(mount, path) else {
        return false;
    };
    let mut dirs = { below.ancestors().skip(1) }.filter(|dir| !dir.as_os_str().is_empty());
    let Some(first) = dirs.next().filter(|_| is_made && mount.destination != "/") else {
        return false;
    };
    match made(mount) {
        Some(links) => links.contains(first) || dirs.any(|dir| links.contains(dir)),
        None => true,
    }
}

fn leads_through_proc(restored: &Restored, path: &Path) -> bool {
    let procs = { restored.mounts.iter().flatten() }.filter(|it| it.fs_type == FsType::Proc);
    let parts = procs.filter_map(|mount| path.strip_prefix(&mount.destination).ok());
    parts.into_iter().any(|below| {
        let names: Vec<&str> = below.iter().filter_map(|it| it.to_str()).collect();
        let Some((last, before)) = names.split_last() else {
            return false;
        };
        let of_process = names[0].bytes().all(|byte| byte.is_ascii_digit());
        let own = matches!(names[0], "self" | "thread-self");
        // CRIU may look at each process of the node, and whoever has the file goes on to.
        let is_stranger = || {
            let pid = names[0].parse();
            !{ restored.processes.iter() }.any(|process| Ok(process.pid) == pid)
        };
        let of_stranger = of_process && OF_TRACERS.contains(last) && is_stranger();
        own && !before.is_empty()
            || of_stranger
            || of_process
                && (LINKS_TO_DIRECTORIES.contains(last)
                    || before.iter().any(|name| {
                        LINKS_TO_DIRECTORIES.contains(name) || DIRECTORIES_OF_LINKS.contains(name)
                    }))
    })
}

/// The same of a volume that is the node's own `/proc`, or a part of it, whose processes are all strangers.
fn leads_through_foreign_proc(allowed: &Allowance, path: &Path) -> bool {
    let binds = { allowed.mounts.iter() }.filter_map(|mount| {
        let part = mount.source.strip_prefix("/proc").ok()?;
        Some(part.join(path.strip_prefix(&mount.destination).ok()?))
    });
    let is_of_stranger = |below: PathBuf| {
        let mut names = below.iter().filter_map(|it| it.to_str());
        let is_process = |name: &str| {
            matches!(name, "self" | "thread-self") || name.bytes().all(|byte| byte.is_ascii_digit())
        };
        names.next().is_some_and(is_process)
            && names.any(|name| {
                OF_TRACERS.contains(&name)
                    || LINKS_TO_DIRECTORIES.contains(&name)
                    || DIRECTORIES_OF_LINKS.contains(&name)
            })
    };
    !allowed.capabilities.has(SYS_PTRACE) && binds.into_iter().any(is_of_stranger)
}

/// All that CRIU looks for by a name.
fn looked_for(restored: &Restored) -> impl Iterator<Item = &NamedFile> {
    restored.named_files.iter().chain(&restored.watched_files)
}

pub(super) fn with_id(restored: &Restored, id: u32) -> Option<&NamedFile> {
    let mut files = restored.named_files.iter();
    files.find(|it| it.id == id && !it.is_socket)
}

pub(super) fn mount_of<'a>(restored: &'a Restored, file: &NamedFile) -> Option<&'a Mount> {
    let mut mounts = restored.mounts.iter().flatten();
    mounts.find(|it| Some(it.id) == file.mount)
}

/// The one of these mounts that a path is in, whatever mount the image says: CRIU goes by the path.
pub(super) fn deepest<'m>(
    mounts: impl IntoIterator<Item = &'m Mount>,
    path: &Path,
) -> Option<&'m Mount> {
    let mounts = { mounts.into_iter() }.filter(|it| path.starts_with(&it.destination));
    mounts.max_by_key(|it| Path::new(&it.destination).components().count())
}

/// What a path is called in the file system of a mount, of which only a part may be shown there.
pub(super) fn within(mount: &Mount, path: &Path) -> Option<PathBuf> {
    let below = path.strip_prefix(&mount.destination).ok()?;
    Some(Path::new(mount.root.trim_start_matches('/')).join(below))
}
