//! Text of `/proc`, in which names are bytes.

use std::io;
use std::path::Path;

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

    /// The capabilities that it can have at all: a user who can gain nothing has no others than now.
    #[must_use]
    pub fn attainable(&self) -> Option<u64> {
        let mut ids = self.field("Uid")?.split_whitespace();
        let gains = self.field("NoNewPrivs") != Some("1") || ids.any(|id| id == "0");
        let set = self.field(if gains { "CapBnd" } else { "CapPrm" })?;
        u64::from_str_radix(set, 16).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert!(read_proc("/proc/thread-self/none").is_err());
    }
}
