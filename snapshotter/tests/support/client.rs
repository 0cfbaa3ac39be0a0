//! A client of the snapshots API, for a proxy plugin's socket as for containerd's own.

use std::collections::HashMap;
use std::path::Path;

use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest,
    PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest, UpdateSnapshotRequest,
    UsageRequest, UsageResponse, ViewSnapshotRequest,
};
use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{Request, Status};
use containerd_client::types::Mount;

/// One connection.
#[derive(Debug, Clone)]
pub struct Client {
    snapshots: SnapshotsClient<Channel>,
    snapshotter: String,
    namespace: String,
}

pub type Labels<'a> = &'a [(&'a str, &'a str)];

impl Client {
    /// Connects to `socket`; `snapshotter` matters to containerd only.
    pub async fn connect(
        socket: &Path,
        snapshotter: &str,
    ) -> Result<Self, containerd_client::tonic::transport::Error> {
        let channel = containerd_client::connect(socket).await?;
        Ok(Self {
            snapshots: SnapshotsClient::new(channel).max_decoding_message_size(16 << 20),
            snapshotter: snapshotter.to_owned(),
            namespace: "conformance".to_owned(),
        })
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let namespace = self.namespace.parse().expect("a plain word");
        request
            .metadata_mut()
            .insert("containerd-namespace", namespace);
        request
    }

    pub async fn prepare(
        &self,
        key: &str,
        parent: &str,
        labels: Labels<'_>,
    ) -> Result<Vec<Mount>, Status> {
        let request = self.request(PrepareSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: owned(labels),
        });
        Ok(self
            .snapshots
            .clone()
            .prepare(request)
            .await?
            .into_inner()
            .mounts)
    }

    pub async fn view(
        &self,
        key: &str,
        parent: &str,
        labels: Labels<'_>,
    ) -> Result<Vec<Mount>, Status> {
        let request = self.request(ViewSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: owned(labels),
        });
        Ok(self
            .snapshots
            .clone()
            .view(request)
            .await?
            .into_inner()
            .mounts)
    }

    pub async fn mounts(&self, key: &str) -> Result<Vec<Mount>, Status> {
        let request = self.request(MountsRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
        });
        Ok(self
            .snapshots
            .clone()
            .mounts(request)
            .await?
            .into_inner()
            .mounts)
    }

    pub async fn commit(&self, name: &str, key: &str, labels: Labels<'_>) -> Result<(), Status> {
        let request = self.request(CommitSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels: owned(labels),
        });
        self.snapshots.clone().commit(request).await.map(drop)
    }

    pub async fn remove(&self, key: &str) -> Result<(), Status> {
        let request = self.request(RemoveSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
        });
        self.snapshots.clone().remove(request).await.map(drop)
    }

    pub async fn stat(&self, key: &str) -> Result<Info, Status> {
        let request = self.request(StatSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
        });
        let info = self
            .snapshots
            .clone()
            .stat(request)
            .await?
            .into_inner()
            .info;
        Ok(info.expect("containerd dereferences the info of every answer"))
    }

    pub async fn update(&self, info: Info, fields: &[&str]) -> Result<Info, Status> {
        let paths = fields.iter().map(|field| (*field).to_owned()).collect();
        let request = self.request(UpdateSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            info: Some(info),
            update_mask: Some(prost_types::FieldMask { paths }),
        });
        let info = self
            .snapshots
            .clone()
            .update(request)
            .await?
            .into_inner()
            .info;
        Ok(info.expect("containerd dereferences the info of every answer"))
    }

    pub async fn usage(&self, key: &str) -> Result<UsageResponse, Status> {
        let request = self.request(UsageRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
        });
        Ok(self.snapshots.clone().usage(request).await?.into_inner())
    }

    /// All that pass the filters.
    pub async fn list(&self, filters: &[&str]) -> Result<Vec<Info>, Status> {
        let mut infos = Vec::new();
        self.for_each_message(filters, async |message| infos.extend(message))
            .await?;
        Ok(infos)
    }

    /// Does `act` with the snapshots of each message of a List, before the next one is read.
    pub async fn for_each_message(
        &self,
        filters: &[&str],
        mut act: impl AsyncFnMut(Vec<Info>),
    ) -> Result<(), Status> {
        let request = self.request(ListSnapshotsRequest {
            snapshotter: self.snapshotter.clone(),
            filters: filters.iter().map(|filter| (*filter).to_owned()).collect(),
        });
        let mut stream = self.snapshots.clone().list(request).await?.into_inner();
        while let Some(message) = stream.message().await? {
            act(message.info).await;
        }
        Ok(())
    }

    pub async fn cleanup(&self) -> Result<(), Status> {
        let request = self.request(CleanupRequest {
            snapshotter: self.snapshotter.clone(),
        });
        self.snapshots.clone().cleanup(request).await.map(drop)
    }
}

fn owned(labels: Labels<'_>) -> HashMap<String, String> {
    labels
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}
