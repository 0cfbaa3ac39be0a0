//! `restore`: containerd's own way (`ctr containers restore --live`), repaired.
//!
//! It hands over the spec of the dump word for word, with the namespace paths of a sandbox that is
//! long gone, and starts what it restores at once: there is nothing to hold.

use std::fs;
use std::path::{Path, PathBuf};

use transship_checkpoint::annotations::Role;
use transship_checkpoint::namespaces::{self, Namespace};
use transship_checkpoint::spec::HookPoint;
use transship_checkpoint::stage::{LinkedImages, PodDir};

use super::bundle::{Bundle, Config, Marker};
use super::{Front, FrontContext, FrontError, Outcome, held, reason};
use crate::argv::Arguments;
use crate::runtime::exit_code;

/// Where runc looks for images without `--image-path`.
const DEFAULT_IMAGES: &str = "checkpoint";

impl Front<'_> {
    pub(super) fn native_restore(
        &self,
        restore: &Arguments,
    ) -> Result<Option<Outcome>, FrontError> {
        let bundle = Bundle::of(restore);
        let Some(mut config) = bundle.any_config(&restore.id)? else {
            return Ok(None);
        };
        let plan = self.plan_namespaces(&restore.id, &config, false)?;
        if plan.is_empty() && !config.annotations.ours {
            return Ok(None);
        }
        let pod = self.pod_of(&restore.id, &config)?;
        let own_pod = plan.has_made().then(|| restore.id.clone());
        let result = self.restore_repaired(restore, &bundle, &mut config, &plan, &pod, own_pod);
        if !matches!(result, Ok(Outcome::Exit(0))) {
            drop(pod.remove_if_empty());
        }
        result.map(Some)
    }

    fn restore_repaired(
        &self,
        restore: &Arguments,
        bundle: &Bundle,
        config: &mut Config,
        plan: &namespaces::Plan,
        pod: &PodDir,
        own_pod: Option<String>,
    ) -> Result<Outcome, FrontError> {
        namespaces::apply(&mut config.spec, plan);
        let sandbox = config.annotations.role == Role::Sandbox;
        if sandbox {
            self.add_hooks(&mut config.spec, &[HookPoint::Poststop])?;
        }
        // Restores into one IPC namespace wait for each other: its objects are made once.
        let joins_ipc = namespaces::joined(&config.spec).contains_key(&Namespace::Ipc);
        let _lock = joins_ipc.then(|| pod.lock()).transpose()?;
        let from = restore
            .value("image-path")
            .map_or(PathBuf::from(DEFAULT_IMAGES), PathBuf::from);
        let images = LinkedImages::of(&from)?;
        let joining = self.fit_images(images.path(), config, pod)?;
        bundle.replace_config(&config.spec)?;
        bundle.remove_marker();

        let log = self.globals.log.as_deref();
        let log_start = log
            .and_then(|log| fs::metadata(log).ok())
            .map_or(0, |meta| meta.len());
        let args = restore.clone().with("image-path", images.path()).to_args();
        let args = self.with_globals("restore", args);
        let status = self.around.runtime.run(&self.around.own, &args)?;
        if !status.success() {
            let work = restore
                .value("work-path")
                .map_or(PathBuf::from("."), PathBuf::from);
            let reason = reason::of_restore(&work, log, log_start, &reason::kept_log(&restore.id));
            return Err(FrontError::NativeRestore {
                id: restore.id.clone(),
                reason,
            });
        }
        if let Some(path) = restore.value("pid-file").map(Path::new) {
            let pid = fs::read_to_string(path).during("read", path)?;
            let pid: i32 = pid
                .trim()
                .parse()
                .map_err(std::io::Error::other)
                .during("read", path)?;
            let start_time = held::start_time(pid).unwrap_or_default();
            bundle.write_marker(&Marker {
                own_pod,
                ..Marker::new(false, pid, start_time)
            })?;
            if sandbox {
                pod.pin(pid)?;
            }
        }
        joining.record(pod)?;
        Ok(Outcome::Exit(exit_code(status)))
    }
}
