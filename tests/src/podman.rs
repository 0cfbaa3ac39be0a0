//! Debian's podman in a node.

use crate::{CommandRun as _, DebianProgram, Node, Settings, TestbedError};

impl Node {
    /// Puts podman, and all that its package needs, into the node's tree; nothing that is there is replaced. The node
    /// needs [`crate::NodeOptions::without_unified_cgroup`].
    ///
    /// # Errors
    /// When the packages cannot be had, or podman does not work.
    pub fn install_podman(&self, settings: &Settings) -> Result<(), TestbedError> {
        DebianProgram::PODMAN.install(settings, self)?;
        // Where containerd's layers lie, podman's can: overlay does not stand on an overlay.
        self.shell(
            "mkdir -p /var/lib/containerd/podman /var/lib/containers
             mount --bind /var/lib/containerd/podman /var/lib/containers
             podman --version",
        )
        .run()
    }
}
