//! What CRIU does not keep of frozen tasks, read from the kernel: affinity, timer slack, I/O priority, what a core dump
//! has, options of sockets, what was not read, and the moment of the freeze.
//!
//! ```text
//!  /proc/PID/task/TID/status    NSpid, Cpus_allowed_list    cpus, where they are fewer than the cpuset's
//!  /proc/TID/timerslack_ns
//!  /proc/PID/coredump_filter
//!  ionice -p TID...             ioprio_get(2) has no safe binding; without the program there is none
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use transship_checkpoint::task_attributes::{
    DEFAULT_COREDUMP_FILTER, DEFAULT_TIMER_SLACK, IoClass, IoPriority, Task, TaskAttributes,
    parse_cpus,
};
use transship_sandbox::{TaskStatus, read_proc};

use crate::descriptor_attributes;
use crate::wall_clock_timers::{Expiries, wall_clock_now};

const CGROUPS: &str = "/sys/fs/cgroup";
const ONLINE: &str = "/sys/devices/system/cpu/online";
/// Threads that one call of `ionice` is given.
const AT_ONCE: usize = 512;

/// The attributes of all threads of these frozen processes, now, and what tells of their timers after the dump.
pub(crate) fn read(pids: &[u32]) -> (TaskAttributes, Expiries) {
    let frozen_at = wall_clock_now();
    let mut tasks: Vec<(u32, Task)> = Vec::new();
    for pid in pids {
        let allowed = allowed_cpus(*pid);
        let threads = fs::read_dir(format!("/proc/{pid}/task"));
        let names = threads.into_iter().flatten().flatten();
        for tid in names.filter_map(|entry| entry.file_name().to_str()?.parse().ok()) {
            tasks.extend(task(*pid, tid, &allowed).map(|task| (tid, task)));
        }
    }
    for chunk in tasks.chunks_mut(AT_ONCE) {
        let tids: Vec<u32> = chunk.iter().map(|(tid, _)| *tid).collect();
        let priorities = io_priorities(&tids);
        if priorities.len() == chunk.len() {
            for ((_, task), priority) in chunk.iter_mut().zip(priorities) {
                task.io_priority = priority;
            }
        }
    }
    let of_descriptors = descriptor_attributes::read(pids);
    let expiries = Expiries::read(pids, of_descriptors.moments);
    let attributes = TaskAttributes {
        frozen_at,
        sockets: of_descriptors.sockets,
        left_out: of_descriptors.left_out,
        unread: of_descriptors.unread,
        // They are known after the dump.
        timers: Vec::new(),
        descriptor_timers: Vec::new(),
        tasks: tasks
            .into_iter()
            .map(|(_, task)| task)
            .filter(|task| !task.is_ordinary())
            .collect(),
    };
    (attributes, expiries)
}

fn task(pid: u32, tid: u32, allowed: &[usize]) -> Option<Task> {
    let status = TaskStatus::of(format!("/proc/{pid}/task/{tid}")).ok()?;
    let cpus = parse_cpus(status.field("Cpus_allowed_list")?);
    let slack = fs::read_to_string(format!("/proc/{tid}/timerslack_ns")).ok();
    let slack = slack.and_then(|text| text.trim().parse().ok());
    Some(Task {
        id: status.id_in_container()?,
        cpus: if cpus.len() < allowed.len() {
            cpus
        } else {
            Vec::new()
        },
        timer_slack: slack.filter(|slack| *slack != DEFAULT_TIMER_SLACK),
        io_priority: None,
        coredump_filter: (tid == pid).then(|| coredump_filter(pid)).flatten(),
    })
}

/// Where it is not the usual one.
fn coredump_filter(pid: u32) -> Option<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/coredump_filter")).ok()?;
    // Of a process without memory nothing is told.
    let filter = u32::from_str_radix(text.trim(), 16).ok()?;
    (filter != DEFAULT_COREDUMP_FILTER).then_some(filter)
}

/// The processors of the process's cpuset; where that cannot be found, those of the machine.
fn allowed_cpus(pid: u32) -> Vec<usize> {
    let cgroups = read_proc(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let of_cpuset = cgroups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let has_it = controllers.split(',').any(|it| it == "cpuset");
        has_it.then(|| {
            (
                Path::new(CGROUPS).join("cpuset"),
                path.to_owned(),
                "cpuset.effective_cpus",
            )
        })
    });
    let unified = || {
        let path = cgroups.lines().find_map(|line| line.strip_prefix("0::"))?;
        Some((
            PathBuf::from(CGROUPS),
            path.to_owned(),
            "cpuset.cpus.effective",
        ))
    };
    let found = of_cpuset.or_else(unified).and_then(|(root, path, file)| {
        let dir = root.join(path.trim_start_matches('/'));
        // On v2 a cgroup without the controller has the set of the one above.
        let mut above = dir.ancestors().take_while(|dir| dir.starts_with(&root));
        above.find_map(|dir| fs::read_to_string(dir.join(file)).ok())
    });
    let list = found.or_else(|| fs::read_to_string(ONLINE).ok());
    parse_cpus(&list.unwrap_or_default())
}

/// One for each thread, in their order; empty when they cannot be had.
fn io_priorities(tids: &[u32]) -> Vec<Option<IoPriority>> {
    let output = Command::new("ionice")
        .arg("-p")
        .args(tids.iter().map(u32::to_string))
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    let Ok(output) = output else {
        return Vec::new();
    };
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().map(parse_priority).collect()
}

/// As in `best-effort: prio 7`; `none` is what every task has.
fn parse_priority(line: &str) -> Option<IoPriority> {
    let (class, level) = line.split_once(": prio ").unwrap_or((line, "0"));
    let class = match class.trim() {
        "realtime" => IoClass::Realtime,
        "best-effort" => IoClass::BestEffort,
        "idle" => IoClass::Idle,
        _ => return None,
    };
    let level = level.trim().parse().ok()?;
    Some(IoPriority { class, level })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_tells_what_is_not_ordinary() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id();
        fs::write(format!("/proc/{pid}/timerslack_ns"), "123456").ok();
        let slack = fs::read_to_string(format!("/proc/{pid}/timerslack_ns"));
        fs::write(format!("/proc/{pid}/coredump_filter"), "0x7f").unwrap();
        let (read, _) = read(&[pid]);
        let found = read
            .tasks
            .iter()
            .find(|task| task.timer_slack == Some(123_456));
        // Another user's may be neither read nor written.
        assert_eq!(found.is_some(), slack.is_ok_and(|it| it.trim() == "123456"));
        let filter = read.tasks.iter().find_map(|task| task.coredump_filter);
        assert_eq!(filter, Some(0x7f));
        assert!(read.frozen_at > 1_700_000_000_000_000_000);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn priorities_are_read_as_they_are_printed() {
        let level = |class, level| Some(IoPriority { class, level });
        assert_eq!(
            parse_priority("best-effort: prio 7"),
            level(IoClass::BestEffort, 7)
        );
        assert_eq!(parse_priority("idle"), level(IoClass::Idle, 0));
        assert_eq!(parse_priority("none: prio 4"), None);
    }
}
