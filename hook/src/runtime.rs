//! The real runtime: found, exec'ed, or run under supervision.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{AccessFlags, access, getppid};
use serde::Deserialize;

/// First argument of the front as the guard of a restore.
pub const GUARD: &str = "transship-restore-guard";
/// First argument of the front's own child; see [`Runtime::run`].
pub const SUPERVISED: &str = "transship-supervised";
/// The same, with a mount namespace of its own. When it restores, runc binds what the spec binds below the container's root,
/// with all that is mounted in it, to make mount points there, and takes it away again with `MNT_DETACH`
/// (`prepareCriuRestoreMounts`). Where the node's mounts are shared, as systemd makes them, that would unmount them on the
/// node, too.
pub const SUPERVISED_APART: &str = "transship-supervised-apart";
/// A configuration file that CRIU reads before it hears of options over RPC.
pub const CRIU_CONFIG_VARIABLE: &str = "CRIU_CONFIG_FILE";
/// Where the operator's configurations of CRIU are.
pub const CRIU_CONFIG_DIR: &str = "/etc/criu";
const FRONT_PREFIX: &str = "transship-";

/// The real runtime cannot be found or started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// Nothing of this name on `PATH` but the front itself.
    #[error("there is no OCI runtime {name:?} on PATH ({path:?})")]
    NotFound {
        /// What was looked for.
        name: String,
        /// Where.
        path: OsString,
    },
    /// It cannot be executed.
    #[error("cannot execute {path}")]
    Execute {
        /// The runtime.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The real runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runtime {
    path: PathBuf,
    /// What it is called: by its name alone, as a caller without the front would, or by its path.
    called: OsString,
}

/// The part of `runtime state` that matters.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ContainerState {
    /// `created`, `running`, `paused`, `stopped`.
    pub status: String,
    /// First process, in the caller's pid namespace; 0 when it is stopped.
    #[serde(default)]
    pub pid: i32,
}

/// A call of `restore`.
#[derive(Debug)]
pub struct GuardedRestore<'a> {
    /// Id of the container.
    pub id: &'a str,
    /// All arguments of the runtime.
    pub args: Vec<OsString>,
    /// The directory where CRIU writes its log.
    pub work: &'a Path,
    /// The bundle of the container.
    pub bundle: &'a Path,
    /// The directory of the images.
    pub images: &'a Path,
    /// How long CRIU may make no progress.
    pub patience: Duration,
    /// A CRIU configuration beneath the one that the runtime names to CRIU.
    pub criu_config: Option<&'a Path>,
    /// Whether stdin is a pipe that is at its end.
    pub ended_stdin: bool,
}

impl Runtime {
    /// Finds the runtime that a front called `program` stands for: `transship-crun` is `crun`.
    /// A front that was put in the runtime's place, under its name, does not find itself.
    ///
    /// # Errors
    /// [`RuntimeError::NotFound`].
    pub fn find(program: &OsStr, own: &Path, path: &OsStr) -> Result<Self, RuntimeError> {
        let name = Path::new(program)
            .file_name()
            .unwrap_or(program)
            .to_string_lossy();
        let name = name.strip_prefix(FRONT_PREFIX).unwrap_or(&name).to_owned();
        let identity = |path: &Path| path.metadata().ok().map(|meta| (meta.dev(), meta.ino()));
        let own = identity(own);
        std::env::split_paths(path)
            .map(|dir| dir.join(&name))
            .find(|file| {
                file.is_file() && access(file, AccessFlags::X_OK).is_ok() && identity(file) != own
            })
            .map(|path| Self {
                called: match program.as_bytes().contains(&b'/') {
                    true => path.clone().into(),
                    false => OsString::from(&name),
                },
                path,
            })
            .ok_or_else(|| RuntimeError::NotFound {
                name: name.clone(),
                path: path.to_owned(),
            })
    }

    /// Its name, without directories.
    #[must_use]
    pub fn name(&self) -> &str {
        self.path
            .file_name()
            .and_then(OsStr::to_str)
            .unwrap_or_default()
    }

