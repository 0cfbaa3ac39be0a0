//! Checkpoints on disk and on the wire, and what must be changed in them before a restore.
//!
//! ```text
//!  dump (CLI) --> store::Draft --> manifest --> /var/lib/transship/checkpoints/<name>/
//!                                                   |              ^
//!                                        wire (send |              | receive)
//!                                                   v              |
//!                                              a byte stream ------'
//!
//!  createRuntime hook, runtime front --> stage --> /run/transship/pods/<sandbox>/restore/<c>/
//!      annotations: what is asked for      |-- namespaces: paths of the sandbox into the spec
//!                                          |-- criu_images: host name and IPC data of the images
//!                                          |-- shared_dirs: /dev/shm and emptyDirs of the pod
//!                                          `-- criu_options: CRIU configuration of this restore
//! ```
//!
//! A plain synchronous library: no runtime, no gRPC, no terminal, no environment. Every byte of a
//! checkpoint is hostile input: names are checked when the manifest is parsed, digests before use.

pub mod annotations;
pub mod criu_images;
pub mod criu_log;
pub mod criu_options;
mod loopback;
pub mod manifest;
pub mod namespaces;
pub mod node_config;
pub mod service_account;
pub mod shared_dirs;
pub mod spec;
pub mod stage;
pub mod store;
pub mod wire;
