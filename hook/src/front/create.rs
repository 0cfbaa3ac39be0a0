//! `create`: a sandbox gets the hook, a staged container is restored, all others start cold.

use std::path::Path;

use transship_checkpoint::annotations::{OnFailure, Role};
use transship_checkpoint::namespaces;
use transship_checkpoint::spec::{HookPoint, Spec};
use transship_sandbox::admission::node_config::NodeConfig;
use transship_sandbox::stage::{PodDir, Staged, State, is_consumed_by};

use super::bundle::{Bundle, Config};
use super::{Front, FrontError, Outcome};
use crate::argv::Arguments;
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
            self.check_fit(id, config, staged)?;
        }
        Ok(found)
    }

    pub(super) fn add_hooks(
        &self,
        spec: &mut Spec,
        points: &[HookPoint],
    ) -> Result<(), FrontError> {
        let hook = &self.around.hook;
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
        if let (Some(wanted), Some(upperdir)) = (wanted, bundle.layer())
            && is_consumed_by(&upperdir, wanted)?
        {
            return Ok(None);
        }
        if let Some(wanted) = wanted
            && config.cri
            && self.has_consumed(config, wanted, name)?
        {
            // The sandbox has been made again; the container's life has gone on since. Or another
            // container of the pod has it.
            if let (Some(staged), Some(asker)) =
                (pod.staged(name)?, &config.annotations.pod_container)
                && staged.state()? == State::Restored
            {
                staged.reserve_for(asker)?;
            }
            return Ok(None);
        }
        if let Some(staged) = pod.staged(name)?
            && wanted.is_none_or(|wanted| staged.request().is_ok_and(|it| it.checkpoint == wanted))
        {
            let again = match staged.state()? {
                State::Staged => true,
                // The next attempt starts cold.
                State::Restored => {
                    if let Some(name) = &config.annotations.pod_container {
                        staged.reserve_for(name)?;
                    }
                    false
                }
                State::Failed(_) => config.annotations.on_failure == OnFailure::Fail,
            };
            return Ok(again.then_some((pod, staged)));
        }
        let Some(wanted) = wanted else {
            return Ok(None);
        };
        let checkpoint = self.around.store.open(wanted)?;
        let manifest = &checkpoint.manifest;
        let asker = config.annotations.kubernetes_namespace.as_deref();
        NodeConfig::read(&self.around.node_config)?.check_namespace(manifest, asker)?;
        let named = manifest
            .containers
            .iter()
            .find(|container| container.name == name);
        let container = match (named, &config.annotations.container) {
            (Some(container), _) => container,
            // The pod has a container that the checkpoint does not have: it starts cold.
            (None, Some(_)) if config.cri => return Ok(None),
            (None, Some(name)) => manifest.container(Some(name))?,
            (None, None) => manifest.container(None)?,
        };
        let staged = pod.stage(name, &checkpoint, container)?;
        Ok(Some((pod, staged)))
    }
}
