//! `delete ID`: takes away what a restore left, after the runtime has deleted the container.

use std::ffi::OsString;

use transship_sandbox::stage::PodDir;

use super::bundle::Phase;
use super::{Front, FrontError, Outcome};
use crate::runtime::exit_code;

impl Front<'_> {
    pub(super) fn delete(&self, id: &str, force: bool) -> Result<Option<Outcome>, FrontError> {
        let Some(bundle) = self.bundle_of(id) else {
            return Ok(None);
        };
        let Some(marker) = bundle.marker()? else {
            return Ok(None);
        };
        let mut args: Vec<OsString> = Vec::new();
        if marker.phase == Phase::Restoring {
            self.unmount_criu_root(id, &bundle);
        }
        if force || marker.phase != Phase::Running {
            // To its caller a held container is a created one, which may be deleted; the runtime
            // takes it for a running one, which may not.
            args.push("--force".into());
        }
        args.push(id.into());
        let args = self.with_globals("delete", args);
        let status = self.around.runtime.run(&self.around.own, &args)?;
        if status.success() {
            bundle.remove_marker();
            // What is staged stays: it says that the checkpoint is consumed, and the next attempt
            // starts cold. It goes away with the sandbox.
            if let Some(pod) = marker.own_pod {
                let pod = PodDir::at(&self.around.run_dir, &pod)?;
                pod.unpin()?;
                pod.remove_if_empty()?;
            }
        }
        Ok(Some(Outcome::Exit(exit_code(status))))
    }
}
