//! The image directory for one restore: hard links, so that no byte is copied and an edited image
//! can stand in the place of the original.
//!
//! ```text
//! .../checkpoint/             the images, never written to
//! .../memory-1/, memory-2/    of a migration: images of memory that those build on
//! .../.staged-<pid>-<n>/      links to them, edited ones beside; locked (flock) while in use
//!        parent/              links to those of the last memory-<n>
//!          parent/            ... of the one before
//! ```
//!
//! Symbolic links would not do: CRIU opens a part of the images (`pagemap-*.img`) when the task is
//! in the mount namespace of the container already, where a path of the host leads nowhere. For
//! hard links the directory must be on the file system of the images, hence next to them.
//!
//! Who has written the images may have put links to files of the node among them, or a FIFO: only
//! regular files are taken.

use std::ffi::{CString, OsStr};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, Flock, FlockArg, OFlag, open};
use nix::sys::stat::{Mode, SFlag, fstatat};
use nix::unistd::linkat;

use transship_checkpoint::criu_images::file_names::PARENT_DIR;
use transship_checkpoint::manifest::{LINKED_PREFIX, MEMORY_DIR};

use transship_path_error::During as _;

use crate::error::SandboxError;

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
    pub fn of(from: &Path) -> Result<Self, SandboxError> {
        let linked = Self::alone(from)?;
        linked.fill_parents(&from.canonicalize().during("find", from)?)?;
        Ok(linked)
    }

    /// The same of images that build on nothing beside them: those of containerd's own checkpoints lie where everybody may
    /// write.
    ///
    /// # Errors
    /// A system call failed; nothing is left then.
    pub fn alone(from: &Path) -> Result<Self, SandboxError> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let from = from.canonicalize().during("find", from)?;
        remove_orphans(&from)?;
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = from.with_file_name(format!("{LINKED_PREFIX}{}-{count}", std::process::id()));
        DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .during("create", &dir)?;
        let lock = File::open(&dir).during("open", &dir)?;
        let lock = Flock::lock(lock, FlockArg::LockExclusive)
            .map_err(|(_, errno)| io::Error::from(errno))
            .during("lock", &dir)?;
        let linked = Self { dir, _lock: lock };
        fill(&linked.dir, &from)?;
        Ok(linked)
    }

    /// What they build on, as CRIU looks for it.
    fn fill_parents(&self, from: &Path) -> Result<(), SandboxError> {
        let memory = (1_u32..)
            .map(|number| from.with_file_name(format!("{MEMORY_DIR}{number}")))
            .take_while(|memory| memory.symlink_metadata().is_ok_and(|it| it.is_dir()));
        let mut dir = self.dir.clone();
        // A migration makes as many as it has rounds.
        for memory in memory.collect::<Vec<_>>().iter().rev() {
            dir.push(PARENT_DIR);
            DirBuilder::new()
                .mode(0o700)
                .create(&dir)
                .during("create", &dir)?;
            fill(&dir, memory)?;
        }
        Ok(())
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.dir
    }
}

/// Makes links in `dir` to all that is in `from`.
fn fill(dir: &Path, from: &Path) -> Result<(), SandboxError> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut images = Dir::open(from, flags, Mode::empty()).during("list", from)?;
    let names = images.iter().map(|entry| Ok(entry?.file_name().to_owned()));
    let names = names.collect::<Result<Vec<CString>, Errno>>();
    let links = File::open(dir).during("open", dir)?;
    for name in names.during("list", from)? {
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let path = from.join(OsStr::from_bytes(name.to_bytes()));
        // Of a symbolic link this makes another name for the link itself.
        let no_follow = AtFlags::empty();
        linkat(&images, name.as_c_str(), &links, name.as_c_str(), no_follow)
            .or_else(|errno| match errno {
                // Nobody can have another name for a directory.
                Errno::EPERM => Ok(()),
                errno => Err(errno),
            })
            .during("link", &path)?;
        // The link is in a directory that nobody else writes to: it is looked at, not the name
        // where others may.
        let found = fstatat(&links, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW);
        let regular =
            found.is_ok_and(|stat| stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFREG.bits());
        if !regular {
            return Err(SandboxError::Damaged {
                path,
                what: "an image is a regular file".to_owned(),
            });
        }
    }
    Ok(())
}

impl Drop for LinkedImages {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next restore from these images.
        drop(fs::remove_dir_all(&self.dir));
    }
}

/// Removes the directories of links to the images in `from` that a killed process has left.
///
/// # Errors
/// The directory cannot be listed.
pub fn remove_orphans(from: &Path) -> Result<(), SandboxError> {
    let parent = from.parent().unwrap_or(Path::new("/"));
    for entry in fs::read_dir(parent).during("list", parent)? {
        let entry = entry.during("list", parent)?;
        if !entry
            .file_name()
            .to_string_lossy()
            .starts_with(LINKED_PREFIX)
        {
            continue;
        }
        // Its maker may be removing it at this moment. What is no directory is somebody else's: beside containerd's own
        // checkpoints everybody may write.
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let Ok(dir) = open(&entry.path(), flags, Mode::empty()).map(File::from) else {
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
    fn what_lies_beside_containerds_images_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let images = root.path().join("ctrd-checkpoint1");
        fs::create_dir(&images).unwrap();
        fs::write(images.join("core-1.img"), b"core").unwrap();
        // Whoever waits for a writer waits for ever.
        nix::unistd::mkfifo(&root.path().join(".staged-x"), Mode::S_IRWXU).unwrap();
        fs::create_dir_all(root.path().join("memory-1/x")).unwrap();
        std::os::unix::fs::symlink(&images, root.path().join(".staged-y")).unwrap();
        let linked = LinkedImages::alone(&images).unwrap();
        assert_eq!(fs::read_dir(linked.path()).unwrap().count(), 1);
        assert!(images.join("core-1.img").symlink_metadata().is_ok());
        LinkedImages::of(&images).unwrap_err();
    }

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

    /// CRIU would read the host's file as the memory of a container, and the front write to it.
    #[test]
    fn what_is_no_regular_file_is_refused() {
        type Make = fn(&Path);
        let makes: [Make; 4] = [
            |path| std::os::unix::fs::symlink("/etc/shadow", path).unwrap(),
            |path| std::os::unix::fs::symlink("core-1.img", path).unwrap(),
            |path| nix::unistd::mkfifo(path, Mode::S_IRWXU).unwrap(),
            |path| fs::create_dir(path).unwrap(),
        ];
        for make in makes {
            let root = tempfile::tempdir().unwrap();
            let images = root.path().join("checkpoint");
            fs::create_dir(&images).unwrap();
            fs::write(images.join("core-1.img"), b"core").unwrap();
            make(&images.join("pages-1.img"));
            let error = LinkedImages::of(&images).unwrap_err().to_string();
            assert!(
                error.ends_with("pages-1.img is damaged: an image is a regular file"),
                "{error}"
            );
            assert_eq!(
                fs::read_dir(root.path()).unwrap().count(),
                1,
                "nothing is left"
            );
        }
    }
}
