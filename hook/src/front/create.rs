//! `create`: a sandbox gets the hook, a staged container is restored, all others start cold.

use std::path::{Path, PathBuf};

use transship_checkpoint::annotations::{Mptcp, OnFailure, Role};
use transship_checkpoint::namespaces;
use transship_checkpoint::spec::{HookPoint, Spec};

use transship_path_error::During as _;
use transship_sandbox::consumed::Consumed;
use transship_sandbox::opened::remove_all_unused;
use transship_sandbox::{Staged, State};

use super::beginning::Beginning;
use super::bundle::{Bundle, Config};
use super::{FitError, Front, FrontError, Outcome};
use crate::argv::Arguments;
use crate::one_line;
use crate::restore_log::{self, LOG_DIR};

/// Sysctl of a network namespace; a new one begins with 1 wherever the kernel has it.
const MPTCP_SYSCTL: &str = "net.mptcp.enabled";
const MPTCP_ENABLED: &str = "/proc/sys/net/mptcp/enabled";

/// Makes sockets of MPTCP those of TCP in the sandbox's network: CRIU dumps no other
/// (checkpoint-restore/criu#2655), and servers in Go ask for MPTCP unless they are told not to. A network
/// that is the node's, and what the pod says itself, stay as they are.
fn switch_mptcp_off(spec: &mut Spec, kernel_has_it: bool) {
    let has_own = namespaces::has_own_network(spec);
    if kernel_has_it && has_own && spec.get("/linux/sysctl/net.mptcp.enabled").is_none() {
        spec.set_sysctl(MPTCP_SYSCTL, "0");
    }
}

