//! Who may restore what, and what the new container's spec allows.
//!
//! CRIU is root of the node: it gives each process the ids, capabilities, filters and mounts that the
//! images name. What the images name is compared with the spec that the container is made of before
//! CRIU runs, so that the spec alone decides:
//!
//! ```text
//!  images ── Restored::read ──┐
//!  spec ──── Allowance::of ───┼─ compare ─> Admission { refusals, edits } ── apply ─> edited images
//!  node ──── Environment ─────┘                 │
//!                                               └ one refusal, and nothing is restored
//!
//!  refused   capabilities, user and group ids, securebits, hard limits that the spec names,
//!            scheduling, open files that take a capability, mounts, unmasked paths, namespaces, id
//!            mappings, cgroups, devices, files that are no images, names of files that lead elsewhere,
//!            deleted files that it could not have made, watches without a name, sockets of others,
//!            sockets where it could bind none, terminals that are none, rules for packets
//!  imposed   seccomp profile (a further filter), no_new_privs, LSM profile, bounding and
//!            inheritable set, limits that the spec does not name, oom_score_adj, buffers of sockets
//! ```
//!
//! The comparison is pure. `asker` says who may ask at all, by the rules in `node_config`.

pub mod allowance;
pub mod asker;
mod bound_sockets;
pub mod capabilities;
pub mod container_base;
mod deleted_files;
mod environment;
mod files;
pub mod foreign_spec;
#[cfg(test)]
mod image_tests;
mod mount_ways;
mod mounts;
mod network;
pub mod node_config;
mod open_files;
mod places;
mod queued_files;
mod refusal;
mod restored;
mod seccomp_chains;
mod seccomp_program;
pub mod service_account;
mod terminals;
#[cfg(test)]
mod tests;
mod threads;

use std::collections::BTreeMap;
use std::path::Path;

use transship_checkpoint::criu_images::ImageError;
use transship_checkpoint::criu_images::mounts::Mount;
use transship_checkpoint::criu_images::open_files::{BufferLimits, limit_buffers};
use transship_checkpoint::criu_images::seccomp::{Filter, write_filters};
use transship_checkpoint::criu_images::threads::{TASK_DEAD, ThreadEdit, edit};
use transship_checkpoint::spec::Spec;

pub use allowance::Allowance;
pub use environment::{Environment, is_own_namespace, resolve_within};
pub use mount_ways::MadeLinks;
pub use network::Network;
pub use refusal::Refusal;
pub use restored::{Restored, RestoredError};

/// A checkpoint that is not admitted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdmissionError {
    /// The processes would be allowed more than the new container allows.
    #[error(
        "it is stronger than this container may be: {first}{}: give the container what the \
         checkpointed one had, or take a checkpoint of one that has no more than this one",
        others(*.more)
    )]
    Stronger {
        /// The first thing that is.
        first: Refusal,
        /// How many more there are.
        more: usize,
    },
    /// The images cannot be read.
    #[error(transparent)]
    Images(#[from] RestoredError),
    /// An image cannot be edited.
    #[error(transparent)]
    Edit(#[from] ImageError),
}

fn others(more: usize) -> String {
    match more {
        0 => String::new(),
        more => format!(" (and {more} more)"),
    }
}

/// What is to be done about a restore.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Admission {
    /// In what the images are stronger than the spec.
    pub refusals: Vec<Refusal>,
    /// What is imposed on threads, by their id.
    pub edits: BTreeMap<u32, ThreadEdit>,
    /// The seccomp filters as they will be, if they change.
    pub filters: Option<Vec<Filter>>,
    /// What CRIU is told of the LSM, `apparmor:NAME` or `selinux:LABEL`.
    pub lsm_profile: Option<String>,
    /// What sockets may keep, if some of them keep more.
    pub buffers: Option<BufferLimits>,
}

impl Admission {
    fn refuse(&mut self, refusal: Refusal) {
        self.refusals.push(refusal);
    }

    fn edit(&mut self, tid: u32) -> &mut ThreadEdit {
        self.edits.entry(tid).or_default()
    }

    /// Whether something is to be changed before CRIU reads the images.
    #[must_use]
    pub fn has_edits(&self) -> bool {
        self.filters.is_some()
            || self.buffers.is_some()
            || self.edits.values().any(|edit| !edit.is_empty())
    }

