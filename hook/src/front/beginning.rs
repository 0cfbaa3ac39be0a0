//! What a container begins with: the memory of a checkpoint, its image, or nothing at all.
//!
//! ```text
//!  taken before by this pod? ──yes─> its image (a checkpoint is consumed once)
//!  comes with a migration? ──yes─> waits for it
//!  staged by the sandbox's hook, or by who receives it? ──yes─> restored
//!  the checkpoint that it names has it ──> staged now, restored
//!                               had seen it end ──> nothing: it ends so again
//!                               lacks it ──> its image, and not in silence; or refused
//! ```

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use transship_checkpoint::annotations::{ColdContainers, OnFailure};
use transship_checkpoint::manifest::{Manifest, NotRunning};
use transship_checkpoint::store::{Checkpoint, StoreError};
use transship_sandbox::admission::asker::Asker;
use transship_sandbox::admission::node_config::NodeConfig;
use transship_sandbox::consumed::{Consumed, Owner};
use transship_sandbox::{Arrival, PodDir, SandboxError, Staged, State};

use super::bundle::{Bundle, Config, HeldRestore, Phase};
use super::{FitError, Front, FrontError};
use crate::descendants::kill_if_same;
use crate::restore_log::{self, LOG_DIR};
use crate::start_time::is_same;

/// How long a container waits for its migration: less than kubelet waits for it (two minutes). The next attempt waits
/// again.
const ARRIVAL_PATIENCE: Duration = Duration::from_secs(90);
/// How long it waits where images are missing: they may just have been pulled, or be those of containers that whoever makes
/// them comes to next.
const IMAGES_PATIENCE: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// What a container begins with.
#[derive(Debug)]
pub(super) enum Beginning {
    /// What is staged.
    Restored(PodDir, Staged),
    /// Its image.
    Cold,
    /// It had ended with this code when the checkpoint was taken. Its start takes that out of the checkpoint.
    Done(HeldRestore, u8),
}

