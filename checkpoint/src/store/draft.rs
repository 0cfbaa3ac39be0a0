//! A checkpoint in the making: a directory that gets its name when all of it is there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, OFlag, open};
use nix::sys::stat::Mode;
use transship_path_error::During as _;

use super::{Checkpoint, Store, StoreError};
use crate::manifest::{MANIFEST_FILE, Manifest};
use crate::sealed::{SEALED_FILE, Sealed};

/// A checkpoint in the making; removed when it is dropped without [`Draft::commit`].
#[derive(Debug)]
pub struct Draft {
    pub(super) dir: PathBuf,
    pub(super) target: PathBuf,
    pub(super) name: String,
    // Shows other processes that the draft has a maker.
    pub(super) _lock: Flock<File>,
    pub(super) committed: bool,
}

/// A directory for files that will take the place of others, which goes with this.
#[derive(Debug)]
pub struct Aside {
    pub(super) dir: PathBuf,
    pub(super) _lock: Flock<File>,
}

impl Aside {
    /// It.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next draft.
        drop(fs::remove_dir_all(&self.dir));
    }
}

/// Whether a checkpoint has to survive a power failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Everything is on the disk before the checkpoint gets its name.
    Synced,
    /// The checkpoint lives for one migration only.
    Ephemeral,
}

impl Draft {
    /// Where the files go.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the checkpoint will be.
    #[must_use]
    pub fn place(&self) -> &Path {
        &self.target
    }

    /// The name that the checkpoint will have.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The same, whose checkpoint gets another name: it was begun before its own was known.
    ///
    /// # Errors
    /// As [`Store::check_free`].
    pub fn renamed(mut self, store: &Store, name: &str) -> Result<Self, StoreError> {
        store.check_free(name)?;
        self.target = store.root().join(name);
        name.clone_into(&mut self.name);
        Ok(self)
    }

    /// Writes the manifest and gives the checkpoint its name.
    ///
    /// # Errors
    /// A failing system call; the draft is gone then.
    pub fn commit(
        self,
        manifest: Manifest,
        durability: Durability,
    ) -> Result<Checkpoint, StoreError> {
        let json = manifest.to_json();
        self.commit_as(manifest, &json, durability)
    }

    /// The same with the manifest's bytes as they came, which a signature is of.
    ///
    /// # Errors
    /// A failing system call; the draft is gone then.
    pub fn commit_as(
        self,
        manifest: Manifest,
        json: &[u8],
        durability: Durability,
    ) -> Result<Checkpoint, StoreError> {
        let dir = self.appear(MANIFEST_FILE, json, durability)?;
        Ok(Checkpoint {
            dir,
            manifest,
            sealed: None,
        })
    }

    /// Makes a sealed checkpoint of the package in it.
    ///
    /// # Errors
    /// A failing system call; the draft is gone then.
    pub fn commit_sealed(self, sealed: Sealed) -> Result<Checkpoint, StoreError> {
        let dir = self.appear(SEALED_FILE, &sealed.to_json(), Durability::Synced)?;
        Ok(Checkpoint {
            dir,
            manifest: sealed.head.clone(),
            sealed: Some(Box::new(sealed)),
        })
    }

    /// Writes the last file, and gives the directory its name.
    fn appear(
        mut self,
        last: &str,
        json: &[u8],
        durability: Durability,
    ) -> Result<PathBuf, StoreError> {
        let path = self.dir.join(last);
        let mut open = OpenOptions::new();
        open.write(true).create_new(true).mode(0o600);
        open.open(&path)
            .and_then(|mut file| file.write_all(json))
            .during("write", &path)?;
        if durability == Durability::Synced {
            let dir = File::open(&self.dir).during("open", &self.dir)?;
            nix::unistd::syncfs(&dir).during("sync", &self.dir)?;
        }
        match fs::rename(&self.dir, &self.target) {
            // Somebody who has begun at the same time was faster.
            Err(error)
                if [ErrorKind::DirectoryNotEmpty, ErrorKind::AlreadyExists]
                    .contains(&error.kind()) =>
            {
                return Err(StoreError::Exists {
                    name: self.name.clone(),
                });
            }
            renamed => renamed.during("rename", &self.dir)?,
        }
        self.committed = true;
        if durability == Durability::Synced {
            let root = self.target.parent().unwrap_or(Path::new("/"));
            File::open(root)
                .and_then(|dir| dir.sync_all())
                .during("sync", root)?;
        }
        Ok(self.target.clone())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.committed {
            // A dump that was cut off may make one more file meanwhile. What cannot be removed now is
            // removed by the next draft.
            let gone = |_| fs::remove_dir_all(&self.dir).is_ok();
            let _ = (0..3).any(gone);
        }
    }
}

/// For a process that works in a draft, as a descriptor that it has as long as it lives: until then nobody but the draft's maker
/// removes it, also when that one is killed.
///
/// # Errors
/// The draft is gone, or a failing system call.
pub fn open_to_work(draft: &Path) -> io::Result<File> {
    let dir = open_own(draft)?;
    dir.lock_shared()?;
    match dir.metadata()?.nlink() {
        0 => Err(io::Error::from(io::ErrorKind::NotFound)),
        _ => Ok(dir),
    }
}

/// Whether a draft has its maker, or somebody who works in it; also where that cannot be told.
#[must_use]
pub fn is_worked_in(draft: &Path) -> bool {
    match open_own(draft) {
        Ok(dir) => dir.try_lock().is_err(),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

/// Opens a directory that is nobody else's: in that of others it may be anything, which opening waits for.
pub(super) fn open_own(dir: &Path) -> io::Result<File> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let opened = File::from(open(dir, flags, Mode::empty())?);
    let metadata = opened.metadata()?;
    let is_own = metadata.uid() == nix::unistd::geteuid().as_raw() && metadata.mode() & 0o077 == 0;
    match is_own {
        true => Ok(opened),
        false => Err(io::ErrorKind::PermissionDenied.into()),
    }
}