    /// The first refusal as an error.
    ///
    /// # Errors
    /// [`AdmissionError::Stronger`].
    pub fn check(&self) -> Result<(), AdmissionError> {
        match self.refusals.split_first() {
            None => Ok(()),
            Some((first, more)) => Err(AdmissionError::Stronger {
                first: first.clone(),
                more: more.len(),
            }),
        }
    }

    /// Writes what is imposed into the images in `dir`, which may be links into a checkpoint.
    ///
    /// # Errors
    /// An image cannot be read or replaced.
    pub fn apply(&self, dir: &Path) -> Result<(), ImageError> {
        if let Some(filters) = &self.filters {
            write_filters(dir, filters)?;
        }
        if let Some(limits) = &self.buffers {
            limit_buffers(dir, limits)?;
        }
        for (tid, change) in self.edits.iter().filter(|(_, change)| !change.is_empty()) {
            edit(dir, *tid, change)?;
        }
        Ok(())
    }
}

/// Compares what the images say with what the spec allows. `old` is the spec of the dump, where there is
/// one.
#[must_use]
pub fn compare(
    restored: &Restored,
    old: Option<&Spec>,
    allowed: &Allowance,
    here: &Environment,
) -> Admission {
    let mut admission = Admission {
        // A kernel without the LSM has no profile, and CRIU refuses one there.
        lsm_profile: { allowed.lsm_profile.clone() }.filter(|profile| here.has_lsm(profile)),
        ..Admission::default()
    };
    for name in &restored.strangers {
        admission.refuse(Refusal::Stranger { name: name.clone() });
    }
    for process in &restored.processes {
        let image = |tid| restored.threads.iter().find(|thread| thread.tid == tid);
        // CRIU makes no thread of a zombie, whatever ids the list has.
        let is_dead = image(process.pid)
            .and_then(|thread| thread.task.as_ref())
            .is_some_and(|task| task.state == TASK_DEAD);
        let has_images = process.threads.contains(&process.pid)
            && process.threads.iter().all(|tid| image(*tid).is_some());
        if !is_dead && !has_images {
            admission.refuse(Refusal::Damaged {
                what: format!("a thread of process {} has no image", process.pid),
            });
        }
    }
    for thread in &restored.threads {
        threads::compare(thread, allowed, here, &mut admission);
    }
    files::compare(restored, allowed, &mut admission);
    terminals::compare(restored, &mut admission);
    deleted_files::compare(restored, allowed, &mut admission);
    queued_files::compare(restored, allowed, &mut admission);
    open_files::compare(&restored.privileged_files, allowed, here, &mut admission);
    for addresses in &restored.addresses {
        threads::compare_addresses(addresses, allowed, here, &mut admission);
    }
    mounts::compare(&restored.mounts, allowed, here, &mut admission);
    places::compare_namespaces(
        &restored.processes,
        &restored.inventory,
        allowed,
        here,
        &mut admission,
    );
    places::compare_networks(restored, allowed, &mut admission);
    places::compare_mappings(&restored.id_mappings, allowed, &mut admission);
    places::compare_cgroups(&restored.cgroups, &mut admission);
    if let Some(profile) = &allowed.seccomp {
        match seccomp_program::compile(profile, &here.machine) {
            Ok(compiled) => seccomp_chains::impose(
                &compiled,
                &restored.threads,
                &restored.processes,
                &restored.filters,
                &mut admission,
            ),
            Err(why) => admission.refuse(Refusal::Seccomp {
                who: "any process".to_owned(),
                why,
            }),
        }
    }
    let old_devices = old.map(|old| Allowance::of(old, &Path::to_path_buf).devices);
    for device in old_devices.into_iter().flatten() {
        if !allowed.devices.contains(&device) {
            admission.refuse(Refusal::Device { path: device.0 });
        }
    }
    admission
}

/// Compares the names in the images with what there is: `rootfs` is the root of the container, as it is mounted now, and
/// `made` says which links are in a file system that CRIU will make, or that this is not known. Volumes may be changed by
/// other containers at any time.
pub fn compare_names(
    restored: &Restored,
    allowed: &Allowance,
    rootfs: &Path,
    made: &dyn Fn(&Mount) -> MadeLinks,
    admission: &mut Admission,
) {
    mount_ways::refuse_links(restored, allowed, rootfs, made, admission);
    files::refuse_links(restored, allowed, rootfs, made, admission);
    terminals::refuse_links(restored, made, admission);
    bound_sockets::compare(restored, allowed, rootfs, admission);
}
