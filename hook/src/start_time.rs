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

/// Whether the process of this number is the one that started then, and has not ended.
pub(crate) fn is_same(pid: i32, began: u64) -> bool {
    start_time(pid).ok() == Some(began)
}

/// The same for who cannot go on without it.
///
/// # Errors
/// It is not.
pub(crate) fn check_same(pid: i32, began: u64) -> io::Result<()> {
    match is_same(pid, began) {
        true => Ok(()),
        false => Err(io::Error::other("it was ended meanwhile")),
    }
}
