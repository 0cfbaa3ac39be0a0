//! POSIX message queues, which CRIU cannot dump: neither an open one nor what is in it.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{FsType, statfs};
use procfs::process::FDTarget;

use super::Hit;
use super::processes::Processes;

/// `MQUEUE_MAGIC` of `ipc/mqueue.c`.
const MQUEUE_MAGIC: FsType = FsType(0x1980_0202);

/// The queues that processes have open, and those that they could open.
pub(super) fn hits(processes: &Processes) -> Vec<Hit> {
    let open = processes
        .descriptors()
        .filter_map(|(seen, number, target)| {
            let FDTarget::Path(path) = target else {
                return None;
            };
            is_queue(Path::new(&seen.descriptor(number))).then(|| path.clone())
        });
    let there = processes.tree.iter().flat_map(|seen| {
        let dir = PathBuf::from(format!("/proc/{}/root/dev/mqueue", seen.pid));
        let entries = fs::read_dir(&dir).into_iter().flatten().flatten();
        let queues = is_queue(&dir);
        entries.map(|entry| entry.path()).filter(move |_| queues)
    });
    let name = |path: PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        format!("/{}", name.trim_end_matches(" (deleted)").escape_debug())
    };
    open.chain(there)
        .map(|path| ("message-queue", name(path)))
        .collect()
}

fn is_queue(path: &Path) -> bool {
    statfs(path).is_ok_and(|file_system| file_system.filesystem_type() == MQUEUE_MAGIC)
}