    /// The flags of runc's `restore` that this runtime does not have, and can do without: crun is
    /// no subreaper unless it waits, CRIU mounts the root itself, and `empty-ns` stands in the CRIU
    /// configuration, too.
    #[must_use]
    pub fn unknown_restore_flags(&self) -> &'static [&'static str] {
        if self.name() == "crun" {
            &["no-subreaper", "no-pivot", "empty-ns"]
        } else {
            &[]
        }
    }

    /// Whether the runtime may not hand CRIU the configuration file in `org.criu.config`: crun does
    /// with libcriu 4.2 and later only. Then CRIU finds it by the environment; what the runtime sends
    /// over RPC comes after that, and must be given as flags.
    #[must_use]
    pub fn may_ignore_criu_config(&self) -> bool {
        self.name() == "crun"
    }

    /// Where it keeps the states of containers unless it is told otherwise.
    #[must_use]
    pub fn default_root(&self) -> &'static Path {
        Path::new(if self.name() == "crun" {
            "/run/crun"
        } else {
            "/run/runc"
        })
    }

    /// Becomes the runtime, with a CRIU configuration in the environment if one is given. Returns
    /// only if that fails.
    pub fn exec(&self, args: &[OsString], criu_config: Option<&Path>) -> RuntimeError {
        let source = Command::new(&self.path)
            .arg0(&self.called)
            .args(args)
            .envs(criu_config.map(|path| (CRIU_CONFIG_VARIABLE, path)))
            .exec();
        RuntimeError::Execute {
            path: self.path.clone(),
            source,
        }
    }

    /// Runs the runtime with the caller's streams and waits for it.
    ///
    /// It must die with the caller: a shim that gives up kills the front. The kernel's parent-death
    /// signal is set in the child, so the child is this program again (`front`, with
    /// [`SUPERVISED`] as its first argument), which sets it and becomes the runtime.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn run(&self, front: &Path, args: &[OsString]) -> Result<ExitStatus, RuntimeError> {
        let mut command = Command::new(front);
        command
            .arg(SUPERVISED)
            .arg(std::process::id().to_string())
            .arg(&self.path)
            .args(args);
        command.status().map_err(|source| RuntimeError::Execute {
            path: front.to_path_buf(),
            source,
        })
    }

    /// Runs a `restore` of the runtime below a guard, and waits for it; see
    /// [`crate::restore_guard`].
    ///
    /// # Errors
    /// It cannot be started.
    pub fn run_guarded(
        &self,
        front: &Path,
        restore: &GuardedRestore<'_>,
    ) -> Result<ExitStatus, RuntimeError> {
        let mut command = Command::new(front);
        if restore.ended_stdin {
            command.stdin(Stdio::piped());
        }
        command
            .envs(restore.criu_config.map(|path| (CRIU_CONFIG_VARIABLE, path)))
            .arg(GUARD)
            .arg(std::process::id().to_string())
            .arg(restore.work)
            .arg(restore.bundle)
            .arg(restore.images)
            .arg(restore.patience.as_millis().to_string())
            .arg(restore.id)
            .arg(&self.path)
            .args(&restore.args);
        let status = command.spawn().and_then(|mut child| {
            drop(child.stdin.take());
            child.wait()
        });
        status.map_err(|source| RuntimeError::Execute {
            path: front.to_path_buf(),
            source,
        })
    }

    /// What its `checkpoint` understands: runc before 1.3.0 knows less.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn checkpoint_help(&self) -> Result<String, RuntimeError> {
        let mut command = Command::new(&self.path);
        let output = command.args(["checkpoint", "--help"]).stdin(Stdio::null());
        let output = output.output().map_err(|source| RuntimeError::Execute {
            path: self.path.clone(),
            source,
        })?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The state of a container, `None` when the runtime does not know it.
    ///
    /// # Errors
    /// The runtime cannot be started.
    pub fn state(
        &self,
        root: Option<&Path>,
        id: &str,
    ) -> Result<Option<ContainerState>, RuntimeError> {
        let mut command = Command::new(&self.path);
        if let Some(root) = root {
            command.arg("--root").arg(root);
        }
        // Without the caller's --log: what is asked for in passing is no error of this call.
        let output = command.args(["state", id]).stdin(Stdio::null()).output();
        let output = output.map_err(|source| RuntimeError::Execute {
            path: self.path.clone(),
            source,
        })?;
        Ok(serde_json::from_slice(&output.stdout)
            .ok()
            .filter(|_| output.status.success()))
    }
}

/// The other side of [`Runtime::run`]: `args` are the parent's pid, the runtime, its arguments.
/// Returns only on failure.
pub fn exec_supervised(args: &[OsString], apart: bool) -> RuntimeError {
    let [parent, runtime, args @ ..] = args else {
        return RuntimeError::NotFound {
            name: SUPERVISED.to_owned(),
            path: OsString::new(),
        };
    };
    let runtime = Runtime {
        path: runtime.into(),
        called: runtime.clone(),
    };
    if let Err(errno) = set_pdeathsig(Signal::SIGKILL) {
        return RuntimeError::Execute {
            path: runtime.path,
            source: errno.into(),
        };
    }
    // The parent may have died before the signal was set.
    if parent.to_str() != Some(getppid().to_string().as_str()) {
        let source = io::Error::other("the caller is gone");
        return RuntimeError::Execute {
            path: runtime.path,
            source,
        };
    }
    if apart && let Err(errno) = leave_mounts_of_node() {
        return RuntimeError::Execute {
            path: runtime.path,
            source: errno.into(),
        };
    }
    runtime.exec(args, None)
}

/// What is mounted and unmounted from here on is not on the node; what is there comes here, as mounts with `rslave` expect.
fn leave_mounts_of_node() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let (none, flags) = (None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE);
    mount(none, "/", none, flags, none)
}

/// The exit code to pass on: that of the child, or 128 + the signal that killed it.
#[must_use]
pub fn exit_code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn finds_the_runtime_behind_the_front() {
        let dir = tempfile::tempdir().unwrap();
        let make = |path: &str, mode| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            path
        };
        let front = make("front/transship-runc", 0o755);
        fs::hard_link(&front, dir.path().join("front/runc")).unwrap();
        make("data/runc", 0o644);
        let runc = make("bin/runc", 0o755);
        let crun = make("bin/crun", 0o755);
        let path = ["front", "data", "missing", "bin"].map(|name| dir.path().join(name));
        let path = std::env::join_paths(path).unwrap();
        let find = |program: &str| Runtime::find(OsStr::new(program), &front, &path);
        let by_path = find("/usr/bin/transship-runc").unwrap();
        assert_eq!(
            (&by_path.path, by_path.called.as_os_str()),
            (&runc, runc.as_os_str())
        );
        assert_eq!(find("transship-runc").unwrap().called, "runc");
        assert_eq!(
            find("runc").unwrap().path,
            runc,
            "in the place of the runtime"
        );
        assert_eq!(find("transship-crun").unwrap().path, crun);
        let error = find("transship-youki").unwrap_err();
        assert!(error.to_string().contains("youki"), "{error}");
    }
}
