//! A program of a Debian suite that no tree has, for a test that wants that very program.
//!
//! ```text
//! <cache_dir>/program-<package>-<hash>     the package, extracted by mmdebstrap
//! ```

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::recipe::{make_once, short_hash};
use crate::run::CommandRun as _;
use crate::{Node, Settings, TestbedError};

const SUITE: &str = "forky";

/// What a program finds of its package on a machine.
const PARTS: [&str; 6] = [
    "usr/bin",
    "usr/sbin",
    "usr/lib",
    "usr/libexec",
    "usr/share/containers",
    "etc/containers",
];

/// A program that needs nothing but the C library.
#[derive(Debug, Clone, Copy)]
pub struct DebianProgram {
    /// Name of its package.
    pub package: &'static str,
    /// Where it lies.
    pub path: &'static str,
}

impl DebianProgram {
    /// The usual reader of checkpoint archives.
    pub const CHECKPOINTCTL: DebianProgram = DebianProgram {
        package: "checkpointctl",
        path: "usr/bin/checkpointctl",
    };

    /// Another engine; its package comes with conmon, its network tools and their libraries.
    pub const PODMAN: DebianProgram = DebianProgram {
        package: "podman",
        path: "usr/bin/podman",
    };

    /// The daemon of Docker, with BuildKit in it.
    pub const DOCKER: DebianProgram = DebianProgram {
        package: "docker.io",
        path: "usr/sbin/dockerd",
    };

    /// The client of Docker.
    pub const DOCKER_CLI: DebianProgram = DebianProgram {
        package: "docker-cli",
        path: "usr/bin/docker",
    };

    /// The client's part for BuildKit.
    pub const DOCKER_BUILDX: DebianProgram = DebianProgram {
        package: "docker-buildx",
        path: "usr/libexec/docker/cli-plugins/docker-buildx",
    };

    /// Puts the package, and all that it depends on, into a node that has the rest of Debian already: nothing of that is
    /// replaced.
    ///
    /// # Errors
    /// When mmdebstrap fails.
    pub fn install(&self, settings: &Settings, node: &Node) -> Result<(), TestbedError> {
        let dir = self.fetch_all(settings)?;
        for part in PARTS {
            let from = dir.join(part);
            if !from.is_dir() {
                continue;
            }
            let to = node.path_from_outside(&format!("/{part}"));
            Command::new("mkdir").arg("-p").arg(&to).run()?;
            let mut copy = Command::new("cp");
            copy.args(["-an", "--reflink=auto"]);
            copy.arg(from.join(".")).arg(&to).run()?;
        }
        Ok(())
    }

    /// The directory of the package and of all that it depends on, as the file system of a machine has them; fetched
    /// once.
    ///
    /// # Errors
    /// When mmdebstrap fails.
    pub fn fetch_all(&self, settings: &Settings) -> Result<PathBuf, TestbedError> {
        let parts = Path::new(self.path).components().count();
        let program = self.fetch(settings)?;
        let dir = program.ancestors().nth(parts).unwrap_or(Path::new("/"));
        Ok(dir.to_path_buf())
    }

    /// Its path on this machine; the package is fetched once.
    ///
    /// # Errors
    /// When mmdebstrap fails.
    pub fn fetch(&self, settings: &Settings) -> Result<PathBuf, TestbedError> {
        let name = format!("program-{}", self.package);
        let hash = short_hash(&format!("{SUITE} {}", self.package));
        let dir = settings.cache_dir.join(format!("{name}-{hash}"));
        make_once(&dir, &name, |new| {
            Command::new("mmdebstrap")
                .args(["--quiet", "--format=directory", "--variant=extract"])
                .arg(format!("--include={}", self.package))
                // A testing suite's Release file may have run out on a mirror that follows slowly.
                .arg("--aptopt=Acquire::Check-Valid-Until \"false\"")
                .arg(SUITE)
                .arg(new)
                .run()
        })?;
        Ok(dir.join(self.path))
    }
}
