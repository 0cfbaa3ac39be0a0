//! What CRIU leaves when it is killed in the middle of a restore.
//!
//! ```text
//!  <work>/.criu.cgyard.XXXXXX/    tmpfs with the hierarchies of cgroups in it (prepare_cgroup of criu/cgroup.c)
//! ```
//!
//! It lies in CRIU's working directory, which is the work directory. containerd removes that with the bundle: as long as
//! cgroups are mounted below, it goes into them, fails, and no container of this id can be made any more.

use std::fs;
use std::path::Path;

use nix::mount::{MntFlags, umount2};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

const YARD: &str = ".criu.cgyard.";

/// Kills CRIU, where nobody is left who would: all that restores into a container works in this directory.
pub(super) fn kill_criu(work: &Path) {
    let Ok(work) = fs::canonicalize(work) else {
        return;
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    for pid in pids.filter_map(Pid::from_raw) {
        let works_there = || {
            let cwd = format!("/proc/{}/cwd", pid.as_raw_nonzero());
            fs::read_link(cwd).is_ok_and(|cwd| cwd == work)
        };
        if let Ok(process) = pidfd_open(pid, PidfdFlags::empty())
            && works_there()
        {
            // One that has ended meanwhile is what is wanted.
            let _ = pidfd_send_signal(&process, Signal::KILL);
        }
    }
}

/// Takes away the mounts, and what they were mounted on.
pub(super) fn unmount_yards(work: &Path) {
    let entries = fs::read_dir(work).into_iter().flatten().flatten();
    for entry in entries {
        if entry.file_name().to_string_lossy().starts_with(YARD) {
            let yard = entry.path();
            // With all that is mounted in it.
            while umount2(&yard, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
            // Not more than that: it must be empty.
            drop(fs::remove_dir(&yard));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use nix::mount::{MsFlags, mount};

    use super::*;

    #[test]
    fn root_a_yard_goes_with_all_that_is_mounted_in_it() {
        let work = tempfile::tempdir().unwrap();
        let yard = work.path().join(".criu.cgyard.Ab12Cd");
        let tmpfs = |at: &Path| {
            fs::create_dir(at).unwrap();
            let none = None::<&str>;
            mount(Some("none"), at, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        };
        tmpfs(&yard);
        tmpfs(&yard.join("systemd"));
        fs::write(yard.join("systemd/cgroup.procs"), "").unwrap();
        fs::write(work.path().join("restore.log"), "").unwrap();
        unmount_yards(work.path());
        assert!(yard.symlink_metadata().is_err());
        assert!(work.path().join("restore.log").is_file());
    }

    #[test]
    fn who_works_in_the_directory_is_killed_and_nobody_else() {
        let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let mut sleeping = dirs.each_ref().map(|dir| {
            let mut sleep = Command::new("sleep");
            sleep.arg("1000").current_dir(dir.path()).spawn().unwrap()
        });
        kill_criu(dirs[0].path());
        assert!(!sleeping[0].wait().unwrap().success());
        assert!(sleeping[1].try_wait().unwrap().is_none());
        sleeping[1].kill().unwrap();
        sleeping[1].wait().unwrap();
    }
}
