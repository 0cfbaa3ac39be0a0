//! Directories in memory: for what must not come onto a disk in clear, which is the dump of a checkpoint that is sealed,
//! and a sealed checkpoint as long as it is opened; and for the files of a migration as long as it lasts.
//!
//! ```text
//! /run/transship/opened/<key>/   that of a sealed checkpoint (Sealed::opened_key), dump-<pid>-<time>-<n>, or migration-<id>
//!     lock    flock: shared by who uses it, exclusive by who removes it
//!     made    flock: by who fills it
//!     files/  a tmpfs, 0700; a store of checkpoints. One that is sealed is never swapped out (noswap, Linux 6.4)
//! ```
//!
//! A process that is killed leaves it mounted. Whoever makes the next one, `transship recover`, `transship serve`, and the
//! end of each restore remove what nobody uses: no process holds the lock, no restore is staged with its images, none
//! reads them, and no runtime works in a draft there that its maker has left. The key is a digest of what was opened and
//! its name, so nobody meets another checkpoint.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::SystemTime;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use transship_checkpoint::annotations::is_of_migration;
use transship_checkpoint::manifest::check_name;
use transship_checkpoint::store::{DEFAULT_OPENED, OPENED_FILES, Store};
use transship_path_error::During as _;

use crate::error::SandboxError;
use crate::files::{make_dir, remove_tree, unmount_all};
use crate::pod_dir::remove_forgotten;
use crate::staged::Staged;

const LOCK: &str = "lock";
const MADE: &str = "made";

/// Options of the tmpfs, the best ones first. What is written in large pieces gets large pages (tmpfs.rst, from Linux 6.14
/// on), none of them larger than the file: to write it, to read it and to give it back then takes a sixth of the time.
const MOUNT_WAYS: &[&str] = &[
    "noswap,huge=within_size,",
    "noswap,",
    "huge=within_size,",
    "",
];
/// How many of them are never swapped out.
const NEVER_SWAPPED: usize = 2;

/// What memory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holds {
    /// What may not be in clear on a disk: the kernel never writes it to its swap.
    Sealed,
    /// The dump of a migration, which would be on the disk otherwise; CRIU runs its script there.
    Dump,
    /// What arrives of a migration.
    Arrival,
}

/// One of them, kept from being removed.
#[derive(Debug)]
pub struct InMemory {
    dir: PathBuf,
    in_use: Flock<File>,
}

impl InMemory {
    /// That with this key below `opened`; made when it is not there.
    ///
    /// # Errors
    /// A key that could lead elsewhere, or a system call failed.
    pub fn of(opened: &Path, key: &str) -> Result<Self, SandboxError> {
        check_name("the key", key)?;
        let dir = opened.join(key);
        let path = dir.join(LOCK);
        loop {
            make_dir(&dir)?;
            let file = match open_lock(&path) {
                // Somebody removes it at this moment.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                file => file.during("open", &path)?,
            };
            let lock = Flock::lock(file, FlockArg::LockShared)
                .map_err(|(_, errno)| errno)
                .during("lock", &path)?;
            if lock.metadata().during("look at", &path)?.nlink() > 0 {
                return Ok(Self { dir, in_use: lock });
            }
        }
    }

    /// A new one for a dump.
    ///
    /// # Errors
    /// As [`Self::of`].
    pub fn for_dump(opened: &Path) -> Result<Self, SandboxError> {
        // Not that of another process of this number, which may have been killed while a runtime works there.
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let (process, time) = (std::process::id(), time.unwrap_or_default().as_nanos());
        Self::of(opened, &format!("dump-{process}-{time:x}-{}", unique()))
    }

    /// The checkpoints in it.
    #[must_use]
    pub fn store(&self) -> Store {
        Store::at(self.dir.join(OPENED_FILES))
    }

