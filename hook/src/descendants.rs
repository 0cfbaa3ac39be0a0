//! The processes below another one, and signals to them.
//!
//! A signal goes to a pidfd, and only if the process is still where it was found: its number may
//! belong to another one by then.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::AsFd as _;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::Signal;
pub(crate) use transship_sandbox::children;
use transship_sandbox::{KnownProcess, ProcessHandle, tree_with_parents};

use crate::freezer::thaw_killed;
use crate::start_time::is_same;

/// How often [`kill_below`] looks for processes that have been made since it looked last.
const LOOKS: usize = 100;

/// A process and all below it, parents first.
pub(crate) fn tree(root: i32) -> io::Result<Vec<i32>> {
    let mut tasks = vec![root];
    let mut seen = 0;
    while let Some(pid) = tasks.get(seen).copied() {
        seen += 1;
        tasks.extend(children(pid)?);
    }
    Ok(tasks)
}

/// Kills all processes below `root`, but not those in `spared` and below them. They are stopped
/// first, so that none makes another one behind the back of this; frozen ones are let go to their end.
///
/// # Errors
/// `/proc` cannot be read.
pub(crate) fn kill_below(root: i32, spared: &[i32]) -> io::Result<()> {
    let mut found = BTreeMap::new();
    // Whatever fails for one: what has been stopped is not left so.
    let mut all = stop_below(root, spared, &mut found);
    for known in found.values() {
        // One that has ended meanwhile is as good.
        let killed = known.open().map(|process| {
            let process = process.iter();
            process.for_each(|process| drop(process.signal(Signal::KILL)));
        });
        all = all.and(killed);
    }
    thaw_killed(&found.into_keys().collect());
    all
}

/// Stops all processes below `root` that are not yet in `found`, until there are no others. What fails for one is told
/// when it has been done for the others.
fn stop_below(
    root: i32,
    spared: &[i32],
    found: &mut BTreeMap<i32, KnownProcess>,
) -> io::Result<()> {
    for _ in 0..LOOKS {
        let before = found.len();
        let mut all = Ok(());
        for (pid, parent) in below(root, spared)? {
            if found.contains_key(&pid) {
                continue;
            }
            match stop(pid, parent) {
                Ok(known) => found.extend(known.map(|known| (pid, known))),
                Err(error) => all = all.and(Err(error)),
            }
        }
        if found.len() == before {
            return all;
        }
    }
    Ok(())
}

/// None for one that is not there any more.
fn stop(pid: i32, parent: i32) -> io::Result<Option<KnownProcess>> {
    let Some(process) = ProcessHandle::open_below(pid, Some(parent))? else {
        return Ok(None);
    };
    let known = KnownProcess::of(&process)?;
    if known.is_some() {
        drop(process.signal(Signal::STOP));
    }
    Ok(known)
}

/// The numbers of all processes below `root`, each with its parent's, but for those in `spared` and below them.
fn below(root: i32, spared: &[i32]) -> io::Result<Vec<(i32, i32)>> {
    let (mut parents, mut found) = (vec![root], Vec::new());
    while let Some(parent) = parents.pop() {
        for pid in children(parent)? {
            if !spared.contains(&pid) {
                parents.push(pid);
                found.push((pid, parent));
            }
        }
    }
    Ok(found)
}

/// Stops a process and all below it, also those that are made meanwhile.
///
/// # Errors
/// It is gone, or the kernel does not let us.
pub(crate) fn stop_tree(root: i32) -> io::Result<()> {
    let mut stopped = BTreeSet::new();
    for _ in 0..LOOKS {
        let mut is_any_new = false;
        for (pid, parent) in tree_with_parents(root)? {
            if stopped.contains(&pid) {
                continue;
            }
            match ProcessHandle::open_below(pid, parent)? {
                Some(task) => {
                    stopped.insert(pid);
                    is_any_new = true;
                    task.signal(Signal::STOP)?;
                }
                None if parent.is_none() => return Err(io::Error::from(io::ErrorKind::NotFound)),
                // It has ended, or is found below another one next time.
                None => {}
            }
        }
        if !is_any_new {
            return Ok(());
        }
    }
    Err(io::Error::other(
        "its processes make others faster than they are stopped",
    ))
}

