//! What `/proc/PID/fdinfo` tells of descriptors that CRIU knows by their kind, and yet does not dump, or makes again
//! as other ones.
//!
//! ```text
//!  eventfd   eventfd-semaphore: 1    EFD_SEMAPHORE; Linux 6.5 and later tell. CRIU makes it again without
//!  timerfd   clockid: 8              CLOCK_REALTIME_ALARM, 9 is CLOCK_BOOTTIME_ALARM
//!  fanotify  fanotify sdev:39 mflags:0 mask:20 ...    FAN_MARK_FILESYSTEM
//!  pipe      flags: 040001           O_DIRECT: each write is a packet of its own
//!  pidfd     flags: 02000202         O_EXCL is PIDFD_THREAD
//!            Pid: 4711               -1: it has ended; else CRIU wants it among what it dumps
//!  limit     as many as there may be  CRIU opens its own in the process
//!  any       lock: 1: FLOCK  ADVISORY  WRITE 7 00:1b:42 0 EOF    also leases
//!  proc      /proc/1/task/7/status   files are opened again before there are threads
//!            /proc/1                 CRIU asks for "/proc/1/" and whatever stands behind it in memory
//! ```

use std::path::Path;

use nix::libc;
use nix::sys::statfs::{PROC_SUPER_MAGIC, statfs};
use procfs::process::{FDTarget, LimitValue};

use super::processes::{Processes, Seen};
use super::{Hit, Subject};
use crate::process_files::{self, field};

/// What CRIU has open in a process at once: its memory, its socket, its log, /proc (3.17 to 4.2).
const OF_CRIU: u64 = 4;
/// More of what is told of a descriptor than this is not read: marks of fanotify are behind one another.
const INFORMATION: u64 = 4 << 20;
/// The first lock comes before what a kind of file tells.
const FIRST_LOCK: u64 = 4 << 10;

pub(super) fn hits(processes: &Processes) -> Vec<Hit> {
    let hits = processes
        .descriptors()
        .filter_map(|(seen, number, target)| {
            // One that was closed meanwhile is none.
            let information = || process_files::descriptor(seen.pid, number, INFORMATION).ok();
            match target {
                FDTarget::AnonInode(kind) if kind == "[eventfd]" => semaphore(&information()?),
                FDTarget::AnonInode(kind) if kind == "[pidfd]" => {
                    pidfd(&information()?, &in_tree(processes))
                }
                FDTarget::AnonInode(kind) if kind == "[fanotify]" => {
                    watches_file_system(&information()?)
                }
                FDTarget::AnonInode(kind) if kind == "[timerfd]" => alarm(&information()?),
                FDTarget::Pipe(_) => packets(&information()?),
                FDTarget::Path(path) => {
                    let of_threads = of_a_thread(path)?;
                    let file = seen.descriptor(number);
                    is_proc(&file).then_some(("thread-file", of_threads))
                }
                _ => None,
            }
            .map(|(name, what)| (name, of(&what, seen)))
        });
    let full = processes.tree.iter().filter(|seen| !has_room(seen));
    hits.chain(full.map(|seen| ("descriptor-limit", seen.called())))
        .collect()
}

/// Files that are locked, where locks are not to be kept.
pub(super) fn locks(subject: &Subject, processes: &Processes) -> Vec<Hit> {
    if subject.criu.file_locks {
        return Vec::new();
    }
    let paths = { processes.descriptors() }.filter_map(|(seen, number, target)| match target {
        FDTarget::Path(path) => Some((seen, number, path.display().to_string())),
        FDTarget::MemFD(name) => Some((seen, number, format!("/memfd:{name}"))),
        _ => None,
    });
    let locked = paths.filter(|(seen, number, _)| {
        let information = process_files::descriptor(seen.pid, *number, FIRST_LOCK);
        information.is_ok_and(|it| is_locked(&it))
    });
    locked
        .map(|(seen, _, path)| {
            let what = format!("{} of {}", path.escape_debug(), seen.called());
            ("file-locks", what)
        })
        .collect()
}

fn is_locked(information: &str) -> bool {
    field(information, "lock:").is_some()
}

/// Also where the limit is not told.
fn has_room(seen: &Seen) -> bool {
    let limits = seen.process().and_then(|it| it.limits());
    let limit = limits.map(|it| it.max_open_files.soft_limit);
    match limit {
        Ok(LimitValue::Value(most)) => seen.descriptors.len() as u64 + OF_CRIU <= most,
        _ => true,
    }
}

fn of(what: &str, seen: &Seen) -> String {
    match what.is_empty() {
        true => seen.called(),
        false => format!("{what} of {}", seen.called()),
    }
}

fn in_tree(processes: &Processes) -> impl Fn(i64) -> bool {
    |pid| {
        let mut pids = processes.tree.iter().map(|seen| i64::from(seen.pid));
        pids.any(|it| it == pid)
    }
}

fn flags(information: &str) -> i32 {
    let flags = field(information, "flags:").and_then(|octal| i32::from_str_radix(octal, 8).ok());
    flags.unwrap_or_default()
}

fn semaphore(information: &str) -> Option<Hit> {
    let on = field(information, "eventfd-semaphore:") == Some("1");
    on.then(|| ("eventfd-semaphore", String::new()))
}

