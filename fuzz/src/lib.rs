//! What reads bytes of others, each as a function of these bytes alone.
//!
//! ```text
//!  corpus/<target>/*  ──> tests/corpus.rs: every file once, an ordinary test
//!                     ──> libfuzzer/: libFuzzer's mutations of them (`make fuzz`)
//!                              │
//!                    TARGETS ──┴─> layers     tars of image layers, of /dev/shm and emptyDir
//!                                  streams    the manifest of a checkpoint, the stream between nodes
//!                                  images     CRIU's images, of each kind alone and all of a dump
//!                                  mounts     options of overlay mounts, mountinfo
//!                                  specs      config.json of a bundle
//!                                  calls      argv of the runtime front, stdin of the hook
//!                                  snapshots  filters of List, messages of gRPC
//!                                  packages   packages, archives of other engines, artifacts of registries
//! ```
//!
//! `scratch` is a directory for those that write.
//!
//! A target panics when the code under it does, and when what it promises does not hold: that nothing
//! beside a directory is touched, that what was written is read again, that what was admitted once is
//! admitted as it is.

mod calls;
mod images;
mod layers;
mod mounts;
mod packages;
mod scratch;
mod snapshots;
mod specs;
mod streams;

/// Takes bytes of any kind.
pub type Target = fn(&[u8]);

/// All targets, by the names of their folders in `corpus/`.
pub const TARGETS: &[(&str, Target)] = &[
    ("argv", calls::argv),
    ("artifact", packages::artifact),
    ("criu_cgroup", images::cgroup),
    ("criu_core", images::core),
    ("criu_dump", images::dump),
    ("criu_files", images::files),
    ("criu_ids", images::ids),
    ("criu_inventory", images::inventory),
    ("criu_ipcns_msg", images::ipcns_msg),
    ("criu_ipcns_sem", images::ipcns_sem),
    ("criu_ipcns_shm", images::ipcns_shm),
    ("criu_ipcns_var", images::ipcns_var),
    ("criu_log", images::log),
    ("criu_mm", images::mm),
    ("criu_mountpoints", images::mountpoints),
    ("criu_packet_rules", images::packet_rules),
    ("criu_pipes_data", images::pipes_data),
    ("criu_pstree", images::pstree),
    ("criu_seccomp", images::seccomp),
    ("criu_userns", images::userns),
    ("criu_utsns", images::utsns),
    ("grpc", snapshots::grpc),
    ("hook_state", calls::hook_state),
    ("layer", layers::layer),
    ("list_filter", snapshots::list_filter),
    ("manifest", streams::manifest),
    ("mountinfo", mounts::mountinfo),
    ("overlay_options", mounts::overlay_options),
    ("package", packages::package),
    ("shared_dir", layers::shared_dir),
    ("spec", specs::spec),
    ("stream", streams::stream),
];

/// The target of this name.
#[must_use]
pub fn target(name: &str) -> Option<Target> {
    let found = TARGETS.iter().find(|(known, _)| *known == name);
    found.map(|(_, target)| *target)
}
