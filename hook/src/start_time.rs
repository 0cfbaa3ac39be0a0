//! What tells a process from another one of the same number.

use std::io;

use transship_sandbox::TaskStat;

/// When a process started, in clock ticks since boot. One that has ended is not found, although it
/// may not have been waited for.
pub(crate) fn start_time(pid: i32) -> io::Result<u64> {
    let stat = TaskStat::of(format!("/proc/{pid}"))?;
    let start = stat.start_time().filter(|_| !stat.has_ended());
    start.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
}
