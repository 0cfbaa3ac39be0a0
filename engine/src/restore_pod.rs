//! A pod of the CRI made of a checkpoint, as kubelet would make it.
//!
//! ```text
//!  path --> a checkpoint of this node's store (copied into it when it lies elsewhere)
//!  RunPodSandbox (annotation dev.transship/restore) --> CreateContainer, StartContainer of each
//!  failure: the sandbox is stopped and removed again
//! ```

use std::collections::HashMap;
use std::path::PathBuf;

use k8s_cri::v1::PodSandboxConfig;
use transship_checkpoint::annotations::{PREFIX, RESTORE};
use transship_checkpoint::criu_options::CriuOverrides;
use transship_checkpoint::store::Store;
use transship_containerd::Containerd;
use transship_proto::node_api::RestorePodRequest;

use crate::cri_pods::CriPods;
use crate::error::{Error, Result};
use crate::origin::Origins;

mod adopt;

use adopt::adopt;

/// CRIU's options as a request names them.
///
/// # Errors
/// One that means nothing.
pub fn overrides(options: &HashMap<String, String>) -> Result<CriuOverrides> {
    let mut criu = CriuOverrides::default();
    for (name, value) in options {
        criu.set(name, value)
            .map_err(|error| Error::refused(format!("the option {name} is {value:?}; {error}")))?;
    }
    Ok(criu)
}

/// Makes the pod and gives the id of its sandbox.
///
/// # Errors
/// Nothing of it is left then.
pub async fn restore_pod(
    node: &Containerd,
    store: &Store,
    request: RestorePodRequest,
) -> Result<String> {
    overrides(&request.options)?;
    let mut config = request
        .config
        .clone()
        .ok_or_else(|| Error::refused("the request has no config of a sandbox"))?;
    let path = PathBuf::from(&request.path);
    let store = store.clone();
    let adopted = tokio::task::spawn_blocking({
        let store = store.clone();
        move || adopt(&store, &path, Origins::of_node())
    })
    .await??;
    config
        .annotations
        .insert(RESTORE.to_owned(), adopted.name.clone());
    for (name, value) in &request.options {
        config
            .annotations
            .insert(format!("{PREFIX}{name}"), value.clone());
    }
    let made = make(CriPods::of(node), config, request).await;
    if adopted.copied {
        let removed = store.remove(&adopted.name);
        // The pod runs, or its failure is what matters.
        if let (Err(error), true) = (removed, made.is_ok()) {
            tracing::warn!(%error, "a checkpoint that was copied for a pod is left");
        }
    }
    made
}

async fn make(
    mut cri: CriPods,
    config: PodSandboxConfig,
    request: RestorePodRequest,
) -> Result<String> {
    let id = cri.run(config.clone(), request.runtime_handler).await?;
    for container in request.container_configs {
        let name = container.metadata.clone().unwrap_or_default().name;
        let started = match cri.create(&id, container, &config).await {
            Ok(container) => cri.start(&name, &container).await,
            Err(error) => Err(error),
        };
        if let Err(error) = started {
            return Err(match cri.remove(&id).await {
                Ok(()) => error,
                Err(left) => {
                    Error::failed(format!("the sandbox {id} is left: {}", left.one_line()))
                        .because(error)
                }
            });
        }
    }
    Ok(id)
}

/// Stops a pod whose containers have been killed.
///
/// # Errors
/// What the CRI answers.
pub async fn stop_pod(node: &Containerd, pod_sandbox_id: String) -> Result<()> {
    CriPods::of(node).stop(&pod_sandbox_id).await
}
