//! What is prepared for a sandbox and the restores into it.
//!
//! ```text
//! /run/transship/pods/<sandbox id>/      PodDir; a container without sandbox is its own
//!     lock                               flock: held while a restore changes the sandbox
//!     ns/{net,ipc,uts,pid,user,cgroup}   namespaces of the sandbox, bind mounted
//!     filled-<file>                      a shared directory that has its content, see shared_dirs
//!     ipc.json                           System V objects that restores have put into ns/ipc
//!     restore/<container>/               Staged; locked (flock) while it is being restored
//!         state                          staged | restored | failed; a second line says why
//!         restore.json                   Request
//!         owner                          name of the pod's container that it is restored for
//! ```
//!
//! ```text
//!            stage                 restore
//!   nothing ------> staged ------------------> restored     a checkpoint is consumed once:
//!                     |  ^                                  the next create starts cold
//!              failure|  |another attempt: no task has run
//!                     v  |
//!                    failed
//! ```
//!
//! `/run` is empty after a boot, as are the sandboxes; nothing here has to survive one.

mod consumed;
mod images;
mod ipc_record;
mod pins;
mod sysv_objects;

pub use consumed::{is_consumed_by, mark_consumed_by};
pub use images::LinkedImages;
pub use pins::{live_ipc_sysctls, live_network_namespace, live_uts_names, paths_of_process};
pub use sysv_objects::LiveIpc;

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use transship_checkpoint::criu_images::ImageError;
use transship_checkpoint::criu_options::CriuOptions;
use transship_checkpoint::manifest::{Container, IMAGES_DIR, ManifestError, check_name};
use transship_checkpoint::store::Checkpoint;

/// Where staged restores and pinned namespaces are.
pub const DEFAULT_RUN_DIR: &str = "/run/transship";
const STATE_FILE: &str = "state";
const REQUEST_FILE: &str = "restore.json";
const OWNER_FILE: &str = "owner";
const FILLED_PREFIX: &str = "filled-";

/// A failure to stage or to find what is staged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StageError {
    /// A name that could lead elsewhere.
    #[error(transparent)]
    Name(#[from] ManifestError),
    /// An image of CRIU that cannot be edited.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The same container is being restored by another process.
    #[error("{path} is being restored by another process")]
    Busy {
        /// The staged restore.
        path: PathBuf,
    },
    /// Two containers of a pod want the same one.
    #[error(
        "the container {container:?} of the checkpoint {checkpoint:?} is restored as {owner:?} of \
         this pod, so {asker:?} cannot be it, too"
    )]
    Twice {
        /// Name of the checkpoint.
        checkpoint: String,
        /// The container in it.
        container: String,
        /// Who has it.
        owner: String,
        /// Who asks for it.
        asker: String,
    },
    /// A file in the staged restore that this program has not written.
    #[error("{path} is damaged: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A system call failed.
    #[error("cannot {act} {path}")]
    Io {
        /// The act.
        act: &'static str,
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

pub(crate) trait StageContext<T> {
    fn staging(self, act: &'static str, path: impl AsRef<Path>) -> Result<T, StageError>;
}

impl<T, E: Into<io::Error>> StageContext<T> for Result<T, E> {
    fn staging(self, act: &'static str, path: impl AsRef<Path>) -> Result<T, StageError> {
        self.map_err(|error| StageError::Io {
            act,
            path: path.as_ref().to_path_buf(),
            source: error.into(),
        })
    }
}

/// The directory of one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodDir {
    dir: PathBuf,
}

/// How far a staged restore is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Ready.
    Staged,
    /// Done: the checkpoint is consumed.
    Restored,
    /// The last attempt failed, for this reason.
    Failed(String),
}

/// What to restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// The checkpoint's name.
    pub checkpoint: String,
    /// The container in it.
    pub container: String,
    /// The images as they were dumped.
    pub images: PathBuf,
    /// CRIU's options of the dump.
    pub criu: CriuOptions,
}

/// One staged restore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Staged {
    dir: PathBuf,
}