impl Front<'_> {
    /// What this container begins with; a restore is staged now unless the sandbox's hook has done it.
    pub(super) fn find_beginning(
        &self,
        id: &str,
        config: &Config,
        bundle: &Bundle,
    ) -> Result<Beginning, FrontError> {
        let name = config.annotations.container.as_deref().unwrap_or(id);
        let pod = self.pod_of(id, config)?;
        let chosen = match &config.annotations.restore {
            Some(name) => Some(name.clone()),
            // The sandbox's hook has found it.
            None => pod.checkpoint().filter(|_| config.cri),
        };
        let wanted = chosen.as_deref();
        let owner = self.owner(id, config, bundle);
        let mut consumed = Consumed::by(&self.env.consumed, &owner)?;
        let asker = config.annotations.pod_container.as_deref().unwrap_or(id);
        let mut staged = pod.staged(name)?;
        let named = match (wanted, &staged) {
            (Some(wanted), _) => Some(wanted.to_owned()),
            (None, Some(staged)) => Some(staged.request()?.checkpoint),
            (None, None) => None,
        };
        if let Some(named) = &named
            && !pod.has_ended(name)?
            && let Some(restore) = self.of_ended((named, name), asker, config, &consumed)?
        {
            return Ok(Beginning::Done(restore, 0));
        }
        // The container's life has gone on since, also when the sandbox has been made again. Or
        // another container of the pod has it.
        if let Some(named) = &named
            && let Some(owner) = consumed.container(named, name)
        {
            if config.cri && owner != asker {
                return Err(SandboxError::Twice {
                    checkpoint: named.clone(),
                    container: name.to_owned(),
                    owner: owner.to_owned(),
                    asker: asker.to_owned(),
                }
                .into());
            }
            let reason = format!("the checkpoint {named:?} has been restored for it before");
            self.tell_cold_start(id, Some(named), &reason);
            return Ok(Beginning::Cold);
        }
        if consumed.has_started_cold(asker) {
            let reason = "it has started from its image before";
            self.tell_cold_start(id, wanted, reason);
            return Ok(Beginning::Cold);
        }
        // Who names no checkpoint does not depend on them.
        let rules = match named {
            Some(_) => NodeConfig::read(&self.env.node_config)?,
            None => NodeConfig::default(),
        };
        let pod_asks = Asker {
            rules: &rules,
            annotations: &config.annotations,
        };
        if let Some(named) = &named {
            let found = self.env.store.find(named);
            if let Ok(found) = &found
                && staged.is_none()
            {
                // First of all: who may not have it does not hear what has become of it.
                pod_asks.admit(&found.manifest)?;
            }
            let created = found.ok().map(|it| it.manifest.created);
            // Of what is not there a pod hears that.
            if created.is_some() || staged.is_some() || !config.cri {
                consumed.check_not_spent(named, created)?;
            }
        }
        if config.annotations.receives {
            let began = Instant::now();
            // What is staged has not been let go.
            if staged.is_none() && wanted.is_some_and(|wanted| consumed.has_container_of(wanted)) {
                let reason = "it did not come with the migration of its pod, which has ended";
                self.tell_cold_start(id, wanted, reason);
                return Ok(Beginning::Cold);
            }
            if let (Some(wanted), None) = (wanted, &staged)
                && let Some(code) = wait_for_ended(&pod, id, name, began)?
                && !pod.has_ended(name)?
            {
                let restore = HeldRestore::of_done(owner, wanted, name, asker);
                return Ok(Beginning::Done(restore, code));
            }
            wait_for_migration(&pod, id, began)?;
            staged = pod.staged(name)?;
        }
        if let Some(staged) = staged
            && wanted.is_none_or(|wanted| staged.request().is_ok_and(|it| it.checkpoint == wanted))
        {
            return self.of_staged(config, asker, pod, staged);
        }
        let Some(wanted) = wanted else {
            let asks = &config.annotations;
            // The sandbox's hook has found none, and with `on-failure: cold-start` that is no error.
            if config.cri && asks.restore_image.is_some() {
                let reason = format!(
                    "its pod has no checkpoint (why: {LOG_DIR}/{} on the node)",
                    restore_log::LOG_FILE
                );
                self.tell_cold_start(id, None, &reason);
            }
            return Ok(Beginning::Cold);
        };
        let checkpoint = match self.env.store.open(wanted) {
            // Taken away when all that it has was restored.
            Err(StoreError::NotFound { .. })
                if config.annotations.once && consumed.has_any_of(wanted) =>
            {
                if config.annotations.cold_containers == ColdContainers::Refuse {
                    return Err(not_in_checkpoint(wanted, name));
                }
                let missing = not_in_checkpoint(wanted, name).to_string();
                self.tell_cold_start(id, Some(wanted), &missing);
                return Ok(Beginning::Cold);
            }
            // What it has is staged as long as it waits, and opened as long as it is staged.
            Err(StoreError::Sealed { .. }) => self.find_lacking(wanted, name)?,
            Err(error) => {
                let not_found = pod_asks.not_found(&self.env.store, wanted, &error);
                return Err(not_found.map_or(error.into(), FrontError::from));
            }
            Ok(opened) => opened,
        };
        let manifest = &checkpoint.manifest;
        pod_asks.admit(manifest)?;
        let is_named = |it: &&transship_checkpoint::manifest::Container| it.name == name;
        let container = match manifest.containers.iter().find(is_named) {
            Some(container) => container,
            None if config.cri && config.annotations.container.is_some() => {
                if let Some(code) = manifest.ended_with(name) {
                    let restore = HeldRestore::of_done(owner, wanted, name, asker);
                    return Ok(Beginning::Done(restore, code));
                }
                check_lacking(config, manifest, name, &consumed)?;
                let missing = not_in_checkpoint(&manifest.name, name);
                self.tell_cold_start(id, Some(wanted), &missing.to_string());
                // Of a migration only what is let go has run, and says that it has ended.
                if !config.annotations.receives {
                    consumed.add_container((wanted, Some(manifest.created)), name, asker)?;
                }
                return Ok(Beginning::Cold);
            }
            None => manifest.container(config.annotations.container.as_deref())?,
        };
        let staged = pod.stage(name, &checkpoint, container)?;
        Ok(Beginning::Restored(pod, staged))
    }

    /// A container that had ended with 0, as init containers do, when the sandbox is made again and nothing of the pod has
    /// gone on since: it does not run beside those that still wait.
    fn of_ended(
        &self,
        (checkpoint, name): (&str, &str),
        asker: &str,
        config: &Config,
        consumed: &Consumed,
    ) -> Result<Option<HeldRestore>, FrontError> {
        if consumed.container(checkpoint, name) != Some(asker) {
            return Ok(None);
        }
        let Ok(found) = self.env.store.find(checkpoint) else {
            return Ok(None);
        };
        let manifest = &found.manifest;
        let had_ended = |it: &str| manifest.ended_with(it).is_some();
        let is_kept = manifest.ended_with(name) == Some(0)
            && !consumed.has_run(checkpoint, had_ended)
            && config.cri;
        if !is_kept {
            return Ok(None);
        }
        let rules = NodeConfig::read(&self.env.node_config)?;
        let annotations = &config.annotations;
        let rules = &rules;
        Asker { rules, annotations }.admit(manifest)?;
        let owner = annotations.pod_uid.clone().map(Owner::Pod);
        Ok(owner.map(|owner| HeldRestore::of_done(owner, checkpoint, name, asker)))
    }

    /// A sealed checkpoint that is not opened, for a container that it lacks.
    fn find_lacking(&self, wanted: &str, name: &str) -> Result<Checkpoint, StoreError> {
        let found = self.env.store.find(wanted)?;
        match found.manifest.containers.iter().any(|it| it.name == name) {
            true => Err(StoreError::Sealed {
                name: wanted.to_owned(),
            }),
            false => Ok(found),
        }
    }

    fn of_staged(
        &self,
        config: &Config,
        asker: &str,
        pod: PodDir,
        staged: Staged,
    ) -> Result<Beginning, FrontError> {
        let again = match staged.state()? {
            State::Staged => true,
            State::Held(other) if config.cri => {
                staged.reserve_for(asker)?;
                self.end_given_up(&staged, &other);
                true
            }
            State::Held(other) => {
                check_not_held(&staged, &Bundle::at(&other))?;
                true
            }
            State::Failed(_) => config.annotations.on_failure == OnFailure::Fail,
        };
        Ok(match again {
            true => Beginning::Restored(pod, staged),
            false => Beginning::Cold,
        })
    }

    /// The next attempt of a container that is held: kubelet has given the first one up, and
    /// containerd may have forgotten it (its shim made it after the call was cancelled).
    fn end_given_up(&self, staged: &Staged, bundle: &Path) {
        let Some((pid, start_time)) = staged.holder() else {
            return;
        };
        kill_if_same(pid, start_time);
        if let Some(id) = bundle.file_name().and_then(|id| id.to_str()) {
            self.delete_restored(id);
        }
    }
}

