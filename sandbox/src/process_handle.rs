//! Processes that are signalled: their numbers may be those of others by then.
//!
//! ```text
//!  number ── pidfd_open ──> ProcessHandle ── is it what was looked for? ──> pidfd_send_signal
//! ```
//!
//! What is asked of `/proc` about a number holds for the process only if the handle was there before.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::proc_text::TaskStat;

/// One process: whoever has its number later is left alone.
#[derive(Debug)]
pub struct ProcessHandle {
    pid: i32,
    pidfd: OwnedFd,
}

impl ProcessHandle {
    /// The process that has this number now.
    ///
    /// # Errors
    /// There is none.
    pub fn open(pid: i32) -> io::Result<Self> {
        let number = Pid::from_raw(pid).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let pidfd = pidfd_open(number, PidfdFlags::empty())?;
        Ok(Self { pid, pidfd })
    }

    /// Its number, as long as it has not been waited for.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends it a signal; gives whether it is there to take it.
    ///
    /// # Errors
    /// The kernel does not let us.
    pub fn signal(&self, signal: Signal) -> io::Result<bool> {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::SRCH) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The one that has this number, as long as it is a child of `parent` (none: whoever it is of); none where it is not,
    /// or gone.
    ///
    /// # Errors
    /// The kernel does not let us, or too many descriptors are open.
    pub fn open_below(pid: i32, parent: Option<i32>) -> io::Result<Option<Self>> {
        let process = match Self::open(pid) {
            Err(error) if error.raw_os_error() == Some(Errno::ESRCH as i32) => return Ok(None),
            process => process?,
        };
        // A child whose parent has just ended is a child of its reaper: it is found there next time.
        let is_same = parent.is_none_or(|parent| parent_of(pid) == Some(parent));
        Ok(is_same.then_some(process))
    }
}

/// A process that is found again. There may be more processes than descriptors, so whoever signals many of them later keeps
/// these and opens one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownProcess {
    pid: i32,
    start_time: u64,
}

impl KnownProcess {
    /// The one of a handle; none when it has been waited for.
    ///
    /// # Errors
    /// `/proc` cannot be read, or too many descriptors are open.
    pub fn of(process: &ProcessHandle) -> io::Result<Option<Self>> {
        let pid = process.pid;
        let stat = match TaskStat::of(format!("/proc/{pid}")) {
            Err(error) if is_gone(&error) => return Ok(None),
            stat => stat?,
        };
        let start_time = stat.start_time();
        Ok(start_time.map(|start_time| Self { pid, start_time }))
    }

    /// The one that has this number now; none when it has been waited for.
    ///
    /// # Errors
    /// As those of [`Self::of`].
    pub fn with_number(pid: i32) -> io::Result<Option<Self>> {
        match ProcessHandle::open_below(pid, None)? {
            Some(process) => Self::of(&process),
            None => Ok(None),
        }
    }

    /// A handle of it; none when it has been waited for.
    ///
    /// # Errors
    /// The kernel does not let us, or too many descriptors are open.
    pub fn open(self) -> io::Result<Option<ProcessHandle>> {
        let Some(process) = ProcessHandle::open_below(self.pid, None)? else {
            return Ok(None);
        };
        let is_same = Self::of(&process)? == Some(self);
        Ok(is_same.then_some(process))
    }
}

impl AsFd for ProcessHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// What `/proc` says of a process that has been waited for.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::ESRCH as i32)
}

/// The children of all threads of a process; none when it is gone.
///
/// # Errors
/// `/proc` cannot be read.
pub fn children(pid: i32) -> io::Result<Vec<i32>> {
    let threads = match fs::read_dir(format!("/proc/{pid}/task")) {
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        threads => threads?,
    };
    let mut children = Vec::new();
    for thread in threads {
        // Kernels without CONFIG_PROC_CHILDREN cannot run CRIU either.
        match fs::read_to_string(thread?.path().join("children")) {
            Err(error) if is_gone(&error) => {}
            text => children.extend(
                text?
                    .split_whitespace()
                    .filter_map(|pid| pid.parse::<i32>().ok()),
            ),
        }
    }
    Ok(children)
}

/// The numbers of a process and all below it, each with its parent's, parents first: for [`ProcessHandle::open_below`], one
/// after the other, because there may be more of them than descriptors.
///
/// # Errors
/// `/proc` cannot be read.
pub fn tree_with_parents(root: i32) -> io::Result<Vec<(i32, Option<i32>)>> {
    let mut tasks = vec![(root, None)];
    let mut seen = 0;
    while let Some((parent, _)) = tasks.get(seen).copied() {
        seen += 1;
        let below = children(parent)?.into_iter();
        tasks.extend(below.map(|pid| (pid, Some(parent))));
    }
    Ok(tasks)
}

fn parent_of(pid: i32) -> Option<i32> {
    TaskStat::of(format!("/proc/{pid}")).ok()?.parent()
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_process_that_has_ended_takes_no_signal() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id().cast_signed();
        let own = std::process::id().cast_signed();
        assert_eq!(parent_of(pid), Some(own));
        assert!(ProcessHandle::open_below(pid, Some(1)).unwrap().is_none());
        let handle = ProcessHandle::open_below(pid, Some(own)).unwrap().unwrap();
        let known = KnownProcess::of(&handle).unwrap().unwrap();
        assert_eq!(KnownProcess::with_number(pid).unwrap(), Some(known));
        assert!(handle.signal(Signal::KILL).unwrap());
        assert!(known.open().unwrap().is_some());
        child.wait().unwrap();
        assert!(known.open().unwrap().is_none());
        assert_eq!(KnownProcess::of(&handle).unwrap(), None);
        // Its number may be another one's from here on.
        assert!(!handle.signal(Signal::KILL).unwrap());
        assert!(ProcessHandle::open(0).is_err());
    }

    #[test]
    fn a_tree_has_parents_first() {
        let mut shell = Command::new("sh")
            .args(["-c", "sh -c 'sleep 1000; :' & wait"])
            .spawn()
            .unwrap();
        let root = shell.id().cast_signed();
        let deadline = Instant::now() + Duration::from_secs(20);
        let tasks = loop {
            let tasks = tree_with_parents(root).unwrap();
            if tasks.len() == 3 {
                break tasks;
            }
            assert!(Instant::now() < deadline, "three processes");
            std::thread::sleep(Duration::from_millis(5));
        };
        assert_eq!(tasks[0], (root, None));
        assert_eq!(tasks[2].1, Some(tasks[1].0));
        let open = |pid, parent| ProcessHandle::open_below(pid, parent).unwrap();
        assert!(open(tasks[2].0, Some(root)).is_none(), "of another parent");
        let tasks = tasks.into_iter();
        let handles: Vec<_> = tasks
            .map(|(pid, parent)| open(pid, parent).unwrap())
            .collect();
        for handle in handles {
            handle.signal(Signal::KILL).unwrap();
        }
        shell.wait().unwrap();
        assert!(open(root, None).is_none());
    }
}
