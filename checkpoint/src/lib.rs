//! Checkpoints on disk and on the wire, and what must be changed in them before a restore.
//!
//! ```text
//!  dump (engine) --> store::Draft --> manifest --> /var/lib/transship/checkpoints/<name>/
//!                                                      |              ^
//!                                           wire (send |              | receive)
//!                                                      v              |
//!                                                 a byte stream ------'
//!
//!      annotations: what is asked for;  namespaces, spec: the OCI spec of the new container
//!      criu_images: the images that must be edited;  criu_options: what CRIU is told
//!      cri_names: labels and annotations of the CRI
//!      task_attributes: what CRIU does not keep, in a file of the checkpoint
//!      beneath: opens what others have put into a directory
//!      sealed: a checkpoint that lies encrypted
//!      container_log: what a container has written so far
//!      shared_dirs: what the containers of a pod share;  criu_log: why CRIU failed
//!      shown_text: what others have chosen, as people get to see it
//!      conditions: what keeps a container from being dumped or restored, and what to do
//! ```
//!
//! ```
//! use transship_checkpoint::store::Store;
//!
//! # let dir = tempfile::tempdir()?;
//! # let root = dir.path();
//! // `Store::of_node()` is the one below /var/lib/transship.
//! let store = Store::at(root);
//! for (name, found) in store.list()? {
//!     let checkpoint = found?;
//!     for container in &checkpoint.manifest.containers {
//!         println!("{name}: {} in {}", container.name, checkpoint.container_dir(container).display());
//!     }
//! }
//! assert!(store.open("web-monday").is_err(), "there is none yet");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A plain synchronous library: no runtime, no gRPC, no terminal, no environment. Every byte of a
//! checkpoint is hostile input: names are checked when the manifest is parsed, digests before use.

pub mod annotations;
pub mod beneath;
pub mod conditions;
pub mod container_log;
pub mod cri_names;
pub mod criu_images;
pub mod criu_log;
pub mod criu_options;
pub mod manifest;
pub mod namespaces;
pub mod sealed;
pub mod shared_dirs;
pub mod shown_text;
pub mod spec;
pub mod store;
pub mod task_attributes;
pub mod wire;
