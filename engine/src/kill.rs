//! The end of a frozen container: not one of its processes executes another instruction.
//!
//! ```text
//!  frozen: its processes --> a pidfd of each --> SIGKILL to each --> resume --> each has ended
//! ```
//!
//! While a container is frozen none of its processes can make another one, so the list is whole. With
//! the freezer of cgroup v1 a signal waits until the freezer lets go, and a task that has a SIGKILL
//! then ends before it is back in its program; with cgroup v2 it ends frozen. `runc kill --all` does
//! not do: since 1.2.0 it signals the first process alone where the container has a pid namespace of
//! its own, thaws, and the others run until the kernel takes the namespace down.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use transship_containerd::Containerd;

use crate::error::{Context, Error, Result};
use crate::frozen_pids::pids_of_frozen;
use crate::task_to_freeze::TaskToFreeze;

/// How long killed processes may take to end.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often the container is let go again while they do not.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Kills all processes of frozen containers, and waits until all have ended. `killed` goes on beside that, when all have
/// been killed: from then on nothing that lets them go makes them execute another instruction.
pub(crate) async fn kill_frozen(
    node: &Containerd,
    tasks: &[TaskToFreeze],
    killed: impl Future<Output = ()>,
) -> Result<()> {
    let processes = signal_all(node, tasks).await?;
    let (ended, ()) = tokio::join!(wait_for_end(node, tasks, processes), killed);
    ended
}

async fn signal_all(node: &Containerd, tasks: &[TaskToFreeze]) -> Result<Vec<OwnedFd>> {
    let mut processes = Vec::new();
    for task in tasks {
        for pid in pids_of_frozen(node, &task.runtime, &task.id).await? {
            processes.extend(open(pid, &task.id)?);
        }
    }
    for process in &processes {
        match pidfd_send_signal(process, Signal::KILL) {
            Err(error) if error != rustix::io::Errno::SRCH => {
                return Err(std::io::Error::from(error)).context("cannot kill a frozen process");
            }
            _ => {}
        }
    }
    Ok(processes)
}

async fn wait_for_end(
    node: &Containerd,
    tasks: &[TaskToFreeze],
    mut processes: Vec<OwnedFd>,
) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        for task in tasks {
            // On cgroup v2 there is nothing left to be let go, which is no error here.
            if node.resume(&task.id).await.is_err() {
                drop(task.runtime.resume(&task.id).await);
            }
        }
        processes = tokio::task::spawn_blocking(move || still_there(processes)).await??;
        if processes.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            let ids: Vec<&str> = tasks.iter().map(|task| task.id.as_str()).collect();
            return Err(Error::failed(format!(
                "{} processes of {} were killed and have not ended after {} s",
                processes.len(),
                ids.join(", "),
                PATIENCE.as_secs()
            )));
        }
    }
}

/// None for a process that has ended.
fn open(pid: u32, id: &str) -> Result<Option<OwnedFd>> {
    let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return Ok(None);
    };
    match pidfd_open(raw, PidfdFlags::empty()) {
        Ok(process) => Ok(Some(process)),
        Err(rustix::io::Errno::SRCH) => Ok(None),
        Err(error) => Err(std::io::Error::from(error))
            .with_context(|| format!("cannot open the process {pid} of {id:?}")),
    }
}

/// Those that have not ended within a moment.
fn still_there(processes: Vec<OwnedFd>) -> Result<Vec<OwnedFd>> {
    let deadline = Instant::now() + LOOK_AGAIN;
    let mut left = Vec::new();
    for process in processes {
        let remaining = deadline.saturating_duration_since(Instant::now());
        let remaining = PollTimeout::try_from(remaining).unwrap_or(PollTimeout::ZERO);
        // A pidfd is readable when the process has ended.
        let mut ended = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ended, remaining) {
            Ok(0) | Err(Errno::EINTR) => left.push(process),
            Ok(_) => {}
            Err(error) => {
                return Err(std::io::Error::from(error)).context("cannot wait for a process");
            }
        }
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_end_of_a_process_is_seen() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = open(child.id(), "x").unwrap().unwrap();
        let mut left = still_there(vec![process]).unwrap();
        assert_eq!(left.len(), 1);
        pidfd_send_signal(&left[0], Signal::KILL).unwrap();
        while !left.is_empty() {
            left = still_there(left).unwrap();
        }
        let pid = child.id();
        child.wait().unwrap();
        assert!(open(pid, "x").unwrap().is_none());
    }
}