impl Front<'_> {
    pub(super) fn create(&self, create: &Arguments) -> Result<Option<Outcome>, FrontError> {
        let bundle = Bundle::of(create);
        self.refuse_moved(&bundle)?;
        let Some(mut config) = bundle.our_config(&create.id)? else {
            return Ok(None);
        };
        if bundle.has_spec_elsewhere() {
            let id = create.id.clone();
            return Err(FitError::SpecElsewhere { id }.into());
        }
        bundle.remove_marker();
        if config.annotations.role == Role::Sandbox {
            if config.cri && config.annotations.mptcp == Mptcp::Off {
                let sysctl = Path::new(MPTCP_ENABLED);
                let is_there = sysctl.try_exists().during("look for", sysctl)?;
                switch_mptcp_off(&mut config.spec, is_there);
            }
            self.add_hooks(
                &mut config.spec,
                &[HookPoint::CreateRuntime, HookPoint::Poststop],
            )?;
            bundle.replace_config(&config.spec)?;
            return Ok(None);
        }
        if self.may_create_aside(create, &config)? {
            return self.create_aside(create, &bundle);
        }
        self.begin_as_the_sandbox(&create.id, &mut config, &bundle);
        let cold_start = config.annotations.on_failure == OnFailure::ColdStart;
        let found = self.find_fitting_beginning(&create.id, &config, &bundle);
        let outcome = match found {
            Ok((Beginning::Restored(pod, staged), log)) => {
                self.restore_held(create, &bundle, config, (&pod, &staged), log.as_deref())
            }
            Ok((Beginning::Done(restore, code), _)) => {
                self.create_done(create, &bundle, config, (restore, code))
            }
            Ok((Beginning::Cold, _)) => {
                self.remember_cold(&create.id, &config, &bundle)?;
                return self.create_cold(create, &bundle, config);
            }
            Err(error) if cold_start && !error.is_refusal() => {
                let checkpoint = config.annotations.restore.as_deref();
                let reason = one_line(&error);
                self.remember_cold(&create.id, &config, &bundle)?;
                drop(self.forget_restore(&create.id, &config));
                self.tell_cold_start(&create.id, checkpoint, &reason);
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

    /// With the log of a container that is restored.
    fn find_fitting_beginning(
        &self,
        id: &str,
        config: &Config,
        bundle: &Bundle,
    ) -> Result<(Beginning, Option<PathBuf>), FrontError> {
        let found = self.find_beginning(id, config, bundle)?;
        let log = match &found {
            Beginning::Restored(_, staged) => {
                let fit = self.check_fit(id, config, bundle, staged);
                fit.inspect_err(|error| tell_receiver(config, staged, error))?
            }
            _ => None,
        };
        Ok((found, log))
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

    /// It starts from its image: nobody waits for its memory any more, nor for its end of a connection.
    fn forget_restore(&self, id: &str, config: &Config) -> Result<(), FrontError> {
        let name = config.annotations.container.as_deref().unwrap_or(id);
        let pod = self.pod_of(id, config)?;
        let Some(staged) = pod.staged(name)? else {
            return Ok(());
        };
        // What another attempt works on is that one's.
        let Ok(_claim) = staged.claim() else {
            return Ok(());
        };
        let request = staged.request()?;
        let connections = { self.hold_pod_connections(config, &pod, &request) }.ok();
        staged.remove()?;
        drop(connections);
        if let Some(opened) = self.env.store.opened() {
            drop(remove_all_unused(&self.env.run_dir, opened));
        }
        Ok(pod.remove_if_empty()?)
    }

    /// One that was to be restored lives on without the checkpoint, and without each that comes later.
    fn remember_cold(&self, id: &str, config: &Config, bundle: &Bundle) -> Result<(), FrontError> {
        let annotations = &config.annotations;
        let asks_for_pod = annotations.restore_latest || annotations.restore_image.is_some();
        if annotations.restore.is_none() && !(config.cri && asks_for_pod) {
            return Ok(());
        }
        let asker = annotations.pod_container.as_deref().unwrap_or(id);
        let owner = self.owner(id, config, bundle);
        let mut consumed = Consumed::by(&self.env.consumed, &owner)?;
        let name = annotations.container.as_deref().unwrap_or(id);
        let has_had = { annotations.restore.as_deref().or(consumed.taken_from()) }
            .is_some_and(|checkpoint| consumed.container(checkpoint, name).is_some());
        match consumed.add_cold(asker) {
            // What it has had is on the disk, and a full one must not keep it from starting again.
            Err(_) if has_had => Ok(()),
            added => Ok(added?),
        }
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
}

/// Whoever receives the migration of the pod sees why what he has staged does not fit.
fn tell_receiver(config: &Config, staged: &Staged, error: &FrontError) {
    // What another attempt works on may come to run, and one that is for another container is still to come.
    let is_of_another = matches!(error, FrontError::Stage(_));
    if !config.annotations.receives || is_of_another {
        return;
    }
    if let Ok(_claim) = staged.claim()
        && staged.state().is_ok_and(|state| state == State::Staged)
    {
        drop(staged.set_state(&State::Failed(one_line(error))));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mptcp_is_off_in_a_network_of_its_own_unless_the_pod_says_otherwise() {
        let own = r#""namespaces":[{"type":"network","path":"/run/netns/x"}]"#;
        for (linux, kernel_has_it, value) in [
            (own.to_owned(), true, Some("0")),
            (own.to_owned(), false, None),
            (r#""namespaces":[{"type":"ipc"}]"#.to_owned(), true, None),
            (
                format!(r#"{own},"sysctl":{{"net.mptcp.enabled":"1"}}"#),
                true,
                Some("1"),
            ),
            (
                format!(r#"{own},"sysctl":{{"kernel.shm_rmid_forced":"1"}}"#),
                true,
                Some("0"),
            ),
        ] {
            let json = format!(r#"{{"linux":{{{linux}}}}}"#);
            let mut spec = Spec::parse(json.as_bytes()).unwrap();
            switch_mptcp_off(&mut spec, kernel_has_it);
            let found = spec.get("/linux/sysctl/net.mptcp.enabled");
            assert_eq!(found.and_then(|it| it.as_str()), value, "{linux}");
        }
    }
}
