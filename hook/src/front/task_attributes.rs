//! What CRIU does not keep of tasks, given back to them while they are held; see
//! [`transship_checkpoint::task_attributes`].
//!
//! The file is part of the checkpoint, so what it may do is bounded: a task gets processors of its own
//! cpuset only, a real-time I/O priority only where the container may have one, and a socket only what every process
//! may ask for.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use transship_checkpoint::beneath::{Links, read_regular};
use transship_checkpoint::criu_images::timers::{self, WallClock};
use transship_checkpoint::criu_images::{ImageError, posix_timers};
use transship_checkpoint::task_attributes::{
    IoClass, Socket, TASKS_FILE, TASKS_LIMIT, Task, TaskAttributes, Unread, parse_cpus,
};
use transship_sandbox::socket_options::{Allowed, give};
use transship_sandbox::{DescriptorsOf, TaskStatus};

use crate::descendants::tree;

/// `CAP_SYS_ADMIN` and `CAP_SYS_NICE`, either of which ioprio_set(2) wants for real-time.
const REALTIME_CAPABILITIES: u64 = 1 << 21 | 1 << 23;
/// So many tasks are given an I/O priority by one program.
const IONICE_TASKS: usize = 512;
/// So many losses of what was not read are told.
const UNREAD: usize = 16;
/// So many losses in all, of which a checkpoint could name any number.
const LOST: usize = 256;
/// Congestion controls that a process needs no capability for; others are modules that root's choice would load.
const ALLOWED_CONGESTION: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";

/// Reads the file in a container's directory of the checkpoint. A checkpoint without one says nothing.
///
/// # Errors
/// It cannot be read.
pub(super) fn read(dir: &Path) -> io::Result<TaskAttributes> {
    let file = Path::new(TASKS_FILE);
    match read_regular(dir, file, Links::Refused, TASKS_LIMIT) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(TaskAttributes::default()),
        json => Ok(serde_json::from_slice(&json?)?),
    }
}

/// Sets the timers in the images of `dir` that CRIU would let fire late, or never.
///
/// # Errors
/// An image cannot be read or replaced.
pub(super) fn correct_timers(dir: &Path, attributes: &TaskAttributes) -> Result<(), ImageError> {
    let now = now();
    let frozen_at = match attributes.frozen_at {
        0 => now,
        frozen_at => frozen_at,
    };
    let descriptors: BTreeMap<u32, u64> = { attributes.descriptor_timers.iter() }
        .map(|it| (it.id, it.at))
        .collect();
    let clock = WallClock { frozen_at, now };
    timers::correct(dir, clock, |id| descriptors.get(&id).copied())?;
    if attributes.timers.is_empty() {
        return Ok(());
    }
    let of_wall_clock: BTreeMap<(u32, u64), u64> = { attributes.timers.iter() }
        .map(|it| ((it.process, it.timer), it.at))
        .collect();
    posix_timers::set_left(dir, |timer| {
        let at = of_wall_clock.get(&(timer.process, timer.id))?;
        (!timer.left.is_zero()).then(|| left_until(*at, now, timer.period))
    })
}

/// How long it is to a moment of the wall clock. One that has passed fires at once, and a periodic timer with its next beat:
/// a timer is set to no time that has passed.
fn left_until(at: u64, now: u64, period: Duration) -> Duration {
    let period = u64::try_from(period.as_nanos()).unwrap_or(u64::MAX);
    let late = now.saturating_sub(at);
    Duration::from_nanos(match at.checked_sub(now) {
        Some(left @ 1..) => left,
        _ if period == 0 => 1,
        _ => period - late % period,
    })
}

/// Nanoseconds of the wall clock since 1970.
fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.ok().and_then(|now| u64::try_from(now.as_nanos()).ok());
    now.unwrap_or_default()
}

