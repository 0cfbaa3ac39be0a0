//! POSIX message queues, which CRIU cannot dump: neither an open one nor what is in it.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{FsType, statfs};

/// `MQUEUE_MAGIC` of `ipc/mqueue.c`.
const MQUEUE_MAGIC: FsType = FsType(0x1980_0202);

/// Why processes with POSIX message queues cannot be dumped; `None` when they have none.
pub fn refusal(pids: &[u32]) -> Option<String> {
    let mut queues: Vec<String> = pids.iter().flat_map(|pid| queues_of(*pid)).collect();
    queues.sort_unstable();
    queues.dedup();
    (!queues.is_empty()).then(|| {
        format!(
            "CRIU cannot dump POSIX message queues, and it has {}",
            queues.join(", ")
        )
    })
}

/// The queues that a process has open, and those that it could open.
fn queues_of(pid: u32) -> Vec<String> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let entries = |dir: PathBuf| {
        // A process that has ended has none.
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.path())
    };
    let is_queue = |path: &Path| {
        statfs(path).is_ok_and(|file_system| file_system.filesystem_type() == MQUEUE_MAGIC)
    };
    let open = entries(process.join("fd"))
        .filter(|fd| is_queue(fd))
        .filter_map(|fd| fs::read_link(fd).ok());
    let there = process.join("root/dev/mqueue");
    let there = entries(there.clone()).filter(|_| is_queue(&there));
    let name = |path: PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        format!("/{}", name.trim_end_matches(" (deleted)"))
    };
    open.chain(there).map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_without_queues_is_not_refused() {
        assert_eq!(refusal(&[std::process::id(), u32::MAX]), None);
    }
}
