//! What a pod is restored from was said when its sandbox was made.
//!
//! ```text
//!  <state>/io.containerd.runtime.v2.task/k8s.io/
//!     <sandbox id>/config.json      annotations of the pod when its sandbox was made
//!     <id>/config.json              those that it has now, as kubelet hands them on
//! ```
//!
//! An annotation that is edited meanwhile would bring back the memory of a checkpoint, and empty the emptyDirs for its
//! files, beside containers of the pod that have gone on. So it counts when the sandbox is made anew. Only a pod that has
//! no annotation of ours any more is none of ours, and its containers start cold.

use transship_checkpoint::annotations::Role;
use transship_checkpoint::manifest::check_name;

use super::Front;
use super::bundle::{Bundle, Config};

impl Front<'_> {
    /// Puts what the sandbox of a container of the CRI was told in the place of what its pod asks for now, and tells
    /// where the container starts cold by that. A sandbox whose spec is not found was told the same.
    pub(super) fn begin_as_the_sandbox(&self, id: &str, config: &mut Config, bundle: &Bundle) {
        let Some(told) = config_of_sandbox(config, bundle) else {
            return;
        };
        let (now, told) = (&mut config.annotations, told.annotations);
        let is_same = now.restore == told.restore
            && now.receives == told.receives
            && now.restore_latest == told.restore_latest
            && now.restore_image == told.restore_image;
        if is_same {
            return;
        }
        let asks_at_all =
            told.restore.is_some() || told.restore_latest || told.restore_image.is_some();
        let late = now.restore.take();
        let asks_late = late.is_some() || now.restore_latest || now.restore_image.is_some();
        now.restore = told.restore;
        now.receives = told.receives;
        now.restore_latest = told.restore_latest;
        now.restore_image = told.restore_image;
        if asks_late && !asks_at_all {
            let reason = "its pod ran already when it was annotated: that counts when its sandbox is made anew";
            self.tell_cold_start(id, late.as_deref(), reason);
        }
    }
}

fn config_of_sandbox(config: &Config, bundle: &Bundle) -> Option<Config> {
    let Role::Member { sandbox } = &config.annotations.role else {
        return None;
    };
    if !config.cri {
        return None;
    }
    check_name("the sandbox's id", sandbox).ok()?;
    let own = std::path::absolute(bundle.dir()).ok()?;
    let sandbox_bundle = Bundle::at(&own.with_file_name(sandbox));
    let told = sandbox_bundle.any_config(sandbox).ok().flatten()?;
    (told.cri && told.annotations.role == Role::Sandbox).then_some(told)
}
