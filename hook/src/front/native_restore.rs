//! `restore`: containerd's own way (`ctr containers restore --live`), repaired.
//!
//! It hands over the spec of the dump word for word, with the namespace paths of a sandbox that is
//! long gone, and has no start: what is restored is held until it has been looked at, and no longer.

use std::path::{Path, PathBuf};

use transship_checkpoint::annotations::Role;
use transship_checkpoint::criu_images::tasks;
use transship_checkpoint::criu_options::CriuOptions;
use transship_checkpoint::namespaces::{self, Namespace};
use transship_checkpoint::spec::HookPoint;
use transship_sandbox::admission::Admission;
use transship_sandbox::admission::node_config::NodeConfig;
use transship_sandbox::{LinkedImages, PodDir};

use transship_path_error::During as _;

use super::admission::{admit, take_oom_score};
use super::bundle::{Bundle, Config, Marker, Phase};
use super::criu_config::CriuConfig;
use super::held_restore::read_pid;
use super::{FitError, Front, FrontError, Outcome, RestoreError, held, open_files};
use crate::argv::Arguments;
use crate::hold_script;
use crate::start_time::start_time;

/// Where runc looks for images without `--image-path`.
const DEFAULT_IMAGES: &str = "checkpoint";
/// Where it writes the first process of a restore, unless it is told.
const PID_FILE: &str = "transship.pid";

