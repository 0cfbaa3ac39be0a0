//! What a CRIU that is killed in the middle of a restore leaves on the node.
//!
//! ```text
//!  /tmp/.criu.mntns.XXXXXX         where it builds the mounts, in a mount namespace that has ended: an empty directory. The
//!                                  lines of its log have the name (create_mnt_roots of criu/mount.c)
//!  <volume>/NAME.cr.ID.ghost       a file that had lost its name, in the making: beside the name that it had in the
//!                                  container, with the hexadecimal number of its image (ghost_path of criu/files-reg.c)
//! ```
//!
//! A CRIU that fails takes both away itself. A directory that had lost its name is made under that name, and is left: one
//! that somebody has made there meanwhile looks the same.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use nix::unistd::{UnlinkatFlags, unlinkat};
use transship_checkpoint::beneath::{Links, open_directory};
use transship_checkpoint::criu_images::named_files::{named_files, remaps};
use transship_checkpoint::spec::Spec;

use crate::restore_log::RESTORE_LOG;

const ROOTS: &[u8] = b"/tmp/.criu.mntns.";
/// Random letters and digits, as mkdtemp(3) makes them.
const RANDOM: usize = 6;
/// Bytes of the log that are looked through: the mounts are made early.
const BEGINNING: u64 = 32 << 20;

/// Takes it away, after nothing of the restore runs any more. What cannot be read or removed is left: the container is
/// gone in any case.
pub(crate) fn clean_up(work: &Path, bundle: &Path, images: &Path) {
    remove_roots_of_mounts(work);
    let Ok(spec) = fs::read(bundle.join("config.json")) else {
        return;
    };
    let Ok(spec) = Spec::parse(&spec) else {
        return;
    };
    for ghost in ghosts(images) {
        if let Some((dir, name)) = place_on_node(&spec, bundle, &ghost) {
            remove_beneath(&dir, &name);
        }
    }
}

/// Takes away the directory for mounts alone, of a restore whose images are not known any more.
pub(crate) fn remove_roots_of_mounts(work: &Path) {
    if let Some(roots) = roots_of_mounts(&work.join(RESTORE_LOG)) {
        // It goes only while it is empty.
        drop(fs::remove_dir(roots));
    }
}

fn roots_of_mounts(log: &Path) -> Option<PathBuf> {
    let log = BufReader::new(File::open(log).ok()?.take(BEGINNING));
    { log.split(b'\n') }.map_while(Result::ok).find_map(|line| {
        let at = line.windows(ROOTS.len()).position(|it| it == ROOTS)?;
        let path = line.get(at..at + ROOTS.len() + RANDOM)?;
        let random = path.get(ROOTS.len()..)?;
        let is_one = random.iter().all(u8::is_ascii_alphanumeric);
        is_one.then(|| OsStr::from_bytes(path).into())
    })
}

/// The paths in the container that files without a name get for a moment.
fn ghosts(images: &Path) -> Vec<PathBuf> {
    let remaps = remaps(images).unwrap_or_default();
    if remaps.iter().all(|remap| remap.ghost.is_none()) {
        return Vec::new();
    }
    let files = named_files(images).unwrap_or_default();
    let made = remaps.iter().filter_map(|remap| {
        let mut files = files.iter().filter(|file| !file.is_socket);
        let file = files.find(|file| file.id == remap.file)?;
        let mut path = OsString::from(&file.path);
        path.push(format!(".cr.{:x}.ghost", remap.ghost?.id));
        Some(PathBuf::from(path))
    });
    made.collect()
}

/// The directory of the node that the container has mounted there, and the path beneath it; none of what goes with the
/// container's mounts.
fn place_on_node(spec: &Spec, bundle: &Path, path: &Path) -> Option<(PathBuf, PathBuf)> {
    let mounts = spec.mount_destinations().into_iter();
    let mount =
        { mounts.filter(|at| path.starts_with(at)) }.max_by_key(|at| at.components().count());
    let (destination, source) = match mount {
        Some(mount) => { spec.bind_mounts().into_iter() }.find(|(at, _)| *at == mount)?,
        None => (PathBuf::from("/"), bundle.join("rootfs")),
    };
    let beneath = path.strip_prefix(destination).ok()?.to_path_buf();
    Some((source, beneath))
}

fn remove_beneath(dir: &Path, path: &Path) {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if let (Some(name), Ok(parent)) = (
        path.file_name(),
        open_directory(dir, parent, Links::Refused),
    ) {
        let _ = unlinkat(parent, name, UnlinkatFlags::NoRemoveDir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_of_mounts_is_the_one_of_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("restore.log");
        for (said, found) in [
            (&b"(00.1) mnt-v2: Create plain mountpoint /tmp/.criu.mntns.aB3xY9/mnt-0000000208 for 208\n"[..], Some("/tmp/.criu.mntns.aB3xY9")),
            (b"\xff\n(00.1) Opening ghost file 0x1 for tmp/x\n(00.2) /tmp/.criu.mntns.000000\n", Some("/tmp/.criu.mntns.000000")),
            (b"/tmp/.criu.mntns.aB/../x\n/tmp/.criu.mntns.aB3x", None),
            (b"", None),
        ] {
            fs::write(&log, said).unwrap();
            assert_eq!(roots_of_mounts(&log).as_deref(), found.map(Path::new));
        }
        assert_eq!(roots_of_mounts(&dir.path().join("none")), None);
    }

    #[test]
    fn a_file_is_where_the_innermost_mount_is_from() {
        let spec = br#"{"mounts":[{"destination":"/dev","type":"tmpfs"},
            {"destination":"/vol","type":"bind","source":"/srv/vol","options":["rbind"]}]}"#;
        let spec = Spec::parse(spec).unwrap();
        let place = |path: &str| place_on_node(&spec, Path::new("/b"), Path::new(path));
        let is = |dir: &str, path: &str| Some((PathBuf::from(dir), PathBuf::from(path)));
        assert_eq!(
            place("/vol/a/x.cr.1.ghost"),
            is("/srv/vol", "a/x.cr.1.ghost")
        );
        assert_eq!(place("/volume/x"), is("/b/rootfs", "volume/x"));
        assert_eq!(place("/dev/x"), None);
    }

    #[test]
    fn nothing_but_a_file_beneath_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (volume, outside) = (dir.path().join("volume"), dir.path().join("outside"));
        for made in [&volume, &outside, &volume.join("dir.ghost")] {
            fs::create_dir(made).unwrap();
        }
        std::os::unix::fs::symlink(&outside, volume.join("link")).unwrap();
        for file in [volume.join("a"), outside.join("b")] {
            fs::write(file, "").unwrap();
        }
        for path in ["a", "link/b", "../outside/b", "dir.ghost", "none/x", ""] {
            remove_beneath(&volume, Path::new(path));
        }
        assert_eq!(fs::read_dir(&volume).unwrap().count(), 2);
        assert!(outside.join("b").symlink_metadata().is_ok());
    }
}
