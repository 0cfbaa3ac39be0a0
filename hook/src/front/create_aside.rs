//! `create` that answers when the first task is there, and is brought to its end by a process of its own.
//!
//! ```text
//!  shim ── front of `create` of a ── aside: all that `create` does ── guard ── runc ── CRIU ── tasks, held
//!    │        └ answers when the guard has said that the first task is there, in its cgroup
//!    ├─ front of `create` of b ...     begins now: a shim of a pod takes one Create after the other
//!    ├─ front of `start` of a          waits for the end of `create`
//!    └─ `kill`, `delete` of a          end it
//!
//!  <work>/create-aside        as in `aside`
//!  <work>/create-aside.pid    "PID START": who brings it to its end, and when that was started, in clock ticks since boot
//!  <work>/first-task          by the guard (first_task)
//!  <work>/create-caller       locked (flock) by who was called, until it ends
//!  <work>/create-answered     made by that one before it answers; who works ends itself when its caller has ended without
//! ```
//!
//! The first task is a child of the runtime's (`rst_sibling`, which runc asks CRIU for), then of the guard, then of the shim. If it
//! ends before that, the guard does not wait for it, so that the shim hears of it: without that containerd would never let
//! the container go.
//!
//! A restore uses one processor for half of its time, so that containers of a pod are restored side by side, as far as they share
//! nothing. Only in a pod that whoever receives its migration has made: that one takes away the pod when a container fails that
//! `create` has answered for, and nobody else has heard of it. And not where a failure would be followed by a cold start, which
//! has another first task.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::raise;
use rustix::process::Signal;
use transship_checkpoint::annotations::OnFailure;
use transship_path_error::During as _;
use transship_sandbox::{ProcessHandle, replace_file};

use super::bundle::{Bundle, Config};
use super::{Environment, Front, FrontError, Outcome, RestoreError, aside};
use crate::argv::{self, Arguments, Invocation};
use crate::first_task::{self, ASIDE as FILE};
use crate::runtime::exit_code;
use crate::start_time::{is_same, start_time};
use crate::{one_line, restore_guard};

/// First argument of the front as the one that works aside; the rest are those of the call of `create`.
pub const ROLE: &str = "transship-create-aside";
const PID: &str = "create-aside.pid";
const CALLER: &str = "create-caller";
const ANSWERED: &str = "create-answered";
const KILLED: &str = "who restored it was killed";
const LOOK_AGAIN: Duration = Duration::from_millis(1);

impl Front<'_> {
    /// Whether the container is one whose `create` may answer before it has come to its end.
    pub(super) fn may_create_aside(
        &self,
        create: &Arguments,
        config: &Config,
    ) -> Result<bool, FrontError> {
        let asked = &config.annotations;
        if self.is_aside || !config.cri || !asked.receives || asked.on_failure != OnFailure::Fail {
            return Ok(false);
        }
        // A shim waits for the terminal without an end, and for its first task's number.
        let has_terminal = create.value("console-socket").is_some();
        if has_terminal || create.value("pid-file").is_none() || self.env.runtime.name() != "runc" {
            return Ok(false);
        }
        let id = &create.id;
        let name = asked.container.as_deref().unwrap_or(id);
        let staged = self.pod_of(id, config)?.staged(name)?;
        Ok(staged.is_some_and(|staged| staged.once().is_some()))
    }

    /// Has somebody else do what `create` does, and answers when that has ended, or has got as far as the first task.
    pub(super) fn create_aside(
        &self,
        create: &Arguments,
        bundle: &Bundle,
    ) -> Result<Option<Outcome>, FrontError> {
        let work = bundle.make_work_dir()?;
        for stale in [FILE, PID, first_task::FILE, CALLER, ANSWERED] {
            drop(fs::remove_file(work.join(stale)));
        }
        let caller = work.join(CALLER);
        let locked = File::create_new(&caller).during("make", &caller)?;
        locked.lock().during("lock", &caller)?;
        let own = &self.env.own;
        let mut aside = self.once_more(ROLE, create).spawn().during("run", own)?;
        loop {
            if let Some(ended) = aside.try_wait().during("wait for", own)? {
                if ended.signal().is_some() {
                    return Err(failed(&create.id, io::Error::other(KILLED)));
                }
                return Ok(Some(Outcome::Exit(exit_code(ended))));
            }
            if let Some(pid) = first_task::read(&work) {
                let file = Path::new(create.value("pid-file").unwrap_or_default());
                replace_file(file, pid.to_string().as_bytes())?;
                let answered = work.join(ANSWERED);
                File::create_new(&answered).during("make", &answered)?;
                return Ok(Some(Outcome::Exit(0)));
            }
            thread::sleep(LOOK_AGAIN);
        }
    }
}