    /// Held by who fills it: others wait.
    ///
    /// # Errors
    /// A system call failed.
    pub fn lock_to_fill(&self) -> Result<Flock<File>, SandboxError> {
        let path = self.dir.join(MADE);
        let file = open_lock(&path).during("open", &path)?;
        Ok(Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| errno)
            .during("lock", &path)?)
    }

    /// Mounts memory there, `bytes` of it at most; who calls it fills it. What a killed process has left there goes.
    ///
    /// # Errors
    /// Somebody else uses it, unless it is that of a sealed checkpoint, which he who [fills](Self::lock_to_fill) it mounts
    /// for all; [`SandboxError::Swapped`] where the kernel could write it to its swap; or a system call failed.
    pub fn mount(&self, bytes: u64, holds: Holds) -> Result<(), SandboxError> {
        let dir = self.dir.join(OPENED_FILES);
        if holds != Holds::Sealed {
            self.relock(FlockArg::LockExclusiveNonblock)?;
        }
        unmount_all(&dir);
        make_dir(&dir)?;
        let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        flags.set(MsFlags::MS_NOEXEC, holds != Holds::Dump);
        let mount = |options: &str| {
            let options = format!("{options}mode=0700,size={bytes}");
            mount(
                Some("transship"),
                &dir,
                Some("tmpfs"),
                flags,
                Some(options.as_str()),
            )
        };
        // The first that this kernel knows.
        let ways = match holds {
            Holds::Sealed => &MOUNT_WAYS[..NEVER_SWAPPED],
            Holds::Dump | Holds::Arrival => MOUNT_WAYS,
        };
        let mut tried = ways.iter().map(|options| mount(options));
        let mounted = tried.find(|mounted| *mounted != Err(Errno::EINVAL));
        match mounted.unwrap_or(Err(Errno::EINVAL)) {
            Err(Errno::EINVAL) if holds == Holds::Sealed => return Err(SandboxError::Swapped),
            mounted => mounted.during("mount memory at", &dir)?,
        }
        self.relock(FlockArg::LockShared)
    }

    /// Changes the lock. The kernel does not do it in one step: another may remove the directory in between.
    fn relock(&self, lock: FlockArg) -> Result<(), SandboxError> {
        let path = self.dir.join(LOCK);
        self.in_use.relock(lock).during("lock", &path)?;
        match self.in_use.metadata().during("look at", &path)?.nlink() {
            0 => Ok(Err(io::Error::from(io::ErrorKind::NotFound)).during("lock", &path)?),
            _ => Ok(()),
        }
    }

    /// Lets it go: it is removed unless somebody else uses it.
    ///
    /// # Errors
    /// A system call failed.
    pub fn leave(self, run_dir: &Path) -> Result<(), SandboxError> {
        let dir = self.dir.clone();
        drop(self);
        remove_unused(&dir, &staged_images(run_dir), |_| false)
    }
}

/// Whether these files have come with a migration, into memory.
#[must_use]
pub fn has_arrived(files: &Path) -> bool {
    let key = files
        .strip_prefix(DEFAULT_OPENED)
        .ok()
        .and_then(|below| below.iter().next());
    key.and_then(OsStr::to_str).is_some_and(is_of_migration)
}

/// Removes all that nobody uses. It is no error when there is nothing.
///
/// # Errors
/// The first that cannot be removed; the others are.
pub fn remove_all_unused(run_dir: &Path, opened: &Path) -> Result<(), SandboxError> {
    remove_forgotten(run_dir);
    let dirs = match all(opened) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        dirs => dirs.during("list", opened)?,
    };
    if dirs.is_empty() {
        return Ok(());
    }
    let images = staged_images(run_dir);
    let removed = dirs
        .iter()
        .map(|dir| remove_unused(dir, &images, Store::has_draft_in_use));
    removed.fold(Ok(()), Result::and)
}

/// Those that are nobody's any more, and in which a runtime still works whose caller was killed.
#[must_use]
pub fn left_to_runtimes(opened: &Path) -> Vec<PathBuf> {
    let mut dirs = all(opened).unwrap_or_default();
    dirs.retain(|dir| {
        let lock = File::open(dir.join(LOCK));
        lock.is_ok_and(|lock| lock.try_lock().is_ok())
            && Store::at(dir.join(OPENED_FILES)).has_draft_in_use()
    });
    dirs
}

fn all(opened: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(opened)?;
    Ok(entries.flatten().map(|entry| entry.path()).collect())
}

