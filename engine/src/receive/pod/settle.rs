//! The end of a pod's migration: its containers are let go, or all of it is removed.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use containerd_client::types::v1::Status;
use k8s_cri::v1::PodSandboxState;
use tokio::task::JoinSet;
use transship_checkpoint::annotations::RECEIVE;
use transship_containerd::Containerd;
use transship_layer::remove_tree;
use transship_sandbox::consumed::{Consumed, DEFAULT_CONSUMED_DIR, Owner};
use transship_sandbox::{Arrival as InSandbox, DEFAULT_RUN_DIR, PodDir};

use super::super::arrival::{Arrival, Arrivals, ArrivingPod, Found};
use super::contents;
use crate::cri_pods::CriPods;
use crate::error::{Context, Error, Result};
use crate::task_to_freeze::TaskToFreeze;

/// What is found of a pod whose source has committed itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Committed {
    /// All that is there runs.
    Runs,
    /// None of it has run, and a part of it is not there, or cannot be let go.
    NeverRan,
    /// It has run, or a part of it, and nothing is there any more.
    Gone,
}

/// Lets all containers go that are held; those that run are as they were.
///
/// # Errors
/// One of them has ended before the first was let go: then none is. The runtime front's; what has been let go runs.
pub(in super::super) async fn release(node: &Containerd, arrival: &Arrival) -> Result<()> {
    if !has_run(arrival)? && !all_are_held(arrival) {
        let message = "a container of the pod has ended while it was held";
        return Err(Error::failed(message));
    }
    let mut runtimes = Vec::new();
    for id in ids(arrival) {
        let record = node.container(id).await?;
        let task = node.task(id).await?;
        runtimes.push((id.clone(), TaskToFreeze::of(node, &record, &task).runtime));
    }
    let mut runtimes = runtimes.into_iter();
    // Where the first cannot be let go nothing has run, and the source goes on.
    if let Some((id, runtime)) = runtimes.next() {
        runtime.release(&id, node.address()).await?;
    }
    // Side by side: those that wait stand still.
    let mut releases = JoinSet::new();
    for (id, runtime) in runtimes {
        let containerd = node.address().to_path_buf();
        releases.spawn(async move { runtime.release(&id, &containerd).await });
    }
    let mut all = Ok(());
    while let Some(released) = releases.join_next().await {
        all = all.and(released.map_err(Error::from).flatten());
    }
    all
}

/// Brings a pod to its end whose source has committed itself.
///
/// # Errors
/// containerd's or the runtime front's.
pub(in super::super) async fn let_go(node: &Containerd, arrival: &Arrival) -> Result<Committed> {
    let mut there = 0;
    for id in ids(arrival) {
        there += usize::from(is_there(node, id).await?);
    }
    let all = ids(arrival).count();
    if there == all {
        return match release(node, arrival).await {
            Ok(()) => Ok(Committed::Runs),
            Err(_) if !has_run(arrival)? => Ok(Committed::NeverRan),
            Err(error) => Err(error),
        };
    }
    if !has_run(arrival)? {
        return Ok(Committed::NeverRan);
    }
    if there == 0 {
        return Ok(Committed::Gone);
    }
    // One of them has ended since, as containers do.
    for id in ids(arrival) {
        if is_there(node, id).await? {
            let one = ArrivingPod {
                ids: vec![id.clone()],
                ..ArrivingPod::default()
            };
            let one = Arrival {
                pod: Some(one),
                ..arrival.clone()
            };
            release(node, &one).await?;
        }
    }
    Ok(Committed::Runs)
}

/// Whether the first processes of all containers live that were held, as far as they are known.
fn all_are_held(arrival: &Arrival) -> bool {
    let mut held = arrival.pod.iter().flat_map(|pod| &pod.held);
    held.all(|process| process.lives())
}

fn ids(arrival: &Arrival) -> impl Iterator<Item = &String> {
    arrival.pod.iter().flat_map(|pod| &pod.ids)
}

async fn is_there(node: &Containerd, id: &str) -> Result<bool> {
    match node.task(id).await {
        Err(error) if error.is_not_found() => Ok(false),
        task => Ok(!matches!(task?.status(), Status::Stopped)),
    }
}

