//! The bundle of a container that containerd has forgotten, with its shim.
//!
//! ```text
//!  <state>/io.containerd.runtime.v2.task/<namespace>/<id>/    the bundle; the shim works in it
//!      rootfs/          mounts of the snapshot
//!      work          -> <root>/io.containerd.runtime.v2.task/<namespace>/<id>/
//!                           .criu.cgyard.XXXXXX/    what CRIU mounts for a restore (criu/cgroup.c)
//! ```
//!
//! A call of `Create` or `Delete` whose caller goes in the middle makes containerd (seen with 2.1.9) drop the shim from
//! its list and leave the rest until it is restarted. Until then no container of this id can be made.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use transship_path_error::During as _;

use crate::error::SandboxError;
use crate::files::{remove_tree, unmount_all};
use crate::proc_text::{TaskStat, read_proc};

/// What the shims of containerd are called, as far as the kernel keeps it.
const SHIM: &str = "containerd-shim";
/// Drawn in `hook/src/front/bundle.rs`.
pub const MARKER: &str = "transship.json";
const YARD: &str = ".criu.cgyard.";

/// Ends the shim of a bundle that containerd does not know, and removes the bundle and its work directory, as containerd
/// does with those that it knows. Nothing is removed of a root that is still mounted.
///
/// # Errors
/// Something of it cannot be removed.
pub fn remove(bundle: &Path) -> Result<(), SandboxError> {
    if let Ok(dir) = fs::metadata(bundle) {
        kill_who_works_in(&dir, Some(SHIM));
    }
    let (root, work) = (bundle.join("rootfs"), bundle.join("work"));
    unmount_all(&root);
    // Empty, or there is something that is not ours to remove.
    match fs::remove_dir(&root) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Ok(Err(error).during("remove", root)?);
        }
        _ => {}
    }
    unmount_yards(&work);
    let work = fs::canonicalize(&work).ok();
    let work = work.filter(|work| work.file_name() == bundle.file_name());
    for dir in work.as_deref().into_iter().chain([bundle]) {
        remove_tree(dir)?;
    }
    Ok(())
}

/// Whether the container of a bundle was made, has ended, and was deleted by the runtime. Of one that is being made, or
/// is held, the runtime front's `delete` or its watch takes away what belongs to the restore as well.
#[must_use]
pub fn has_ended(bundle: &Path) -> bool {
    // The runtime writes it when the container is there; the front's marker goes when it is deleted.
    let pid = fs::read_to_string(bundle.join("init.pid")).unwrap_or_default();
    let lives = || {
        let stat = TaskStat::of(Path::new("/proc").join(pid.trim()));
        // One that has ended stays as a zombie while somebody traces it.
        stat.is_ok_and(|stat| !stat.has_ended())
    };
    !pid.is_empty() && !lives() && bundle.join(MARKER).symlink_metadata().is_err()
}

/// Kills all processes that work in a directory, which may have been removed; of this name, if there is one.
pub fn kill_who_works_in(dir: &fs::Metadata, name: Option<&str>) {
    let identity = |dir: &fs::Metadata| (dir.dev(), dir.ino());
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    for pid in pids.filter_map(Pid::from_raw) {
        let proc = Path::new("/proc").join(pid.as_raw_nonzero().to_string());
        let is_one = || {
            let comm = || read_proc(proc.join("comm")).unwrap_or_default();
            fs::metadata(proc.join("cwd")).is_ok_and(|cwd| identity(&cwd) == identity(dir))
                && name.is_none_or(|name| comm().trim_end() == name)
        };
        if let Ok(process) = pidfd_open(pid, PidfdFlags::empty())
            && is_one()
        {
            // One that has ended meanwhile is what is wanted.
            let _ = pidfd_send_signal(&process, Signal::KILL);
        }
    }
}

/// Takes away what a killed CRIU has mounted for its restore, and what it was mounted on. containerd, which removes this
/// directory with the bundle, would go into the cgroups there and fail.
pub fn unmount_yards(work: &Path) {
    let entries = fs::read_dir(work).into_iter().flatten().flatten();
    for entry in entries {
        if entry.file_name().to_string_lossy().starts_with(YARD) {
            let yard = entry.path();
            unmount_all(&yard);
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

    fn tmpfs(at: &Path) {
        fs::create_dir(at).unwrap();
        let none = None::<&str>;
        mount(Some("none"), at, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    }

    #[test]
    fn root_a_yard_goes_with_all_that_is_mounted_in_it() {
        let work = tempfile::tempdir().unwrap();
        let yard = work.path().join(".criu.cgyard.Ab12Cd");
        tmpfs(&yard);
        tmpfs(&yard.join("systemd"));
        fs::write(yard.join("systemd/cgroup.procs"), "").unwrap();
        fs::write(work.path().join("restore.log"), "").unwrap();
        unmount_yards(work.path());
        assert!(yard.symlink_metadata().is_err());
        assert!(work.path().join("restore.log").is_file());
    }

    #[test]
    fn root_a_bundle_goes_and_not_the_files_of_its_root() {
        let dir = tempfile::tempdir().unwrap();
        let (bundle, work) = (dir.path().join("state/web"), dir.path().join("root/web"));
        fs::create_dir_all(&bundle).unwrap();
        fs::create_dir_all(work.join("images")).unwrap();
        std::os::unix::fs::symlink(&work, bundle.join("work")).unwrap();
        tmpfs(&bundle.join("rootfs"));
        fs::write(bundle.join("rootfs/file"), "").unwrap();
        fs::write(bundle.join("config.json"), "{}").unwrap();
        remove(&bundle).unwrap();
        assert!(bundle.symlink_metadata().is_err() && work.symlink_metadata().is_err());
        // One whose root is no mount keeps its files.
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        fs::write(bundle.join("rootfs/file"), "").unwrap();
        remove(&bundle).unwrap_err();
        assert!(bundle.join("rootfs/file").is_file());
    }

    #[test]
    fn a_container_that_is_being_made_has_not_ended() {
        let bundle = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(bundle.path().join(name), text).unwrap();
        assert!(!has_ended(bundle.path()));
        write("init.pid", &std::process::id().to_string());
        assert!(!has_ended(bundle.path()));
        // More than the kernel has (PID_MAX_LIMIT).
        write("init.pid", "4194305\n");
        assert!(has_ended(bundle.path()));
        write(MARKER, "{}");
        assert!(!has_ended(bundle.path()));
    }

    #[test]
    fn who_works_in_the_directory_is_killed_and_nobody_else() {
        let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let mut sleeping = dirs.each_ref().map(|dir| {
            let mut sleep = Command::new("sleep");
            sleep.arg("1000").current_dir(dir.path()).spawn().unwrap()
        });
        let at = dirs.each_ref().map(|dir| fs::metadata(dir.path()).unwrap());
        fs::remove_dir(dirs[0].path()).unwrap();
        kill_who_works_in(&at[1], Some("other"));
        kill_who_works_in(&at[0], None);
        assert!(!sleeping[0].wait().unwrap().success());
        assert!(sleeping[1].try_wait().unwrap().is_none());
        sleeping[1].kill().unwrap();
        sleeping[1].wait().unwrap();
    }
}
