//! Protobuf definitions that no crate ships, minimal and wire-compatible, and the node's own API.
//!
//! ```text
//!  container record's runtime options  --decode-->  runc_options::Options  --encode--> new record
//!  CLI's choice of CRIU options        --encode-->  runc_options::CheckpointOptions --> Tasks.Checkpoint
//!  CLI, runtimes, tests               --HTTP/2-->  node_api::NodeServer --> a `NodeApi`
//!  containerd's proxied differ         --HTTP/2-->  diff_server::DiffServer --> a `Differ`
//!                                                   both are a grpc_service::GrpcServer
//! ```
//!
//! Only what Transship speaks itself; everything else comes with `containerd-client`, which has the
//! messages of all services and no server, and with `k8s-cri`.

pub mod diff_server;
pub mod grpc_service;
pub mod node_api;
pub mod runc_options;
