//! What `/proc` tells of a process, whatever names its threads and files have: the functions of `procfs` for these files
//! take nothing but UTF-8.

use procfs::process::{MemoryMaps, MountInfos, Status};
use procfs::{FromRead, ProcResult};

use transship_sandbox::read_proc;

/// `/proc/PID/status`.
///
/// # Errors
/// The process has ended.
pub(crate) fn status(pid: u32) -> ProcResult<Status> {
    parse(pid, "status")
}

/// `/proc/PID/maps`.
///
/// # Errors
/// As [`status`].
pub(crate) fn maps(pid: u32) -> ProcResult<MemoryMaps> {
    parse(pid, "maps")
}

/// `/proc/PID/mountinfo`.
///
/// # Errors
/// As [`status`].
pub(crate) fn mountinfo(pid: u32) -> ProcResult<MountInfos> {
    parse(pid, "mountinfo")
}

fn parse<T: FromRead>(pid: u32, name: &str) -> ProcResult<T> {
    T::from_read(read_proc(format!("/proc/{pid}/{name}"))?.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_read() {
        let own = std::process::id();
        assert_eq!(status(own).unwrap().pid, own.cast_signed());
        assert!(maps(own).unwrap().into_iter().count() > 0);
        assert!(mountinfo(own).unwrap().into_iter().count() > 0);
        assert!(status(u32::MAX).is_err());
    }
}