impl Front<'_> {
    /// What containerd restores by itself is signed by nobody.
    fn check_signature_of(&self, id: &str) -> Result<(), FrontError> {
        let native = NodeConfig::read(&self.env.node_config)?.check_native();
        Ok(native.map_err(|source| RestoreError::NativeUnsigned {
            id: id.to_owned(),
            source,
        })?)
    }

    pub(super) fn native_restore(
        &self,
        restore: &Arguments,
    ) -> Result<Option<Outcome>, FrontError> {
        let bundle = Bundle::of(restore);
        // Without these it is nobody's way but that of root at a terminal.
        let is_by_hand = !is_detached(restore) || restore.value("pid-file").is_none();
        if !is_by_hand {
            self.check_signature_of(&restore.id)?;
        }
        let Some(mut config) = bundle.any_config(&restore.id)? else {
            // containerd takes the spec from the checkpoint, word for word, and Go reads texts that are none here.
            return match is_by_hand {
                true => Ok(None),
                false => Err(RestoreError::NoSpec {
                    id: restore.id.clone(),
                }
                .into()),
            };
        };
        let images = restore
            .value("image-path")
            .map_or(PathBuf::from(DEFAULT_IMAGES), PathBuf::from);
        if std::fs::symlink_metadata(&images).is_err() {
            // The runtime says what is missing.
            return Ok(None);
        }
        let admission = admit_native(&restore.id, &images, &config, &bundle)?;
        let plan = self.plan_namespaces(&restore.id, &config, false)?;
        let imposes = admission.has_edits() || admission.lsm_profile.is_some();
        let as_it_is = !imposes && config.criu_config.is_none();
        if is_by_hand && plan.is_empty() && !config.annotations.ours && as_it_is {
            return Ok(None);
        }
        if is_by_hand {
            self.check_signature_of(&restore.id)?;
        }
        if !is_detached(restore) {
            let id = restore.id.clone();
            return Err(RestoreError::InForeground { id }.into());
        }
        let restore = &match restore.value("pid-file") {
            Some(_) => restore.clone(),
            None => restore.clone().with("pid-file", bundle.path(PID_FILE)),
        };
        let pod = self.pod_of(&restore.id, &config)?;
        let is_known = pod.path().symlink_metadata().is_ok();
        let made = plan.has_made();
        let restored = self
            .restore_repaired(restore, &bundle, &mut config, &plan, &pod)
            .inspect_err(|_| {
                // The error is what failed first; what cannot be removed is in /run.
                if made {
                    drop(pod.unpin());
                }
                drop(pod.remove_if_empty());
                bundle.remove_marker();
            })?;
        if !is_known {
            // A sandbox that is not ours has nobody who would remove what the restore alone has needed.
            drop(pod.remove_if_empty());
        }
        Ok(Some(restored))
    }

    fn restore_repaired(
        &self,
        restore: &Arguments,
        bundle: &Bundle,
        config: &mut Config,
        plan: &namespaces::Plan,
        pod: &PodDir,
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
        let images = LinkedImages::alone(&from)?;
        // Nothing says of which checkpoint they are.
        let edits = self.fit_images(images.path(), config, pod, "")?;
        let admission = admit_native(&restore.id, images.path(), config, bundle)?;
        admission.apply(images.path())?;
        // containerd gives no option of the dump to its restore.
        let mut criu = config.annotations.criu.over(CriuOptions::default());
        if config.cri {
            NodeConfig::read(&self.env.node_config)?.check_options(&criu)?;
        }
        if admission.lsm_profile.is_some() {
            criu.lsm_profile = admission.lsm_profile;
        }
        let work = restore
            .value("work-path")
            .map_or(PathBuf::from("."), PathBuf::from);
        let mut lines = self.cgroup_lines(&restore.id, &config.spec)?;
        lines.push(hold_script::prepare(&work).during("prepare", &work)??);
        let criu_config = CriuConfig::write(bundle, &mut config.spec, &criu, &lines)?;
        bundle.replace_config(&config.spec)?;
        self.remove_aborted_restore(&restore.id, bundle);
        let restoring = Marker::restoring(plan.has_made().then(|| restore.id.clone()), None);
        bundle.write_marker(&restoring)?;

        let fitted = restore
            .clone()
            .with("image-path", images.path())
            .with_flags(criu.restore_flags());
        take_oom_score(&config.spec)?;
        self.run_restore(fitted, bundle, config, &work, Some(criu_config.path()))
            .and_then(|done| {
                done.map_err(|reason| {
                    FrontError::from(RestoreError::NativeRestore {
                        id: restore.id.clone(),
                        reason,
                    })
                })
            })
            .inspect_err(|_| edits.undo())?;
        let finish = || {
            let pid = read_pid(restore)?;
            let hold = held::wait_until_held(pid).map_err(|source| {
                let id = restore.id.clone();
                FrontError::from(RestoreError::NotHeld { id, source })
            })?;
            open_files::check(&restore.id, pid, &config.spec)?;
            let proc = format!("/proc/{pid}");
            self.take_into_cgroup(&restore.id, &config.spec, pid)
                .during("move into the container's cgroup", &proc)?;
            let started = start_time(pid).unwrap_or_default();
            bundle.write_marker(&Marker {
                phase: Phase::Running,
                pid,
                start_time: started,
                ..restoring
            })?;
            if sandbox {
                pod.pin(pid)?;
            }
            criu_config.give_back()?;
            edits.record(pod, (pid, started))?;
            let stopped = tasks::stopped(images.path())?;
            let released = held::release(pid, &hold, &stopped);
            Ok::<(), FrontError>(released.during("let go the tasks of", &proc)?)
        };
        finish().inspect_err(|_| {
            self.delete_restored(&restore.id);
            edits.undo();
        })?;
        Ok(Outcome::Exit(0))
    }
}

/// Whether the runtime is done when the container has been restored. In the foreground nothing can be held.
fn is_detached(restore: &Arguments) -> bool {
    restore.switch("detach") || restore.switch("d")
}

fn admit_native(
    id: &str,
    images: &Path,
    config: &Config,
    bundle: &Bundle,
) -> Result<Admission, FrontError> {
    // containerd gives no option of the dump to its restore.
    let criu = config.annotations.criu.over(CriuOptions::default());
    admit(images, None, &config.spec, bundle, &criu).map_err(|source| {
        FrontError::from(FitError::NotAdmitted {
            what: format!("{id:?}"),
            source,
        })
    })
}
