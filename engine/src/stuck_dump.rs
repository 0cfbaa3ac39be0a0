//! A dump that does not come to its end.
//!
//! CRIU can wait for ever: `ptrace(PTRACE_SEIZE)` of a task that is stopped (SIGSTOP) and frozen by
//! the cgroup v1 freezer does (seen on Linux 6.18 in `ptrace_attach`), and so can a file system that
//! hangs. Progress is what it writes: images and log. CRIU itself is found by the files that it has
//! open, because the runtime and the shim stand between.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use procfs::process::{FDTarget, Process, all_processes};
use tokio::time::{Instant, sleep};
use walkdir::WalkDir;

/// How long a dump may write nothing, unless somebody says otherwise.
pub const PROGRESS_PATIENCE: Duration = Duration::from_secs(30);
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// How long a program may take to make rules, at most; it is one of the container's own if it takes longer.
const MAKES_RULES: Duration = Duration::from_secs(2);

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

/// Waits for the end of a dump into `dir` that nobody else waits for, and ends it when it is stuck. `root` is the
/// container's first process: its network is locked no more, also where CRIU was killed before it could say so.
pub async fn wait_for_end(dir: &Path, root: Option<u32>) {
    let gone = async {
        while !criu_writing_to(dir).is_empty() {
            sleep(LOOK_AGAIN).await;
        }
    };
    tokio::select! {
        () = gone => {}
        () = no_progress(dir, PROGRESS_PATIENCE, || false) => end(dir),
    }
    if let Some(root) = root {
        // A network that cannot be looked at has no lock.
        drop(tokio::task::spawn_blocking(move || unlock_network(root)).await);
    }
}

/// Ends the dump into `dir`: the runtime that asked for it then says that it has failed.
pub fn end(dir: &Path) {
    for pid in criu_writing_to(dir) {
        // One that has ended meanwhile is as good.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
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
fn criu_writing_to(dir: &Path) -> Vec<i32> {
    let processes = all_processes().into_iter().flatten().flatten();
    let criu = processes.filter(|process| process.stat().is_ok_and(|stat| stat.comm == "criu"));
    criu.filter(|criu| has_open_below(criu, dir))
        .map(|criu| criu.pid)
        .collect()
}

fn has_open_below(process: &Process, dir: &Path) -> bool {
    let descriptors = process.fd().into_iter().flatten().flatten();
    descriptors
        .map(|descriptor| descriptor.target)
        .any(|target| matches!(target, FDTarget::Path(path) if path.starts_with(dir)))
}

/// Takes away the lock that a CRIU has left which could not: `CRIU-...` tables of nftables, or the
/// chain `CRIU` of iptables (`criu/netfilter.c`). A program that a killed CRIU has told to make it may still be at it.
fn unlock_network(root: u32) {
    let deadline = std::time::Instant::now() + MAKES_RULES;
    while makes_rules(root) && std::time::Instant::now() < deadline {
        std::thread::sleep(LOOK_AGAIN / 10);
    }
    let unlock = || {
        let namespace = fs::File::open(format!("/proc/{root}/ns/net"))?;
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        let tables = output("nft", &["list", "tables"]);
        for table in tables.lines().filter(|line| line.contains(" CRIU-")) {
            let mut words = vec!["delete"];
            words.extend(table.split_whitespace());
            output("nft", &words);
        }
        for (save, restore) in [
            ("iptables-save", "iptables-restore"),
            ("ip6tables-save", "ip6tables-restore"),
        ] {
            if output(save, &["-t", "filter"]).contains(":CRIU ") {
                feed(
                    restore,
                    "*filter\n:CRIU - [0:0]\n-D INPUT -j CRIU\n-D OUTPUT -j CRIU\n-X CRIU\nCOMMIT\n",
                )?;
            }
        }
        io::Result::Ok(())
    };
    // A thread of its own, because it changes its namespace. A container that has ended has no
    // network, and a node without these tools no lock.
    std::thread::scope(|scope| drop(scope.spawn(unlock).join()));
}

/// Whether a program that makes rules is at work in the network of this process.
fn makes_rules(root: u32) -> bool {
    let network = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let Some(of_root) = network(root.cast_signed()) else {
        return false;
    };
    let processes = all_processes().into_iter().flatten().flatten();
    processes
        .filter(|process| {
            let name = process.stat().map(|stat| stat.comm).unwrap_or_default();
            ["iptables", "ip6tables", "nft"]
                .iter()
                .any(|rules| name.starts_with(rules))
        })
        .any(|process| network(process.pid) == Some(of_root.clone()))
}

fn output(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output();
    output.map_or_else(
        |_| String::new(),
        |output| String::from_utf8_lossy(&output.stdout).into_owned(),
    )
}

fn feed(program: &str, text: &str) -> io::Result<()> {
    let mut child = Command::new(program)
        .args(["-w", "--noflush"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(text.as_bytes())?;
    }
    child.wait().map(drop)
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
        wait_for_end(dir.path(), None).await;
    }

    #[test]
    fn a_stopped_task_is_named() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id();
        kill(Pid::from_raw(pid.cast_signed()), Signal::SIGSTOP).unwrap();
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
