//! A cgroup for what must not end with its caller: systemd kills all processes of a unit, or of a session, by their cgroup.
//!
//! ```text
//!  /sys/fs/cgroup/transship.guards             v2; of v1 in /sys/fs/cgroup/systemd, which alone systemd goes by
//! ```

use std::fs;
use std::io::{self, Write as _};
use std::path::Path;

const CGROUPS: &str = "/sys/fs/cgroup";
/// It stays when the last of them has ended.
const GUARDS: &str = "transship.guards";

/// Moves this process into it, and with it what it starts.
///
/// # Errors
/// There is none, or the kernel does not let us.
pub fn leave_cgroup_of_caller() -> io::Result<()> {
    leave(Path::new(CGROUPS))
}

fn leave(cgroups: &Path) -> io::Result<()> {
    const PROCESSES: &str = "cgroup.procs";
    let of_v1 = cgroups.join("systemd");
    let is_v1 = of_v1.join(PROCESSES).symlink_metadata().is_ok();
    let top = if is_v1 { of_v1.as_path() } else { cgroups };
    // Else no cgroups are there, and a directory would be one.
    top.join(PROCESSES).symlink_metadata()?;
    let own = top.join(GUARDS);
    fs::DirBuilder::new().recursive(true).create(&own)?;
    // Without O_CREAT.
    let mut processes = fs::OpenOptions::new()
        .write(true)
        .open(own.join(PROCESSES))?;
    processes.write_all(b"0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_to_where_systemd_looks() {
        let dir = tempfile::tempdir().unwrap();
        let cgroups = dir.path();
        assert!(leave(cgroups).is_err());
        assert!(cgroups.join(GUARDS).symlink_metadata().is_err());
        for top in [cgroups.to_path_buf(), cgroups.join("systemd")] {
            let own = top.join(GUARDS);
            fs::create_dir_all(&own).unwrap();
            fs::write(top.join("cgroup.procs"), "").unwrap();
            fs::write(own.join("cgroup.procs"), "").unwrap();
            leave(cgroups).unwrap();
            let joined = fs::read(own.join("cgroup.procs")).unwrap();
            assert_eq!(joined, b"0", "{}", top.display());
        }
    }
}
