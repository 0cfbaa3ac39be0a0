//! One staged restore: a directory of some files.
//!
//! ```text
//! restore/<container>/
//!   state          staged | held | failed; a second line says in which bundle, or why
//!   restore.json   Request
//!   owner          name of the pod's container that it is restored for
//!   started        the bundle of the container that is held although it has been started
//!   once           Once: there is no second attempt
//!   holder         first process of the container that is held: PID START_TIME
//! ```
//!
//! ```text
//!            create (restore)            start
//!   staged -------------------> held -------------> removed, and recorded in `consumed`
//!     |  ^                       |                  the next create starts cold
//!     |  '-----------------------'
//!     |      delete: it has not run
//!     '--> failed --> another attempt, or a cold start
//! ```

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use transship_checkpoint::criu_options::CriuOptions;

use transship_path_error::During as _;

use crate::error::SandboxError;
use crate::files::{remove_tree, replace};

/// The command of the runtime front that lets a container go whose `start` has answered while its tasks are held,
/// because it came with a migration. No OCI runtime has it.
pub const RELEASE_COMMAND: &str = "transship-release";

pub(crate) const STATE_FILE: &str = "state";
const REQUEST_FILE: &str = "restore.json";
const OWNER_FILE: &str = "owner";
const HOLDER_FILE: &str = "holder";
const STARTED_FILE: &str = "started";
const ONCE_FILE: &str = "once";

/// How far a staged restore is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Ready.
    Staged,
    /// Restored by the create of the container in this bundle, which has not been started.
    Held(PathBuf),
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

/// The container that the receiver of a migration has made for this restore. It is started once: if that fails the source
/// goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Once {
    /// Its id. The receiver has seen that it is made of the layers that the source's is made of.
    pub id: String,
    /// Where its output goes, if that is a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<PathBuf>,
    /// Whether the receiver has filled its upperdir.
    #[serde(default)]
    pub is_filled: bool,
}

