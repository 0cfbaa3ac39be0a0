//! Services and messages that no crate ships, generated from the `.proto` files beside `src/`, and what
//! every server of them needs: a socket that root alone is served on (`private_socket`).
//!
//! ```text
//!  node.proto          transship.node.v1                 node_api       server, client, messages
//!  diff.proto          containerd.services.diff.v1       diff_server    server; messages of containerd-client
//!  snapshots.proto     containerd.services.snapshots.v1  snapshots_api  server, client; but for Commit's, the same
//!  runc_options.proto  containerd.runc.v1                runc_options   messages
//! ```
//!
//! Everything else comes with `containerd-client`, which has the messages of all of containerd's
//! services and their clients but no servers, and with `k8s-cri`.

mod private_socket;

pub use private_socket::{bind_private, require_trusted_peer};

/// Largest message that containerd and its plugins send or take, in bytes. tonic's own limit for
/// incoming messages is 4 MiB.
pub const MESSAGE_LIMIT: usize = 16 << 20;

/// The API of a node, `transship.node.v1.Node`, on a socket that only root can open.
///
/// CheckpointPod and RestorePod have the fields that KEP-5823 gives to these calls of the CRI, so that
/// a runtime can hand them on as they come; the messages that they share with the CRI are the CRI's.
pub mod node_api {
    pub use generated::node_client::NodeClient;
    pub use generated::node_server::{Node as NodeApi, NodeServer};
    pub use generated::{
        CheckpointPodRequest, CheckpointPodResponse, Chunk, ExportSnapshotRequest,
        ImportSnapshotRequest, ImportSnapshotResponse, ImportTarget, PostCheckpointState,
        RestorePodRequest, RestorePodResponse,
    };

    /// Path of the socket unless another one is given.
    pub const NODE_SOCKET: &str = "/run/transship/node.sock";

    #[allow(
        missing_docs,
        unreachable_pub,
        clippy::allow_attributes_without_reason,
        reason = "generated"
    )]
    mod generated {
        tonic::include_proto!("transship.node.v1");
    }
}

/// The server side of containerd's diff service, `containerd.services.diff.v1.Diff`.
pub mod diff_server {
    pub use generated::diff_server::{Diff as Differ, DiffServer};

    #[allow(
        missing_docs,
        unreachable_pub,
        clippy::allow_attributes_without_reason,
        reason = "generated"
    )]
    mod generated {
        tonic::include_proto!("containerd.services.diff.v1");
    }
}

/// containerd's snapshots service, `containerd.services.snapshots.v1.Snapshots`, with the parent that a Commit can name
/// since containerd 2.2.
pub mod snapshots_api {
    pub use generated::snapshots_client::SnapshotsClient;
    pub use generated::snapshots_server::{Snapshots, SnapshotsServer};
    pub use generated::{CommitSnapshotRequest, Empty};

    #[allow(
        missing_docs,
        unreachable_pub,
        clippy::allow_attributes_without_reason,
        reason = "generated"
    )]
    mod generated {
        tonic::include_proto!("containerd.services.snapshots.v1");
    }
}

/// Options of containerd's runc shim, `io.containerd.runc.v2`.
///
/// Their type URLs are their full names without a prefix: see `containerd_client::to_any`.
pub mod runc_options {
    pub use generated::{CheckpointOptions, Options};

    #[allow(
        missing_docs,
        unreachable_pub,
        clippy::allow_attributes_without_reason,
        reason = "generated"
    )]
    mod generated {
        tonic::include_proto!("containerd.runc.v1");
    }
}
