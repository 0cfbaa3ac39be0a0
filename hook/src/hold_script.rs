//! What CRIU runs while it restores: the container's networks are made, and its tasks are held.
//!
//! ```text
//!  guard ── runc ─┬─ CRIU ── this     `setup-namespaces`: the first task is there, in the container's cgroup, with CRIU
//!                 │                   `post-setup-namespaces`: the networks (own_networks)
//!                 '─ tasks            `pre-resume`: every task is whole, and still traced by CRIU
//!
//!  <work>/transship-hold -> /proc/GUARD/exe     CRIU's action script: a program without arguments
//!  <work>/transship-hold.socket                 the guard's: 'm' <number of the first task, 4 bytes>         move helpers
//!                                                            'h' <number of the first task, 4 bytes> -> "\n"  hold
//!
//!  helpers (CRIU, this) out of the container's cgroup ─> freeze it ─> CRIU detaches from frozen tasks
//! ```
//!
//! CRIU's own way, `leave-stopped`, sends SIGSTOP, so who lets the tasks go must send SIGCONT: programs
//! have handlers for it, and their parents hear of both (SIGCHLD). The freezer nobody notices. runc has
//! started CRIU in the container's cgroup, to be frozen with it, so it is moved to that of the guard first. The kernel takes
//! some ten milliseconds for it (a grace period of RCU), so the guard does it while CRIU restores; `pre-resume` moves what is
//! left.
//! Where there is no freezer, or others are in the cgroup, the tasks are stopped by SIGSTOP after all.
//!
//! Where CRIU joins a pid namespace its scripts are in it, so that the numbers that cgroups and signals know there are not
//! those of this node's /proc. The guard, which is not, then does what this would do. Others in that namespace may send
//! SIGCONT; what is frozen stays so.
//!
//! CRIU goes on when `pre-resume` fails. So whatever comes here, the tasks do not run: what can be neither
//! frozen nor stopped is killed.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;

use nix::sched::{CloneFlags, setns};
use transship_checkpoint::criu_options::{ConfigLine, ConfigLineError};

use crate::descendants::{Process, stop_tree, tree};
use crate::first_task;
use crate::freezer::Freezer;
use crate::own_networks;

/// The front's name as this program.
pub const PROGRAM: &str = "transship-hold";
const SOCKET: &str = "transship-hold.socket";
/// What the guard is asked for.
const MOVE_HELPERS: u8 = b'm';
const HOLD: u8 = b'h';
/// How often helpers are moved that have come to be since.
const ROUNDS: usize = 10;

/// Puts the program into the work directory, and gives the line of CRIU's configuration.
pub(crate) fn prepare(work: &Path) -> io::Result<Result<ConfigLine, ConfigLineError>> {
    let work = std::path::absolute(work)?;
    link(&work, std::process::id())?;
    let program = work.join(PROGRAM);
    Ok(ConfigLine::with(
        "action-script",
        &program.to_string_lossy(),
    ))
}

/// The guard of the restore, below which all of it is, lives until its end. It gets where it may be asked, if there is a
/// program.
pub(crate) fn guard(work: &Path) -> io::Result<Option<UnixListener>> {
    match work.join(PROGRAM).symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        found => {
            found?;
            link(work, std::process::id())?;
            drop(fs::remove_file(work.join(SOCKET)));
            let dir = File::open(work)?;
            UnixListener::bind(socket(&dir)).map(Some)
        }
    }
}

/// The name of a socket is short, and that of a work directory is not.
fn socket(work: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", work.as_raw_fd()))
}

/// Does as the guard what a program asks for. What goes wrong when the tasks are to be held that one does not hear of, and
/// waits.
pub(crate) fn answer(asked: &UnixListener, work: &Path) -> io::Result<()> {
    let (mut program, _) = asked.accept()?;
    let (mut what, mut root) = ([0; 1], [0; 4]);
    program.read_exact(&mut what)?;
    program.read_exact(&mut root)?;
    let (guard, root) = (std::process::id().cast_signed(), i32::from_le_bytes(root));
    match what {
        [MOVE_HELPERS] => {
            // Whoever waits for it waits for the end of the restore otherwise.
            drop(first_task::tell(work, root));
            // What it does not do `pre-resume` does.
            thread::spawn(move || tree(root).and_then(|tasks| move_helpers(guard, &tasks)));
            Ok(())
        }
        [HOLD] => {
            hold(Some(guard), root)?;
            program.write_all(b"\n")
        }
        _ => Err(io::Error::from(io::ErrorKind::InvalidData)),
    }
}

fn say(program: &Path, what: u8, root: i32) -> io::Result<UnixStream> {
    let work = program.parent().unwrap_or(Path::new("."));
    let mut guard = UnixStream::connect(socket(&File::open(work)?))?;
    let mut message = vec![what];
    message.extend(root.to_le_bytes());
    guard.write_all(&message)?;
    Ok(guard)
}

/// Has the tasks held by the guard. CRIU goes on when this ends, so it does not until they are; the guard ends what makes
/// no progress.
fn ask(program: &Path, root: i32) {
    let held = say(program, HOLD, root).and_then(|mut guard| guard.read_exact(&mut [0]));
    if let Err(error) = held {
        eprintln!("the tasks are not held: {error}");
        loop {
            thread::park();
        }
    }
}

/// Whether numbers of processes here are those of this node's /proc.
fn is_in_pid_namespace_of_node() -> io::Result<bool> {
    Ok(fs::read_link("/proc/self")?.as_os_str() == OsStr::new(&std::process::id().to_string()))
}

