//! Where a testbed finds and puts things.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The paths that a testbed works with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Built node trees, kept from run to run.
    pub cache_dir: PathBuf,
    /// Directories of running testbeds; on a disk, since containerd's root lies here.
    pub work_dir: PathBuf,
    /// Our binaries, bind-mounted into each node's /usr/local/bin as far as they are there.
    pub binaries_dir: PathBuf,
    /// Cargo's target directory for the programs that run inside containers.
    pub workload_target_dir: PathBuf,
    /// A directory with those programs, built elsewhere: then no cargo is needed.
    pub built_workloads: Option<PathBuf>,
    /// The cargo that builds those programs.
    pub cargo: PathBuf,
    /// The program that answers to [`crate::node_role`]: the current executable.
    pub executable: PathBuf,
}

impl Settings {
    /// Decides from environment variables, looked up with `variable`, and the running executable.
    ///
    /// | variable | decides | default |
    /// |---|---|---|
    /// | `XDG_CACHE_HOME` | `cache_dir` = `$XDG_CACHE_HOME/transship-testbed` | `/var/cache/transship-testbed` |
    /// | `TRANSSHIP_TESTBED_DIR` | `work_dir` | `/var/tmp/transship-testbed` |
    /// | `TRANSSHIP_BIN_DIR` | `binaries_dir` | where the executable lies (cargo's `deps` is stepped out of) |
    /// | `TRANSSHIP_WORKLOADS` | `built_workloads` | none |
    /// | `CARGO` | `cargo` | `cargo` |
    pub fn from_variables(
        variable: impl Fn(&str) -> Option<OsString>,
        executable: PathBuf,
    ) -> Settings {
        let path = |name: &str| variable(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let cache = path("XDG_CACHE_HOME").unwrap_or_else(|| "/var/cache".into());
        let beside = executable.parent().unwrap_or(Path::new("/"));
        let beside = match beside.file_name() {
            Some(name) if name == "deps" => beside.parent().unwrap_or(beside),
            _ => beside,
        };
        let target = beside.parent().unwrap_or(beside).join("workload");
        Settings {
            cache_dir: cache.join("transship-testbed"),
            work_dir: path("TRANSSHIP_TESTBED_DIR")
                .unwrap_or_else(|| "/var/tmp/transship-testbed".into()),
            binaries_dir: path("TRANSSHIP_BIN_DIR").unwrap_or_else(|| beside.to_owned()),
            workload_target_dir: target,
            built_workloads: path("TRANSSHIP_WORKLOADS"),
            cargo: path("CARGO").unwrap_or_else(|| "cargo".into()),
            executable,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_win_over_defaults() {
        let exe = PathBuf::from("/s/target/debug/deps/node-1");
        let plain = Settings::from_variables(|_| None, exe.clone());
        assert_eq!(plain.cache_dir, Path::new("/var/cache/transship-testbed"));
        assert_eq!(plain.binaries_dir, Path::new("/s/target/debug"));
        assert_eq!(plain.workload_target_dir, Path::new("/s/target/workload"));
        let set = Settings::from_variables(
            |name| match name {
                "XDG_CACHE_HOME" => Some("/c".into()),
                "TRANSSHIP_BIN_DIR" => Some("/b".into()),
                "TRANSSHIP_TESTBED_DIR" => Some(OsString::new()),
                _ => None,
            },
            exe,
        );
        assert_eq!(set.cache_dir, Path::new("/c/transship-testbed"));
        assert_eq!(set.binaries_dir, Path::new("/b"));
        assert_eq!(set.work_dir, Path::new("/var/tmp/transship-testbed"));
    }
}
