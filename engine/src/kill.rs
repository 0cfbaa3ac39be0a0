//! The end of a frozen container: not one of its processes executes another instruction.
//!
//! ```text
//!  frozen: its processes --> SIGKILL to each, by a pidfd --> resume --> each has ended
//! ```
//!
//! While a container is frozen none of its processes can make another one, so the list is whole. With
//! the freezer of cgroup v1 a signal waits until the freezer lets go, and a task that has a SIGKILL
//! then ends before it is back in its program; with cgroup v2 it ends frozen. `runc kill --all` does
//! not do: since 1.2.0 it signals the first process alone where the container has a pid namespace of
//! its own, thaws, and the others run until the kernel takes the namespace down.
//!
//! A container may have more processes than this one may have descriptors, so no more than one is open at a time.

use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::Signal;
use transship_containerd::Containerd;
use transship_sandbox::KnownProcess;

use crate::error::{Context, Error, Result};
use crate::frozen_pids::pids_of_frozen;
use crate::task_to_freeze::TaskToFreeze;
use crate::thaw::{ANSWER, answered};

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

async fn signal_all(node: &Containerd, tasks: &[TaskToFreeze]) -> Result<Vec<KnownProcess>> {
    let mut all = Vec::new();
    for task in tasks {
        let pids = pids_of_frozen(node, &task.runtime, &task.id).await?;
        all.extend(pids.into_iter().map(|pid| (pid, &task.id)));
    }
    let mut known = Vec::new();
    for (pid, id) in all {
        // Before the first signal: one that ends by it leaves its number to others.
        let process = KnownProcess::with_number(pid.cast_signed());
        known.extend(process.with_context(|| format!("cannot kill the process {pid} of {id:?}"))?);
    }
    kill_all(&known).context("cannot kill all processes")?;
    Ok(known)
}

/// Kills each that has not ended, also where that fails for one before.
fn kill_all(processes: &[KnownProcess]) -> std::io::Result<()> {
    let mut all = Ok(());
    for known in processes {
        let killed = known.open().and_then(|process| match process {
            Some(process) => process.signal(Signal::KILL).map(drop),
            None => Ok(()),
        });
        all = all.and(killed);
    }
    all
}

async fn wait_for_end(
    node: &Containerd,
    tasks: &[TaskToFreeze],
    mut processes: Vec<KnownProcess>,
) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        for task in tasks {
            // On cgroup v2 there is nothing left to be let go, which is no error here.
            if answered(ANSWER, node.resume(&task.id)).await.is_err() {
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

/// Those that have not ended within a moment.
fn still_there(processes: Vec<KnownProcess>) -> Result<Vec<KnownProcess>> {
    let deadline = Instant::now() + LOOK_AGAIN;
    let mut left = Vec::new();
    for known in processes {
        let Some(process) = known.open().context("cannot wait for a process")? else {
            continue;
        };
        let remaining = deadline.saturating_duration_since(Instant::now());
        let remaining = PollTimeout::try_from(remaining).unwrap_or(PollTimeout::ZERO);
        // A pidfd is readable when the process has ended.
        let mut ended = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ended, remaining) {
            Ok(0) | Err(Errno::EINTR) => left.push(known),
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
    use std::process::{Child, Command};

    use nix::sys::resource::{Resource, getrlimit, setrlimit};

    use super::*;

    #[test]
    fn the_end_of_more_processes_than_descriptors_is_seen() {
        let sleep = || Command::new("sleep").arg("1000").spawn().unwrap();
        let mut children: Vec<_> = (0..60).map(|_| sleep()).collect();
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 40, hard).unwrap();
        let known = |child: &Child| KnownProcess::with_number(child.id().cast_signed()).unwrap();
        let alive = known(&children[0]).unwrap();
        assert_eq!(still_there(vec![alive]).unwrap(), [alive]);
        let mut left: Vec<_> = children.iter().filter_map(known).collect();
        assert_eq!(left.len(), 60);
        kill_all(&left).unwrap();
        while !left.is_empty() {
            left = still_there(left).unwrap();
        }
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        for child in &mut children {
            child.wait().unwrap();
        }
        assert_eq!(known(&children[0]), None);
        kill_all(&[alive]).unwrap();
    }
}