impl PodDir {
    /// The directory of the sandbox `id`, which need not exist.
    ///
    /// # Errors
    /// The id is not a plain name.
    pub fn at(run_dir: &Path, id: &str) -> Result<Self, StageError> {
        check_name("the sandbox's id", id)?;
        Ok(Self {
            dir: run_dir.join("pods").join(id),
        })
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Makes the directory, for root only: the images hold another process's memory.
    ///
    /// # Errors
    /// A system call failed.
    pub fn make(&self) -> Result<(), StageError> {
        make_dir(&self.dir)
    }

    /// Waits until no other restore changes this sandbox.
    ///
    /// # Errors
    /// A system call failed.
    pub fn lock(&self) -> Result<Flock<File>, StageError> {
        let path = self.dir.join("lock");
        loop {
            self.make()?;
            let file = File::create(&path).staging("create", &path)?;
            let lock = Flock::lock(file, FlockArg::LockExclusive)
                .map_err(|(_, errno)| errno)
                .staging("lock", &path)?;
            // Who had it before may have removed the directory.
            if lock.metadata().staging("look at", &path)?.nlink() > 0 {
                return Ok(lock);
            }
        }
    }

    /// Stages a container of a checkpoint, in the place of what is staged under this name.
    ///
    /// # Errors
    /// A system call failed; what was staged before is as it was.
    pub fn stage(
        &self,
        name: &str,
        checkpoint: &Checkpoint,
        container: &Container,
    ) -> Result<Staged, StageError> {
        check_name("the container's name", name)?;
        let images = checkpoint.dir.join(&container.name).join(IMAGES_DIR);
        // A checkpoint that has lost its images is told of when the sandbox comes up.
        fs::read_dir(&images).staging("list", &images)?;
        let parent = self.dir.join("restore");
        make_dir(&parent)?;
        let new = parent.join(format!(".new-{}", std::process::id()));
        remove_tree(&new)?;
        let request = Request {
            checkpoint: checkpoint.manifest.name.clone(),
            container: container.name.clone(),
            images,
            criu: container.criu.clone(),
        };
        let draft = Staged { dir: new.clone() };
        let fill = || {
            make_dir(&new)?;
            draft.write_request(&request)?;
            draft.set_state(&State::Staged)
        };
        let staged = Staged {
            dir: parent.join(name),
        };
        fill()
            .and_then(|()| {
                remove_tree(&staged.dir)?;
                fs::rename(&new, &staged.dir).staging("rename", &new)
            })
            .inspect_err(|_| drop(fs::remove_dir_all(&new)))?;
        Ok(staged)
    }

    /// What is staged under a name.
    ///
    /// # Errors
    /// The name is not a plain one, or a system call failed.
    pub fn staged(&self, name: &str) -> Result<Option<Staged>, StageError> {
        check_name("the container's name", name)?;
        let dir = self.dir.join("restore").join(name);
        let found = dir
            .join(STATE_FILE)
            .try_exists()
            .staging("look for", &dir)?;
        Ok(found.then_some(Staged { dir }))
    }

    /// Whether the shared directory that is in `file` of the checkpoint has its content.
    ///
    /// # Errors
    /// A system call failed.
    pub fn is_filled(&self, file: &str) -> Result<bool, StageError> {
        let path = self.dir.join(format!("{FILLED_PREFIX}{file}"));
        path.try_exists().staging("look for", &path)
    }

    /// Remembers that it has.
    ///
    /// # Errors
    /// A system call failed.
    pub fn set_filled(&self, file: &str) -> Result<(), StageError> {
        self.make()?;
        replace(&self.dir.join(format!("{FILLED_PREFIX}{file}")), b"")
    }

    /// Names of the restores that no attempt has been made at.
    ///
    /// # Errors
    /// A system call failed.
    pub fn waiting(&self) -> Result<Vec<String>, StageError> {
        let dir = self.dir.join("restore");
        let mut waiting = Vec::new();
        for entry in fs::read_dir(&dir).staging("list", &dir)? {
            let name = entry.staging("list", &dir)?.file_name();
            if let Some(name) = name.to_str().filter(|name| !name.starts_with(".new-"))
                && let Some(staged) = self.staged(name)?
                && staged.state()? == State::Staged
            {
                waiting.push(name.to_owned());
            }
        }
        Ok(waiting)
    }

    /// Removes everything of this sandbox, pins first. It is no error when there is nothing.
    ///
    /// # Errors
    /// A system call failed.
    pub fn remove(&self) -> Result<(), StageError> {
        self.unpin()?;
        for entry in fs::read_dir(self.dir.join("restore")).into_iter().flatten() {
            let entry = entry.staging("list", &self.dir)?;
            // The checkpoint may have gone before the pod.
            if let Ok(request) = Staged::at(entry.path()).request() {
                drop(images::remove_orphans(&request.images));
            }
        }
        remove_tree(&self.dir)
    }

    /// Removes the directory if nothing is in it but its lock.
    ///
    /// # Errors
    /// A system call failed.
    pub fn remove_if_empty(&self) -> Result<(), StageError> {
        if self.has_ipc_record()? {
            return Ok(());
        }
        for entry in ["restore", "ns"] {
            match fs::remove_dir(self.dir.join(entry)) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if error.raw_os_error() == Some(Errno::ENOTEMPTY as i32) => {
                    return Ok(());
                }
                Err(error) => return Err(error).staging("remove", self.dir.join(entry)),
            }
        }
        remove_tree(&self.dir)
    }
}

