//! A pod of the CRI made of a checkpoint, as kubelet would make it.
//!
//! ```text
//!  path --> a checkpoint of this node's store (linked or copied into it when it lies elsewhere)
//!  RunPodSandbox (annotation dev.transship/restore) --> CreateContainer, StartContainer of each
//!  failure: the sandbox is stopped and removed again
//! ```

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    CreateContainerRequest, PodSandboxConfig, RemovePodSandboxRequest, RunPodSandboxRequest,
    StartContainerRequest, StopPodSandboxRequest,
};
use tonic::transport::Channel;
use transship_checkpoint::annotations::{PREFIX, RESTORE};
use transship_checkpoint::criu_options::CriuOverrides;
use transship_checkpoint::store::{Durability, Store};
use transship_proto::node_api::RestorePodRequest;

use crate::problem::{Kind, Problem};
use transship_containerd::Node;

type Cri = RuntimeServiceClient<Channel>;

/// CRIU's options as a request names them.
///
/// # Errors
/// One that means nothing.
pub fn overrides(options: &HashMap<String, String>) -> Result<CriuOverrides> {
    let mut criu = CriuOverrides::default();
    for (name, value) in options {
        criu.set(name, value).map_err(|error| {
            Problem::new(
                Kind::Refused,
                format!("the option {name} is {value:?}; {error}"),
            )
        })?;
    }
    Ok(criu)
}

/// Makes the pod and gives the id of its sandbox.
///
/// # Errors
/// Nothing of it is left then.
pub async fn restore_pod(node: &Node, store: &Store, request: RestorePodRequest) -> Result<String> {
    overrides(&request.options)?;
    let mut config = request
        .config
        .clone()
        .ok_or_else(|| Problem::new(Kind::Refused, "the request has no config of a sandbox"))?;
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
            eprintln!("transship: {:#}", anyhow::Error::from(error));
        }
    }
    made
}

/// A checkpoint of the node's store.
struct Adopted {
    name: String,
    copied: bool,
}

/// What an annotation can name: a checkpoint of the store.
fn adopt(store: &Store, path: &Path) -> Result<Adopted> {
    let name = path.file_name().and_then(|name| name.to_str());
    let (Some(name), Some(parent)) = (name, path.parent()) else {
        return Err(Problem::new(
            Kind::Refused,
            format!("{} is no directory of a checkpoint", path.display()),
        )
        .into());
    };
    let at = Store::at(parent);
    let checkpoint = at.open(name).map_err(|error| {
        anyhow!(error).context(Problem::new(
            Kind::NotFound,
            format!("there is no checkpoint at {}", path.display()),
        ))
    })?;
    if parent.canonicalize().ok() == store.root().canonicalize().ok() {
        let name = name.to_owned();
        return Ok(Adopted {
            name,
            copied: false,
        });
    }
    let mut manifest = checkpoint.manifest;
    manifest.name = format!("pod-{}", transship_containerd::unique());
    let draft = store.draft(&manifest.name)?;
    link_tree(&checkpoint.dir, draft.dir())?;
    let name = manifest.name.clone();
    draft.commit(manifest, Durability::Ephemeral)?;
    Ok(Adopted { name, copied: true })
}

/// Links on one file system, copies across two. The manifest is written anew.
fn link_tree(from: &Path, to: &Path) -> Result<()> {
    let entries = fs::read_dir(from).with_context(|| format!("cannot list {}", from.display()))?;
    for entry in entries {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type()?.is_dir() {
            fs::create_dir(&target).with_context(|| format!("cannot make {}", target.display()))?;
            link_tree(&source, &target)?;
        } else if entry.file_name() != transship_checkpoint::manifest::MANIFEST_FILE
            && fs::hard_link(&source, &target).is_err()
        {
            fs::copy(&source, &target)
                .with_context(|| format!("cannot copy {}", source.display()))?;
        }
    }
    Ok(())
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
        .map_err(|status| anyhow!("cannot run the sandbox: {}", status.message()))?
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
            let error = anyhow!("cannot start {name:?}: {}", status.message());
            return Err(match remove(&mut cri, &id).await {
                Ok(()) => error,
                Err(left) => error.context(format!("the sandbox {id} is left: {}", left.message())),
            });
        }
    }
    Ok(id)
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
pub async fn stop_pod(node: &Node, pod_sandbox_id: String) -> Result<()> {
    let mut cri = RuntimeServiceClient::new(node.channel());
    let request = StopPodSandboxRequest { pod_sandbox_id };
    let answer = cri.stop_pod_sandbox(request).await;
    answer.map_err(|status| anyhow!("cannot stop the sandbox: {}", status.message()))?;
    Ok(())
}
