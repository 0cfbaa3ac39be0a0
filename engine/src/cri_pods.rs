//! Pods as a client of the CRI has them: made, asked about, removed.
//!
//! ```text
//!  run, create, start   as kubelet calls them
//!  made_of              what the source's CRI has made a pod of (the verbose status, JSON of containerd)
//!  remove               until it succeeds: a container that ends by itself meanwhile can cost containerd the
//!                       connection to its shim
//! ```

use std::collections::HashMap;
use std::time::Duration;

use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    ContainerConfig, ContainerStatusRequest, CreateContainerRequest, ImageSpec, ImageStatusRequest,
    ListPodSandboxRequest, PodSandbox, PodSandboxConfig, PodSandboxStatusRequest,
    RemoveImageRequest, RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest,
    StopPodSandboxRequest,
};
use serde_json::Value;
use tokio::time::{Instant, sleep};
use tonic::Status;
use tonic::transport::Channel;
use transship_containerd::Containerd;

use crate::error::{Error, Result};

/// How long the removal of a pod is tried.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(200);

/// The CRI of a node.
#[derive(Debug, Clone)]
pub(crate) struct CriPods {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

/// What a pod was made of.
#[derive(Debug)]
pub(crate) struct MadeOf {
    /// Its `PodSandboxConfig`, as containerd writes it in JSON.
    pub(crate) config: String,
    /// Its runtime handler; empty: the default one.
    pub(crate) runtime_handler: String,
}

impl CriPods {
    pub(crate) fn of(node: &Containerd) -> Self {
        Self {
            runtime: RuntimeServiceClient::new(node.channel()),
            images: ImageServiceClient::new(node.channel()),
        }
    }

    /// Runs a sandbox, and gives its id.
    pub(crate) async fn run(
        &mut self,
        config: PodSandboxConfig,
        runtime_handler: String,
    ) -> Result<String> {
        let request = RunPodSandboxRequest {
            config: Some(config),
            runtime_handler,
        };
        let answer = self.runtime.run_pod_sandbox(request).await;
        let answer = answer.map_err(|status| refused("cannot run the sandbox", &status))?;
        Ok(answer.into_inner().pod_sandbox_id)
    }

    /// Makes a container of a sandbox, and gives its id.
    pub(crate) async fn create(
        &mut self,
        sandbox: &str,
        container: ContainerConfig,
        config: &PodSandboxConfig,
    ) -> Result<String> {
        let name = container.metadata.clone().unwrap_or_default().name;
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(container),
            sandbox_config: Some(config.clone()),
        };
        let answer = self.runtime.create_container(request).await;
        let answer = answer.map_err(|status| refused(&format!("cannot make {name:?}"), &status))?;
        Ok(answer.into_inner().container_id)
    }

    /// Starts a container that people call `name`.
    pub(crate) async fn start(&mut self, name: &str, id: &str) -> Result<()> {
        let container_id = id.to_owned();
        let request = StartContainerRequest { container_id };
        let answer = self.runtime.start_container(request).await;
        answer.map_err(|status| refused(&format!("cannot start {name:?}"), &status))?;
        Ok(())
    }

    /// Stops a pod: what still runs of it is killed.
    pub(crate) async fn stop(&mut self, sandbox: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.stop_once(sandbox).await {
                Err(_) if Instant::now() < deadline => sleep(PAUSE).await,
                stopped => return stopped,
            }
        }
    }

    async fn stop_once(&mut self, sandbox: &str) -> Result<()> {
        let pod_sandbox_id = sandbox.to_owned();
        let request = StopPodSandboxRequest { pod_sandbox_id };
        let answer = self.runtime.stop_pod_sandbox(request).await;
        answer.map_err(|status| refused("cannot stop the sandbox", &status))?;
        Ok(())
    }

    /// Stops a pod and removes it; one that is gone is as good.
    pub(crate) async fn remove(&mut self, sandbox: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.remove_once(sandbox).await {
                Err(_) if Instant::now() < deadline => sleep(PAUSE).await,
                removed => return removed,
            }
        }
    }

    async fn remove_once(&mut self, sandbox: &str) -> Result<()> {
        self.stop_once(sandbox).await?;
        let pod_sandbox_id = sandbox.to_owned();
        let request = RemovePodSandboxRequest { pod_sandbox_id };
        let answer = self.runtime.remove_pod_sandbox(request).await;
        answer.map_err(|status| refused("cannot remove the sandbox", &status))?;
        Ok(())
    }

    /// All sandboxes.
    pub(crate) async fn sandboxes(&mut self) -> Result<Vec<PodSandbox>> {
        let request = ListPodSandboxRequest::default();
        let answer = self.runtime.list_pod_sandbox(request).await;
        let answer = answer.map_err(|status| refused("cannot list the pods", &status))?;
        Ok(answer.into_inner().items)
    }

    /// Whether the CRI knows an image by this id.
    pub(crate) async fn has_image(&mut self, id: &str) -> Result<bool> {
        let request = ImageStatusRequest {
            image: Some(image(id)),
            verbose: false,
        };
        let answer = self.images.image_status(request).await;
        let answer = answer.map_err(|status| refused("cannot ask for an image", &status))?;
        Ok(answer.into_inner().image.is_some())
    }

    /// Takes an image away, under all of its names.
    pub(crate) async fn remove_image(&mut self, id: &str) -> Result<()> {
        let request = RemoveImageRequest {
            image: Some(image(id)),
        };
        let answer = self.images.remove_image(request).await;
        answer.map_err(|status| refused(&format!("cannot remove the image {id}"), &status))?;
        Ok(())
    }

    /// What a sandbox was made of.
    pub(crate) async fn made_of(&mut self, sandbox: &str) -> Result<MadeOf> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: sandbox.to_owned(),
            verbose: true,
        };
        let answer = self.runtime.pod_sandbox_status(request).await;
        let answer = answer.map_err(|status| refused("cannot ask about the sandbox", &status))?;
        let answer = answer.into_inner();
        let status = answer.status.unwrap_or_default();
        Ok(MadeOf {
            config: config_of(&answer.info, &format!("the sandbox {sandbox}"))?,
            runtime_handler: status.runtime_handler,
        })
    }

    /// The `ContainerConfig` that a container was made of, as containerd writes it in JSON.
    pub(crate) async fn container_made_of(&mut self, name: &str, id: &str) -> Result<String> {
        let request = ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: true,
        };
        let answer = self.runtime.container_status(request).await;
        let answer =
            answer.map_err(|status| refused(&format!("cannot ask about {name:?}"), &status))?;
        config_of(&answer.into_inner().info, &format!("{name:?}"))
    }
}

fn image(id: &str) -> ImageSpec {
    ImageSpec {
        image: id.to_owned(),
        ..ImageSpec::default()
    }
}

/// The field `config` of what containerd says of its own.
fn config_of(info: &HashMap<String, String>, of: &str) -> Result<String> {
    let said = info.get("info").map_or("", String::as_str);
    let said: Value = serde_json::from_str(said).unwrap_or_default();
    match said.get("config") {
        Some(config) if config.is_object() => Ok(config.to_string()),
        _ => Err(Error::refused(format!(
            "containerd does not say what {of} was made of"
        ))),
    }
}

/// What the CRI has answered to an act.
pub(crate) fn refused(act: &str, status: &Status) -> Error {
    Error::failed(format!("{act}: {}", status.message()))
}
