//! Protobuf definitions that no crate ships, minimal and wire-compatible.
//!
//! ```text
//!  container record's runtime options  --decode-->  runc_options::Options  --encode--> new record
//!  CLI's choice of CRIU options        --encode-->  runc_options::CheckpointOptions --> Tasks.Checkpoint
//!  containerd's proxied differ         --HTTP/2-->  diff_server::DiffServer --> a `Differ`
//! ```
//!
//! Only what Transship speaks itself; everything else comes with `containerd-client`, which has the
//! messages of all services and no server.

pub mod diff_server;
pub mod runc_options;
