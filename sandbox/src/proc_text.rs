//! Text of `/proc`, in which names are bytes.

use std::io;
use std::path::Path;
use std::str::FromStr;

/// Reads a file of `/proc` as text. Names of threads, files, sockets and mount points in it are whatever a program has
/// given them, and the kernel cuts that of a thread at 15 bytes, also in the middle of a character: what is no UTF-8
/// becomes U+FFFD.
///
/// # Errors
/// The file cannot be read, for example because the process has ended.
pub fn read_proc(path: impl AsRef<Path>) -> io::Result<String> {
    let bytes = std::fs::read(path)?;
    Ok(match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
    })
}

/// The status of a task: `/proc/PID/status` or `/proc/PID/task/TID/status`.
#[derive(Debug, Default)]
pub struct TaskStatus(String);

impl From<String> for TaskStatus {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl TaskStatus {
    /// Reads that of the task whose directory this is.
    ///
    /// # Errors
    /// As [`read_proc`].
    pub fn of(task: impl AsRef<Path>) -> io::Result<Self> {
        read_proc(task.as_ref().join("status")).map(Self)
    }

    /// What stands behind this name, for example `Umask`; none where this kernel has no such line.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&str> {
        let mut values =
            { self.0.lines() }.filter_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        values.next().map(str::trim)
    }

    /// Its id in the innermost of the pid namespaces that it is in.
    #[must_use]
    pub fn id_in_container(&self) -> Option<u32> {
        // One number for each pid namespace, the innermost last.
        let ids = self.field("NSpid")?;
        ids.split_whitespace().last()?.parse().ok()
    }

    /// Its user ids: real, effective, saved, and that of the file system.
    #[must_use]
    pub fn users(&self) -> Option<Vec<u32>> {
        self.numbers("Uid")
    }

    /// Its group ids, those of its user besides among them.
    #[must_use]
    pub fn groups(&self) -> Option<Vec<u32>> {
        let mut groups = self.numbers("Gid")?;
        groups.extend(self.numbers("Groups")?);
        Some(groups)
    }

    fn numbers(&self, name: &str) -> Option<Vec<u32>> {
        let numbers = self.field(name)?.split_whitespace();
        numbers.map(|number| number.parse().ok()).collect()
    }

    /// The capabilities that it can have at all: a user who can gain nothing has no others than now.
    #[must_use]
    pub fn attainable(&self) -> Option<u64> {
        let mut ids = self.field("Uid")?.split_whitespace();
        let gains = self.field("NoNewPrivs") != Some("1") || ids.any(|id| id == "0");
        let set = self.field(if gains { "CapBnd" } else { "CapPrm" })?;
        u64::from_str_radix(set, 16).ok()
    }
}

/// What the kernel counts of a task: `/proc/PID/stat` or `/proc/PID/task/TID/stat`, proc_pid_stat(5).
///
/// ```text
/// 7 (a) b (c) S 1 7 7 ...      the name, in parentheses, may hold anything; then the fields from the third on
/// ```
#[derive(Debug)]
pub struct TaskStat {
    /// Behind the name.
    fields: String,
}

impl TaskStat {
    /// Reads that of the task whose directory this is.
    ///
    /// # Errors
    /// As [`read_proc`].
    pub fn of(task: impl AsRef<Path>) -> io::Result<Self> {
        let text = read_proc(task.as_ref().join("stat"))?;
        Self::parse(&text).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
    }

    fn parse(text: &str) -> Option<Self> {
        let (_, fields) = text.rsplit_once(") ")?;
        let fields = fields.trim_end().to_owned();
        Some(Self { fields })
    }

    /// A field, by its number in proc_pid_stat(5).
    fn field<T: FromStr>(&self, number: usize) -> Option<T> {
        let mut fields = self.fields.split(' ');
        fields.nth(number.checked_sub(3)?)?.parse().ok()
    }

    /// What it does, as in `S`.
    #[must_use]
    pub fn state(&self) -> char {
        self.field(3).unwrap_or_default()
    }

    /// Whether it has ended, and is there because nobody has waited for it, or somebody traces it.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        matches!(self.state(), 'Z' | 'X')
    }

    /// The process that has it for a child.
    #[must_use]
    pub fn parent(&self) -> Option<i32> {
        self.field(4)
    }

    /// Its nice value.
    #[must_use]
    pub fn nice(&self) -> Option<i32> {
        self.field(19)
    }

    /// When it started, in clock ticks since boot.
    #[must_use]
    pub fn start_time(&self) -> Option<u64> {
        self.field(22)
    }

    /// How it is scheduled: a policy of sched(7).
    #[must_use]
    pub fn policy(&self) -> Option<u32> {
        self.field(41)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_behind_any_name() {
        let text = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 -5 1 0 4242 9 10";
        let stat = TaskStat::parse(text).unwrap();
        assert_eq!((stat.state(), stat.parent()), ('S', Some(1)));
        assert_eq!((stat.nice(), stat.start_time()), (Some(-5), Some(4242)));
        assert_eq!(stat.policy(), None);
        assert!(!stat.has_ended());
        let ended = TaskStat::parse(&text.replace(" S ", " Z ")).unwrap();
        assert!(ended.has_ended());
        assert!(TaskStat::parse("7 (a").is_none());
        let own = TaskStat::of("/proc/thread-self").unwrap();
        assert!(own.start_time() > Some(0) && own.policy().is_some() && own.state() == 'R');
        assert!(TaskStat::of("/proc/none").is_err());
    }

    #[test]
    fn a_name_is_whatever_a_thread_calls_itself() {
        let own = "/proc/thread-self/comm";
        std::fs::write(own, b"m\xc3\xbcller \xff w\xc3").unwrap();
        assert_eq!(read_proc(own).unwrap(), "m\u{fc}ller \u{fffd} w\u{fffd}\n");
        let status = TaskStatus::of("/proc/thread-self").unwrap();
        assert_eq!(status.field("Name"), Some("m\u{fc}ller \u{fffd} w\u{fffd}"));
        assert_eq!(status.field("Nam"), None);
        assert!(status.id_in_container().is_some() && status.attainable().is_some());
        let of = |uid, no_new| {
            let text = format!("Uid:\t{uid}\nCapPrm:\t1\nCapBnd:\t3\nNoNewPrivs:\t{no_new}\n");
            TaskStatus::from(text).attainable()
        };
        assert_eq!(of("0\t0\t0\t0", 1), Some(3));
        assert_eq!(of("7\t7\t7\t7", 0), Some(3));
        assert_eq!(of("7\t7\t7\t7", 1), Some(1));
        let text = "Uid:\t1\t2\t2\t2\nGid:\t3\t3\t3\t3\nGroups:\t4 5 \n".to_owned();
        let status = TaskStatus::from(text);
        assert_eq!(status.users(), Some(vec![1, 2, 2, 2]));
        assert_eq!(status.groups(), Some(vec![3, 3, 3, 3, 4, 5]));
        let none = TaskStatus::from("Gid:\t3\t3\t3\t3\nGroups:\t \n".to_owned());
        assert_eq!((none.users(), none.groups()), (None, Some(vec![3; 4])));
        assert!(read_proc("/proc/thread-self/none").is_err());
    }
}
