//! What `transship` does, for the command line, the node's API and whoever else calls it.
//!
//! ```text
//!  selection: one container or a pod
//!  checkpoint --> source, pod, pod_ended, pod_dirs (find, dump, export)  --> checkpoint directory
//!  restore, restore_pod                      <-- checkpoint directory
//!  conditions: what keeps a running container from being moved, seen before anything is frozen
//!  container_log: where a container's output goes
//!  cri_pods: pods as a client of the CRI has them;  kubelet: whether one is here
//!  dump_hold: a dump that waits for the freeze, and while memory is read in its processes;  begun_dump: whoever waits for it
//!  dump_links: names in /dev/shm that CRIU's images need
//!  oci_runtime: runc or crun, called past containerd;  shim_options: what containerd's shim is told;  vfork: waits for processes
//!  that CRIU cannot dump yet
//!  task_attributes, descriptor_attributes: what CRIU does not keep of what stands still
//!  overlay_mounts: the directories of a snapshot;  image_blobs: the image of a container, for another node
//!  network_namespace: in that of a process;  own_networks: interfaces and networks of CNI of a container that shares its network with nobody
//!  send, receive                             <-> checkpoint directory as a stream
//!  migrate --> conversation (pipe), data_channel (TLS) --> receive, restore on the other node;  migrate::recover: the end of one that
//!  was cut off
//!  cri_record: what the record of a container of the CRI says of its pod
//!  restart_policy: keeps containerd from starting what a migration has frozen
//!  moved_mark: of pods that must not start again where they were;  moved_pods: what becomes of them there
//!  exported_layer: what the export of an upperdir gives;  task_to_freeze: what is to stand still
//!  frozen: containers that stand still;  freeze_guard: the process that lets them run if this one
//!  cannot (guard_process: how such a one is started);  thaw: they are seen to run;  kill: their end;  stuck_dump: ends a dump;
//!  killed_criu (left_links, nodes_network): what one that was killed has left;  frozen_pids: which processes stand still
//!  lost_task: what containerd has lost from its list
//!  snapshot: what a snapshot changes, as a layer, out and in;  serve, node_service: the node's API
//!  import: a package as a checkpoint of this node;  push: into a registry, with an image that starts cold;  registry,
//!  pulls: from registries, also for pods that want one
//!  process_files: what /proc tells of a process;  node_id: this node and its boot;  machine: what it is and has;  version: of programs;  shell_words: words for a shell
//!  timer_threads, wall_clock_timers, renamed_sockets, dumped_fifos: what CRIU gets wrong in the images of a dump;  lost_watches: what it leaves out of them
//!  room: that a file system keeps free;  origin: whose checkpoints are restored;  sealed: those that lie encrypted;  memory_dir: files of a checkpoint in memory;  listing: the checkpoints of a store;  sharing: of their blocks;  retention: which of them go;  check: findings about this node
//!  error: one error type, with its kind and what to do next;  reasons: several of them at once;  progress: what the caller is told;
//!  timeline: what took how long;  durable_record: small files that outlive a power cut;  locks: one at a time
//! ```
//!
//! ```no_run
//! use std::path::Path;
//!
//! use transship_checkpoint::store::Store;
//! use transship_containerd::Containerd;
//! use transship_engine::checkpoint::{self, Afterwards, Request, Selection};
//! use transship_engine::interrupt::Interrupt;
//! use transship_engine::{Result, Silent};
//!
//! /// A checkpoint of all containers of the pod `shop/web`, which runs on.
//! async fn take() -> Result<String> {
//!     let node = Containerd::connect(Path::new("/run/containerd/containerd.sock"), "k8s.io").await?;
//!     let request = Request::of(Selection::Pod("shop/web".to_owned()));
//!     let target = checkpoint::find(&node, &request).await?;
//!     let (name, store) = (target.default_name(), Store::of_node());
//!     let (afterwards, interrupt) = (Afterwards::Run, Interrupt::never());
//!     let taken =
//!         checkpoint::checkpoint(&target, &name, &store, afterwards, &interrupt, &Silent).await?;
//!     Ok(taken.directory)
//! }
//! ```
//!
//! # What a program that calls it must do
//! Some of its parts run the calling program again: the guard of frozen containers
//! (`PROGRAM freeze-guard`, which calls [`freeze_guard::run`]), that of a migration whose end is open
//! (`PROGRAM commit-guard`, [`migrate::run_guard`]), that of one that arrives
//! (`PROGRAM receive-guard`, [`receive::run_guard`]), that of a copy that is restored (`PROGRAM copy-guard`,
//! [`restore::run_guard`]), and in the middle of a dump with `link-remap` the export of
//! the upperdir (`PROGRAM -a ADDRESS -n NAMESPACE snapshot export --no-pause -o FILE ID`) and the links of a pod's
//! `/dev/shm` (`PROGRAM dump-links DIRECTORY FILE`, [`dump_links::write`]).

mod begun_dump;
pub mod check;
pub mod checkpoint;
pub mod conditions;
pub mod container_log;
pub mod conversation;
mod cri_pods;
pub mod cri_record;
pub mod data_channel;
mod descriptor_attributes;
mod dump_hold;
pub mod dump_links;
mod dumped_fifos;
mod durable_record;
pub mod error;
mod exported_layer;
pub mod freeze_guard;
pub mod frozen;
mod frozen_pids;
mod guard_process;
mod image_blobs;
pub mod import;
pub mod interrupt;
mod kill;
mod killed_criu;
mod kubelet;
pub mod listing;
mod locks;
mod lost_task;
mod lost_watches;
pub mod machine;
pub mod memory_dir;
pub mod migrate;
mod moved_mark;
pub mod moved_pods;
mod network_namespace;
mod node_id;
mod node_service;
mod oci_runtime;
pub mod origin;
mod overlay_mounts;
mod own_networks;
pub mod pod;
pub mod pod_dirs;
mod pod_ended;
mod process_files;
pub mod progress;
mod pulls;
pub mod push;
mod reasons;
pub mod receive;
pub mod registry;
mod renamed_sockets;
mod restart_policy;
pub mod restore;
pub mod restore_pod;
pub mod retention;
pub mod room;
pub mod sealed;
mod selection;
pub mod send;
pub mod serve;
mod sharing;
mod shell_words;
mod shim_options;
pub mod snapshot;
pub mod source;
pub mod stuck_dump;
mod task_attributes;
mod task_to_freeze;
mod thaw;
pub mod timeline;
mod timer_threads;
mod version;
mod vfork;
mod wall_clock_timers;

pub use error::{Context, Error, Kind, Result};
pub use progress::{Progress, Silent};
