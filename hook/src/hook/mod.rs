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

use std::io;
use std::path::Path;

use serde::Deserialize;
use std::collections::HashMap;
use transship_checkpoint::annotations::{AnnotationError, Annotations, Role};
use transship_checkpoint::manifest::ManifestError;
use transship_checkpoint::stage::{PodDir, StageError};
use transship_checkpoint::store::{Store, StoreError};

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
    Manifest(#[from] ManifestError),
    /// The sandbox's directory.
    #[error("cannot prepare the sandbox {id:?}")]
    Stage {
        /// The sandbox.
        id: String,
        /// Why.
        source: StageError,
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

/// Pins the namespaces of a sandbox and stages what is to be restored into it.
///
/// # Errors
/// See [`HookError`]; nothing is left then.
pub fn create_runtime(state: &HookState, run_dir: &Path, store: &Store) -> Result<(), HookError> {
    let annotations = Annotations::read(&state.id, Some(&state.annotations))?;
    if annotations.role != Role::Sandbox || state.status == "stopped" {
        return Ok(());
    }
    let stage_error = |source| HookError::Stage {
        id: state.id.clone(),
        source,
    };
    let pod = PodDir::at(run_dir, &state.id).map_err(stage_error)?;
    // What an earlier sandbox of this id left when the node lost it.
    pod.remove().map_err(stage_error)?;
    let prepare = || {
        pod.pin(state.pid).map_err(stage_error)?;
        let Some(name) = &annotations.restore else {
            return Ok(());
        };
        let checkpoint = store.open(name).map_err(|source| HookError::Store {
            id: state.id.clone(),
            source: Box::new(source),
        })?;
        let asker = annotations.kubernetes_namespace.as_deref();
        checkpoint.manifest.check_asker(asker)?;
        for container in &checkpoint.manifest.containers {
            pod.stage(&container.name, &checkpoint, container)
                .map_err(stage_error)?;
        }
        Ok(())
    };
    prepare().inspect_err(|_| drop(pod.remove()))
}

/// Removes what [`create_runtime`] made. It is no error when there is nothing.
///
/// # Errors
/// See [`HookError`].
pub fn poststop(state: &HookState, run_dir: &Path) -> Result<(), HookError> {
    PodDir::at(run_dir, &state.id)
        .and_then(|pod| pod.remove())
        .map_err(|source| HookError::Stage {
            id: state.id.clone(),
            source,
        })
}

#[cfg(test)]
mod tests;