fn alarm(information: &str) -> Option<Hit> {
    let clock: i32 = field(information, "clockid:")?.parse().ok()?;
    let wakes = [libc::CLOCK_REALTIME_ALARM, libc::CLOCK_BOOTTIME_ALARM].contains(&clock);
    wakes.then(|| ("alarm-timerfd", String::new()))
}

/// CRIU reads the marks of files and mounts, and passes over what it does not know (`parse_fdinfo_pid_s`).
fn watches_file_system(information: &str) -> Option<Hit> {
    let mut lines = information.lines();
    let any = lines.any(|line| line.starts_with("fanotify sdev:"));
    any.then(|| ("filesystem-watch", String::new()))
}

fn packets(information: &str) -> Option<Hit> {
    (flags(information) & libc::O_DIRECT != 0).then(|| ("packet-pipe", String::new()))
}

fn pidfd(information: &str, in_tree: &dyn Fn(i64) -> bool) -> Option<Hit> {
    if flags(information) & libc::O_EXCL != 0 {
        return Some(("pidfd", "one of a thread".to_owned()));
    }
    let pid: i64 = field(information, "Pid:")?.parse().ok()?;
    (pid != -1 && !in_tree(pid)).then(|| ("pidfd", "one of a process outside".to_owned()))
}

/// The path, if it is of a thread that is not the first of its process, or the directory of a process.
fn of_a_thread(path: &Path) -> Option<String> {
    let names: Vec<&str> = path.to_str()?.split('/').collect();
    let is_id = |name: &&str| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit());
    let at = names.iter().position(is_id)?;
    let told = match names[at..] {
        [_] => true,
        [process, "task", thread, ..] => is_id(&thread) && thread != process,
        _ => false,
    };
    told.then(|| path.display().to_string().escape_debug().to_string())
}

fn is_proc(file: &str) -> bool {
    statfs(file).is_ok_and(|it| it.filesystem_type() == PROC_SUPER_MAGIC)
}

#[cfg(test)]
mod tests {
    use transship_checkpoint::criu_options::CriuOptions;
    use transship_checkpoint::spec::Spec;

    use super::*;

    #[test]
    fn a_lock_of_memory_is_a_lock() {
        let memory = rustix::fs::memfd_create("buffer", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let locked = || {
            let own = std::process::id();
            let subject = Subject {
                id: String::new(),
                init: own,
                pids: Vec::new(),
                spec: Spec::parse(b"{}").unwrap(),
                criu: CriuOptions {
                    file_locks: false,
                    ..CriuOptions::default()
                },
            };
            let hits = locks(&subject, &Processes::read(own, &[own]));
            hits.iter()
                .any(|(_, what)| what.starts_with("/memfd:buffer"))
        };
        assert!(!locked());
        rustix::fs::flock(&memory, rustix::fs::FlockOperation::LockExclusive).unwrap();
        assert!(locked());
    }

    #[test]
    fn what_the_kernel_tells_is_read() {
        let name = |hit: Option<Hit>| hit.map(|(name, _)| name);
        let event = "pos:\t0\nflags:\t02\neventfd-count: 3\neventfd-id: 1\neventfd-semaphore: ";
        assert_eq!(
            name(semaphore(&format!("{event}1\n"))),
            Some("eventfd-semaphore")
        );
        assert_eq!(name(semaphore(&format!("{event}0\n"))), None);
        assert_eq!(name(packets("flags:\t040001\n")), Some("packet-pipe"));
        assert_eq!(name(packets("flags:\t0100001\n")), None);
        let lock = "flags:\t0100002\nlock:\t1: FLOCK  ADVISORY  WRITE 7 00:1b:42 0 EOF\n";
        assert!(is_locked(lock) && !is_locked("flags:\t0100002\nmnt_id:\t7\n"));
        assert_eq!(name(alarm("clockid: 9\nticks: 0\n")), Some("alarm-timerfd"));
        assert_eq!(name(alarm("clockid: 7\nticks: 0\n")), None);
        let marks = "flags:\t02\nfanotify flags:0 event-flags:0\nfanotify ino:7 sdev:39 mflags:0 mask:2\n\
            fanotify mnt_id:3 mflags:0 mask:2\n";
        assert_eq!(name(watches_file_system(marks)), None);
        let whole = format!("{marks}fanotify sdev:39 mflags:0 mask:20 ignored_mask:0\n");
        assert_eq!(name(watches_file_system(&whole)), Some("filesystem-watch"));
        let inside = |pid| pid == 7;
        for (information, told) in [
            ("flags:\t02000202\nPid:\t7\n", Some("pidfd")),
            ("flags:\t02000002\nPid:\t7\n", None),
            ("flags:\t02000002\nPid:\t-1\n", None),
            ("flags:\t02000002\nPid:\t8\n", Some("pidfd")),
        ] {
            assert_eq!(name(pidfd(information, &inside)), told, "{information}");
        }
    }

    #[test]
    fn files_of_threads_are_known_by_their_paths() {
        for (path, told) in [
            ("/proc/1/task/7/status", true),
            ("/proc/1/task/7", true),
            ("/proc/1", true),
            ("/proc/1/task/1/status", false),
            ("/proc/1/task", false),
            ("/proc/1/status", false),
            ("/proc/7 (deleted)", false),
            ("/proc/meminfo", false),
            ("/proc", false),
        ] {
            assert_eq!(of_a_thread(Path::new(path)).is_some(), told, "{path}");
        }
        assert!(is_proc("/proc/self/status") && !is_proc("/dev/null"));
    }
}
