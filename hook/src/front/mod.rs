//! The runtime front: one call of the OCI runtime, from argv to its end.
//!
//! ```text
//!  create ──> moved: refused       sandbox      joins which living namespaces
//!    │    ──> done: has ended      beginning    memory, image, or nothing
//!    │    ──> held_restore ──────> fit          the checkpoint fits the container (shared_pids)
//!    │             │               volumes, shared_dirs, rootfs          mounts and files
//!    │             │               admission, tmpfs_archive, canonical_tar               images and spec compared, before CRIU runs
//!    │             │               criu_config, restored_cgroup          what CRIU is told
//!    │             │               pod_connections, lost_addresses       sockets
//!    │             │           CRIU, then, while the tasks are held (held):
//!    │             │               open_files   what they have open
//!    │             │               apart_memory, shm_attach, task_attributes   what CRIU has not restored
//!    │             ├─────────────> hold_watch   ends it when nobody starts it
//!    │             └─────────────> memory_fill  puts memory in while the next one of its pod is restored (aside)
//!    ├──────> create_aside         the same while the next one of its pod is restored
//!    └──────> the runtime, untouched      late_annotations   what the sandbox was told counts
//!  run ──> refused where `create` would have something to do
//!  start ──> lets a held restore go;  kill ──> ends it;  delete ──> takes away what it left
//!  native_restore: `ctr containers restore --live`;  checkpoint: a dump that somebody else takes
//!  bundle: config.json and the marker;  reason, tell: why it failed, and who hears of it;  error
//! ```

mod admission;
mod apart_memory;
mod aside;
mod beginning;
mod bundle;
mod canonical_tar;
mod checkpoint;
mod create;
mod create_aside;
mod criu_config;
mod delete;
mod done;
mod error;
mod fit;
mod held;
mod held_restore;
mod hold_watch;
mod kill;
mod late_annotations;
mod lost_addresses;
mod memory_fill;
mod moved;
mod native_restore;
mod open_files;
mod pod_connections;
mod reason;
mod restored_cgroup;
mod rootfs;
mod run;
mod sandbox;
mod shared_dirs;
mod shared_pids;
#[cfg_attr(not(target_arch = "x86_64"), path = "shm_attach_unsupported.rs")]
mod shm_attach;
mod start;
mod task_attributes;
mod tell;
mod tmpfs_archive;
mod volumes;

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process;

use transship_checkpoint::beneath::{Links, read_regular};
use transship_checkpoint::manifest::check_name;
use transship_checkpoint::store::Store;
use transship_sandbox::admission::node_config::NodeConfig;
use transship_sandbox::forgotten_bundle::unmount_yards;
use transship_sandbox::unmount_all;

pub use create_aside::{ROLE as CREATE_ASIDE_ROLE, serve_aside};
pub use error::{FitError, FrontError, RestoreError, RootfsError};
pub use hold_watch::{ROLE as HOLD_WATCH_ROLE, serve_watch};
pub use memory_fill::{ROLE as MEMORY_FILL_ROLE, serve as serve_memory_fill};

use self::bundle::{Bundle, Config};
use self::held_restore::read_pid;

use crate::argv::{Arguments, Command, Globals, Invocation};
use crate::killed_restore;
use crate::lazy_pages::LazyPages;
use crate::one_line;
use crate::own_networks;
use crate::restore_guard::TIMED_OUT;
use crate::restore_log::{LOG_DIR, criu_log_name};
use crate::runtime::{GuardedRestore, Runtime};
use crate::runtime_log::append_error;

/// Where runc and crun mount the root file system for CRIU.
const CRIU_ROOT: &str = "criu-root";
/// Largest `descriptors.json` that is read, in bytes: runc writes three short strings.
const DESCRIPTORS_LIMIT: u64 = 64 << 10;

/// Where the front finds things.
#[derive(Debug, Clone)]
pub struct Environment {
    /// The real runtime.
    pub runtime: Runtime,
    /// This program.
    pub own: PathBuf,
    /// The hook's program.
    pub hook: PathBuf,
    /// `/run/transship`.
    pub run_dir: PathBuf,
    /// The checkpoints of this node.
    pub store: Store,
    /// What has been consumed, by whom.
    pub consumed: PathBuf,
    /// Marks of pods that have been moved away.
    pub moved: PathBuf,
    /// The program `transship`, which can ask containerd.
    pub tool: PathBuf,
    /// containerd's socket, if it is known.
    pub containerd: Option<PathBuf>,
    /// The rules of this node.
    pub node_config: PathBuf,
    /// Where its checkpoints come from.
    pub origins: PathBuf,
    /// Whether the caller names a CRIU configuration in the environment.
    pub criu_config_named: bool,
}

