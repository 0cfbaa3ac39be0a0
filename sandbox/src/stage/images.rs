//! The image directory for one restore: hard links, so that no byte is copied and an edited image
//! can stand in the place of the original.
//!
//! ```text
//! .../checkpoint/             the images, never written to
//! .../.staged-<pid>-<n>/      links to them, edited ones beside; locked (flock) while in use
//! ```
//!
//! Symbolic links would not do: CRIU opens a part of the images (`pagemap-*.img`) when the task is
//! in the mount namespace of the container already, where a path of the host leads nowhere. For
//! hard links the directory must be on the file system of the images, hence next to them.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::fcntl::{Flock, FlockArg};

use super::{StageContext, StageError};
use transship_checkpoint::manifest::LINKED_PREFIX;

/// A directory of links to images; it goes away with this.
#[derive(Debug)]
pub struct LinkedImages {
    dir: PathBuf,
    // Tells other processes that the directory is in use.
    _lock: Flock<File>,
}

impl LinkedImages {
    /// Makes links to the images in `from`, and removes those that a killed process has left.
    ///
    /// # Errors
    /// A system call failed; nothing is left then.
    pub fn of(from: &Path) -> Result<Self, StageError> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let from = from.canonicalize().staging("find", from)?;
        remove_orphans(&from)?;
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = from.with_file_name(format!("{LINKED_PREFIX}{}-{count}", std::process::id()));
        DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .staging("create", &dir)?;
        let lock = File::open(&dir).staging("open", &dir)?;
        let lock = Flock::lock(lock, FlockArg::LockExclusive)
            .map_err(|(_, errno)| io::Error::from(errno))
            .staging("lock", &dir)?;
        let linked = Self { dir, _lock: lock };
        for entry in fs::read_dir(&from).staging("list", &from)? {
            let entry = entry.staging("list", &from)?;
            link(&from, &entry, &linked.dir.join(entry.file_name()))?;
        }
        Ok(linked)
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.dir
    }
}

impl Drop for LinkedImages {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next restore from these images.
        drop(fs::remove_dir_all(&self.dir));
    }
}

fn link(from: &Path, entry: &fs::DirEntry, link: &Path) -> Result<(), StageError> {
    let path = entry.path();
    if entry.file_type().staging("stat", &path)?.is_symlink() {
        // A pre-dump's `parent` is relative to the images.
        let target = fs::read_link(&path).staging("read", &path)?;
        return symlink(from.join(target), link).staging("create", link);
    }
    fs::hard_link(&path, link).staging("link", &path)
}

/// Removes the directories of links to the images in `from` that a killed process has left.
///
/// # Errors
/// The directory cannot be listed.
pub(super) fn remove_orphans(from: &Path) -> Result<(), StageError> {
    let parent = from.parent().unwrap_or(Path::new("/"));
    for entry in fs::read_dir(parent).staging("list", parent)? {
        let entry = entry.staging("list", parent)?;
        if !entry
            .file_name()
            .to_string_lossy()
            .starts_with(LINKED_PREFIX)
        {
            continue;
        }
        // Its maker may be removing it at this moment.
        let Ok(dir) = File::open(entry.path()) else {
            continue;
        };
        if let Ok(_lock) = Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
            drop(fs::remove_dir_all(entry.path()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_replace_nothing_and_go_away() {
        let root = tempfile::tempdir().unwrap();
        let images = root.path().join("checkpoint");
        fs::create_dir(&images).unwrap();
        fs::write(images.join("core-1.img"), b"core").unwrap();
        let orphan = root.path().join(".staged-1-0");
        fs::create_dir(&orphan).unwrap();

        let linked = LinkedImages::of(&images).unwrap();
        assert_eq!(fs::read(linked.path().join("core-1.img")).unwrap(), b"core");
        assert!(!orphan.try_exists().unwrap(), "left by a dead process");
        let second = LinkedImages::of(&images).unwrap();
        assert_ne!(linked.path(), second.path());
        drop((linked, second));
        let left: Vec<_> = fs::read_dir(root.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
        assert_eq!(fs::read(images.join("core-1.img")).unwrap(), b"core");
    }
}