fn remove_unused(
    dir: &Path,
    staged: &[PathBuf],
    is_worked_in: impl Fn(&Store) -> bool,
) -> Result<(), SandboxError> {
    let path = dir.join(LOCK);
    let file = match open_lock(&path) {
        // Somebody has been faster.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file.during("open", &path)?,
    };
    let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
        return Ok(());
    };
    if lock.metadata().during("look at", &path)?.nlink() == 0
        || staged.iter().any(|images| images.starts_with(dir))
    {
        return Ok(());
    }
    let files = dir.join(OPENED_FILES);
    let checkpoints = Store::at(&files).list().map_err(Box::new)?;
    let is_read = |it: &transship_checkpoint::store::Checkpoint| it.is_being_restored();
    if checkpoints
        .iter()
        .any(|(_, it)| it.as_ref().is_ok_and(is_read))
    {
        return Ok(());
    }
    if is_worked_in(&Store::at(&files)) {
        return Ok(());
    }
    unmount_all(&files);
    // Under another name, so that who makes it anew meanwhile gets a directory of his own.
    let gone = dir.with_file_name(format!("gone-{}-{}", std::process::id(), unique()));
    fs::rename(dir, &gone).during("remove", dir)?;
    remove_tree(&gone)
}

/// A number that this process has not had.
fn unique() -> u32 {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    COUNT.fetch_add(1, Ordering::Relaxed)
}

fn open_lock(path: &Path) -> io::Result<File> {
    let mut open = OpenOptions::new();
    open.write(true).create(true).truncate(false).mode(0o600);
    open.open(path)
}

/// The images that restores wait for, or hold containers of.
fn staged_images(run_dir: &Path) -> Vec<PathBuf> {
    let requests = staged(run_dir).into_iter();
    requests.map(|request| request.images).collect()
}