/// How a call goes on.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The real runtime does it, with these arguments.
    Exec(Vec<OsString>),
    /// The same, with a CRIU configuration file in the environment.
    ExecWithCriuConfig(Vec<OsString>, PathBuf),
    /// It is done, with this exit code.
    Exit(u8),
}

/// Whether stdin is the node's `/dev/null`. A restored process that gets it for a pipe has a file of
/// a mount that is not its container's, and CRIU cannot dump it again.
fn stdin_is_null() -> bool {
    const NULL: u64 = nix::libc::makedev(1, 3);
    fs::metadata("/proc/self/fd/0").is_ok_and(|meta| meta.rdev() == NULL)
}

/// Whether it was a pipe when the container was dumped.
fn stdin_was_pipe(images: &Path) -> bool {
    // runc: a list of what the descriptors 0, 1 and 2 were.
    let file = Path::new("descriptors.json");
    let read = read_regular(images, file, Links::Refused, DESCRIPTORS_LIMIT);
    let descriptors = read.map(|json| serde_json::from_slice::<Vec<String>>(&json));
    matches!(descriptors, Ok(Ok(list)) if list.first().is_some_and(|it| it.starts_with("pipe:")))
}

fn lazy_error(what: String) -> FrontError {
    FrontError::from(RestoreError::LazyPages { what })
}

/// One call.
#[derive(Debug)]
struct Front<'a> {
    env: &'a Environment,
    globals: &'a Globals,
    /// Whether it works for another one, which answers.
    is_aside: bool,
}

/// Does what the arguments say, up to the point where the real runtime takes over.
#[must_use]
pub fn serve(env: &Environment, call: Invocation) -> Outcome {
    let front = Front {
        env,
        globals: &call.globals,
        is_aside: false,
    };
    // The streams of create and restore are the container's own.
    let mut streams_are_ours = true;
    let outcome = match &call.command {
        Command::Other => Ok(None),
        Command::Create(create) => {
            streams_are_ours = false;
            front.create(create)
        }
        Command::Run(run) => {
            streams_are_ours = false;
            front.run(run)
        }
        Command::Restore(restore) => {
            streams_are_ours = false;
            front.native_restore(restore)
        }
        Command::Checkpoint(dump) => front.checkpoint(dump),
        Command::Start { id } => front.start(id),
        Command::Release { id } => front.release(id),
        Command::Delete { id, force } => front.delete(id, *force),
        Command::Kill { id, signal } => front.kill(id, signal),
    };
    match outcome {
        Ok(None) => Outcome::Exec(call.args),
        Ok(Some(outcome)) => outcome,
        Err(error) => {
            front.report(&one_line(&error), streams_are_ours);
            Outcome::Exit(1)
        }
    }
}

impl<'a> Front<'a> {
    /// The one of a process that goes on with a call for the one that was called.
    fn aside(env: &'a Environment, globals: &'a Globals) -> Self {
        let is_aside = true;
        Self {
            env,
            globals,
            is_aside,
        }
    }
}

