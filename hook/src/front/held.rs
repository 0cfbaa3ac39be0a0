//! The tasks of a held restore: frozen in their cgroup ([`crate::hold_script`]), or stopped.
//!
//! Where the front has to work on the tasks with ptrace, which waits for ever for a frozen one, CRIU's `leave-stopped`
//! sends each task a SIGSTOP before it executes its first instruction; SIGCONT lets it go. Tasks are found as the tree
//! below the first process: that is what CRIU restored.

use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use transship_sandbox::{ProcessHandle, TaskStat, TaskStatus, tree_with_parents};

use crate::descendants::tree;
use crate::freezer::Freezer;

/// How long a stop signal may take: the task is on its way out of the kernel.
const PATIENCE: Duration = Duration::from_secs(5);

/// How tasks are held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Hold {
    /// By the freezer of this cgroup.
    Frozen(PathBuf),
    /// By SIGSTOP.
    Stopped,
}

/// Waits until all tasks below `root` and itself are held: CRIU is gone before each of them has taken a
/// stop signal.
pub(super) fn wait_until_held(root: i32) -> io::Result<Hold> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let tasks = tree(root)?;
        if let Some(freezer) = frozen(&tasks) {
            return Ok(Hold::Frozen(freezer.dir().to_path_buf()));
        }
        let running = tasks.into_iter().find(|pid| !is_stopped(*pid));
        match running {
            None => return Ok(Hold::Stopped),
            Some(pid) if Instant::now() > deadline => {
                let message = format!("process {pid} is neither frozen nor stopped");
                return Err(io::Error::other(message));
            }
            Some(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// Thaws tasks that SIGSTOP holds as well, from `root` downwards.
pub(super) fn thaw_stopped(root: i32, dir: &Path) -> io::Result<Hold> {
    let (freezer, deadline) = (Freezer::at(dir), Instant::now() + PATIENCE);
    freezer.thaw()?;
    while freezer.is_frozen()? {
        if Instant::now() > deadline {
            return Err(io::Error::from(io::ErrorKind::TimedOut));
        }
        thread::sleep(Duration::from_millis(1));
    }
    wait_until_held(root)
}

fn frozen(tasks: &[i32]) -> Option<Freezer> {
    let freezer = Freezer::around(tasks).ok()?;
    freezer.is_frozen().ok()?.then_some(freezer)
}

/// Stopped, or ended, or gone.
fn is_stopped(pid: i32) -> bool {
    let stat = TaskStat::of(format!("/proc/{pid}"));
    stat.map_or(true, |stat| stat.state() == 'T' || stat.has_ended())
}

/// Lets all tasks below `root` and itself go on. Of those that SIGSTOP holds the ones stay whose pid in the
/// container is in `stopped`; one that was stopped and is frozen stays stopped by itself.
///
/// Children first: a parent that waits for stopped children (a shell) must never see them so.
pub(super) fn release(root: i32, hold: &Hold, stopped: &[u32]) -> io::Result<()> {
    if let Hold::Frozen(dir) = hold {
        return Freezer::at(dir).thaw();
    }
    for (pid, parent) in tree_with_parents(root)?.into_iter().rev() {
        let Some(task) = ProcessHandle::open_below(pid, parent)? else {
            continue;
        };
        if pid_in_container(task.pid()).is_some_and(|inner| stopped.contains(&inner)) {
            continue;
        }
        // One that was killed meanwhile is not to be let go.
        task.signal(Signal::CONT)?;
    }
    Ok(())
}

/// Its pid in the innermost pid namespace that it is in; none when it is gone.
pub(super) fn pid_in_container(pid: i32) -> Option<u32> {
    let status = TaskStatus::of(format!("/proc/{pid}")).ok()?;
    status.id_in_container()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;

    use super::{Hold, TaskStat, release, tree, wait_until_held};

    fn state(pid: i32) -> Option<char> {
        Some(TaskStat::of(format!("/proc/{pid}")).ok()?.state())
    }

    fn wait_for(what: &str, mut reached: impl FnMut() -> bool) {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while !reached() {
            assert!(std::time::Instant::now() < deadline, "{what}");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    /// A real process tree, stopped as CRIU stops it.
    #[test]
    fn a_tree_is_released_but_for_those_that_were_stopped() {
        let mut shell = Command::new("sh")
            .args(["-c", "sleep 100 & sh -c 'sleep 100; :' & wait"])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let root = i32::try_from(shell.id()).unwrap();
        // All asleep: who is in vfork waits in a state that no signal stops, until its child, which
        // would be stopped, has called exec.
        wait_for("four processes", || {
            let all = tree(root).unwrap();
            all.len() == 4 && all.iter().all(|pid| state(*pid) == Some('S'))
        });
        let all = tree(root).unwrap();
        for pid in &all {
            kill(Pid::from_raw(*pid), Signal::SIGSTOP).unwrap();
        }
        assert_eq!(wait_until_held(root).unwrap(), Hold::Stopped);
        assert!(all.iter().all(|pid| state(*pid) == Some('T')));
        let keep = all[3];
        release(root, &Hold::Stopped, &[keep.try_into().unwrap()]).unwrap();
        wait_for("the others run", || {
            all.iter()
                .all(|pid| (state(*pid) == Some('T')) == (*pid == keep))
        });
        // Parents first: one whose child has gone would go by itself.
        for pid in all {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
        shell.wait().unwrap();
    }
}