/// Waits until `create` has come to its end, where it has answered before.
///
/// # Errors
/// It has failed since, and why; or what `look` says, which is asked meanwhile.
pub(super) fn wait(work: &Path, look: impl Fn() -> io::Result<()>) -> io::Result<()> {
    aside::wait(&work.join(FILE), KILLED, look, None)
}

/// Ends a `create` that has answered and goes on, with all that it has made.
pub(super) fn end(work: &Path) {
    if !aside::goes_on(&work.join(FILE)) {
        return;
    }
    let known = fs::read_to_string(work.join(PID)).unwrap_or_default();
    if let Some((pid, began)) = known.split_once(' ')
        && let (Ok(pid), Ok(began)) = (pid.parse(), began.parse())
    {
        // Not what is below: its guard ends that, and takes away what CRIU has left.
        let process = ProcessHandle::open(pid);
        if is_same(pid, began) {
            drop(process.and_then(|process| process.signal(Signal::KILL)));
        }
    }
    if let Ok(dir) = File::open(work) {
        drop(restore_guard::wait_for_end(
            dir,
            restore_guard::END_PATIENCE,
        ));
    }
}

/// The one that works aside; `args` are those of the call of `create`.
pub fn serve_aside(env: &Environment, args: Vec<OsString>) -> Outcome {
    let call = Invocation::read(args);
    let argv::Command::Create(create) = &call.command else {
        return Outcome::Exit(1);
    };
    let front = Front::aside(env, &call.globals);
    match front.do_create(create) {
        Ok(code) => Outcome::Exit(code),
        Err(error) => {
            front.report(&one_line(&error), false);
            Outcome::Exit(1)
        }
    }
}

impl Front<'_> {
    fn do_create(&self, create: &Arguments) -> Result<u8, FrontError> {
        let work = Bundle::of(create).path("work");
        let work = std::path::absolute(&work).during("find", &work)?;
        let (path, own) = (work.join(FILE), work.join(PID));
        let mut file = File::create_new(&path).during("make", &path)?;
        file.lock().during("lock", &path)?;
        let pid = std::process::id().cast_signed();
        let began = start_time(pid).during("read", "/proc/self/stat")?;
        replace_file(&own, format!("{pid} {began}").as_bytes())?;
        let caller = File::open(work.join(CALLER)).during("open", work.join(CALLER))?;
        thread::spawn(move || end_with_caller(caller, &work.join(ANSWERED)));
        let done = self.create(create).and_then(|outcome| match outcome {
            Some(Outcome::Exit(code)) => Ok(code),
            // It starts from its image after all, and nobody has answered for a first task.
            _ => {
                let args = self.with_globals("create", create.to_args());
                Ok(exit_code(self.env.runtime.run(&self.env.own, &args)?))
            }
        });
        match &done {
            Ok(0) => fs::remove_file(&path).during("remove", &path)?,
            Ok(_) => {}
            // Who waits for the end reads it when this has ended.
            Err(error) => drop(file.write_all(one_line(error).as_bytes())),
        }
        done
    }
}

/// A caller that was killed has made nothing.
fn end_with_caller(caller: File, answered: &Path) {
    let ended = Flock::lock(caller, FlockArg::LockShared);
    if ended.is_err() || answered.symlink_metadata().is_err() {
        // The guard ends what was begun.
        let _ = raise(nix::sys::signal::Signal::SIGKILL);
    }
}

/// The failure of a container that `create` has answered for.
pub(super) fn failed(id: &str, source: io::Error) -> FrontError {
    let id = id.to_owned();
    FrontError::from(RestoreError::FailedAside { id, source })
}
