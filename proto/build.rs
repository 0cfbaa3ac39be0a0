//! Generates the services and messages of `*.proto`. protoc is the one that `containerd-client` and
//! `k8s-cri` need to be built, too.

use std::io;

use tonic_prost_build::{Config, configure};

/// What `containerd-client` has of the snapshots service.
const SNAPSHOT_MESSAGES: [&str; 16] = [
    "PrepareSnapshotRequest",
    "PrepareSnapshotResponse",
    "ViewSnapshotRequest",
    "ViewSnapshotResponse",
    "MountsRequest",
    "MountsResponse",
    "RemoveSnapshotRequest",
    "StatSnapshotRequest",
    "StatSnapshotResponse",
    "UpdateSnapshotRequest",
    "UpdateSnapshotResponse",
    "ListSnapshotsRequest",
    "ListSnapshotsResponse",
    "UsageRequest",
    "UsageResponse",
    "CleanupRequest",
];

fn main() -> io::Result<()> {
    configure()
        .build_transport(false)
        .extern_path(".runtime.v1", "::k8s_cri::v1")
        .compile_protos(&["node.proto"], &[".", "imported"])?;
    configure()
        .build_transport(false)
        .build_client(false)
        .extern_path(
            ".containerd.services.diff.v1",
            "::containerd_client::services::v1",
        )
        .compile_protos(&["diff.proto"], &["."])?;
    let mut snapshots = configure().build_transport(false);
    for message in SNAPSHOT_MESSAGES {
        snapshots = snapshots.extern_path(
            format!(".containerd.services.snapshots.v1.{message}"),
            format!("::containerd_client::services::v1::snapshots::{message}"),
        );
    }
    snapshots.compile_protos(&["snapshots.proto"], &["."])?;
    // The full names are the type URLs by which containerd knows the messages.
    let mut named = Config::new();
    named.enable_type_names();
    configure().compile_with_config(named, &["runc_options.proto"], &["."])
}
