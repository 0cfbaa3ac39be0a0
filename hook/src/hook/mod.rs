//! The OCI hook: what happens when a sandbox comes up and when it goes.
//!
//! ```text
//! stdin: { "ociVersion", "id", "status": "creating" | "stopped", "pid", "bundle", "annotations" }
//! ```
//!
//! It runs in the runtime's namespaces, as its child; what it writes to stderr on failure is what
//! the runtime reports. On `createRuntime` the status is `creating`; `stopped` means that the
//! container is being restored, and that its namespaces are not there yet (runc's notification
//! `setup-namespaces` comes before CRIU joins them): the front pins those itself.

use std::collections::HashMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use transship_checkpoint::annotations::{AnnotationError, Annotations, OnFailure, Role};
use transship_checkpoint::store::{Checkpoint, DEFAULT_OPENED, Store, StoreError};
use transship_sandbox::admission::asker::{Asker, NotForAsker};
use transship_sandbox::admission::node_config::{NodeConfig, NodeConfigError};
use transship_sandbox::consumed::{Consumed, Owner};
use transship_sandbox::last_run::PodRun;
use transship_sandbox::opened::{InMemory, remove_all_unused};
use transship_sandbox::wanted_image::{WantedImage, WantedImageError};
use transship_sandbox::{PodDir, SandboxError};

use crate::descendants::kill_if_same;
use crate::one_line;
use crate::origin::{OriginError, require_origin};
use crate::restore_log;

/// Longest state that is read, in bytes: annotations are most of it, and a spec has no more.
const STATE_LIMIT: u64 = 16 << 20;

/// The state of the container that a runtime hands to its hooks.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct HookState {
    /// The container.
    pub id: String,
    /// See the head of this module.
    pub status: String,
    /// Its first process.
    #[serde(default)]
    pub pid: i32,
    /// Annotations of its spec.
    #[serde(default)]
    pub annotations: HashMap<String, String>,
}

impl HookState {
    /// Reads it, as it comes on stdin.
    ///
    /// # Errors
    /// It cannot be read, or is none.
    pub fn read(input: impl Read) -> Result<Self, HookError> {
        let mut json = Vec::new();
        let read = input.take(STATE_LIMIT).read_to_end(&mut json);
        read.map_err(HookError::Input)?;
        Ok(serde_json::from_slice(&json)?)
    }
}

