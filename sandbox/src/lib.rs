//! Sandboxes of this node and the restores into them: what is below `/run/transship`, and what a
//! restore is allowed to do.
//!
//! ```text
//!  createRuntime hook, runtime front --> stage --> /run/transship/pods/<sandbox>/restore/<c>/
//!      admission: who may restore what
//!      shared_dirs: /dev/shm and emptyDirs of the pod
//! ```

pub mod admission;
mod loopback;
pub mod shared_dirs;
pub mod stage;
