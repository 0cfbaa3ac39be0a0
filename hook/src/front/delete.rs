//! `delete ID`: takes away what a restore left, after the runtime has deleted the container.

use std::ffi::OsString;
use std::fs::File;

use transship_sandbox::forgotten_bundle::kill_who_works_in;
use transship_sandbox::{PodDir, State};

use super::bundle::{Bundle, Phase};
use super::{Front, FrontError, Outcome, create_aside};
use crate::killed_restore::remove_roots_of_mounts;
use crate::own_networks;
use crate::restore_guard::{self, END_PATIENCE};
use crate::runtime::exit_code;

impl Front<'_> {
    pub(super) fn delete(&self, id: &str, force: bool) -> Result<Option<Outcome>, FrontError> {
        let Some(bundle) = self.bundle_of(id) else {
            if force {
                self.kill_frozen(id);
            }
            return Ok(None);
        };
        create_aside::end(&bundle.path("work"));
        let mut marker = bundle.marker()?;
        if let Some(marker) = marker.as_mut().filter(|it| it.stands_still()) {
            marker.phase = Phase::Held;
        }
        if force {
            self.kill_frozen(id);
        }
        let Some(marker) = marker else {
            // Whatever keeps this from being removed, the container is to be deleted.
            drop(self.forget_staged(id, &bundle));
            return Ok(None);
        };
        let mut args: Vec<OsString> = Vec::new();
        if marker.phase == Phase::Restoring {
            // What restores has been killed, or is being killed by its guard.
            let work = bundle.path("work");
            if let Ok(dir) = File::open(&work).and_then(|dir| Ok((dir.metadata()?, dir))) {
                drop(restore_guard::wait_for_end(dir.1, END_PATIENCE));
                // The guard may have been killed or stopped, too.
                kill_who_works_in(&dir.0, None);
            }
            self.unmount_rest(id, &bundle);
            remove_roots_of_mounts(&work);
        }
        if matches!(
            marker.phase,
            Phase::Restoring | Phase::Held | Phase::Awaiting
        ) {
            self.kill_held(id);
        }
        if force || marker.phase != Phase::Running {
            // To its caller a held container is a created one, which may be deleted; the runtime
            // takes it for a running one, which may not.
            args.push("--force".into());
        }
        args.push(id.into());
        let args = self.with_globals("delete", args);
        let status = self.env.runtime.run(&self.env.own, &args)?;
        if status.success() {
            bundle.remove_marker();
            own_networks::remove(&bundle.path("work"));
            if let Some(pod) = marker.own_pod {
                let pod = PodDir::at(&self.env.run_dir, &pod)?;
                pod.unpin()?;
                pod.remove_if_empty()?;
            }
            if let Some(restore) = marker.restore.filter(|_| marker.phase != Phase::Running) {
                // The container is deleted whatever this does; a restore that is still held by this
                // bundle is known for what it is by the next attempt.
                drop(self.give_back(&restore, &bundle));
            }
        }
        Ok(Some(Outcome::Exit(exit_code(status))))
    }

    /// Removes what a front has staged that was killed before it wrote its marker. What the sandbox's hook has staged
    /// waits for the next attempt.
    fn forget_staged(&self, id: &str, bundle: &Bundle) -> Result<(), FrontError> {
        let Some(config) = bundle.our_config(id)? else {
            return Ok(());
        };
        let annotations = &config.annotations;
        if annotations.restore.is_none() || config.cri {
            return Ok(());
        }
        let pod = self.pod_of(id, &config)?;
        let name = annotations.container.as_deref().unwrap_or(id);
        if let Some(staged) = pod.staged(name)?
            && staged.state()? == State::Staged
            && staged.claim().is_ok()
        {
            staged.remove()?;
        }
        Ok(pod.remove_if_empty()?)
    }
}
