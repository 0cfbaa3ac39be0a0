//! What CRIU does not keep of the tasks of a container: in its directory of the checkpoint, beside the spec.
//!
//! ```text
//! tasks.json   { "frozen_at": 1767323045000000000,
//!                "tasks": [ { "id": 7, "cpus": [0, 1], "timer_slack": 123456,
//!                             "io_priority": { "class": "best-effort", "level": 7 } } ],
//!                "sockets": [ { "process": 1, "descriptor": 5, "options": { "defer_accept": 7 } } ],
//!                "left_out": 12,
//!                "timers": [ { "process": 1, "timer": 0, "at": 1767323060000000000 } ],
//!                "descriptor_timers": [ { "id": 9, "at": 1767323060000000000 } ],
//!                "unread": [ { "process": 1, "descriptor": 3, "kind": "inotify", "bytes": 16 } ] }
//! ```
//!
//! Only tasks and sockets are there, and only those of their attributes, that are not what every new task has.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Name of the file.
pub const TASKS_FILE: &str = "tasks.json";
/// Longest file that is read, in bytes.
pub const TASKS_LIMIT: u64 = 16 << 20;
/// Nanoseconds that the kernel gives to every program.
pub const DEFAULT_TIMER_SLACK: u64 = 50_000;
/// `MMF_DUMP_FILTER_DEFAULT` of a kernel that has ELF headers in core dumps, core(5).
pub const DEFAULT_COREDUMP_FILTER: u32 = 0x33;

/// The attributes of the tasks of one container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskAttributes {
    /// When the container stood still, in nanoseconds of the wall clock since 1970.
    pub frozen_at: u64,
    /// Those that are not as every new task.
    #[serde(default)]
    pub tasks: Vec<Task>,
    /// Sockets that are not as every new one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sockets: Vec<Socket>,
    /// How many sockets more there were, of which nothing is here.
    #[serde(default, skip_serializing_if = "is_none")]
    pub left_out: u64,
    /// What waited to be read and is lost.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unread: Vec<Unread>,
    /// POSIX timers that are set to a moment of the wall clock.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub timers: Vec<WallClockTimer>,
    /// Timers of descriptors that are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub descriptor_timers: Vec<WallClockDescriptor>,
}

/// A POSIX timer that fires at a moment, however long its process stands still: set with `TIMER_ABSTIME`, of
/// `CLOCK_REALTIME`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WallClockTimer {
    /// The id of the process in the container.
    pub process: u32,
    /// The id of the timer in the process.
    pub timer: u64,
    /// When it fires next, in nanoseconds of the wall clock since 1970.
    pub at: u64,
}

/// A timer of a descriptor that does: set with `TFD_TIMER_ABSTIME`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WallClockDescriptor {
    /// Its id in CRIU's images.
    pub id: u32,
    /// When it fires next, in nanoseconds of the wall clock since 1970.
    pub at: u64,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_none(count: &u64) -> bool {
    *count == 0
}

impl TaskAttributes {
    /// The bytes of the file. Sockets beyond [`TASKS_LIMIT`] are left out.
    ///
    /// # Errors
    /// Those of the encoder.
    pub fn to_json(mut self) -> serde_json::Result<Vec<u8>> {
        loop {
            let json = serde_json::to_vec(&self)?;
            if json.len() as u64 <= TASKS_LIMIT || self.sockets.is_empty() {
                return Ok(json);
            }
            let beyond = self.sockets.split_off(self.sockets.len() / 2);
            self.left_out += beyond.len() as u64;
        }
    }
}

/// What waited to be read, by a descriptor of who would have read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unread {
    /// The id of the process in the container.
    pub process: u32,
    /// The number of the descriptor there.
    pub descriptor: i32,
    /// What it is.
    pub kind: UnreadKind,
    /// How much, as the kernel tells; of datagrams the first one.
    pub bytes: u64,
}

/// Of what CRIU dumps the descriptor, and not what waits there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UnreadKind {
    /// Events of inotify.
    Inotify,
    /// Events of fanotify.
    Fanotify,
    /// Datagrams.
    Udp,
}

