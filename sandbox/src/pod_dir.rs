//! The directory of one sandbox below `/run/transship/pods`; the crate's head draws it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use transship_checkpoint::manifest::{Container, IMAGES_DIR, NotRunning, check_name};
use transship_checkpoint::store::Checkpoint;

use transship_path_error::During as _;

use crate::error::SandboxError;
use crate::files::{make_dir, remove_tree, replace};
use crate::linked_images;
use crate::staged::{Request, STATE_FILE, Staged, State};

/// What has become of the migration that brings the containers of this sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// Images of its containers are missing, which whoever starts them pulls one after the other.
    LacksImages,
    /// It is on its way.
    Coming,
    /// All of it is in the store, and what it has is staged.
    Arrived,
    /// It does not come.
    GivenUp,
}

const ARRIVAL_FILE: &str = "arrival";
const NOT_RUNNING_FILE: &str = "not-running";
const WAITING_FILE: &str = "waiting";
const FILLED_PREFIX: &str = "filled-";
const ENDED_PREFIX: &str = "ended-";
pub(crate) const UID_FILE: &str = "uid";
const CHECKPOINT_FILE: &str = "checkpoint";

/// The directory of one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodDir {
    dir: PathBuf,
}

impl PodDir {
    /// The directory of the sandbox `id`, which need not exist.
    ///
    /// # Errors
    /// The id is not a plain name.
    pub fn at(run_dir: &Path, id: &str) -> Result<Self, SandboxError> {
        check_name("the sandbox's id", id)?;
        Ok(Self {
            dir: run_dir.join("pods").join(id),
        })
    }

