//! CRIU's options as `Tasks.Checkpoint` has them, for a dump by containerd's shim.

use std::path::Path;

use transship_checkpoint::criu_options::{CriuOptions, Tcp};
use transship_proto::runc_options::CheckpointOptions;

/// Options of a dump into `images`, with CRIU's log in `work`; the container continues.
pub(crate) fn checkpoint_options(
    criu: &CriuOptions,
    images: &Path,
    work: &Path,
) -> CheckpointOptions {
    CheckpointOptions {
        exit: false,
        // Connections that are closed at the restore must be dumped all the same.
        open_tcp: criu.tcp != Tcp::Refuse,
        external_unix_sockets: criu.ext_unix_sk,
        terminal: criu.shell_job,
        file_locks: criu.file_locks,
        empty_namespaces: criu.empty_ns.iter().map(|_| "network".to_owned()).collect(),
        image_path: images.display().to_string(),
        work_path: work.display().to_string(),
        ..CheckpointOptions::default()
    }
}