/// Gives the held tasks below `root` what they had. Gives what they cannot have, for people.
///
/// # Errors
/// The tasks cannot be listed.
pub(super) fn give_back(root: i32, attributes: &TaskAttributes) -> io::Result<Vec<String>> {
    let wanted: BTreeMap<u32, &Task> = attributes
        .tasks
        .iter()
        .map(|task| (task.id, task))
        .collect();
    let unread = attributes.unread.iter().take(UNREAD);
    let mut lost: Vec<String> = unread.map(Unread::text).collect();
    if attributes.left_out > 0 {
        lost.push(format!(
            "the options of {} sockets, which are more than a checkpoint has room for",
            attributes.left_out
        ));
    }
    if wanted.is_empty() && attributes.sockets.is_empty() {
        return Ok(lost);
    }
    let mut sockets: BTreeMap<u32, Vec<&Socket>> = BTreeMap::new();
    for socket in &attributes.sockets {
        sockets.entry(socket.process).or_default().push(socket);
    }
    let allowed_congestion = fs::read_to_string(ALLOWED_CONGESTION).unwrap_or_default();
    let allowed_congestion: Vec<&str> = allowed_congestion.split_whitespace().collect();
    let mut io_priorities: BTreeMap<_, Vec<(i32, &Task)>> = BTreeMap::new();
    for pid in tree(root)? {
        for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
            let name = entry?.file_name();
            let Some(tid) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let status = TaskStatus::of(format!("/proc/{pid}/task/{tid}"))?;
            let id = status.id_in_container();
            let bounding = status.attainable().unwrap_or_default();
            if let Some(sockets) = id.filter(|_| tid == pid).and_then(|id| sockets.get(&id)) {
                let allowed = Allowed {
                    congestion: &allowed_congestion,
                    capabilities: bounding,
                };
                lost.extend(give_to_sockets(pid, sockets, allowed));
            }
            let Some(task) = id.and_then(|id| wanted.get(&id)) else {
                continue;
            };
            let allowed = parse_cpus(status.field("Cpus_allowed_list").unwrap_or_default());
            lost.extend(give_one(tid, task, &allowed));
            match io_priority(task, bounding) {
                Ok(None) => {}
                Ok(Some(priority)) => io_priorities.entry(priority).or_default().push((tid, task)),
                Err(refused) => lost.push(refused),
            }
        }
    }
    for (priority, tasks) in io_priorities {
        lost.extend(give_io_priority(priority, &tasks));
    }
    lost.truncate(LOST);
    Ok(lost)
}

fn give_one(tid: i32, task: &Task, allowed: &[usize]) -> Vec<String> {
    let mut lost = Vec::new();
    let id = task.id;
    if !task.cpus.is_empty() && !set_cpus(tid, &task.cpus, allowed) {
        lost.push(format!(
            "the processors of task {id} ({:?}) are not the container's here, it may use all",
            task.cpus
        ));
    }
    if let Some(slack) = task.timer_slack
        && fs::write(format!("/proc/{tid}/timerslack_ns"), slack.to_string()).is_err()
    {
        lost.push(format!("the timer slack of task {id}, {slack} ns"));
    }
    if let Some(filter) = task.coredump_filter
        && fs::write(
            format!("/proc/{tid}/coredump_filter"),
            format!("{filter:#x}"),
        )
        .is_err()
    {
        lost.push(format!("what a core dump of task {id} has, {filter:#x}"));
    }
    lost
}

/// The class and level that `ionice` is told.
///
/// # Errors
/// The task may not have it.
fn io_priority(task: &Task, bounding: u64) -> Result<Option<(&'static str, u8)>, String> {
    let Some(priority) = task.io_priority else {
        return Ok(None);
    };
    let (class, may_be) = match priority.class {
        IoClass::Realtime => ("1", bounding & REALTIME_CAPABILITIES != 0),
        IoClass::BestEffort => ("2", true),
        IoClass::Idle => ("3", true),
    };
    match may_be {
        true => Ok(Some((class, priority.level.min(7)))),
        false => Err(lost_io_priority(task)),
    }
}

fn lost_io_priority(task: &Task) -> String {
    let had = { task.io_priority }.map_or_else(String::new, |it| format!(", {it:?}"));
    format!("the I/O priority of task {}{had}", task.id)
}

/// Gives many tasks the same: the container stands still meanwhile, and a program for each would take its time.
fn give_io_priority((class, level): (&str, u8), tasks: &[(i32, &Task)]) -> Vec<String> {
    let mut lost = Vec::new();
    for some in tasks.chunks(IONICE_TASKS) {
        let ids = some.iter().map(|(tid, _)| *tid);
        if ionice(ids, class, level) {
            continue;
        }
        // It ends at the first that it cannot give it to.
        let refused = some.iter().filter(|(tid, _)| !ionice([*tid], class, level));
        lost.extend(refused.map(|(_, task)| lost_io_priority(task)));
    }
    lost
}

fn give_to_sockets(pid: i32, sockets: &[&Socket], allowed: Allowed<'_>) -> Vec<String> {
    let descriptors = DescriptorsOf::process(pid).ok();
    let lost = sockets.iter().flat_map(|socket| {
        let Socket {
            process: id,
            descriptor,
            options,
        } = socket;
        let found = { descriptors.as_ref() }.and_then(|it| it.get(*descriptor).ok());
        let lost = match found {
            Some(socket) => give(options, &socket, allowed),
            None => vec!["its options".to_owned()],
        };
        { lost.into_iter() }.map(move |what| format!("of the socket {descriptor} of {id} {what}"))
    });
    lost.collect()
}

