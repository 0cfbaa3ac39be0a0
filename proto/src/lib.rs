//! Protobuf definitions that no crate ships, minimal and wire-compatible.
//!
//! ```text
//!  container record's runtime options  --decode-->  runc_options::Options  --encode--> new record
//!  CLI's choice of CRIU options        --encode-->  runc_options::CheckpointOptions --> Tasks.Checkpoint
//! ```
//!
//! Only the messages that Transship speaks itself; everything else comes with `containerd-client`.

pub mod runc_options;
