//! Whether a checkpoint can be restored: tried at once, on the node that has taken it.
//!
//! ```text
//!  checkpoint --> plan (a name of its own, namespaces of its own, TCP closed) --> held --> removed
//! ```
//!
//! The copy is held, so it executes nothing, and consumes nothing: only `start` does. But CRIU works
//! on what a copy shares with the original: it binds the sockets of a volume again, and makes and
//! removes files there. So a container with a volume that it may write to is not tried.

use std::collections::BTreeSet;
use std::path::Path;

use transship_checkpoint::criu_options::CriuOverrides;
use transship_checkpoint::manifest::Container;
use transship_checkpoint::spec::Spec;
use transship_checkpoint::store::{Checkpoint, Store};
use transship_containerd::{Containerd, unique};
use transship_sandbox::admission::foreign_spec::Allow;

use super::client_files;
use super::copy_guard::CopyGuard;
use super::{AddressChoice, LEASE, Target, hold, open, plan};
use crate::error::{Context, Error, Result};
use crate::machine::free_memory;
use crate::shell_words::command_line;

/// Checks that a container could be tried: before its checkpoint is taken.
///
/// # Errors
/// [`crate::Kind::Refused`] when the trial would reach what the container shares, or there is no memory
/// for a second one.
pub fn can_be_tried(spec: &[u8], container: &Container, called: &str, memory: u64) -> Result<()> {
    let failed = || format!("the spec of {called} is no OCI runtime spec");
    let spec = Spec::parse(spec).with_context(failed)?;
    let shared = written_to(&spec, container);
    if !shared.is_empty() {
        let message = format!(
            "a restore of {called} cannot be tried: CRIU would work on what it shares with the one that \
             runs: {}; take the checkpoint without --verify-restore",
            shared.join(", ")
        );
        return Err(Error::refused(message));
    }
    let free = free_memory();
    if memory > free {
        let message = format!(
            "a restore of {called} cannot be tried: it has {memory} bytes of memory, and {free} are free; \
             take the checkpoint without --verify-restore"
        );
        return Err(Error::refused(message));
    }
    Ok(())
}

/// Restores the container of a checkpoint that this node has just taken, holds it, and removes it.
///
/// # Errors
/// It cannot be restored. Nothing of the trial is left, or the error says what; the checkpoint stays.
pub async fn try_restore(node: &Containerd, store: &Store, name: &str) -> Result<()> {
    let checkpoint = open(store, name)?;
    let leased = node.with_lease(LEASE).await?;
    let tried = try_leased(&leased, &checkpoint).await;
    // A lease that cannot be dropped ends by itself.
    drop(leased.end_lease().await);
    tried.map_err(|error| {
        Error::failed(format!(
            "the checkpoint {name:?} was taken and cannot be restored"
        ))
        .hint(command_line(&["transship", "rm", name]))
        .because(error)
    })
}

async fn try_leased(node: &Containerd, checkpoint: &Checkpoint) -> Result<()> {
    let container = checkpoint.manifest.container(None)?;
    let spec = checkpoint.read_spec(container)?;
    let mut criu = CriuOverrides::default();
    criu.set("tcp", "close")?;
    let target = Target {
        id: Some(format!("transship-verify-{}", unique())),
        new_namespaces: true,
        address: Some(AddressChoice::None),
        criu,
        // It has had all of this here, and executes nothing; hooks and what reads its output would be run.
        allowed: BTreeSet::from(Allow::ALL)
            .into_iter()
            .filter(|allow| ![Allow::Hooks, Allow::LogUri].contains(allow))
            .collect(),
        ..Target::default()
    };
    let plan = plan(node, container, &spec, &target).await?;
    let guard = CopyGuard::start(node, &plan, checkpoint)?;
    let tried = async { hold(node, plan, checkpoint).await?.undo().await };
    let tried = tried.await;
    guard.stand_down(&tried).await;
    tried
}

/// Where the container may write to what others have, too.
fn written_to(spec: &Spec, container: &Container) -> Vec<String> {
    let read_only = |at: &Path| {
        let mounts = spec.get("/mounts").and_then(|mounts| mounts.as_array());
        let mount = mounts
            .into_iter()
            .flatten()
            .find(|mount| mount["destination"].as_str().map(Path::new) == Some(at));
        let options = mount.and_then(|mount| mount["options"].as_array());
        let read_only = options.is_some_and(|options| options.iter().any(|option| option == "ro"));
        read_only || mount.is_some_and(|mount| client_files::is_made_anew(mount, container))
    };
    let binds = spec.bind_mounts().into_iter().map(|(at, _)| at);
    binds
        .filter(|at| !read_only(at))
        .map(|at| at.display().to_string())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    #[test]
    fn what_is_shared_is_left_alone() {
        let web = Container::default();
        let spec = |options: &str| {
            format!(
                r#"{{"mounts":[{{"destination":"/data","type":"bind","source":"/d","options":[{options}]}}]}}"#
            )
        };
        let writable = can_be_tried(spec(r#""rbind""#).as_bytes(), &web, "web", 1).unwrap_err();
        assert_eq!(writable.kind(), Kind::Refused);
        assert!(writable.to_string().contains("/data"), "{writable}");
        can_be_tried(spec(r#""rbind","ro""#).as_bytes(), &web, "web", 1).unwrap();
        let large = can_be_tried(b"{}", &web, "web", u64::MAX).unwrap_err();
        assert!(large.to_string().contains("memory"), "{large}");
    }
}
