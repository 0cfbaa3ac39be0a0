//! The guard of one restore: between the front and the runtime, until the runtime is done.
//!
//! ```text
//!  shim ── front ── guard (child subreaper) ── runc restore ── CRIU ── tasks
//!                     │ the front is gone      ─> all below are killed
//!                     │ no progress for a time ─> the same, exit code TIMED_OUT
//!                     │ the runtime has failed ─> what it left below is killed
//!                     '─ else: its exit code; the tasks go to the shim
//! ```
//!
//! A shim that gives up kills the front. The runtime would die with it, but CRIU would not: it goes
//! on, and leaves tasks that are stopped and belong to nobody. What CRIU makes stays below a child
//! subreaper, whoever in between has ended, so the guard finds all of it. It holds the lock of the
//! work directory for its life: who takes that lock knows that nothing is being restored there.
//!
//! Progress is what CRIU's processes read, and new ones: CRIU can wait for ever for a task that has
//! died, and try for ever to read from images that are too short, with a line in its log each time.
//! That log lies in `/run`, in memory: a log that grows too large ends the restore as well.
//!
//! It also makes the session keyring that the tasks have. The runtime, and CRIU below it, have a mount namespace of their own
//! ([`SUPERVISED_APART`]); the guard stays in the node's.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use keyutils::Keyring;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use transship_sandbox::TaskStat;

use crate::descendants::{children, kill_below, work_done};
use crate::first_task;
use crate::hold_script;
use crate::killed_restore;
use crate::restore_log::RESTORE_LOG;
use crate::runtime::{SUPERVISED_APART, exit_code};

pub use crate::runtime::GUARD as ROLE;

/// Exit code of a guard whose restore made no progress; no runtime has it.
pub const TIMED_OUT: u8 = 124;
/// How long what restores may take to end, for who waits for it: the guard has its own patience, which is less.
pub(crate) const END_PATIENCE: Duration = Duration::from_secs(25);
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// How long killed processes may take to end: one whose memory is large does not go at once, one
/// that hangs in the kernel never.
const LAST_PATIENCE: Duration = Duration::from_secs(20);
/// Bytes of CRIU's log from which on it says the same again and again; a real one has some hundred
/// for each file and mapping.
const LOG_LIMIT: u64 = 256 << 20;

/// The guard. `args`: the front's pid, the work directory, the bundle, the directory of the images, the patience in
/// milliseconds, the container's id, the runtime, its arguments.
///
/// # Errors
/// The runtime cannot be started.
pub fn serve(args: &[OsString]) -> io::Result<u8> {
    let [front, work, bundle, images, patience, id, runtime @ ..] = args else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    let number = |text: &OsString| text.to_str().and_then(|text| text.parse::<u64>().ok());
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let patience = Duration::from_millis(number(patience).ok_or_else(invalid)?);
    let pid = number(front).and_then(|pid| i32::try_from(pid).ok());
    let pid = pid.and_then(Pid::from_raw).ok_or_else(invalid)?;
    let front = pidfd_open(pid, PidfdFlags::empty())?;
    if rustix::process::getppid() != Some(pid) {
        return Err(io::Error::other("the caller is gone"));
    }
    set_child_subreaper(true)?;
    let work = &std::path::absolute(work)?;
    let _lock = lock(work)?;
    // Whoever deletes the container may have had the lock until now.
    if has_ended(&front)? {
        return Err(io::Error::other("the caller is gone"));
    }
    let asked = hold_script::guard(work)?;
    join_keyring(&id.to_string_lossy())?;
    let own = std::process::id();
    // As CRIU does, and before there is anything to guard: who ends a restore whose guard somebody has stopped kills all
    // that work there.
    let of_caller = std::env::current_dir()?;
    std::env::set_current_dir(work)?;
    let mut child = Command::new("/proc/self/exe")
        .arg(SUPERVISED_APART)
        .arg(own.to_string())
        .args(runtime)
        .current_dir(of_caller)
        .spawn()?;
    let own = own.cast_signed();
    let code = match watch(&mut child, (&front, asked.as_ref()), own, work, patience)? {
        End::Done(0) => return Ok(0),
        End::Done(code) => code,
        End::Stuck => {
            end_below(&mut child);
            TIMED_OUT
        }
        End::Deserted => 1,
    };
    kill_all(own, work);
    killed_restore::clean_up(work, Path::new(bundle), Path::new(images));
    Ok(code)
}