/// The code with which the container `name` of the pod had ended on the source, if it is one that ends so again, as soon as that
/// is known; the start `began` then. Whoever makes the pod starts nothing else before an init container has ended, and the
/// source need not stand still for it.
fn wait_for_ended(
    pod: &PodDir,
    id: &str,
    name: &str,
    began: Instant,
) -> Result<Option<u8>, FrontError> {
    loop {
        // Of a pod that is made by who receives it nobody says so: all is there before the first start.
        match (pod.not_running()?, pod.arrival()?) {
            (_, Some(Arrival::Arrived | Arrival::GivenUp)) => return Ok(None),
            (Some(all), _) => {
                let found = all.iter().find(|it| it.name == name);
                return Ok(found.and_then(NotRunning::ended_with));
            }
            (None, _) if began.elapsed() > ARRIVAL_PATIENCE => {
                return Err(FrontError::from(FitError::NotArrived { id: id.to_owned() }));
            }
            (None, _) => thread::sleep(LOOK_AGAIN),
        }
    }
}

/// Waits until all that comes with the migration of the pod is staged: whoever makes the containers does not know when
/// the source stands still. Where images are missing it is not waited for long: a kubelet pulls that of a container when it has
/// tried to start the one before.
fn wait_for_migration(pod: &PodDir, id: &str, began: Instant) -> Result<(), FrontError> {
    let _waits = pod.wait_for_arrival()?;
    let mut lacking = None;
    loop {
        let arrival = pod.arrival()?;
        let is_over = match arrival {
            Some(Arrival::LacksImages) => {
                let since: &Instant = lacking.get_or_insert_with(Instant::now);
                since.elapsed() > IMAGES_PATIENCE
            }
            _ => {
                lacking = None;
                began.elapsed() > ARRIVAL_PATIENCE
            }
        };
        match arrival {
            Some(Arrival::Arrived) => return Ok(()),
            Some(Arrival::GivenUp) => {
                return Err(FrontError::from(FitError::MigrationGivenUp {
                    id: id.to_owned(),
                }));
            }
            _ if is_over => {
                return Err(FrontError::from(FitError::NotArrived { id: id.to_owned() }));
            }
            Some(Arrival::LacksImages | Arrival::Coming) | None => thread::sleep(LOOK_AGAIN),
        }
    }
}

