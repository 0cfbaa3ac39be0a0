//! What `transship` does, for the command line, the node's API and whoever else calls it.
//!
//! ```text
//!  source, pod (find, freeze, dump, export)  --> checkpoint directory
//!  restore, restore_pod                      <-- checkpoint directory
//!  send, receive                             <-> checkpoint directory as a stream
//!  migrate --> conversation --> receive, restore on the other node
//!  restart_policy: keeps containerd from starting what a migration has frozen
//!  freeze_guard: lets containers run again if this process is killed;  stuck_dump: ends a dump
//!  check: findings about this node
//!  error: one error type, with its kind and what to do next;  progress: what the caller is told
//!  problem: as error, for the modules that still use anyhow
//! ```

pub mod check;
pub mod conversation;
pub mod error;
pub mod freeze_guard;
pub mod image_blobs;
pub mod interrupt;
pub mod message_queues;
pub mod migrate;
pub mod oci_runtime;
pub mod overlay_mounts;
pub mod pod;
pub mod pod_dirs;
pub mod problem;
pub mod progress;
pub mod receive;
pub mod restart_policy;
pub mod restore;
pub mod restore_pod;
pub mod send;
pub mod shim_options;
pub mod source;
pub mod stuck_dump;
pub mod timeline;

pub use error::{Context, Error, Kind, Result};
pub use progress::{Progress, Silent};
