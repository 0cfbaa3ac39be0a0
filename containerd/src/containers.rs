//! Container records.

use std::collections::HashMap;

use containerd_client::services::v1::container::Runtime;
use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::{
    Container, CreateContainerRequest, DeleteContainerRequest, GetContainerRequest,
    ListContainersRequest, UpdateContainerRequest,
};
use containerd_client::tonic::transport::Channel;
use prost_types::{Any, FieldMask};

use crate::{Containerd, ContainerdError, During, MESSAGE_LIMIT, present};

/// Type URL of an OCI runtime spec in a container record; the value is JSON.
const SPEC_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

/// What a new container record holds.
#[derive(Debug)]
pub struct NewContainer {
    /// Its id.
    pub id: String,
    /// Its labels.
    pub labels: HashMap<String, String>,
    /// Name of the image.
    pub image: String,
    /// Name of the runtime, such as `io.containerd.runc.v2`.
    pub runtime: String,
    /// The options of its shim.
    pub runtime_options: Option<Any>,
    /// The OCI runtime spec, JSON.
    pub spec: Vec<u8>,
    /// Name of the snapshotter.
    pub snapshotter: String,
    /// Key of the snapshot that becomes the root file system.
    pub snapshot_key: String,
}

impl Containerd {
    fn containers(&self) -> ContainersClient<Channel> {
        // All specs of a node come in one answer.
        ContainersClient::new(self.channel()).max_decoding_message_size(MESSAGE_LIMIT)
    }

    /// The record of the container `id`.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn container(&self, id: &str) -> Result<Container, ContainerdError> {
        let act = || format!("read the container {id:?}");
        let answer = self
            .containers()
            .get(self.request(GetContainerRequest { id: id.to_owned() }))
            .await
            .during(act)?;
        present(answer.into_inner().container, "container", act)
    }

    /// The records of all containers of the namespace.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn all_containers(&self) -> Result<Vec<Container>, ContainerdError> {
        self.list_containers(Vec::new()).await
    }

    /// The records of the namespace's containers that have this label with this value.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn containers_with(
        &self,
        (label, value): (&str, &str),
    ) -> Result<Vec<Container>, ContainerdError> {
        let filter = format!("labels.{label:?}=={value:?}");
        self.list_containers(vec![filter]).await
    }

    async fn list_containers(
        &self,
        filters: Vec<String>,
    ) -> Result<Vec<Container>, ContainerdError> {
        let request = self.request(ListContainersRequest { filters });
        let answer = self.containers().list(request).await;
        let answer = answer.during(|| "list the containers".to_owned())?;
        Ok(answer.into_inner().containers)
    }

    /// Makes a container record.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn create_container(&self, new: NewContainer) -> Result<(), ContainerdError> {
        let id = new.id.clone();
        let container = Container {
            id: new.id,
            labels: new.labels,
            image: new.image,
            runtime: Some(Runtime {
                name: new.runtime,
                options: new.runtime_options,
            }),
            spec: Some(Any {
                type_url: SPEC_TYPE.to_owned(),
                value: new.spec,
            }),
            snapshotter: new.snapshotter,
            snapshot_key: new.snapshot_key,
            ..Container::default()
        };
        self.containers()
            .create(self.request(CreateContainerRequest {
                container: Some(container),
            }))
            .await
            .during(|| format!("make the container {id:?}"))?;
        Ok(())
    }

    /// Replaces the spec of the container `id`.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn update_spec(&self, id: &str, spec: Vec<u8>) -> Result<(), ContainerdError> {
        let container = Container {
            id: id.to_owned(),
            spec: Some(Any {
                type_url: SPEC_TYPE.to_owned(),
                value: spec,
            }),
            ..Container::default()
        };
        let update_mask = Some(FieldMask {
            paths: vec!["spec".to_owned()],
        });
        self.containers()
            .update(self.request(UpdateContainerRequest {
                container: Some(container),
                update_mask,
            }))
            .await
            .during(|| format!("change the spec of the container {id:?}"))?;
        Ok(())
    }

    /// Replaces all labels of the container `id`.
    ///
    /// # Errors
    /// What containerd answers.
    pub async fn label_container(
        &self,
        id: &str,
        labels: HashMap<String, String>,
    ) -> Result<(), ContainerdError> {
        let container = Container {
            id: id.to_owned(),
            labels,
            ..Container::default()
        };
        let update_mask = Some(FieldMask {
            paths: vec!["labels".to_owned()],
        });
        self.containers()
            .update(self.request(UpdateContainerRequest {
                container: Some(container),
                update_mask,
            }))
            .await
            .during(|| format!("change the labels of the container {id:?}"))?;
        Ok(())
    }

    /// Deletes the record of the container `id`.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn delete_container(&self, id: &str) -> Result<(), ContainerdError> {
        self.containers()
            .delete(self.request(DeleteContainerRequest { id: id.to_owned() }))
            .await
            .during(|| format!("delete the container {id:?}"))?;
        Ok(())
    }
}