/// Why the hook fails.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HookError {
    /// stdin.
    #[error("cannot read the container's state from stdin")]
    Input(#[source] io::Error),
    /// stdin is not what a runtime writes.
    #[error("the container's state on stdin is not one")]
    State(#[from] serde_json::Error),
    /// An annotation that means nothing.
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    /// The checkpoint is not for this pod.
    #[error(transparent)]
    NotForAsker(#[from] NotForAsker),
    /// The rules of this node.
    #[error(transparent)]
    NodeConfig(#[from] NodeConfigError),
    /// Nobody whom this node trusts has made the checkpoint.
    #[error(transparent)]
    Origin(#[from] OriginError),
    /// The checkpoint is in a registry.
    #[error(transparent)]
    WantedImage(#[from] WantedImageError),
    /// Somebody else has had the checkpoint.
    #[error(transparent)]
    Spent(SandboxError),
    /// The sandbox's directory.
    #[error("cannot prepare the sandbox {id:?}")]
    Stage {
        /// The sandbox.
        id: String,
        /// Why.
        source: SandboxError,
    },
    /// A sealed checkpoint.
    #[error("cannot restore into the sandbox {id:?}: {reason}")]
    Sealed {
        /// The sandbox.
        id: String,
        /// Why it cannot be opened.
        reason: String,
    },
    /// The checkpoint.
    #[error("cannot restore into the sandbox {id:?}")]
    Store {
        /// The sandbox.
        id: String,
        /// Why; in a box, because it is large beside the others.
        source: Box<StoreError>,
    },
}

impl HookError {
    /// Whether a pod may do without the restore: not when it asks for what is not its own.
    fn may_start_cold(&self) -> bool {
        match self {
            Self::NotForAsker(error) => !error.is_forbidden(),
            Self::WantedImage(error) => error.is_failure(),
            Self::Store { .. } | Self::Spent(_) | Self::Sealed { .. } | Self::Origin(_) => true,
            _ => false,
        }
    }
}

/// Where the hook finds things.
#[derive(Debug, Clone)]
pub struct Node {
    /// `/run/transship`.
    pub run_dir: PathBuf,
    /// The checkpoints of this node.
    pub store: Store,
    /// What has been consumed, by whom.
    pub consumed: PathBuf,
    /// When pods of a name have last begun to run.
    pub runs: PathBuf,
    /// What pods want from registries.
    pub images: PathBuf,
    /// The rules of this node.
    pub config: PathBuf,
    /// Where its checkpoints come from.
    pub origins: PathBuf,
    /// Where failed restores are told of.
    pub log_dir: PathBuf,
    /// The program `transship`, which has the keys of sealed checkpoints.
    pub tool: PathBuf,
}

/// Pins the namespaces of a sandbox and stages what is to be restored into it.
///
/// # Errors
/// See [`HookError`]; nothing is left then.
pub fn create_runtime(state: &HookState, node: &Node) -> Result<(), HookError> {
    let annotations = Annotations::read(&state.id, Some(&state.annotations))?;
    if annotations.role != Role::Sandbox || state.status == "stopped" {
        return Ok(());
    }
    let stage_error = |source| HookError::Stage {
        id: state.id.clone(),
        source,
    };
    let pod = PodDir::at(&node.run_dir, &state.id).map_err(stage_error)?;
    // What an earlier sandbox of this id left when the node lost it.
    pod.remove().map_err(stage_error)?;
    let begin_run = || begin_run(&annotations, node, &pod).map_err(stage_error);
    let staged = pod
        .pin(state.pid)
        .map_err(stage_error)
        .and_then(|()| stage_all(state, &annotations, node, &pod))
        .and_then(|()| begin_run());
    let Err(error) = staged else { return Ok(()) };
    let cold_start = annotations.on_failure == OnFailure::ColdStart && error.may_start_cold();
    let outcome = match cold_start {
        // Its containers find out for themselves.
        true => restore_log::Outcome::StartedCold,
        false => restore_log::Outcome::Failed,
    };
    let wants = annotations.restore.is_some()
        || annotations.restore_latest
        || annotations.restore_image.is_some();
    let is_passing = matches!(&error, HookError::WantedImage(error) if error.is_passing());
    if wants && !is_passing {
        // The error itself is told by the call that fails.
        let of_node = match &error {
            HookError::NotForAsker(error) => error.for_the_node(),
            _ => None,
        };
        let reason = match of_node {
            Some(of_node) => format!("{} ({of_node})", one_line(&error)),
            None => one_line(&error),
        };
        drop(restore_log::append(
            &node.log_dir,
            &state.id,
            outcome,
            &reason,
        ));
    }
    let ended = match cold_start {
        true => begin_run(),
        false => Err(error),
    };
    if ended.is_err() {
        drop(pod.remove());
    }
    ended
}

fn stage_all(
    state: &HookState,
    annotations: &Annotations,
    node: &Node,
    pod: &PodDir,
) -> Result<(), HookError> {
    let stage_error = |source| HookError::Stage {
        id: state.id.clone(),
        source,
    };
    let owner = annotations.pod_uid.clone().map(Owner::Pod);
    if let Some(Owner::Pod(uid)) = &owner {
        pod.set_uid(uid).map_err(stage_error)?;
    }
    let consumed = owner.map(|owner| Consumed::by(&node.consumed, &owner));
    let consumed = consumed.transpose().map_err(stage_error)?;
    let name = match &annotations.restore {
        Some(name) => name.clone(),
        None => match chosen(state, annotations, node, consumed.as_ref())? {
            Some(name) => name,
            None => return Ok(()),
        },
    };
    let name = name.as_str();
    if annotations.restore.is_none() {
        pod.set_checkpoint(name).map_err(stage_error)?;
    }
    let rules = &NodeConfig::read(&node.config)?;
    let asker = Asker { rules, annotations };
    let found = match node.store.find(name) {
        Ok(found) => found,
        // The pod has had its restore; the sandbox has been made again since the checkpoint was
        // removed. A container that has not run yet says what it lacks.
        Err(StoreError::NotFound { .. })
            if consumed.as_ref().is_some_and(|it| it.has_any_of(name)) =>
        {
            return Ok(());
        }
        // It has not arrived yet; whoever receives it stages it, and what is started before fails.
        Err(StoreError::NotFound { .. }) if annotations.receives => return Ok(()),
        Err(source) => {
            return Err(match asker.not_found(&node.store, name, &source) {
                Some(error) => error.into(),
                None => HookError::Store {
                    id: state.id.clone(),
                    source: Box::new(source),
                },
            });
        }
    };
    // First of all: who may not have it does not hear what has become of it.
    asker.admit(&found.manifest)?;
    if let Some(consumed) = &consumed {
        let created = found.manifest.created;
        let checked = consumed.check_not_spent(name, Some(created));
        checked.map_err(HookError::Spent)?;
    }
    let has_run = |container: &str| {
        let consumed = consumed.as_ref();
        consumed.is_some_and(|it| it.container(name, container).is_some())
    };
    let stage = |checkpoint: &Checkpoint| -> Result<(), HookError> {
        asker.admit(&checkpoint.manifest)?;
        let containers = checkpoint.manifest.containers.iter();
        let mut waiting = containers.filter(|it| !has_run(&it.name)).peekable();
        if waiting.peek().is_some() {
            require_origin(checkpoint, rules, &node.origins, Command::new(&node.tool))?;
        }
        waiting.try_for_each(|container| {
            let staged = pod.stage(&container.name, checkpoint, container);
            staged.map(drop).map_err(stage_error)
        })
    };
    match &found.sealed {
        None => stage(&found),
        Some(_) if found.manifest.containers.iter().all(|it| has_run(&it.name)) => Ok(()),
        Some(sealed) => {
            // From now on nobody removes it.
            let opened = node.store.opened().unwrap_or(Path::new(DEFAULT_OPENED));
            let memory = InMemory::of(opened, &sealed.opened_key()).map_err(stage_error)?;
            let staged = open_sealed(state, node, name).and_then(|checkpoint| stage(&checkpoint));
            let left = memory.leave(&node.run_dir).map_err(stage_error);
            staged.and(left)
        }
    }
}

/// A sealed checkpoint, opened with the key of this node.
fn open_sealed(state: &HookState, node: &Node, name: &str) -> Result<Checkpoint, HookError> {
    let failed = |reason: String| HookError::Sealed {
        id: state.id.clone(),
        reason,
    };
    let output = Command::new(&node.tool)
        .args(["open-sealed", name])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(format!("cannot run {}: {error}", node.tool.display())))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let reason = said.lines().next().unwrap_or("it cannot be opened");
        let reason = reason.trim_start_matches("transship: ");
        return Err(failed(reason.to_owned()));
    }
    node.store.open(name).map_err(|source| HookError::Store {
        id: state.id.clone(),
        source: Box::new(source),
    })
}

/// The checkpoint of a pod whose annotations do not name it: that in a registry, or the latest.
fn chosen(
    state: &HookState,
    annotations: &Annotations,
    node: &Node,
    consumed: Option<&Consumed>,
) -> Result<Option<String>, HookError> {
    let wants = annotations.restore_latest || annotations.restore_image.is_some();
    // What it was restored from is its own for ever, whatever was taken since, and whether it could still be had.
    if let Some(had) = consumed.and_then(Consumed::taken_from).filter(|_| wants) {
        return Ok(Some(had.to_owned()));
    }
    if let Some(reference) = &annotations.restore_image {
        let image = WantedImage::new(&node.images, reference)?;
        let rules = NodeConfig::read(&node.config)?;
        let asker = annotations.pod_uid.as_deref();
        return Ok(Some(image.checkpoint(&rules, &node.store, asker)?));
    }
    match annotations.restore_latest {
        false => Ok(None),
        true => latest_of(state, annotations, node),
    }
}

/// The checkpoint that a pod with `restore-latest` gets; without one it starts cold, and that is told.
fn latest_of(
    state: &HookState,
    annotations: &Annotations,
    node: &Node,
) -> Result<Option<String>, HookError> {
    let stage_error = |source| HookError::Stage {
        id: state.id.clone(),
        source,
    };
    let Some(run) = run_of(annotations) else {
        return Ok(None);
    };
    let PodRun {
        namespace, name, ..
    } = run;
    let since = run.since(&node.runs, &node.consumed, now());
    let since = since.map_err(stage_error)?;
    let found = run.latest(&node.store, &node.consumed, since);
    let mut found = found.map_err(stage_error)?;
    let mut lack = "none was taken since its last run, or it was consumed".to_owned();
    if let Some(Err(error)) = found.as_deref().map(|latest| check_latest(latest, node)) {
        (found, lack) = (None, one_line(&error));
    }
    if found.is_none() {
        let reason = format!("the pod {namespace}/{name} wants its latest checkpoint: {lack}");
        let cold = restore_log::Outcome::StartedCold;
        drop(restore_log::append(&node.log_dir, &state.id, cold, &reason));
    }
    Ok(found)
}

/// Whether this node restores the latest checkpoint; of one that is sealed that is seen when it is opened.
fn check_latest(name: &str, node: &Node) -> Result<(), HookError> {
    let rules = NodeConfig::read(&node.config)?;
    match node.store.find(name) {
        Ok(found) if found.sealed.is_none() => {
            let tool = Command::new(&node.tool);
            Ok(require_origin(&found, &rules, &node.origins, tool)?)
        }
        // Whoever stages it tells what is wrong with it.
        _ => Ok(()),
    }
}

/// The run of a pod with `restore-latest`; outside of the CRI nothing says which pod this is.
fn run_of(annotations: &Annotations) -> Option<PodRun<'_>> {
    Some(PodRun {
        namespace: annotations.kubernetes_namespace.as_deref()?,
        name: annotations.pod_name.as_deref()?,
        uid: annotations.pod_uid.as_deref()?,
    })
    .filter(|_| annotations.restore_latest)
}

/// Records that a pod with `restore-latest` begins to run, now that nothing here keeps its containers from it: of one whose
/// sandbox has failed, nothing has gone on since its checkpoint.
fn begin_run(annotations: &Annotations, node: &Node, pod: &PodDir) -> Result<(), SandboxError> {
    match run_of(annotations) {
        Some(run) => {
            let waits = pod.checkpoint().is_some();
            run.begin(&node.runs, &node.consumed, now(), waits)
        }
        None => Ok(()),
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

/// Removes what [`create_runtime`] made. It is no error when there is nothing.
///
/// # Errors
/// See [`HookError`].
pub fn poststop(state: &HookState, run_dir: &Path, consumed: &Path) -> Result<(), HookError> {
    PodDir::at(run_dir, &state.id)
        .and_then(|pod| {
            // Nobody starts them any more.
            for (pid, start_time) in pod.holders() {
                kill_if_same(pid, start_time);
            }
            pod.remove()
        })
        .and_then(|()| Consumed::forget(consumed, &Owner::Container(state.id.clone())))
        .and_then(|()| remove_all_unused(run_dir, &run_dir.join("opened")))
        .map_err(|source| HookError::Stage {
            id: state.id.clone(),
            source,
        })
}

#[cfg(test)]
mod tests;