/// Gives what is restored a session keyring of its own, of the name that runc's containers have. CRIU knows no keyrings,
/// and with that of containerd or of root the containers of a node would share their keys.
fn join_keyring(id: &str) -> io::Result<()> {
    match Keyring::join_session(format!("_ses.{id}")) {
        Ok(_) => Ok(()),
        // A kernel without keyrings.
        Err(error) if error.0 == Errno::ENOSYS as i32 => Ok(()),
        Err(error) => Err(io::Error::from_raw_os_error(error.0)),
    }
}

/// Waits until nobody restores with this work directory any more.
///
/// # Errors
/// A failed system call.
pub(crate) fn lock(work: &Path) -> io::Result<Flock<File>> {
    let lock = Flock::lock(File::open(work)?, FlockArg::LockExclusive);
    lock.map_err(|(_, errno)| errno.into())
}

/// Waits for the same with a work directory that is open, for so long at most: a guard that somebody has stopped never
/// ends.
///
/// # Errors
/// A failed system call.
pub(crate) fn wait_for_end(work: File, patience: Duration) -> io::Result<Option<Flock<File>>> {
    let deadline = Instant::now() + patience;
    let mut dir = work;
    loop {
        dir = match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Some(lock)),
            Err((dir, Errno::EWOULDBLOCK)) => dir,
            Err((_, errno)) => return Err(errno.into()),
        };
        if Instant::now() > deadline {
            return Ok(None);
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

fn has_ended(process: &impl AsFd) -> io::Result<bool> {
    let mut end = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut end, PollTimeout::ZERO)? > 0)
}

enum End {
    Done(u8),
    Stuck,
    Deserted,
}

fn watch(
    child: &mut Child,
    (front, asked): (&impl AsFd, Option<&UnixListener>),
    own: i32,
    work: &Path,
    patience: Duration,
) -> io::Result<End> {
    let pid = Pid::from_raw(child.id().cast_signed());
    let runtime = pidfd_open(pid.expect("a child has a pid"), PidfdFlags::empty())?;
    let (mut done, mut seen, mut since) = (0, BTreeSet::new(), Instant::now());
    loop {
        let mut ends = vec![
            PollFd::new(front.as_fd(), PollFlags::POLLIN),
            PollFd::new(runtime.as_fd(), PollFlags::POLLIN),
        ];
        ends.extend(asked.map(|asked| PollFd::new(asked.as_fd(), PollFlags::POLLIN)));
        let timeout = PollTimeout::try_from(LOOK_AGAIN).expect("it is short");
        match poll(&mut ends, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        // First: nobody is left to take over what the runtime may have finished.
        if ends[0].any() == Some(true) {
            return Ok(End::Deserted);
        }
        if let Some(asked) = asked
            && ends[2].any() == Some(true)
        {
            // Who asks waits until the tasks are held.
            drop(hold_script::answer(asked, work));
        }
        if let Some(status) = child.try_wait()? {
            return Ok(End::Done(exit_code(status)));
        }
        let log = fs::metadata(work.join(RESTORE_LOG)).map_or(0, |meta| meta.len());
        let now = work_done(own, &mut seen);
        if now != done {
            (done, since) = (now, Instant::now());
        }
        if since.elapsed() >= patience || log >= LOG_LIMIT {
            return Ok(End::Stuck);
        }
    }
}

/// Kills what the runtime has started, so that it takes away itself what it has mounted and made.
fn end_below(runtime: &mut Child) {
    let deadline = Instant::now() + LAST_PATIENCE;
    // What cannot be listed cannot be killed; the runtime is killed afterwards in any case.
    drop(kill_below(runtime.id().cast_signed(), &[]));
    while matches!(runtime.try_wait(), Ok(None)) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Kills everything below this process, also what comes to be there by the death of another. A first task that its shim
/// has heard of is left to that one, which is told of its end by nobody but the kernel.
fn kill_all(own: i32, work: &Path) {
    let deadline = Instant::now() + LAST_PATIENCE;
    let of_shim = first_task::read(work);
    loop {
        // What cannot be listed cannot be killed; the next round may.
        drop(kill_below(own, &[]));
        let mut left = children(own);
        if let Ok(left) = &mut left {
            left.retain(|pid| {
                if of_shim == Some(*pid) {
                    let stat = TaskStat::of(format!("/proc/{pid}"));
                    return stat.is_ok_and(|stat| stat.state() != 'Z');
                }
                let flags = WaitPidFlag::WNOHANG | WaitPidFlag::__WALL;
                let ended = waitpid(nix::unistd::Pid::from_raw(*pid), Some(flags));
                matches!(ended, Ok(WaitStatus::StillAlive))
            });
        }
        if left.is_ok_and(|left| left.is_empty()) || Instant::now() > deadline {
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
