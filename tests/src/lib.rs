//! Throwaway containerd nodes on one machine: the ground on which the real-node tests, the demo and the benchmarks stand.
//!
//! ```text
//!  mmdebstrap ──> tree.rs, recipe.rs ──> cached Debian tree (containerd, runc, CRIU)
//!                               │ lowerdir
//!  settings.rs ─> bed.rs ───> node.rs ── unshare ──> init.rs   PID 1 of the node: mounts, pivot_root, reaps
//!  (paths)      run dir, lock   │  │ nsenter         ▲
//!                 │             │  └─ command() ─────┤ enter.rs: joins the node's cgroups.rs, then becomes nsenter
//!                 │             ├─ containerd.rs     config.toml, CNI, start and wait
//!                 │             ├─ network.rs        veth pairs, routes, names;  ssh.rs: `ssh node-b` from node a
//!                 │             └─ logs.rs           tails of what containerd, the snapshotter and CRIU wrote
//!                 ├─ kubernetes.rs <── kubernetes_build.rs   a control plane and kubelets, built from Debian's source
//!                 ├─ image.rs <── workload.rs        OCI image of busybox and our static programs, for `ctr images import`
//!                 │      debian_image.rs             the same of Debian's packages, cached as the trees are
//!                 └─ interrupt.rs, footprint.rs      teardown on signals; proof that nothing is left
//! ```
//!
//! cri.rs and cri_stream.rs are a client of the CRI, podman.rs is Debian's podman, debian_program.rs a program of another suite,
//! disk.rs a disk of its own; journey.rs is what the demo shows and tests check; needs.rs tells what a test needs, poll.rs waits.
//! maps.rs and documented_tests.rs check what the sources and documents say of the sources, circles.rs that no modules use each
//! other in a circle.
//!
//! All that runs on any Linux; machine/ boots a Debian with systemd and cgroup v2 in QEMU and runs it
//! there ([`Machine`]).
//!
//! The program that uses this library is started again by itself as the node's PID 1 and as the
//! door into a node, so its `main` begins with [`node_role`].
//!
//! Whatever happens to that program, the nodes end with it: PID 1 of a node reads a pipe that only
//! the program holds, and leaves at its end; the kernel then kills the PID namespace, and mounts,
//! network and System V objects go with their namespaces. Directories and cgroups are removed by
//! `Drop`, by the signal thread, or (after a SIGKILL) by the next [`Testbed::new`].

#![warn(clippy::missing_errors_doc)]

mod bed;
mod cgroups;
#[cfg(test)]
mod circles;
mod containerd;
mod cri;
mod cri_stream;
mod debian_image;
mod debian_program;
mod disk;
#[cfg(test)]
mod documented_tests;
mod enter;
mod error;
mod footprint;
mod image;
mod init;
mod interrupt;
pub mod journey;
mod kubernetes;
mod kubernetes_build;
mod logs;
mod machine;
#[cfg(test)]
mod maps;
mod needs;
mod network;
mod node;
mod podman;
mod poll;
mod recipe;
mod run;
mod settings;
mod ssh;
mod tree;
mod workload;

pub use bed::Testbed;
pub use containerd::{Containerd, ContainerdConfig};
pub use cri::{Cri, Pod, PodContainer, PodNamespaces, PodSecurity};
pub use cri_stream::CriStream;
pub use debian_image::DebianImage;
pub use debian_program::DebianProgram;
pub use disk::{Disk, FileSystem};
pub use error::TestbedError;
pub use footprint::{Footprint, Traces};
pub use image::Image;
pub use kubernetes::Cluster;
pub use machine::{Machine, Verdict};
pub use needs::{Need, Needs};
pub use network::Link;
pub use node::{Node, NodeOptions, Storage};
pub use poll::{poll_until, stretch_deadlines};
pub use run::CommandRun;
pub use settings::Settings;
pub use tree::Tree;
pub use workload::{CounterReply, Workload};

use std::ffi::OsString;
use std::process::ExitCode;

/// Plays the part of a node's PID 1, or of the door into a node, when the arguments ask for it.
///
/// Returns `None` for every other call of the program, which then goes on. Call it first in `main`:
/// the library starts the current executable again with these arguments.
pub fn node_role(arguments: impl Iterator<Item = OsString>) -> Option<ExitCode> {
    let mut arguments = arguments.skip(1);
    let role = arguments.next()?;
    if role == init::ROLE {
        Some(init::serve(arguments))
    } else if role == enter::ROLE {
        Some(enter::become_command(arguments))
    } else {
        None
    }
}
