//! Debian's podman in a node.

use std::process::Command;

use crate::{CommandRun as _, DebianProgram, Node, Settings, TestbedError};

impl Node {
    /// Puts podman, and all that its package needs, into the node's tree; nothing that is there is replaced. The node
    /// needs [`crate::NodeOptions::without_unified_cgroup`].
    ///
    /// # Errors
    /// When the packages cannot be had, or podman does not work.
    pub fn install_podman(&self, settings: &Settings) -> Result<(), TestbedError> {
        let dir = DebianProgram::PODMAN.fetch_all(settings)?;
        for part in [
            "usr/bin",
            "usr/lib",
            "usr/libexec",
            "usr/share/containers",
            "etc/containers",
        ] {
            let to = self.path_from_outside(&format!("/{part}"));
            Command::new("mkdir").arg("-p").arg(&to).run()?;
            Command::new("cp")
                .args(["-an", "--reflink=auto"])
                .arg(dir.join(part).join("."))
                .arg(&to)
                .run()?;
        }
        // Where containerd's layers lie, podman's can: overlay does not stand on an overlay.
        self.shell(
            "mkdir -p /var/lib/containerd/podman /var/lib/containers
             mount --bind /var/lib/containerd/podman /var/lib/containers
             podman --version",
        )
        .run()
    }
}
