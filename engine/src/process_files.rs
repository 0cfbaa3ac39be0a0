//! What `/proc` tells of a process, whatever names its threads and files have: the functions of `procfs` for these files
//! take nothing but UTF-8.

use std::fs::File;
use std::io::{self, Read as _};

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

/// The beginning of `/proc/PID/fdinfo/N`: of locks, watches and marks there are as many lines as a program likes.
///
/// # Errors
/// The descriptor is closed.
pub(crate) fn descriptor(pid: u32, number: i32, most: u64) -> io::Result<String> {
    let mut bytes = Vec::new();
    let file = File::open(format!("/proc/{pid}/fdinfo/{number}"))?;
    file.take(most).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// What it says in the line that begins with `name`.
pub(crate) fn field<'t>(information: &'t str, name: &str) -> Option<&'t str> {
    let mut lines = information.lines();
    let value = lines.find_map(|line| line.strip_prefix(name))?;
    Some(value.trim())
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
        assert!(descriptor(own, 0, 64).unwrap().contains("flags:"));
        assert_eq!(descriptor(own, 0, 3).unwrap().len(), 3);
    }
}