/// One staged restore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Staged {
    dir: PathBuf,
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
    pub fn state(&self) -> Result<State, SandboxError> {
        let path = self.dir.join(STATE_FILE);
        let text = fs::read_to_string(&path).during("read", &path)?;
        let (word, reason) = text.split_once('\n').unwrap_or((&text, ""));
        match word {
            "staged" => Ok(State::Staged),
            "held" => Ok(State::Held(reason.trim_end().into())),
            "failed" => Ok(State::Failed(reason.trim_end().to_owned())),
            other => Err(SandboxError::Damaged {
                path,
                what: format!("state {other:?}"),
            }),
        }
    }

    /// Changes the state, in one step.
    ///
    /// # Errors
    /// A system call failed; the state is as it was.
    pub fn set_state(&self, state: &State) -> Result<(), SandboxError> {
        let text = match state {
            State::Staged => "staged\n".to_owned(),
            State::Held(bundle) => format!("held\n{}\n", bundle.display()),
            State::Failed(reason) => format!("failed\n{reason}\n"),
        };
        replace(&self.dir.join(STATE_FILE), text.as_bytes())
    }

    /// Remembers the first process of the container that is held, and when it started, in clock
    /// ticks since boot. containerd may forget a container that its caller has given up.
    ///
    /// # Errors
    /// A system call failed.
    pub fn set_holder(&self, pid: i32, start_time: u64) -> Result<(), SandboxError> {
        let text = format!("{pid} {start_time}\n");
        replace(&self.dir.join(HOLDER_FILE), text.as_bytes())
    }

    /// Remembers for which container it is restored, once.
    ///
    /// # Errors
    /// A system call failed.
    pub fn set_once(&self, once: &Once) -> Result<(), SandboxError> {
        let json = serde_json::to_vec(once).expect("texts are JSON");
        replace(&self.dir.join(ONCE_FILE), &json)
    }

    /// What [`Self::set_once`] has said; nothing where there may be a second attempt.
    #[must_use]
    pub fn once(&self) -> Option<Once> {
        let json = fs::read(self.dir.join(ONCE_FILE)).ok()?;
        serde_json::from_slice(&json).ok()
    }

    /// Remembers that the container in this bundle has been started, and is still held.
    ///
    /// # Errors
    /// A system call failed.
    pub fn set_started(&self, bundle: &Path) -> Result<(), SandboxError> {
        replace(
            &self.dir.join(STARTED_FILE),
            bundle.as_os_str().as_encoded_bytes(),
        )
    }

    /// The id of the container that is held.
    ///
    /// # Errors
    /// The state cannot be read.
    pub fn held_id(&self) -> Result<Option<String>, SandboxError> {
        let State::Held(bundle) = self.state()? else {
            return Ok(None);
        };
        let id = bundle.file_name().and_then(|id| id.to_str());
        Ok(id.map(str::to_owned))
    }

    /// The id of the container that is held although it has been started.
    ///
    /// # Errors
    /// The state cannot be read.
    pub fn started(&self) -> Result<Option<String>, SandboxError> {
        let State::Held(bundle) = self.state()? else {
            return Ok(None);
        };
        // An earlier attempt had another bundle.
        let started = fs::read(self.dir.join(STARTED_FILE)).unwrap_or_default();
        let id = bundle.file_name().and_then(|id| id.to_str());
        let same = started == bundle.as_os_str().as_encoded_bytes();
        Ok(id.filter(|_| same).map(str::to_owned))
    }

    /// The process of [`Self::set_holder`], as long as the restore is held.
    #[must_use]
    pub fn holder(&self) -> Option<(i32, u64)> {
        if !matches!(self.state(), Ok(State::Held(_))) {
            return None;
        }
        let text = fs::read_to_string(self.dir.join(HOLDER_FILE)).ok()?;
        let (pid, start_time) = text.trim_end().split_once(' ')?;
        Some((pid.parse().ok()?, start_time.parse().ok()?))
    }

    /// Remembers for which container of the pod it is restored, the first time that one asks.
    ///
    /// # Errors
    /// [`SandboxError::Twice`] when it is for another one, or a failed system call.
    pub fn reserve_for(&self, container: &str) -> Result<(), SandboxError> {
        let path = self.dir.join(OWNER_FILE);
        match fs::read_to_string(&path) {
            Ok(owner) if owner == container => Ok(()),
            Ok(owner) => Err(SandboxError::Twice {
                checkpoint: self.request()?.checkpoint,
                container: self.request()?.container,
                owner,
                asker: container.to_owned(),
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                replace(&path, container.as_bytes())
            }
            Err(error) => Ok(Err(error).during("read", &path)?),
        }
    }

    /// What to restore.
    ///
    /// # Errors
    /// The file cannot be read, or is not one of ours.
    pub fn request(&self) -> Result<Request, SandboxError> {
        let path = self.dir.join(REQUEST_FILE);
        let json = fs::read(&path).during("read", &path)?;
        serde_json::from_slice(&json).map_err(|error| SandboxError::Damaged {
            path,
            what: error.to_string(),
        })
    }

    pub(crate) fn write_request(&self, request: &Request) -> Result<(), SandboxError> {
        let json = serde_json::to_vec_pretty(request).expect("strings and numbers are JSON");
        replace(&self.dir.join(REQUEST_FILE), &json)
    }

    /// Takes the restore for this process, until the lock is dropped or the process ends.
    ///
    /// # Errors
    /// [`SandboxError::Busy`], or a system call failed.
    pub fn claim(&self) -> Result<Flock<File>, SandboxError> {
        let dir = File::open(&self.dir).during("open", &self.dir)?;
        match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(lock),
            Err((_, Errno::EWOULDBLOCK)) => Err(SandboxError::Busy {
                path: self.dir.clone(),
            }),
            Err((_, errno)) => Ok(Err(errno).during("lock", &self.dir)?),
        }
    }

    /// Whether it was held for a container that is gone with its bundle, and whose runtime was killed before it could
    /// take it away.
    #[must_use]
    pub(crate) fn is_forgotten(&self) -> bool {
        let is_there = |path: &Path| path.try_exists().unwrap_or(true);
        let lives = |(pid, _)| is_there(&PathBuf::from(format!("/proc/{pid}")));
        matches!(self.state(), Ok(State::Held(bundle)) if !is_there(&bundle))
            && !self.holder().is_some_and(lives)
    }

    /// Removes it.
    ///
    /// # Errors
    /// A system call failed.
    pub fn remove(&self) -> Result<(), SandboxError> {
        remove_tree(&self.dir)
    }
}