fn set_cpus(tid: i32, cpus: &[usize], allowed: &[usize]) -> bool {
    let mut set = CpuSet::new();
    let mut any = false;
    for cpu in cpus.iter().filter(|cpu| allowed.contains(cpu)) {
        any |= set.set(*cpu).is_ok();
    }
    any && sched_setaffinity(Pid::from_raw(tid), &set).is_ok()
}

fn ionice(tids: impl IntoIterator<Item = i32>, class: &str, level: u8) -> bool {
    let mut command = Command::new("ionice");
    command.args(["-c", class]);
    if class != "3" {
        command.args(["-n", &level.to_string()]);
    }
    let status = command
        .arg("-p")
        .args(tids.into_iter().map(|tid| tid.to_string()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use transship_checkpoint::task_attributes::{SocketOptions, UnreadKind};
    use transship_sandbox::socket_options::{self, SocketKind, Usual};

    use super::*;

    #[test]
    fn a_task_gets_processors_of_its_own_cpuset_only() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id().cast_signed();
        let status = || fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let cpus = || {
            let status = status();
            let list = status
                .lines()
                .find_map(|it| it.strip_prefix("Cpus_allowed_list:"));
            parse_cpus(list.unwrap())
        };
        let first = cpus()[0];
        let task = |cpus| Task {
            id: u32::try_from(pid).unwrap(),
            cpus,
            ..Task::default()
        };
        let attributes = |cpus| TaskAttributes {
            frozen_at: 0,
            tasks: vec![task(cpus)],
            ..TaskAttributes::default()
        };
        let lost = give_back(pid, &attributes(vec![60_000])).unwrap();
        assert_eq!(lost.len(), 1, "{lost:?}");
        assert!(
            give_back(pid, &attributes(vec![first, 60_000]))
                .unwrap()
                .is_empty()
        );
        assert_eq!(cpus(), [first]);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn tasks_with_one_io_priority_get_it_together() {
        let mut children: Vec<_> = (0..3)
            .map(|_| Command::new("sleep").arg("1000").spawn().unwrap())
            .collect();
        let task = Task::default();
        let mut tasks: Vec<(i32, &Task)> = { children.iter() }
            .map(|child| (child.id().cast_signed(), &task))
            .collect();
        // No process has this id.
        tasks.insert(0, (i32::MAX, &task));
        let lost = give_io_priority(("3", 0), &tasks);
        let told: Vec<String> = { children.iter() }
            .map(|child| {
                let of = ["-p", &child.id().to_string()];
                let output = Command::new("ionice").args(of).output().unwrap();
                String::from_utf8(output.stdout).unwrap()
            })
            .collect();
        let all = give_io_priority(("2", 7), &tasks[1..]);
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(lost.len(), 1, "{lost:?}");
        assert!(told.iter().all(|it| it.trim() == "idle"), "{told:?}");
        assert!(all.is_empty(), "{all:?}");
    }

    #[test]
    fn root_a_socket_gets_its_options() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let options = SocketOptions {
            plain: [("user_timeout".to_owned(), 4711)].into(),
            ..SocketOptions::default()
        };
        let pid = std::process::id();
        let socket = |descriptor| Socket {
            process: pid,
            descriptor,
            options: options.clone(),
        };
        let attributes = TaskAttributes {
            sockets: vec![socket(listener.as_raw_fd()), socket(i32::MAX)],
            unread: vec![Unread {
                process: 1,
                descriptor: 3,
                kind: UnreadKind::Inotify,
                bytes: 16,
            }],
            ..TaskAttributes::default()
        };
        let lost = give_back(pid.cast_signed(), &attributes).unwrap();
        assert_eq!(lost.len(), 2, "{lost:?}");
        assert!(lost[0].starts_with("events of inotify"), "{lost:?}");
        let usual = Usual::of(&SocketKind::Tcp.make().unwrap());
        assert_eq!(socket_options::read(&listener, &usual), options);
    }

    #[test]
    fn a_moment_that_has_passed_is_the_next_beat_or_now() {
        let left = |at, now, period| left_until(at, now, Duration::from_nanos(period)).as_nanos();
        assert_eq!(left(100, 30, 0), 70);
        assert_eq!(left(100, 30, 7), 70);
        assert_eq!(left(100, 100, 0), 1);
        assert_eq!(left(100, 1000, 0), 1);
        assert_eq!(left(100, 100, 7), 7);
        assert_eq!(left(100, 109, 7), 5);
        assert_eq!(left(u64::MAX, 0, u64::MAX), u64::MAX.into());
        assert_eq!(left(0, u64::MAX, u64::MAX), u64::MAX.into());
    }

    #[test]
    fn a_checkpoint_without_the_file_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let read = read(dir.path()).unwrap();
        assert_eq!(read.frozen_at, 0);
        assert!(read.tasks.is_empty());
    }
}
