//! `create`: a sandbox gets the hook, a staged container is restored, all others start cold.

use std::path::Path;

use transship_checkpoint::annotations::{ColdContainers, OnFailure, Role};
use transship_checkpoint::namespaces;
use transship_checkpoint::spec::{HookPoint, Spec};
use transship_sandbox::admission::asker::Asker;
use transship_sandbox::admission::node_config::NodeConfig;
use transship_sandbox::consumed::Consumed;
use transship_sandbox::{PodDir, SandboxError, Staged, State};

use super::bundle::{Bundle, Config, Phase};
use super::held::start_time;
use super::{FitError, Front, FrontError, Outcome};
use crate::argv::Arguments;
use crate::descendants::kill_if_same;
use crate::one_line;
use crate::restore_log::{self, LOG_DIR};

impl Front<'_> {
    pub(super) fn create(&self, create: &Arguments) -> Result<Option<Outcome>, FrontError> {
        let bundle = Bundle::of(create);
        let Some(mut config) = bundle.our_config(&create.id)? else {
            return Ok(None);
        };
        bundle.remove_marker();
        if config.annotations.role == Role::Sandbox {
            self.add_hooks(
                &mut config.spec,
                &[HookPoint::CreateRuntime, HookPoint::Poststop],
            )?;
            bundle.replace_config(&config.spec)?;
            return Ok(None);
        }
        let cold_start = config.annotations.on_failure == OnFailure::ColdStart;
        let found = self.find_fitting_restore(&create.id, &config, &bundle);
        let outcome = match found {
            Ok(Some((pod, staged))) => self.restore_held(create, &bundle, config, &pod, &staged),
            Ok(None) => return self.create_cold(create, &bundle, config),
            Err(error) if cold_start && !error.is_refusal() => {
                self.tell_cold_start(&create.id, &one_line(&error));
                return self.create_cold(create, &bundle, config);
            }
            Err(error) => Err(error),
        };
        outcome.inspect_err(|error| {
            // The error itself is told by the call that fails.
            let failed = restore_log::Outcome::Failed;
            let reason = one_line(error);
            drop(restore_log::append(
                Path::new(LOG_DIR),
                &create.id,
                failed,
                &reason,
            ));
        })
    }

    fn find_fitting_restore(
        &self,
        id: &str,
        config: &Config,
        bundle: &Bundle,
    ) -> Result<Option<(PodDir, Staged)>, FrontError> {
        let found = self.find_restore(id, config, bundle)?;
        if let Some((_, staged)) = &found {
            self.check_fit(id, config, bundle, staged)?;
        }
        Ok(found)
    }

    pub(super) fn add_hooks(
        &self,
        spec: &mut Spec,
        points: &[HookPoint],
    ) -> Result<(), FrontError> {
        let hook = &self.env.hook;
        let path = hook.to_str().filter(|_| hook.is_file());
        let path = path.ok_or_else(|| FrontError::NoHook { path: hook.clone() })?;
        for point in points {
            spec.add_hook(*point, path, &["transship-hook", point.key()]);
        }
        Ok(())
    }

    /// A container that starts from its image: only the namespaces of a sandbox that the user
    /// named are brought up to date.
    pub(super) fn create_cold(
        &self,
        create: &Arguments,
        bundle: &Bundle,
        mut config: Config,
    ) -> Result<Option<Outcome>, FrontError> {
        if matches!(config.annotations.role, Role::Member { .. }) && !config.cri {
            let plan = self.plan_namespaces(&create.id, &config, true)?;
            if !namespaces::apply(&mut config.spec, &plan).is_empty() {
                bundle.replace_config(&config.spec)?;
            }
        }
        if config.criu_config.is_some() {
            bundle.replace_config(&config.spec)?;
        }
        Ok(None)
    }

    /// What to restore for this container, staged now unless the sandbox's hook has done it.
    fn find_restore(
        &self,
        id: &str,
        config: &Config,
        bundle: &Bundle,
    ) -> Result<Option<(PodDir, Staged)>, FrontError> {
        let wanted = config.annotations.restore.as_deref();
        let name = config.annotations.container.as_deref().unwrap_or(id);
        let pod = self.pod_of(id, config)?;
        let owner = self.owner(id, config, bundle);
        let mut consumed = Consumed::by(&self.env.consumed, &owner)?;
        let asker = config.annotations.pod_container.as_deref().unwrap_or(id);
        let staged = pod.staged(name)?;
        let named = match (wanted, &staged) {
            (Some(wanted), _) => Some(wanted.to_owned()),
            (None, Some(staged)) => Some(staged.request()?.checkpoint),
            (None, None) => None,
        };
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
            return Ok(None);
        }
        if let Some(staged) = staged
            && wanted.is_none_or(|wanted| staged.request().is_ok_and(|it| it.checkpoint == wanted))
        {
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
            return Ok(again.then_some((pod, staged)));
        }
        let Some(wanted) = wanted else {
            return Ok(None);
        };
        let checkpoint = self.env.store.open(wanted)?;
        let manifest = &checkpoint.manifest;
        let pod_asks = Asker {
            rules: &NodeConfig::read(&self.env.node_config)?,
            annotations: &config.annotations,
        };
        pod_asks.admit(manifest)?;
        let named = manifest
            .containers
            .iter()
            .find(|container| container.name == name);
        let container = match (named, &config.annotations.container) {
            (Some(container), _) => container,
            // The pod has a container that the checkpoint does not have: it starts cold, also when
            // the checkpoint is gone.
            (None, Some(_)) if config.cri => {
                let missing = FrontError::from(FitError::NotInCheckpoint {
                    checkpoint: wanted.to_owned(),
                    container: name.to_owned(),
                });
                if config.annotations.cold_containers == ColdContainers::Refuse {
                    return Err(missing);
                }
                self.tell_cold_start(id, &missing.to_string());
                consumed.add_container(wanted, name, asker)?;
                return Ok(None);
            }
            (None, Some(name)) => manifest.container(Some(name))?,
            (None, None) => manifest.container(None)?,
        };
        let staged = pod.stage(name, &checkpoint, container)?;
        Ok(Some((pod, staged)))
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

/// A restore that another bundle holds is that one's until it is deleted; a bundle that is gone,
/// or whose held process is, was never started.
fn check_not_held(staged: &Staged, other: &Bundle) -> Result<(), FrontError> {
    let Ok(Some(marker)) = other.marker() else {
        return Ok(());
    };
    let alive = start_time(marker.pid).ok() == Some(marker.start_time);
    if marker.phase == Phase::Held && alive {
        let path = staged.path().to_path_buf();
        return Err(SandboxError::Busy { path }.into());
    }
    Ok(())
}