fn link(work: &Path, pid: u32) -> io::Result<()> {
    let (program, new) = (work.join(PROGRAM), work.join("transship-hold.new"));
    drop(fs::remove_file(&new));
    symlink(format!("/proc/{pid}/exe"), &new)?;
    fs::rename(new, program)
}

/// Whether the front was started as this.
#[must_use]
pub fn is_called(program: &OsStr) -> bool {
    Path::new(program).file_name() == Some(OsStr::new(PROGRAM))
}

/// Does what CRIU is at. `program` is the path that it has called, `root` the pid of the first task.
///
/// # Errors
/// The networks are not made; or the tasks are not held, and have been killed.
pub fn serve(program: &Path, action: &str, root: i32) -> io::Result<()> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    match action {
        "post-setup-namespaces" => {
            // What a plugin mounts is for the node, where it is looked for when the network is given back.
            guard_of(program).map_or(Ok(()), enter_mounts_of)?;
            own_networks::make(program.parent().ok_or_else(invalid)?, root)
        }
        "setup-namespaces" if is_in_pid_namespace_of_node()? => {
            // Without a guard, and whenever it does not, `pre-resume` moves them.
            drop(say(program, MOVE_HELPERS, root));
            Ok(())
        }
        "pre-resume" if is_in_pid_namespace_of_node()? => hold(guard_of(program), root),
        "pre-resume" => {
            ask(program, root);
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Holds the tasks from `root` downwards, or kills them.
fn hold(guard: Option<i32>, root: i32) -> io::Result<()> {
    freeze_or_stop(guard, root).inspect_err(|_| {
        // One that has ended is as good.
        drop(Process::open(root).and_then(|root| root.kill_tree()));
    })
}

fn freeze_or_stop(guard: Option<i32>, root: i32) -> io::Result<()> {
    let tasks = tree(root)?;
    if guard.is_some_and(|guard| freeze(guard, &tasks).is_ok()) {
        return Ok(());
    }
    // They take the signal when CRIU has gone.
    stop_tree(root)
}

fn enter_mounts_of(pid: i32) -> io::Result<()> {
    let namespace = File::open(format!("/proc/{pid}/ns/mnt"))?;
    let identity = |it: &fs::Metadata| (it.dev(), it.ino());
    let own = fs::metadata("/proc/self/ns/mnt")?;
    match identity(&namespace.metadata()?) == identity(&own) {
        true => Ok(()),
        false => Ok(setns(namespace, CloneFlags::CLONE_NEWNS)?),
    }
}

/// The guard, by the link that it has made.
fn guard_of(program: &Path) -> Option<i32> {
    let target = fs::read_link(program).ok()?;
    let pid = target.strip_prefix("/proc").ok()?.parent()?;
    pid.to_str()?.parse().ok()
}

fn freeze(guard: i32, tasks: &[i32]) -> io::Result<()> {
    move_helpers(guard, tasks)?.freeze()
}

/// Moves what restores the tasks, and is below the guard, out of their freezer, which has nobody else then.
fn move_helpers(guard: i32, tasks: &[i32]) -> io::Result<Freezer> {
    let freezer = Freezer::around(tasks)?;
    let outside = Freezer::around(&[guard])?;
    let tasks: BTreeSet<i32> = tasks.iter().copied().collect();
    for _ in 0..ROUNDS {
        let members = freezer.members()?;
        let others: Vec<i32> = members.difference(&tasks).copied().collect();
        if others.is_empty() {
            return Ok(freezer);
        }
        let helpers: BTreeSet<i32> = tree(guard)?.into_iter().skip(1).collect();
        for other in others {
            if !helpers.contains(&other) {
                return Err(io::Error::other(format!("process {other} is there, too")));
            }
            outside.take(other)?;
        }
    }
    Err(io::Error::other("others come and go there"))
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use transship_sandbox::TaskStat;

    use super::*;

    #[test]
    fn the_program_leads_to_the_guard() {
        let dir = tempfile::tempdir().unwrap();
        assert!(guard(dir.path()).unwrap().is_none());
        let program = dir.path().join(PROGRAM);
        program.symlink_metadata().unwrap_err();
        let line = prepare(dir.path()).unwrap().unwrap().to_string();
        assert_eq!(line, format!("action-script {}", program.display()));
        drop(guard(dir.path()).unwrap().unwrap());
        assert_eq!(guard_of(&program), Some(std::process::id().cast_signed()));
        assert!(is_called(program.as_os_str()) && !is_called(OsStr::new("transship-runc")));
        // Not asked for anything.
        let own = std::process::id().cast_signed();
        serve(&program, "post-setup-namespaces", own).unwrap();
        serve(&program, "post-restore", 1).unwrap();
    }

    #[test]
    fn what_shares_its_cgroup_with_others_is_stopped() {
        let dir = tempfile::tempdir().unwrap();
        drop(prepare(dir.path()).unwrap());
        let program = dir.path().join(PROGRAM);
        is_stopped(|root| serve(&program, "pre-resume", root).unwrap());
        // The same by the guard.
        let asked = guard(dir.path()).unwrap().unwrap();
        is_stopped(|root| {
            thread::scope(|scope| {
                scope.spawn(|| answer(&asked, dir.path()).unwrap());
                ask(&program, root);
            });
        });
    }

    fn is_stopped(held: impl FnOnce(i32)) {
        let mut task = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = task.id();
        held(pid.cast_signed());
        let stopped = || TaskStat::of(format!("/proc/{pid}")).unwrap().state() == 'T';
        for _ in 0..2000 {
            if stopped() {
                break;
            }
            thread::sleep(Duration::from_millis(5));
        }
        assert!(stopped());
        task.kill().unwrap();
        task.wait().unwrap();
    }
}