impl Staged {
    /// The staged restore at a path that a marker names.
    #[must_use]
    pub fn at(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// How far it is.
    ///
    /// # Errors
    /// The file cannot be read, or is not one of ours.
    pub fn state(&self) -> Result<State, StageError> {
        let path = self.dir.join(STATE_FILE);
        let text = fs::read_to_string(&path).staging("read", &path)?;
        let (word, reason) = text.split_once('\n').unwrap_or((&text, ""));
        match word {
            "staged" => Ok(State::Staged),
            "restored" => Ok(State::Restored),
            "failed" => Ok(State::Failed(reason.trim_end().to_owned())),
            other => Err(StageError::Damaged {
                path,
                what: format!("state {other:?}"),
            }),
        }
    }

    /// Changes the state, in one step.
    ///
    /// # Errors
    /// A system call failed; the state is as it was.
    pub fn set_state(&self, state: &State) -> Result<(), StageError> {
        let text = match state {
            State::Staged => "staged\n".to_owned(),
            State::Restored => "restored\n".to_owned(),
            State::Failed(reason) => format!("failed\n{reason}\n"),
        };
        replace(&self.dir.join(STATE_FILE), text.as_bytes())
    }

    /// Remembers for which container of the pod it is restored, the first time that one asks.
    ///
    /// # Errors
    /// [`StageError::Twice`] when it is for another one, or a system call failed.
    pub fn reserve_for(&self, container: &str) -> Result<(), StageError> {
        let path = self.dir.join(OWNER_FILE);
        match fs::read_to_string(&path) {
            Ok(owner) if owner == container => Ok(()),
            Ok(owner) => Err(StageError::Twice {
                checkpoint: self.request()?.checkpoint,
                container: self.request()?.container,
                owner,
                asker: container.to_owned(),
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                replace(&path, container.as_bytes())
            }
            Err(error) => Err(error).staging("read", &path),
        }
    }

    /// What to restore.
    ///
    /// # Errors
    /// The file cannot be read, or is not one of ours.
    pub fn request(&self) -> Result<Request, StageError> {
        let path = self.dir.join(REQUEST_FILE);
        let json = fs::read(&path).staging("read", &path)?;
        serde_json::from_slice(&json).map_err(|error| StageError::Damaged {
            path,
            what: error.to_string(),
        })
    }

    fn write_request(&self, request: &Request) -> Result<(), StageError> {
        let json = serde_json::to_vec_pretty(request).expect("strings and numbers are JSON");
        replace(&self.dir.join(REQUEST_FILE), &json)
    }

    /// Takes the restore for this process, until the lock is dropped or the process ends.
    ///
    /// # Errors
    /// [`StageError::Busy`], or a system call failed.
    pub fn claim(&self) -> Result<Flock<File>, StageError> {
        let dir = File::open(&self.dir).staging("open", &self.dir)?;
        match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(lock),
            Err((_, Errno::EWOULDBLOCK)) => Err(StageError::Busy {
                path: self.dir.clone(),
            }),
            Err((_, errno)) => Err(errno).staging("lock", &self.dir),
        }
    }

    /// Removes it.
    ///
    /// # Errors
    /// A system call failed.
    pub fn remove(&self) -> Result<(), StageError> {
        remove_tree(&self.dir)
    }
}

pub(crate) fn make_dir(dir: &Path) -> Result<(), StageError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .staging("create", dir)
}

pub(crate) fn remove_tree(dir: &Path) -> Result<(), StageError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).staging("remove", dir),
        _ => Ok(()),
    }
}

pub(crate) fn remove_file(path: &Path) -> Result<(), StageError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).staging("remove", path),
        _ => Ok(()),
    }
}

pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<(), StageError> {
    let new = path.with_extension(format!("new{}", std::process::id()));
    let write = || {
        let mut file = File::create(&new)?;
        file.write_all(bytes)?;
        fs::rename(&new, path)
    };
    write()
        .inspect_err(|_| drop(fs::remove_file(&new)))
        .staging("write", path)
}

#[cfg(test)]
mod tests;