impl Unread {
    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let Self {
            process,
            descriptor,
            kind,
            bytes,
        } = self;
        let what = match kind {
            UnreadKind::Inotify => "events of inotify",
            UnreadKind::Fanotify => "events of fanotify",
            UnreadKind::Udp => "UDP datagrams",
        };
        format!(
            "{what} that process {process} has not read from its descriptor {descriptor} ({bytes} bytes)"
        )
    }
}

/// A socket, by one of its descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Socket {
    /// The id in the container of a process that has it.
    pub process: u32,
    /// The number of its descriptor there.
    pub descriptor: i32,
    /// Its options.
    pub options: SocketOptions,
}

/// The options of a socket that are not what a new one has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOptions {
    /// `TCP_CONGESTION`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub congestion: Option<String>,
    /// The others, by their names.
    #[serde(flatten)]
    pub plain: BTreeMap<String, u32>,
}

impl SocketOptions {
    /// Whether a new socket has the same.
    #[must_use]
    pub fn are_ordinary(&self) -> bool {
        *self == Self::default()
    }
}

/// One thread.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Its id in the container.
    pub id: u32,
    /// The processors that it chose of those that the container may use.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpus: Vec<usize>,
    /// Nanoseconds by which its timers may be late.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timer_slack: Option<u64>,
    /// Its I/O priority.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_priority: Option<IoPriority>,
    /// Of the first thread of a process: which memory a core dump has, where that is not `0x33`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coredump_filter: Option<u32>,
}

impl Task {
    /// Whether there is nothing to say of it.
    #[must_use]
    pub fn is_ordinary(&self) -> bool {
        let Self {
            id: _,
            cpus,
            timer_slack,
            io_priority,
            coredump_filter,
        } = self;
        let none = timer_slack.is_none() && io_priority.is_none() && coredump_filter.is_none();
        none && cpus.is_empty()
    }
}

/// As ioprio_set(2) has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoPriority {
    /// Its class.
    pub class: IoClass,
    /// From 0, the best, to 7.
    pub level: u8,
}

/// `IOPRIO_CLASS_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IoClass {
    /// Before all others.
    Realtime,
    /// The usual one.
    BestEffort,
    /// After all others.
    Idle,
}

/// Reads a list as in `Cpus_allowed_list`: `0-3,8`. What is none gives nothing.
#[must_use]
pub fn parse_cpus(list: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse::<usize>().ok()?..=last.trim().parse::<usize>().ok()?)
    };
    let ranges: Option<Vec<_>> = list.trim().split(',').map(range).collect();
    let cpus = ranges.unwrap_or_default().into_iter().flatten();
    // More than any kernel has: a list of somebody else's.
    cpus.take(1 << 16).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors_are_read() {
        assert_eq!(parse_cpus("0-2,8\n"), [0, 1, 2, 8]);
        assert_eq!(parse_cpus("5"), [5]);
        assert!(parse_cpus("").is_empty());
        assert!(parse_cpus("1-x").is_empty());
        assert_eq!(parse_cpus("0-99999999").len(), 1 << 16);
    }

    #[test]
    fn more_sockets_than_can_be_read_are_counted() {
        let socket = Socket {
            process: 1,
            descriptor: 5,
            options: SocketOptions::default(),
        };
        let attributes = TaskAttributes {
            sockets: vec![socket; 1 << 20],
            left_out: 3,
            ..TaskAttributes::default()
        };
        let json = attributes.to_json().unwrap();
        assert!(json.len() as u64 <= TASKS_LIMIT);
        let read: TaskAttributes = serde_json::from_slice(&json).unwrap();
        assert_eq!(read.sockets.len() as u64 + read.left_out, (1 << 20) + 3);
        assert!(!read.sockets.is_empty());
    }

    #[test]
    fn what_is_ordinary_is_not_written() {
        let task = Task {
            id: 7,
            timer_slack: Some(1),
            ..Task::default()
        };
        assert!(!task.is_ordinary() && Task::default().is_ordinary());
        assert_eq!(
            serde_json::to_string(&task).unwrap(),
            r#"{"id":7,"timer_slack":1}"#
        );
    }

    #[test]
    fn options_of_older_checkpoints_are_read() {
        let read = serde_json::from_str(r#"{"defer_accept":7,"congestion":"reno"}"#);
        let read: SocketOptions = read.unwrap();
        assert_eq!(read.congestion.as_deref(), Some("reno"));
        assert_eq!(read.plain, [("defer_accept".to_owned(), 7)].into());
    }
}