    /// The sandbox that a restore is in.
    #[must_use]
    pub fn of_staged(staged: &Staged) -> Option<Self> {
        let dir = staged.path().parent()?.parent()?.to_path_buf();
        Some(Self { dir })
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
    pub fn make(&self) -> Result<(), SandboxError> {
        make_dir(&self.dir)
    }

    /// Remembers which pod it is the sandbox of.
    ///
    /// # Errors
    /// A system call failed.
    pub fn set_uid(&self, uid: &str) -> Result<(), SandboxError> {
        self.make()?;
        replace(&self.dir.join(UID_FILE), uid.as_bytes())
    }

    /// Remembers which checkpoint it is restored from, when no annotation names it.
    ///
    /// # Errors
    /// A system call failed.
    pub fn set_checkpoint(&self, name: &str) -> Result<(), SandboxError> {
        self.make()?;
        replace(&self.dir.join(CHECKPOINT_FILE), name.as_bytes())
    }

    /// What [`Self::set_checkpoint`] was given.
    #[must_use]
    pub fn checkpoint(&self) -> Option<String> {
        fs::read_to_string(self.dir.join(CHECKPOINT_FILE)).ok()
    }

    /// Whether anything is staged, held or failed here.
    #[must_use]
    pub fn has_restores(&self) -> bool {
        let restores = fs::read_dir(self.dir.join("restore"));
        restores.is_ok_and(|mut it| it.next().is_some())
    }

    /// Waits until no other restore changes this sandbox.
    ///
    /// # Errors
    /// A system call failed.
    pub fn lock(&self) -> Result<Flock<File>, SandboxError> {
        let path = self.dir.join("lock");
        loop {
            self.make()?;
            let file = File::create(&path).during("create", &path)?;
            let lock = Flock::lock(file, FlockArg::LockExclusive)
                .map_err(|(_, errno)| errno)
                .during("lock", &path)?;
            // Who had it before may have removed the directory.
            if lock.metadata().during("look at", &path)?.nlink() > 0 {
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
    ) -> Result<Staged, SandboxError> {
        check_name("the container's name", name)?;
        let images = checkpoint.dir.join(&container.name).join(IMAGES_DIR);
        // A checkpoint that has lost its images is told of when the sandbox comes up.
        fs::read_dir(&images).during("list", &images)?;
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
        let draft = Staged::at(new.clone());
        let fill = || {
            make_dir(&new)?;
            draft.write_request(&request)?;
            draft.set_state(&State::Staged)
        };
        let staged = Staged::at(parent.join(name));
        fill()
            .and_then(|()| {
                remove_tree(staged.path())?;
                Ok(fs::rename(&new, staged.path()).during("rename", &new)?)
            })
            .inspect_err(|_| drop(fs::remove_dir_all(&new)))?;
        Ok(staged)
    }

    /// What is staged under a name.
    ///
    /// # Errors
    /// The name is not a plain one, or a system call failed.
    pub fn staged(&self, name: &str) -> Result<Option<Staged>, SandboxError> {
        check_name("the container's name", name)?;
        let dir = self.dir.join("restore").join(name);
        let found = dir.join(STATE_FILE).try_exists().during("look for", &dir)?;
        Ok(found.then_some(Staged::at(dir)))
    }

    /// Says what has become of the migration that the sandbox waits for.
    ///
    /// # Errors
    /// A system call failed.
    pub fn set_arrival(&self, arrival: Arrival) -> Result<(), SandboxError> {
        self.make()?;
        let word = match arrival {
            Arrival::LacksImages => "lacks images\n",
            Arrival::Coming => "coming\n",
            Arrival::Arrived => "arrived\n",
            Arrival::GivenUp => "given up\n",
        };
        replace(&self.dir.join(ARRIVAL_FILE), word.as_bytes())
    }

    /// What has been said of it; none: nothing yet.
    ///
    /// # Errors
    /// A system call failed.
    pub fn arrival(&self) -> Result<Option<Arrival>, SandboxError> {
        let path = self.dir.join(ARRIVAL_FILE);
        match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            word => Ok(Some(match word.during("read", &path)?.as_str() {
                "lacks images\n" => Arrival::LacksImages,
                "coming\n" => Arrival::Coming,
                "arrived\n" => Arrival::Arrived,
                _ => Arrival::GivenUp,
            })),
        }
    }

    /// Remembers which containers the pod that a migration brings has beside those that move: init containers that have
    /// ended among them, which whoever makes the pod starts first.
    ///
    /// # Errors
    /// A system call failed.
    pub fn set_not_running(&self, all: &[NotRunning]) -> Result<(), SandboxError> {
        self.make()?;
        let json = serde_json::to_vec(all).expect("texts are JSON");
        replace(&self.dir.join(NOT_RUNNING_FILE), &json)
    }

    /// What [`Self::set_not_running`] was given; nothing as long as it was not.
    ///
    /// # Errors
    /// The file cannot be read, or is not one of ours.
    pub fn not_running(&self) -> Result<Option<Vec<NotRunning>>, SandboxError> {
        let path = self.dir.join(NOT_RUNNING_FILE);
        let json = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            json => json.during("read", &path)?,
        };
        let parsed = serde_json::from_slice(&json).map_err(io::Error::from);
        Ok(Some(parsed.during("parse", &path)?))
    }

    /// Says that a start of one of its containers waits for the migration, as long as what is given back lives.
    ///
    /// # Errors
    /// A system call failed.
    pub fn wait_for_arrival(&self) -> Result<Flock<File>, SandboxError> {
        self.make()?;
        let path = self.dir.join(WAITING_FILE);
        let file = File::create(&path).during("create", &path)?;
        let lock = Flock::lock(file, FlockArg::LockShared).map_err(|(_, errno)| errno);
        Ok(lock.during("lock", &path)?)
    }

    /// Whether a start waits so.
    ///
    /// # Errors
    /// A system call failed.
    pub fn is_waited_for(&self) -> Result<bool, SandboxError> {
        let path = self.dir.join(WAITING_FILE);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            file => file.during("open", &path)?,
        };
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(_) => Ok(false),
            Err((_, Errno::EWOULDBLOCK)) => Ok(true),
            Err((_, errno)) => Ok(Err(errno).during("lock", &path)?),
        }
    }

    /// Whether the shared directory that is in `file` of the checkpoint has its content.
    ///
    /// # Errors
    /// A system call failed.
    pub fn is_filled(&self, file: &str) -> Result<bool, SandboxError> {
        let path = self.dir.join(format!("{FILLED_PREFIX}{file}"));
        Ok(path.try_exists().during("look for", &path)?)
    }

    /// Remembers that it has.
    ///
    /// # Errors
    /// A system call failed.
    pub fn set_filled(&self, file: &str) -> Result<(), SandboxError> {
        self.make()?;
        replace(&self.dir.join(format!("{FILLED_PREFIX}{file}")), b"")
    }

    /// Whether the container `name` of the checkpoint has ended again in this sandbox.
    ///
    /// # Errors
    /// The name is not a plain one, or a system call failed.
    pub fn has_ended(&self, name: &str) -> Result<bool, SandboxError> {
        check_name("the container's name", name)?;
        let path = self.dir.join(format!("{ENDED_PREFIX}{name}"));
        Ok(path.try_exists().during("look for", &path)?)
    }

    /// Remembers that it has.
    ///
    /// # Errors
    /// The name is not a plain one, or a system call failed.
    pub fn set_ended(&self, name: &str) -> Result<(), SandboxError> {
        check_name("the container's name", name)?;
        self.make()?;
        replace(&self.dir.join(format!("{ENDED_PREFIX}{name}")), b"")
    }

    /// Names of the restores that no attempt has been made at, or whose attempt was taken back.
    ///
    /// # Errors
    /// A system call failed.
    pub fn waiting(&self) -> Result<Vec<String>, SandboxError> {
        let dir = self.dir.join("restore");
        let mut waiting = Vec::new();
        for entry in fs::read_dir(&dir).during("list", &dir)? {
            let name = entry.during("list", &dir)?.file_name();
            if let Some(name) = name.to_str().filter(|name| !name.starts_with(".new-"))
                && let Some(staged) = self.staged(name)?
                && staged.state()? == State::Staged
            {
                waiting.push(name.to_owned());
            }
        }
        Ok(waiting)
    }

    /// The first processes of containers that are held, with the moments when they started.
    #[must_use]
    pub fn holders(&self) -> Vec<(i32, u64)> {
        let restores = fs::read_dir(self.dir.join("restore"));
        restores
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| Staged::at(entry.path()).holder())
            .collect()
    }

    /// Removes everything of this sandbox, pins first. It is no error when there is nothing.
    ///
    /// # Errors
    /// A system call failed.
    pub fn remove(&self) -> Result<(), SandboxError> {
        self.unpin()?;
        for entry in fs::read_dir(self.dir.join("restore")).into_iter().flatten() {
            let entry = entry.during("list", &self.dir)?;
            // The checkpoint may have gone before the pod.
            if let Ok(request) = Staged::at(entry.path()).request() {
                drop(linked_images::remove_orphans(&request.images));
            }
        }
        remove_tree(&self.dir)
    }

    /// Removes everything of a container outside of pods that is there no more. False when somebody restores it.
    ///
    /// # Errors
    /// A system call failed.
    pub fn remove_unless_restored(&self) -> Result<bool, SandboxError> {
        let mut claims = Vec::new();
        for entry in fs::read_dir(self.dir.join("restore")).into_iter().flatten() {
            let entry = entry.during("list", &self.dir)?;
            match Staged::at(entry.path()).claim() {
                Ok(claim) => claims.push(claim),
                Err(SandboxError::Busy { .. }) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        self.remove()?;
        Ok(true)
    }

    /// Removes the restore of a container outside of pods that nobody waits for any more. In a pod its next container may.
    fn remove_forgotten(&self) -> Result<(), SandboxError> {
        let Some(id) = self.dir.file_name().and_then(|id| id.to_str()) else {
            return Ok(());
        };
        let Some(staged) = self.staged(id)?.filter(Staged::is_forgotten) else {
            return Ok(());
        };
        let _claim = staged.claim()?;
        self.remove()
    }

    /// Removes the directory if nothing is in it but its lock.
    ///
    /// # Errors
    /// A system call failed.
    pub fn remove_if_empty(&self) -> Result<(), SandboxError> {
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
                Err(error) => return Ok(Err(error).during("remove", self.dir.join(entry))?),
            }
        }
        remove_tree(&self.dir)
    }
}

/// Removes all restores that nobody waits for any more. One that cannot be removed is left.
pub(crate) fn remove_forgotten(run_dir: &Path) {
    let pods = fs::read_dir(run_dir.join("pods")).into_iter().flatten();
    for pod in pods.flatten() {
        drop(PodDir { dir: pod.path() }.remove_forgotten());
    }
}

#[cfg(test)]
#[path = "pod_dir_tests.rs"]
mod tests;
