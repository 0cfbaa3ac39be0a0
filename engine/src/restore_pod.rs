//! A pod of the CRI made of a checkpoint, as kubelet would make it.
//!
//! ```text
//!  path --> a checkpoint of this node's store (copied into it when it lies elsewhere)
//!  RunPodSandbox (annotation dev.transship/restore) --> CreateContainer, StartContainer of each
//!  failure: the sandbox is stopped and removed again
//! ```

use std::collections::HashMap;
use std::path::PathBuf;

use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    CreateContainerRequest, PodSandboxConfig, RemovePodSandboxRequest, RunPodSandboxRequest,
    StartContainerRequest, StopPodSandboxRequest,
};
use tonic::transport::Channel;
use transship_checkpoint::annotations::{PREFIX, RESTORE};
use transship_checkpoint::criu_options::CriuOverrides;
use transship_checkpoint::store::Store;
use transship_containerd::Containerd;
use transship_proto::node_api::RestorePodRequest;

use crate::error::{Error, Result};

mod adopt;

use adopt::adopt;

type Cri = RuntimeServiceClient<Channel>;

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
        move || adopt(&store, &path)
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
    let made = make(RuntimeServiceClient::new(node.channel()), config, request).await;
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
    mut cri: Cri,
    config: PodSandboxConfig,
    request: RestorePodRequest,
) -> Result<String> {
    let sandbox = RunPodSandboxRequest {
        config: Some(config.clone()),
        runtime_handler: request.runtime_handler,
    };
    let answer = cri.run_pod_sandbox(sandbox).await;
    let id = answer
        .map_err(|status| refused_by_cri("cannot run the sandbox", &status))?
        .into_inner()
        .pod_sandbox_id;
    for container in request.container_configs {
        let name = container.metadata.clone().unwrap_or_default().name;
        let create = CreateContainerRequest {
            pod_sandbox_id: id.clone(),
            config: Some(container),
            sandbox_config: Some(config.clone()),
        };
        let started = match cri.create_container(create).await {
            Ok(answer) => {
                let container_id = answer.into_inner().container_id;
                let start = StartContainerRequest { container_id };
                cri.start_container(start).await.map(drop)
            }
            Err(status) => Err(status),
        };
        if let Err(status) = started {
            let error = refused_by_cri(&format!("cannot start {name:?}"), &status);
            return Err(match remove(&mut cri, &id).await {
                Ok(()) => error,
                Err(left) => {
                    refused_by_cri(&format!("the sandbox {id} is left"), &left).because(error)
                }
            });
        }
    }
    Ok(id)
}

fn refused_by_cri(act: &str, status: &tonic::Status) -> Error {
    Error::failed(format!("{act}: {}", status.message()))
}

/// Stops a pod and removes it.
async fn remove(cri: &mut Cri, id: &str) -> Result<(), tonic::Status> {
    let pod_sandbox_id = id.to_owned();
    cri.stop_pod_sandbox(StopPodSandboxRequest {
        pod_sandbox_id: pod_sandbox_id.clone(),
    })
    .await?;
    cri.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id })
        .await?;
    Ok(())
}

/// Stops a pod whose containers have been killed.
///
/// # Errors
/// What the CRI answers.
pub async fn stop_pod(node: &Containerd, pod_sandbox_id: String) -> Result<()> {
    let mut cri = RuntimeServiceClient::new(node.channel());
    let request = StopPodSandboxRequest { pod_sandbox_id };
    let answer = cri.stop_pod_sandbox(request).await;
    answer.map_err(|status| refused_by_cri("cannot stop the sandbox", &status))?;
    Ok(())
}
