//! Which living namespaces a container joins.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use transship_checkpoint::annotations::Role;
use transship_checkpoint::criu_images::ipc_sysctls::set_sysctls;
use transship_checkpoint::criu_images::ipcns::IpcObject;
use transship_checkpoint::criu_images::shm_mappings::Attachment;
use transship_checkpoint::criu_images::{mounts, utsns};
use transship_checkpoint::namespaces::{self, Namespace, Plan};
use transship_sandbox::{
    LiveIpc, OfCheckpoint, PodDir, live_ipc_sysctls, live_network_namespace, live_uts_names,
    paths_of_process,
};

use super::bundle::Config;
use super::{FitError, Front, FrontError};
use crate::descendants::tree;

/// What a restore does to the sandbox's namespaces, told when it has succeeded.
#[derive(Debug, Default)]
pub(super) struct NamespaceEdits {
    ipc: Option<(PathBuf, Vec<IpcObject>, LiveIpc)>,
    /// The checkpoint, and when it was taken.
    of: (String, Option<u64>),
    /// System V shared memory of earlier restores, for the held tasks to attach.
    pub(super) attachments: Vec<Attachment>,
}

impl Front<'_> {
    /// The directory of the sandbox that a container belongs to, or its own.
    pub(super) fn pod_of(&self, id: &str, config: &Config) -> Result<PodDir, FrontError> {
        let pod = match &config.annotations.role {
            Role::Member { sandbox } => sandbox,
            Role::Sandbox | Role::Alone => id,
        };
        Ok(PodDir::at(&self.env.run_dir, pod)?)
    }

    /// What to do about the namespaces of a container that is restored, or made anew in a sandbox
    /// that was named by our own annotation. `fresh`: the caller has just written the paths.
    pub(super) fn plan_namespaces(
        &self,
        id: &str,
        config: &Config,
        fresh: bool,
    ) -> Result<Plan, FrontError> {
        let joined = namespaces::joined(&config.spec);
        if joined.is_empty() {
            return Ok(Plan::default());
        }
        let missing = |path: &Path| std::fs::symlink_metadata(path).is_err();
        if let Role::Member { sandbox } = &config.annotations.role {
            let trusted = config.cri && fresh || !config.annotations.ours;
            if trusted && !joined.values().any(|path| missing(path)) {
                return Ok(Plan::default());
            }
            match self.sandbox_namespaces(sandbox)? {
                Some(paths) => return Ok(namespaces::join_sandbox(&joined, &paths)),
                // Of a sandbox that the CRI named long ago the user need not know.
                None if config.cri => {}
                None => {
                    return Err(FrontError::from(FitError::NoSandbox {
                        id: sandbox.clone(),
                    }));
                }
            }
        }
        let policy = config.annotations.missing_namespaces;
        let mut plan = namespaces::replace_missing(&joined, missing, policy)?;
        for namespace in plan.to_make().collect::<Vec<_>>() {
            let pod = PodDir::at(&self.env.run_dir, id)?;
            plan.made(namespace, live_network_namespace(&pod)?);
        }
        Ok(plan)
    }

    /// The namespaces of a living sandbox: its pins, else those of its first process.
    fn sandbox_namespaces(
        &self,
        sandbox: &str,
    ) -> Result<Option<BTreeMap<Namespace, PathBuf>>, FrontError> {
        let pins = PodDir::at(&self.env.run_dir, sandbox)?.pins();
        if !pins.is_empty() {
            return Ok(Some(pins));
        }
        let state = self
            .env
            .runtime
            .state(self.globals.root.as_deref(), sandbox)?;
        let alive = state.filter(|state| state.pid > 0 && state.status != "stopped");
        Ok(alive
            .map(|state| paths_of_process(state.pid))
            .filter(|paths| !paths.is_empty()))
    }

    /// Makes the images in `dir` fit the namespaces that the spec joins: the sandbox keeps its
    /// name and its limits, and its System V objects are made once.
    pub(super) fn fit_images(
        &self,
        dir: &Path,
        config: &Config,
        pod: &PodDir,
        checkpoint: &str,
    ) -> Result<NamespaceEdits, FrontError> {
        mounts::forget_removed(dir)?;
        let joined = namespaces::joined(&config.spec);
        let found = self.env.store.find(checkpoint);
        let mut edits = NamespaceEdits {
            of: (
                checkpoint.to_owned(),
                found.ok().map(|it| it.manifest.created),
            ),
            ..NamespaceEdits::default()
        };
        if let Some(uts) = joined.get(&Namespace::Uts) {
            utsns::set_names(dir, &live_uts_names(uts)?)?;
        }
        if let Some(ipc) = joined.get(&Namespace::Ipc) {
            set_sysctls(dir, &live_ipc_sysctls(ipc)?)?;
            let has_others = || self.has_others(config, ipc);
            let (new, attachments) =
                pod.remove_present_ipc(dir, ipc, edits.of_checkpoint(), &has_others)?;
            edits.ipc = Some((ipc.clone(), new, LiveIpc::of(ipc)?));
            edits.attachments = attachments;
        }
        Ok(edits)
    }
}

impl Front<'_> {
    /// Whether there is somebody in the IPC namespace of a sandbox besides its own container. Whom it has been left by does
    /// not ask for anything there any more.
    fn has_others(&self, config: &Config, namespace: &Path) -> bool {
        let Ok(wanted) = fs::metadata(namespace) else {
            return true;
        };
        let sandbox = match &config.annotations.role {
            Role::Member { sandbox } => {
                let root = self.globals.root.as_deref();
                self.env.runtime.state(root, sandbox).ok().flatten()
            }
            Role::Sandbox | Role::Alone => None,
        };
        let own = sandbox.map_or(Vec::new(), |state| tree(state.pid).unwrap_or_default());
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        { pids.filter(|pid| !own.contains(pid)) }.any(|pid| {
            let its = fs::metadata(format!("/proc/{pid}/ns/ipc"));
            its.is_ok_and(|its| (its.dev(), its.ino()) == (wanted.dev(), wanted.ino()))
        })
    }
}

impl NamespaceEdits {
    fn of_checkpoint(&self) -> OfCheckpoint<'_> {
        OfCheckpoint {
            name: &self.of.0,
            created: self.of.1,
        }
    }

    /// Remembers what is in the sandbox's namespaces now, and the first process of the container that has it.
    pub(super) fn record(&self, pod: &PodDir, holder: (i32, u64)) -> Result<(), FrontError> {
        if let Some((namespace, objects, _)) = &self.ipc {
            pod.record_ipc(namespace, self.of_checkpoint(), objects, holder)?;
        }
        Ok(())
    }

    /// Whether the restore makes what other containers share with this one, or needs what they have made.
    pub(super) fn concern_others(&self) -> bool {
        let makes = self.ipc.as_ref().is_some_and(|(_, new, _)| !new.is_empty());
        makes || !self.attachments.is_empty()
    }

    /// Takes away what a restore that failed has left in the sandbox's namespaces.
    pub(super) fn undo(&self) {
        if let Some((_, objects, live)) = &self.ipc {
            // The failure of the restore is what is told; what stays here makes the next attempt
            // fail, which says it.
            drop(live.remove_new(objects));
        }
    }
}