fn not_in_checkpoint(checkpoint: &str, name: &str) -> FrontError {
    FrontError::from(FitError::NotInCheckpoint {
        checkpoint: checkpoint.to_owned(),
        container: name.to_owned(),
    })
}

/// Whether the pod may have the container `name`, which the checkpoint lacks. A pod of whose containers the
/// checkpoint has none is not the one that was meant; which ones it has is seen as kubelet makes them, and
/// those that are refused now are made again later.
fn check_lacking(
    config: &Config,
    manifest: &Manifest,
    name: &str,
    consumed: &Consumed,
) -> Result<(), FrontError> {
    match config.annotations.cold_containers {
        ColdContainers::Start => Ok(()),
        ColdContainers::Refuse => Err(not_in_checkpoint(&manifest.name, name)),
        ColdContainers::BesideRestored => {
            let mut containers = manifest.containers.iter();
            let known = manifest.not_running.iter().any(|it| it.name == name);
            let taken = |name: &str| consumed.container(&manifest.name, name).is_some();
            if known || containers.any(|container| taken(&container.name)) {
                return Ok(());
            }
            let names: Vec<&str> = { manifest.containers.iter() }
                .map(|container| container.name.as_str())
                .collect();
            Err(FrontError::from(FitError::NoneRestored {
                checkpoint: manifest.name.clone(),
                container: name.to_owned(),
                present: names.join(", "),
            }))
        }
    }
}

/// A restore that another bundle holds is that one's until it is deleted; a bundle that is gone,
/// or whose held process is, was never started.
fn check_not_held(staged: &Staged, other: &Bundle) -> Result<(), FrontError> {
    let Ok(Some(marker)) = other.marker() else {
        return Ok(());
    };
    let alive = is_same(marker.pid, marker.start_time);
    if marker.phase == Phase::Held && alive {
        let path = staged.path().to_path_buf();
        return Err(SandboxError::Busy { path }.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_long_while_images_are_missing() {
        let dir = tempfile::tempdir().unwrap();
        let pod = PodDir::at(dir.path(), "sandbox").unwrap();
        let began = Instant::now();
        pod.set_arrival(Arrival::LacksImages).unwrap();
        let waited = wait_for_migration(&pod, "web", began);
        assert!(waited.unwrap_err().to_string().contains("waits"));
        assert!(began.elapsed() < ARRIVAL_PATIENCE / 2);
        pod.set_arrival(Arrival::Coming).unwrap();
        let waiting = {
            let pod = pod.clone();
            thread::spawn(move || wait_for_migration(&pod, "web", Instant::now()).is_ok())
        };
        thread::sleep(5 * LOOK_AGAIN);
        assert!(!waiting.is_finished());
        pod.set_arrival(Arrival::Arrived).unwrap();
        assert!(waiting.join().unwrap());
    }
}