/// Whether the runtime front has let one of the containers go: it writes that down before the first instruction.
fn has_run(arrival: &Arrival) -> Result<bool> {
    let Some(pod) = &arrival.pod else {
        return Ok(false);
    };
    let owner = Owner::Pod(pod.uid.clone());
    let consumed = Consumed::by(Path::new(DEFAULT_CONSUMED_DIR), &owner)?;
    let mut names = pod.containers.iter();
    Ok(names.any(|name| consumed.container(&arrival.checkpoint, name).is_some()))
}

/// Removes what there is of the pod, which has not run.
///
/// # Errors
/// What is left.
pub(in super::super) async fn remove(
    node: &Containerd,
    pod: &ArrivingPod,
    migration: &str,
) -> Result<()> {
    if pod.waits {
        give_up(node, pod).await?;
        // Nobody fills the emptyDirs of the pod any more.
        return contents::remove(pod);
    }
    let mut cri = CriPods::of(node);
    let mut is_there_again = false;
    // By its annotation, which nobody else has: a command that was killed in the middle of the call knows no id.
    for sandbox in cri.sandboxes().await? {
        let of_migration = sandbox.annotations.get(RECEIVE).map(String::as_str);
        is_there_again |= of_migration != Some(migration)
            && sandbox.state() == PodSandboxState::SandboxReady
            && { sandbox.metadata.as_ref() }.is_some_and(|metadata| metadata.uid == pod.uid);
        if of_migration == Some(migration) {
            let removed = cri.remove(&sandbox.id).await;
            removed.with_context(|| format!("the sandbox {} is left", sandbox.id))?;
        }
    }
    if is_there_again {
        // Another attempt has come, to which the images and directories belong now.
        return Ok(());
    }
    for image in &pod.images {
        if cri.has_image(image).await? {
            cri.remove_image(image).await?;
        }
    }
    for directory in &pod.directories {
        // What kubelet or somebody else has mounted in it by now is not ours.
        match remove_tree(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            removed => {
                removed.with_context(|| format!("cannot remove {}", directory.display()))?;
            }
        }
    }
    // In emptyDirs that were there before.
    contents::remove(pod)
}

/// Removes sandboxes of pods that have been removed: containerd goes on with a call whose caller was killed, and a sandbox
/// comes when it has been looked for.
///
/// # Errors
/// The records cannot be listed; what is left.
pub(in super::super) async fn remove_late(node: &Containerd, arrivals: &Arrivals) -> Result<()> {
    let aborted = arrivals.aborted_pods()?;
    if aborted.is_empty() {
        return Ok(());
    }
    let sandboxes = CriPods::of(node).sandboxes().await?;
    let late: BTreeSet<&String> = { sandboxes.iter() }
        .filter_map(|sandbox| aborted.get(sandbox.annotations.get(RECEIVE)?))
        .collect();
    // One that cannot be removed keeps no other.
    let mut all = Ok(());
    for migration in late {
        let removed = async {
            match arrivals.open(migration)? {
                Found::Record(locked) => match &locked.arrival.pod {
                    Some(pod) => remove(node, pod, migration).await,
                    None => Ok(()),
                },
                Found::Nothing | Found::Busy => Ok(()),
            }
        };
        all = all.and(removed.await);
    }
    all
}

/// Ends what is held in a pod that somebody else has made and will remove. Whatever is made of it later fails, and
/// says why.
async fn give_up(node: &Containerd, pod: &ArrivingPod) -> Result<()> {
    let Some(sandbox) = &pod.sandbox else {
        return Ok(());
    };
    let dir = PodDir::at(Path::new(DEFAULT_RUN_DIR), sandbox)?;
    if !dir.path().is_dir() {
        // It has gone.
        return Ok(());
    }
    dir.set_arrival(InSandbox::GivenUp)?;
    // One that is being restored is held in a moment, or fails.
    let _lock = dir.lock()?;
    for name in &pod.containers {
        let Some(id) = dir
            .staged(name)?
            .map(|staged| staged.held_id())
            .transpose()?
            .flatten()
        else {
            continue;
        };
        let (Ok(record), Ok(task)) = (node.container(&id).await, node.task(&id).await) else {
            // It has ended.
            continue;
        };
        TaskToFreeze::of(node, &record, &task)
            .runtime
            .kill(&id)
            .await?;
    }
    Ok(())
}