/// Kills the process that has this number since `start_time`, and all below it.
pub(crate) fn kill_if_same(pid: i32, start_time: u64) {
    let Ok(process) = Process::open(pid) else {
        return;
    };
    if is_same(pid, start_time) {
        // What cannot be listed is left.
        drop(process.kill_tree());
    }
}

/// A process that is killed later, with what is below it.
#[derive(Debug)]
pub(crate) struct Process(ProcessHandle);

impl Process {
    /// The process that has this number now.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn open(pid: i32) -> io::Result<Self> {
        ProcessHandle::open(pid).map(Self)
    }

    /// Kills it and all below it, if it has not ended.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub(crate) fn kill_tree(&self) -> io::Result<()> {
        // One that has been waited for takes no signal.
        if !self.0.signal(Signal::STOP).unwrap_or_default() {
            return Ok(());
        }
        let killed = kill_below(self.0.pid(), &[]);
        drop(self.0.signal(Signal::KILL));
        let below = tree(self.0.pid())?.into_iter().collect();
        thaw_killed(&below);
        killed
    }

    /// Kills all below it but those in `spared` and below them, if it has not ended.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub(crate) fn kill_below(&self, spared: &[i32]) -> io::Result<()> {
        let mut end = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        let has_ended = poll(&mut end, PollTimeout::ZERO)? > 0;
        if has_ended {
            return Ok(());
        }
        kill_below(self.0.pid(), spared)
    }
}

/// What the processes below another one have done so far: bytes that they have read, and how many
/// there have been. Computing changes nothing of it, nor does writing the same line for ever.
pub(crate) fn work_done(root: i32, seen: &mut BTreeSet<i32>) -> u64 {
    let mut bytes = 0_u64;
    for pid in tree(root).unwrap_or_default().into_iter().skip(1) {
        seen.insert(pid);
        let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
        let read = io.lines().find_map(|line| line.strip_prefix("rchar: "));
        let read = read.and_then(|count| count.parse::<u64>().ok());
        bytes = bytes.wrapping_add(read.unwrap_or_default());
    }
    bytes.wrapping_add(seen.len() as u64)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, Command};
    use std::time::{Duration, Instant};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// A shell with its number, when it has made this many processes with itself.
    fn shell_of(processes: usize, script: &str) -> (Child, i32) {
        let shell = Command::new("sh").args(["-c", script]).spawn().unwrap();
        let root = i32::try_from(shell.id()).unwrap();
        let deadline = Instant::now() + PATIENCE;
        while tree(root).unwrap().len() < processes {
            assert!(Instant::now() < deadline, "{processes} processes");
            std::thread::sleep(Duration::from_millis(5));
        }
        (shell, root)
    }

    fn wait_for_children(root: i32, expected: &[i32]) {
        let deadline = Instant::now() + PATIENCE;
        while children(root).unwrap() != expected {
            assert!(Instant::now() < deadline, "{:?}", tree(root).unwrap());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_tree_is_killed_but_for_those_that_are_spared() {
        let (mut shell, root) = shell_of(5, "sleep 100 & sh -c 'sleep 100 & sleep 100' & wait");
        let spared = children(root).unwrap()[0];
        kill_below(root, &[spared]).unwrap();
        wait_for_children(root, &[spared]);
        Process::open(root).unwrap().kill_tree().unwrap();
        assert_eq!(shell.wait().unwrap().signal(), Some(9));
    }

    #[test]
    fn more_processes_than_descriptors_are_killed() {
        use nix::sys::resource::{Resource, getrlimit, setrlimit};
        let (mut shell, root) = shell_of(61, "for i in $(seq 60); do sleep 100 & done; wait");
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 40, hard).unwrap();
        let killed = kill_below(root, &[]);
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        killed.unwrap();
        wait_for_children(root, &[]);
        shell.kill().unwrap();
        shell.wait().unwrap();
    }
}
