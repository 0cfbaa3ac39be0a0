//! A dump that does not come to its end.
//!
//! CRIU can wait for ever: `ptrace(PTRACE_SEIZE)` of a task that is stopped (SIGSTOP) and frozen by
//! the cgroup v1 freezer does (seen on Linux 6.18 in `ptrace_attach`), and so can a file system that
//! hangs. Progress is what it writes: images and log. CRIU itself is found by the files that it has
//! open, because the runtime and the shim stand between.

use std::path::Path;
use std::time::Duration;

use procfs::process::{FDTarget, Process, all_processes};
use rustix::process::Signal;
use tokio::time::{Instant, sleep};
use transship_sandbox::ProcessHandle;
use walkdir::WalkDir;

use crate::killed_criu;

/// How long a dump may write nothing, unless somebody says otherwise.
pub const PROGRESS_PATIENCE: Duration = Duration::from_secs(30);
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Comes back when the dump into `dir` has made no progress for `patience`, but for the time in which it `waits`
/// for this program.
pub async fn no_progress(dir: &Path, patience: Duration, waits: impl Fn() -> bool) {
    let (mut seen, mut since) = (0, Instant::now());
    loop {
        let now = bytes_below(dir);
        if now != seen || waits() {
            (seen, since) = (now, Instant::now());
        } else if since.elapsed() >= patience {
            return;
        }
        sleep(LOOK_AGAIN).await;
    }
}

/// Waits for the end of a dump into `dir` that nobody else waits for, and ends it when it is stuck. `roots` are the
/// first processes of its containers: what CRIU leaves in them when it is killed is taken away.
pub async fn wait_for_end(dir: &Path, roots: Vec<u32>) {
    let gone = async {
        while !criu_writing_to(dir).is_empty() {
            sleep(LOOK_AGAIN).await;
        }
    };
    tokio::select! {
        () = gone => {}
        () = no_progress(dir, PROGRESS_PATIENCE, || false) => end(dir),
    }
    if !roots.is_empty() {
        let draft = dir.to_path_buf();
        drop(tokio::task::spawn_blocking(move || killed_criu::clean_up(&draft, &roots)).await);
    }
}

/// Ends the dump into `dir`: the runtime that asked for it then says that it has failed.
pub fn end(dir: &Path) {
    for criu in criu_writing_to(dir) {
        // One that has ended meanwhile is as good.
        drop(criu.signal(Signal::KILL));
    }
}

fn bytes_below(dir: &Path) -> u64 {
    // CRIU may have just renamed what cannot be looked at.
    let entries = WalkDir::new(dir).min_depth(1).into_iter().flatten();
    let files = entries.filter_map(|entry| entry.metadata().ok());
    files
        .map(|file| 1 + if file.is_dir() { 0 } else { file.len() })
        .sum()
}

/// The CRIU processes that have something below `dir` open.
fn criu_writing_to(dir: &Path) -> Vec<ProcessHandle> {
    let processes = all_processes().into_iter().flatten().flatten();
    let criu = processes.filter(|process| process.stat().is_ok_and(|stat| stat.comm == "criu"));
    // What is read of it after its handle was opened is its own: the directory in /proc is that of one process.
    criu.filter_map(|criu| {
        let handle = ProcessHandle::open(criu.pid).ok()?;
        has_open_below(&criu, dir).then_some(handle)
    })
    .collect()
}

fn has_open_below(process: &Process, dir: &Path) -> bool {
    let descriptors = process.fd().into_iter().flatten().flatten();
    descriptors
        .map(|descriptor| descriptor.target)
        .any(|target| matches!(target, FDTarget::Path(path) if path.starts_with(dir)))
}

/// The tasks among `pids` that somebody has stopped, as "17 (sh)".
pub fn stopped_tasks(pids: &[u32]) -> Vec<String> {
    let stopped = pids.iter().filter_map(|pid| {
        let stat = Process::new(pid.cast_signed()).ok()?.stat().ok()?;
        (stat.state == 'T').then(|| format!("{pid} ({})", stat.comm))
    });
    stopped.collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;

    #[tokio::test]
    async fn what_grows_is_progress() {
        let dir = tempfile::tempdir().unwrap();
        let images = dir.path().join("images");
        fs::create_dir(&images).unwrap();
        let before = bytes_below(dir.path());
        fs::write(images.join("pages-1.img"), [0; 4096]).unwrap();
        assert!(bytes_below(dir.path()) > before);
        // One that writes no more is stuck; this test itself has nothing of CRIU open.
        no_progress(dir.path(), Duration::from_millis(1), || false).await;
        assert!(criu_writing_to(dir.path()).is_empty());
        wait_for_end(dir.path(), Vec::new()).await;
    }

    #[test]
    fn a_stopped_task_is_named() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id();
        let handle = ProcessHandle::open(pid.cast_signed()).unwrap();
        assert!(handle.signal(Signal::STOP).unwrap());
        while stopped_tasks(&[pid]).is_empty() {
            std::thread::yield_now();
        }
        assert_eq!(
            stopped_tasks(&[pid, std::process::id()]),
            [format!("{pid} (sleep)")]
        );
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
