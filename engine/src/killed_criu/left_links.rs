//! The names that a killed CRIU leaves of files that had lost theirs (`link-remap`).
//!
//! ```text
//!  /proc/PID/fd/N -> /data/x (deleted)    open, and its file has another name still
//!  /data/link_remap.7                     what CRIU calls it for the time of the dump; where /data is gone as well, it is
//!                                         made in the next directory above (create_link_remap of criu/files-reg.c)
//! ```
//!
//! The numbers are the same in each dump of a container: what is left of one makes all later ones fail ("File exists").
//! Any file may have such a name: one is taken away that is of a file which is open without its name, and where CRIU
//! would have made it.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::fstatat;
use nix::unistd::{UnlinkatFlags, unlinkat};
use procfs::process::MMapPath;
use rustix::fs::{StatxFlags, statx};
use transship_checkpoint::shared_dirs::LINK_PREFIX;
use transship_sandbox::tree_with_parents;

use crate::process_files;

const DELETED: &[u8] = b" (deleted)";
/// What the NFS client calls a file that is removed while it is open; CRIU makes a link of it, too.
const NFS_REMOVED: &[u8] = b".nfs";
/// More descriptors and mappings than these are not looked at, of a container.
const OPEN: usize = 1 << 20;
/// More files without a name than these are not looked for.
const FILES: usize = 4096;
/// More directories than these, of all files, are not looked for.
const ABOVE: usize = 1 << 14;
/// More names than these, of all directories, are not looked at.
const NAMES: usize = 1 << 20;

/// A file by its device and inode.
type FileId = (u64, u64);
/// The files that may have a link in a directory, which is below the root of a process.
type Places = BTreeMap<(PathBuf, PathBuf), BTreeSet<FileId>>;

/// Takes them away, of the container with this first process. It must stand still, and no CRIU be at work in it.
pub(super) fn take_away(root: u32) {
    let mut names = NAMES;
    for ((root, directory), files) in places(root) {
        // One that is gone has nothing.
        drop(unlink_below(&root, &directory, &files, &mut names));
    }
}

/// Where the files of a container may have one: what CRIU dumps is the first process and all below it.
fn places(root: u32) -> Places {
    let mut places = Places::new();
    let (mut seen, mut above) = (BTreeSet::new(), ABOVE);
    let tree = tree_with_parents(root.cast_signed()).unwrap_or_default();
    let pids = tree.into_iter().map(|(pid, _)| pid.cast_unsigned());
    let open = pids.flat_map(|pid| open_and_mapped(pid).map(move |link| (pid, link)));
    for (pid, link) in open.take(OPEN) {
        let Some((file, directory)) = without_its_name(&link) else {
            continue;
        };
        if !seen.insert((file, directory.clone())) {
            continue;
        }
        if seen.len() > FILES {
            break;
        }
        let below = root_of(pid, root);
        let mount = mount_of(&link);
        for directory in directory.ancestors() {
            if above == 0 {
                return places;
            }
            above -= 1;
            if let Ok(at) = open_directory(&below, directory, OFlag::O_PATH)
                && mount_of_directory(&at) != mount
            {
                break;
            }
            let place = (below.clone(), directory.to_path_buf());
            places.entry(place).or_default().insert(file);
        }
    }
    places
}

/// Where the paths begin that the kernel tells of a process: at the root of its mounts, whatever its own is.
fn root_of(pid: u32, first: u32) -> PathBuf {
    let mounts = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let pid = if mounts(pid) == mounts(first) {
        first
    } else {
        pid
    };
    PathBuf::from(format!("/proc/{pid}/root"))
}

/// What a process has open or mapped, as links of `/proc`.
fn open_and_mapped(pid: u32) -> impl Iterator<Item = PathBuf> {
    let open = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten();
    let open = open.flatten().map(|entry| entry.path());
    let maps = process_files::maps(pid).into_iter().flatten();
    let mapped = maps.filter_map(move |map| {
        let is_of_file = matches!(&map.pathname, MMapPath::Path(path) if may_lack_a_name(path));
        let (from, to) = map.address;
        is_of_file.then(|| PathBuf::from(format!("/proc/{pid}/map_files/{from:x}-{to:x}")))
    });
    open.chain(mapped)
}

fn may_lack_a_name(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().as_bytes();
    path.is_absolute() && (name.ends_with(DELETED) || name.starts_with(NFS_REMOVED))
}

/// The file at the end of such a link and the directory that it was in, when it has lost its name and has another one.
fn without_its_name(link: &Path) -> Option<(FileId, PathBuf)> {
    // Nothing else of it is asked before: a file system may hang.
    let path = fs::read_link(link).ok().filter(|it| may_lack_a_name(it))?;
    let file = fs::metadata(link).ok()?;
    let has_one = !file.is_dir() && file.nlink() > 0;
    has_one.then_some(((file.dev(), file.ino()), path.parent()?.to_path_buf()))
}

/// The mount that a file was opened on; none where the kernel does not tell (before 5.8).
fn mount_of(link: &Path) -> Option<u64> {
    mount_in(rustix::fs::CWD, link, rustix::fs::AtFlags::empty())
}

fn mount_of_directory(directory: &OwnedFd) -> Option<u64> {
    mount_in(directory, Path::new(""), rustix::fs::AtFlags::EMPTY_PATH)
}

fn mount_in(at: impl AsFd, path: &Path, flags: rustix::fs::AtFlags) -> Option<u64> {
    let found = statx(at, path, flags, StatxFlags::MNT_ID).ok()?;
    let is_told = found.stx_mask & StatxFlags::MNT_ID.bits() != 0;
    is_told.then_some(found.stx_mnt_id)
}