impl Front<'_> {
    /// This program once more, as what `role` says, for this call of `create`.
    fn once_more(&self, role: &str, create: &Arguments) -> process::Command {
        let mut command = process::Command::new(&self.env.own);
        // The front finds its runtime by its own name.
        command.arg0(self.env.runtime.name()).arg(role);
        command.args(self.with_globals("create", create.to_args()));
        command
    }

    /// Tells a failure where the caller looks for it.
    fn report(&self, message: &str, streams_are_ours: bool) {
        let logged = match &self.globals.log {
            Some(log) => append_error(log, self.globals.json, message).is_ok(),
            None => false,
        };
        if streams_are_ours || !logged {
            eprintln!("{message}");
        }
    }

    /// Runs `restore` and waits for it. The inner error is the reason of a failed restore.
    fn run_restore(
        &self,
        restore: Arguments,
        bundle: &Bundle,
        config: &Config,
        work: &Path,
        criu_config: Option<&Path>,
    ) -> Result<Result<(), String>, FrontError> {
        let log = self.globals.log.as_deref();
        let log_start = log
            .and_then(|log| std::fs::metadata(log).ok())
            .map_or(0, |meta| meta.len());
        let kept = criu_log_name(&restore.id, &config.annotations);
        let lazy = self.start_lazy_pages(&restore, work)?;
        let pid_file = restore.clone();
        let restore = restore.without(self.env.runtime.unknown_restore_flags());
        let args = self.with_globals("restore", restore.to_args());
        let (runtime, own) = (&self.env.runtime, &self.env.own);
        let is_another = self.has_state(&restore.id);
        let beneath = criu_config.filter(|_| runtime.may_ignore_criu_config());
        let images = Path::new(pid_file.value("image-path").unwrap_or_default());
        let ended_stdin = stdin_is_null() && stdin_was_pipe(images);
        let patience = NodeConfig::read(&self.env.node_config)?.restore_patience();
        let restore = GuardedRestore {
            id: &pid_file.id,
            args,
            work,
            bundle: bundle.dir(),
            images,
            patience,
            criu_config: beneath,
            ended_stdin,
        };
        let status = runtime.run_guarded(own, &restore)?;
        if status.success() {
            let guard = |lazy: LazyPages| lazy.guard(read_pid(&pid_file)?).map_err(lazy_error);
            lazy.map_or(Ok(()), guard)
                .inspect_err(|_| self.delete_restored(&pid_file.id))?;
            return Ok(Ok(()));
        }
        if let Some(lazy) = lazy {
            lazy.stop();
        }
        // A CRIU that was killed leaves its mounts; a runtime, what it restores into.
        unmount_yards(work);
        // Its guard has done so, unless it was killed as well.
        killed_restore::clean_up(work, bundle.dir(), images);
        if !is_another && self.has_state(&pid_file.id) {
            // runc writes its state before CRIU lets the processes go, and keeps it where they are alive when it fails.
            self.delete_restored(&pid_file.id);
        }
        self.remove_aborted_restore(&pid_file.id, bundle);
        let reason = reason::of_restore(work, log, log_start, (Path::new(LOG_DIR), kept.as_str()));
        let reason = own_networks::failure(work).unwrap_or(reason);
        if status.code() == Some(TIMED_OUT.into()) {
            let seconds = patience.as_secs();
            return Ok(Err(format!(
                "CRIU made no progress for {seconds} s and was killed; {reason}"
            )));
        }
        Ok(Err(reason))
    }

    /// The server of the memory, if it is to come when it is touched.
    fn start_lazy_pages(
        &self,
        restore: &Arguments,
        work: &Path,
    ) -> Result<Option<LazyPages>, FrontError> {
        if !restore.switch("lazy-pages") {
            return Ok(None);
        }
        let runtime = self.env.runtime.name();
        if runtime != "runc" {
            return Err(lazy_error(format!("{runtime} has no such restore")));
        }
        let images = restore.value("image-path").unwrap_or_default();
        LazyPages::start(&self.env.own, Path::new(images), work)
            .map(Some)
            .map_err(lazy_error)
    }

    /// Unmounts what a killed restore has left mounted, where it had no mount namespace of its own (one of an earlier
    /// version): CRIU's cgroups, and the container's root file system for it,
    /// which runc has at `criu-root` in its state directory, and crun in the bundle. As long as that
    /// is there, `delete --force` would delete the files in the container's layer with the state,
    /// and no container of this id can be made.
    fn unmount_rest(&self, id: &str, bundle: &Bundle) {
        unmount_yards(&bundle.path("work"));
        let state = self.state_dir(id).map(|dir| dir.join(CRIU_ROOT));
        for root in state.into_iter().chain([bundle.path(CRIU_ROOT)]) {
            // Whatever cannot be unmounted makes the runtime say so.
            unmount_all(&root);
        }
    }

    /// Removes what a killed restore has left, unless there is a container.
    fn remove_aborted_restore(&self, id: &str, bundle: &Bundle) {
        let Some(dir) = self.state_dir(id).filter(|_| !self.has_state(id)) else {
            return;
        };
        self.unmount_rest(id, bundle);
        drop(std::fs::remove_dir(dir.join(CRIU_ROOT)));
        drop(std::fs::remove_dir(&dir));
    }

    /// Whether the runtime has a container of this id, or may have one.
    fn has_state(&self, id: &str) -> bool {
        let state = self.state_dir(id).map(|dir| dir.join("state.json"));
        state.is_some_and(|state| state.try_exists().unwrap_or(true))
    }

    /// Where the runtime keeps the state of a container; `None` for an id that is no plain name.
    fn state_dir(&self, id: &str) -> Option<PathBuf> {
        check_name("the container's id", id).ok()?;
        let root = self.globals.root.as_deref();
        Some(root.unwrap_or(self.env.runtime.default_root()).join(id))
    }

    /// Takes back a restore that succeeded, after which something else failed.
    fn delete_restored(&self, id: &str) {
        self.kill_held(id);
        let args = self.with_globals("delete", vec!["--force".into(), id.into()]);
        // The first failure is the one that is told.
        drop(self.env.runtime.run(&self.env.own, &args));
    }

    fn with_globals(&self, command: &str, args: Vec<OsString>) -> Vec<OsString> {
        let mut all = self.globals.args.clone();
        all.push(command.into());
        all.extend(args);
        all
    }
}