/// What restores wait for, or hold containers of.
#[must_use]
pub fn staged(run_dir: &Path) -> Vec<crate::staged::Request> {
    let pods = fs::read_dir(run_dir.join("pods")).into_iter().flatten();
    let restores = pods.flatten().filter_map(|pod| {
        let restores = fs::read_dir(pod.path().join("restore"));
        restores.ok()
    });
    // One that was done in this moment is not there any more.
    let requests = restores.flatten().flatten();
    requests
        .filter_map(|restore| Staged::at(restore.path()).request().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::DirBuilderExt as _;

    use transship_checkpoint::store::open_to_work;

    use super::*;

    #[test]
    fn a_migration_is_told_from_what_is_opened() {
        let key = format!("migration-{}", "a".repeat(32));
        let images = |key: &str| {
            Path::new(DEFAULT_OPENED)
                .join(key)
                .join("files/x/web/checkpoint")
        };
        assert!(has_arrived(&images(&key)));
        assert!(!has_arrived(&images("migration-x")));
        assert!(!has_arrived(&images("0123abcd")));
        assert!(!has_arrived(
            &Path::new("/var/lib/transship/checkpoints").join(key)
        ));
    }

    fn is_mounted(dir: &Path) -> bool {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        mounts.contains(&format!(" {} ", dir.display()))
    }

    #[test]
    fn root_memory_goes_with_its_last_user_and_is_never_swapped() {
        let run = tempfile::tempdir().unwrap();
        let opened = run.path().join("opened");
        let one = InMemory::of(&opened, "key").unwrap();
        one.mount(1 << 20, Holds::Sealed).unwrap();
        let files = opened.join("key/files");
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let line = { mounts.lines() }.find(|line| line.contains(&*files.to_string_lossy()));
        assert!(
            line.is_some_and(|line| line.contains("noswap") && line.contains("mode=700")),
            "{line:?}"
        );
        let other = InMemory::of(&opened, "key").unwrap();
        fs::write(files.join("memory"), "secret").unwrap();
        one.leave(run.path()).unwrap();
        remove_all_unused(run.path(), &opened).unwrap();
        assert!(files.join("memory").is_file() && is_mounted(&files));
        // Who is killed leaves it, and has no lock.
        drop(other);
        assert!(is_mounted(&files));
        remove_all_unused(run.path(), &opened).unwrap();
        assert!(!is_mounted(&files));
        assert_eq!(fs::read_dir(&opened).unwrap().count(), 0);
    }

    /// A second offer of a migration, by somebody who has read its name.
    #[test]
    fn root_nobody_mounts_over_what_another_one_uses() {
        let run = tempfile::tempdir().unwrap();
        let opened = run.path().join("opened");
        let one = InMemory::of(&opened, "key").unwrap();
        one.mount(1 << 20, Holds::Arrival).unwrap();
        let memory = opened.join("key/files/memory");
        fs::write(&memory, "content").unwrap();
        let other = InMemory::of(&opened, "key").unwrap();
        let refused = other.mount(1 << 20, Holds::Arrival);
        assert_eq!(fs::read_to_string(&memory).unwrap(), "content");
        assert!(refused.is_err());
        drop(other);
        remove_all_unused(run.path(), &opened).unwrap();
        assert_eq!(fs::read_to_string(&memory).unwrap(), "content");
        // What a killed process has left is nobody's.
        drop(one);
        let next = InMemory::of(&opened, "key").unwrap();
        next.mount(1 << 20, Holds::Arrival).unwrap();
        assert!(!memory.try_exists().unwrap());
        next.leave(run.path()).unwrap();
        assert_eq!(fs::read_dir(&opened).unwrap().count(), 0);
    }

    /// A runtime whose caller was killed.
    #[test]
    fn root_what_somebody_works_in_stays() {
        let run = tempfile::tempdir().unwrap();
        let opened = run.path().join("opened");
        let memory = InMemory::for_dump(&opened).unwrap();
        memory.mount(1 << 20, Holds::Dump).unwrap();
        let (dir, draft) = (memory.dir.clone(), memory.store().root().join(".new-web.1"));
        fs::DirBuilder::new().mode(0o700).create(&draft).unwrap();
        let works = open_to_work(&draft).unwrap();
        drop(memory);
        remove_all_unused(run.path(), &opened).unwrap();
        assert!(is_mounted(&dir.join(OPENED_FILES)));
        assert_eq!(left_to_runtimes(&opened), [dir.as_path()]);
        drop(works);
        remove_all_unused(run.path(), &opened).unwrap();
        assert!(left_to_runtimes(&opened).is_empty() && !dir.is_dir());
    }

    #[test]
    fn root_what_a_restore_is_staged_with_stays() {
        let run = tempfile::tempdir().unwrap();
        let opened = run.path().join("opened");
        let one = InMemory::of(&opened, "key").unwrap();
        one.mount(1 << 20, Holds::Sealed).unwrap();
        let images = opened.join("key/files/web/c/checkpoint");
        fs::create_dir_all(&images).unwrap();
        let restore = run.path().join("pods/pod/restore/c");
        fs::create_dir_all(&restore).unwrap();
        let staged = Staged::at(restore.clone());
        staged
            .write_request(&crate::staged::Request {
                checkpoint: "web".into(),
                container: "c".into(),
                images: images.clone(),
                criu: Default::default(),
            })
            .unwrap();
        one.leave(run.path()).unwrap();
        assert!(images.is_dir());
        fs::remove_dir_all(restore).unwrap();
        remove_all_unused(run.path(), &opened).unwrap();
        assert!(!opened.join("key").is_dir());
    }

    #[test]
    fn root_what_cannot_be_removed_keeps_nothing_else() {
        let run = tempfile::tempdir().unwrap();
        let opened = run.path().join("opened");
        for key in ["a", "z"] {
            let one = InMemory::of(&opened, key).unwrap();
            one.mount(1 << 20, Holds::Sealed).unwrap();
        }
        // Whatever the order of names is, one comes behind it.
        fs::write(opened.join("m"), "no directory").unwrap();
        remove_all_unused(run.path(), &opened).unwrap_err();
        let left: Vec<_> = fs::read_dir(&opened).unwrap().flatten().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[test]
    fn a_key_leads_nowhere_else() {
        let run = tempfile::tempdir().unwrap();
        for key in ["../x", "", "a/b", ".."] {
            assert!(InMemory::of(run.path(), key).is_err(), "{key:?}");
        }
    }
}