/// Opens a directory below a root; no link leads there, as none did when the kernel said that this is its path.
fn open_directory(root: &Path, directory: &Path, flags: OFlag) -> io::Result<OwnedFd> {
    let root = File::open(root)?;
    let how = OpenHow::new()
        .flags(flags | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_SYMLINKS);
    Ok(openat2(&root, directory, how)?)
}

/// Removes the links of these files from a directory, and looks at `names` at most.
fn unlink_below(
    root: &Path,
    directory: &Path,
    files: &BTreeSet<FileId>,
    names: &mut usize,
) -> io::Result<()> {
    let directory = open_directory(root, directory, OFlag::O_RDONLY)?;
    let mut listed = Dir::from_fd(directory.try_clone()?)?;
    let mut links = Vec::new();
    for entry in listed.iter() {
        *names = names.checked_sub(1).ok_or(io::ErrorKind::QuotaExceeded)?;
        let name = OsStr::from_bytes(entry?.file_name().to_bytes()).to_os_string();
        if is_link_of_criu(&name) {
            links.push(name);
        }
    }
    for link in links {
        let found = fstatat(&directory, link.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW);
        if found.is_ok_and(|it| files.contains(&(it.st_dev, it.st_ino))) {
            unlinkat(&directory, link.as_os_str(), UnlinkatFlags::NoRemoveDir)?;
        }
    }
    Ok(())
}

fn is_link_of_criu(name: &OsStr) -> bool {
    let number = name.as_bytes().strip_prefix(LINK_PREFIX.as_bytes());
    number.is_some_and(|it| !it.is_empty() && it.iter().all(u8::is_ascii_digit))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn its_links_are_numbers() {
        for (name, is_one) in [
            ("link_remap.1", true),
            ("link_remap.4294967295", true),
            ("link_remap.", false),
            ("link_remap.1a", false),
            ("link_remap.-1", false),
            ("xlink_remap.1", false),
        ] {
            assert_eq!(is_link_of_criu(OsStr::new(name)), is_one, "{name}");
        }
    }

    #[test]
    fn a_name_that_may_be_lost_is_looked_at() {
        for (path, may) in [
            ("/data/x (deleted)", true),
            ("/data/.nfs000000000001", true),
            ("/data/x", false),
            ("/data (deleted)/x", false),
            ("pipe:[1] (deleted)", false),
        ] {
            assert_eq!(may_lack_a_name(Path::new(path)), may, "{path}");
        }
    }

    /// A process that has the file at `path` open; the name goes meanwhile.
    fn hold(path: &Path) -> std::process::Child {
        let file = File::open(path).unwrap();
        let mut sleep = Command::new("sleep");
        sleep.arg("1000").stdin(Stdio::from(file)).spawn().unwrap()
    }

    #[test]
    fn root_only_links_of_files_without_their_names_go() {
        let dir = tempfile::tempdir().unwrap();
        let (above, below) = (dir.path().join("a"), dir.path().join("a/b"));
        let gone = above.join("gone");
        for made in [&below, &gone] {
            fs::create_dir_all(made).unwrap();
        }
        fs::write(below.join("first"), "x").unwrap();
        fs::hard_link(below.join("first"), below.join("second")).unwrap();
        fs::write(gone.join("first"), "x").unwrap();
        fs::hard_link(gone.join("first"), above.join("of-gone")).unwrap();
        fs::write(below.join("named"), "x").unwrap();
        let mut held = [
            hold(&below.join("first")),
            hold(&gone.join("first")),
            hold(&below.join("named")),
        ];
        fs::remove_file(below.join("first")).unwrap();
        fs::remove_dir_all(&gone).unwrap();
        // CRIU's, and what others have called so.
        fs::hard_link(below.join("second"), below.join("link_remap.7")).unwrap();
        fs::hard_link(above.join("of-gone"), above.join("link_remap.8")).unwrap();
        fs::hard_link(below.join("second"), below.join("link_remap.x")).unwrap();
        fs::hard_link(below.join("named"), below.join("link_remap.9")).unwrap();
        fs::write(below.join("link_remap.10"), "x").unwrap();
        symlink("second", below.join("link_remap.11")).unwrap();
        for process in &held {
            take_away(process.id());
        }
        for process in &mut held {
            process.kill().unwrap();
            process.wait().unwrap();
        }
        let names = |dir: &Path| {
            let entries = fs::read_dir(dir).unwrap();
            let names = entries.map(|it| it.unwrap().file_name().into_string().unwrap());
            names
                .collect::<BTreeSet<_>>()
                .into_iter()
                .collect::<Vec<_>>()
        };
        assert_eq!(names(&above), ["b", "of-gone"]);
        assert_eq!(
            names(&below),
            [
                "link_remap.10",
                "link_remap.11",
                "link_remap.9",
                "link_remap.x",
                "named",
                "second"
            ]
        );
    }

    #[test]
    fn no_link_leads_to_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(dir.path().join("outside")).unwrap();
        fs::create_dir_all(root.join("inside")).unwrap();
        symlink("../outside", root.join("up")).unwrap();
        symlink("inside", root.join("link")).unwrap();
        let open = |path: &str| open_directory(&root, Path::new(path), OFlag::O_RDONLY);
        assert!(open("/inside").is_ok());
        for path in ["/up", "/link", "/../outside", "/none"] {
            assert!(open(path).is_err(), "{path}");
        }
    }
}
