//! Sandboxes of this node and the restores into them: what is below `/run/transship`, what has been
//! restored before, and what a restore is allowed to do.
//!
//! ```text
//!  createRuntime hook ── PodDir::pin, stage ──> /run/transship/pods/<sandbox id>/
//!  runtime front: admission, Staged, LinkedImages, Consumed     engine: admission, shared_dirs
//!
//! /run/transship/pods/<sandbox id>/      pod_dir: PodDir
//!     lock                               flock: held while a restore changes the sandbox
//!     uid                                the pod's, under the CRI
//!     checkpoint                         what it is restored from, when no annotation names it
//!     ns/{net,ipc,uts,pid,user,cgroup}   pins: namespaces of the sandbox, bind mounted
//!     arrival                            Arrival: what has become of the migration that it waits for
//!     not-running                        JSON: [NotRunning], what the pod of the migration has that does not move
//!     waiting                            locked (flock, shared) as long as a start waits for it
//!     filled-<file>                      a shared directory that has its content
//!     ended-<container>                  it had ended before the checkpoint, and has ended so again here
//!     ipc.json                           ipc_record: System V objects that are in ns/ipc by now
//!     restore/<container>/               staged: Staged; locked (flock) while it is being restored
//! /run/transship/opened/                 opened: sealed checkpoints in clear, in memory
//! /run/transship/criu-lock               criu_lock: how CRIU locks networks here
//! /run/transship/{migrations,arrivals,dumps}/  locks of the engine
//! /var/lib/transship/moved/              moved: pods that must not start here again
//! /var/lib/transship/consumed/           consumed: who has taken what out of which checkpoint
//! /var/lib/transship/images/             wanted_image: what pods want from registries
//! /var/lib/transship/runs/               last_run: when a pod of a name has last begun to run
//! /var/lib/transship/origins/            origins: where the checkpoints of this node come from
//! <checkpoint>/<container>/.staged-*/    linked_images: the images of one restore
//! <checkpoint>/<container>/memory-given-back  given_back: images that nothing can be restored from any more
//! /proc                                  proc_text, process_handle, descriptors_of, privileged_files: also for engine and
//!                                        front
//! /sys/fs/cgroup                         guards_cgroup: what must not end with its caller
//! in a network namespace                 interface_addresses, loopback, network_sysctls, network_lock (nft)
//! in an IPC namespace                    sysv_objects
//! sockets of others, by pidfd_getfd      socket_options
//! config.json                            device_rules: also for the front
//! files: whole or not there, for root alone
//! a bundle that containerd has forgotten forgotten_bundle: its shim is ended, and it is removed
//! ```
//!
//! `/run` is empty after a boot, as are the sandboxes; nothing there has to survive one.

pub mod admission;
pub mod consumed;
mod criu_lock;
mod descriptors_of;
pub mod device_rules;
mod error;
mod files;
pub mod forgotten_bundle;
pub mod given_back;
mod guards_cgroup;
mod interface_addresses;
mod ipc_record;
pub mod last_run;
pub mod linked_images;
mod loopback;
pub mod moved;
mod network_lock;
mod network_sysctls;
pub mod opened;
pub mod origins;
mod pins;
mod pod_dir;
pub mod privileged_files;
mod proc_text;
mod process_handle;
pub mod shared_dirs;
pub mod socket_options;
mod staged;
mod sysv_objects;
pub mod wanted_image;

pub use criu_lock::criu_lock;
pub use descriptors_of::DescriptorsOf;
pub use error::SandboxError;
pub use files::{replace as replace_file, unmount_all};
pub use guards_cgroup::leave_cgroup_of_caller;
pub use interface_addresses::{addresses_of, announce_addresses_of};
pub use ipc_record::OfCheckpoint;
pub use linked_images::LinkedImages;
pub use network_lock::{lock_network, nft, unlock_network};
pub use network_sysctls::{of_network as sysctls_of_network, set_network_sysctls};
pub use pins::{
    live_ipc_sysctls, live_network_namespace, live_uts_names, paths_of_process, raise_loopback_of,
};
pub use pod_dir::{Arrival, PodDir};
pub use proc_text::{TaskStat, TaskStatus, read_proc};
pub use process_handle::{KnownProcess, ProcessHandle, children, tree_with_parents};
pub use staged::{Once, RELEASE_COMMAND, Request, Staged, State};
pub use sysv_objects::LiveIpc;

/// Where the directories of sandboxes are.
pub const DEFAULT_RUN_DIR: &str = "/run/transship";
