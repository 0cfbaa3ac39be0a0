//! How much an upperdir takes, counted as containerd's overlayfs snapshotter counts.

use std::collections::HashSet;
use std::fs::Metadata;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;
use walkdir::WalkDir;

/// What a tree takes on its file system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Inodes, the root's included; a file with several names counts once.
    pub inodes: u64,
    /// Bytes allocated (512 for each of `st_blocks`).
    pub size: u64,
}

/// Why a tree could not be counted.
#[derive(Debug, thiserror::Error)]
#[error("cannot count what {path} takes")]
pub struct UsageError {
    /// The tree or the place in it.
    pub path: PathBuf,
    /// What the kernel said.
    pub source: io::Error,
}

/// Counts inodes and allocated bytes of a tree, as containerd reports them for an active snapshot
/// (continuity `fs.DiskUsage`). What disappears while it counts, in a running container, is left out.
///
/// # Errors
/// The first system call that fails for another reason.
pub fn upperdir_usage(dir: &Path) -> Result<Usage, UsageError> {
    let mut usage = Usage::default();
    let mut linked = HashSet::new();
    // Trees still to be walked. walkdir names whole paths, and beyond 4 096 bytes the kernel takes
    // none: the rest below such a place is walked by the short name of its open descriptor.
    let mut trees: Vec<(PathBuf, Option<OwnedFd>)> = vec![(dir.to_path_buf(), None)];
    while let Some((root, open_root)) = trees.pop() {
        let mut walk = WalkDir::new(&root)
            .follow_root_links(open_root.is_some())
            .into_iter();
        while let Some(entry) = walk.next() {
            let error = match entry {
                Ok(entry) if entry.depth() == 0 && open_root.is_some() => continue,
                Ok(entry) => match entry.metadata() {
                    Ok(metadata) => {
                        count(&metadata, &mut usage, &mut linked);
                        continue;
                    }
                    Err(error) => {
                        if entry.file_type().is_dir() {
                            walk.skip_current_dir();
                        }
                        error
                    }
                },
                Err(error) => error,
            };
            let place = error.path().unwrap_or(&root).to_path_buf();
            match error.io_error().and_then(io::Error::raw_os_error) {
                Some(errno) if errno == Errno::ENOENT as i32 && place != dir => {}
                Some(errno) if errno == Errno::ENAMETOOLONG as i32 => {
                    trees.extend(count_beyond(&place, &mut usage, &mut linked)?);
                }
                _ => {
                    return Err(UsageError {
                        path: place,
                        source: error.into(),
                    });
                }
            }
        }
        drop(open_root);
    }
    Ok(usage)
}

type Linked = HashSet<(u64, u64)>;

fn count(metadata: &Metadata, usage: &mut Usage, linked: &mut Linked) {
    // Only a file with several names can be met twice; remembering the others would cost memory
    // in proportion to the tree.
    let may_repeat = metadata.nlink() > 1 && !metadata.is_dir();
    if may_repeat && !linked.insert((metadata.dev(), metadata.ino())) {
        return;
    }
    usage.inodes += 1;
    usage.size += metadata.blocks() * 512;
}

/// Counts a file whose path is too long, through its directory. For a directory that could be
/// named but not listed, returns it as a tree to walk.
fn count_beyond(
    place: &Path,
    usage: &mut Usage,
    linked: &mut Linked,
) -> Result<Option<(PathBuf, Option<OwnedFd>)>, UsageError> {
    let failed = |source: io::Error| UsageError {
        path: place.to_path_buf(),
        source,
    };
    let (Some(parent), Some(name)) = (place.parent(), place.file_name()) else {
        return Err(failed(Errno::ENAMETOOLONG.into()));
    };
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let parent = open(parent, flags | OFlag::O_DIRECTORY, Mode::empty())
        .map_err(|errno| failed(errno.into()))?;
    let fd = match openat(&parent, name, flags | OFlag::O_NOFOLLOW, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::ENOENT) => return Ok(None),
        Err(errno) => return Err(failed(errno.into())),
    };
    let short = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let file = std::fs::File::from(fd);
    let metadata = file.metadata().map_err(failed)?;
    count(&metadata, usage, linked);
    Ok(metadata.is_dir().then(|| (short, Some(file.into()))))
}
