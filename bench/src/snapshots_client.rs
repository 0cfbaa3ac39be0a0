//! A client of containerd's snapshots and diff services, on a proxy plugin's socket or containerd's.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::diff_client::DiffClient;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
    RemoveSnapshotRequest, StatSnapshotRequest, ViewSnapshotRequest,
};
use containerd_client::services::v1::{ApplyRequest, DeleteContentRequest, DiffRequest};
use containerd_client::tonic::Request;
use containerd_client::tonic::transport::Channel;
use containerd_client::types::{Descriptor, Mount};

/// containerd's namespace of all that is made here.
pub(crate) const NAMESPACE: &str = "bench";
/// An uncompressed layer.
pub(crate) const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
/// Keeps containerd's garbage collection from what nothing refers to.
const GC_ROOT: &str = "containerd.io/gc.root";
/// A List of many snapshots comes in messages larger than tonic's own limit of 4 MiB.
const MESSAGE_BYTES: usize = 64 << 20;

/// One connection.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    snapshots: SnapshotsClient<Channel>,
    diff: DiffClient<Channel>,
    content: ContentClient<Channel>,
    snapshotter: String,
}

impl Client {
    /// Connects; the snapshotter's name matters to containerd only.
    pub(crate) async fn connect(socket: &Path, snapshotter: &str) -> Result<Client> {
        let channel = containerd_client::connect(socket)
            .await
            .with_context(|| format!("cannot connect to {}", socket.display()))?;
        Ok(Client {
            snapshots: SnapshotsClient::new(channel.clone())
                .max_decoding_message_size(MESSAGE_BYTES),
            diff: DiffClient::new(channel.clone()),
            content: ContentClient::new(channel),
            snapshotter: snapshotter.to_owned(),
        })
    }

    pub(crate) async fn prepare(&mut self, key: &str, parent: &str) -> Result<Vec<Mount>> {
        let request = request(PrepareSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: labels(),
        });
        let answer = self.snapshots.prepare(request).await.context("Prepare")?;
        Ok(answer.into_inner().mounts)
    }

    pub(crate) async fn view(&mut self, key: &str, parent: &str) -> Result<Vec<Mount>> {
        let request = request(ViewSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: labels(),
        });
        let answer = self.snapshots.view(request).await.context("View")?;
        Ok(answer.into_inner().mounts)
    }

    pub(crate) async fn mounts(&mut self, key: &str) -> Result<Vec<Mount>> {
        let request = request(MountsRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
        });
        let answer = self.snapshots.mounts(request).await.context("Mounts")?;
        Ok(answer.into_inner().mounts)
    }

    pub(crate) async fn commit(&mut self, name: &str, key: &str) -> Result<()> {
        let request = request(CommitSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels: labels(),
        });
        self.snapshots
            .commit(request)
            .await
            .map(drop)
            .context("Commit")
    }

    pub(crate) async fn remove(&mut self, key: &str) -> Result<()> {
        let request = request(RemoveSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
        });
        self.snapshots
            .remove(request)
            .await
            .map(drop)
            .context("Remove")
    }

    pub(crate) async fn stat(&mut self, key: &str) -> Result<()> {
        let request = request(StatSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
        });
        self.snapshots.stat(request).await.map(drop).context("Stat")
    }

    /// How many snapshots there are, all of them read.
    pub(crate) async fn list(&mut self) -> Result<usize> {
        let request = request(ListSnapshotsRequest {
            snapshotter: self.snapshotter.clone(),
            filters: Vec::new(),
        });
        let answer = self.snapshots.list(request).await.context("List")?;
        let (mut stream, mut count) = (answer.into_inner(), 0);
        while let Some(message) = stream.message().await.context("List")? {
            count += message.info.len();
        }
        Ok(count)
    }

    /// Content that says what `right` has changed of `left`.
    pub(crate) async fn diff(
        &mut self,
        left: &[Mount],
        right: &[Mount],
        media_type: &str,
        reference: &str,
    ) -> Result<Descriptor> {
        let request = request(DiffRequest {
            left: left.to_vec(),
            right: right.to_vec(),
            media_type: media_type.to_owned(),
            r#ref: reference.to_owned(),
            labels: labels(),
            ..DiffRequest::default()
        });
        let answer = self.diff.diff(request).await.context("Diff")?;
        answer.into_inner().diff.context("Diff gave no content")
    }

    /// Removes content from the store.
    pub(crate) async fn delete_content(&mut self, digest: &str) -> Result<()> {
        let request = request(DeleteContentRequest {
            digest: digest.to_owned(),
        });
        let deleted = self.content.delete(request).await;
        deleted.map(drop).context("Delete of the content")
    }

    /// Puts the content of a layer into what is mounted so.
    pub(crate) async fn apply(&mut self, layer: &Descriptor, mounts: &[Mount]) -> Result<()> {
        let request = request(ApplyRequest {
            diff: Some(layer.clone()),
            mounts: mounts.to_vec(),
            ..ApplyRequest::default()
        });
        self.diff.apply(request).await.map(drop).context("Apply")
    }
}

fn labels() -> HashMap<String, String> {
    HashMap::from([(GC_ROOT.to_owned(), "bench".to_owned())])
}

fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let namespace = NAMESPACE.parse().expect("a plain word is a header's value");
    request
        .metadata_mut()
        .insert("containerd-namespace", namespace);
    request
}
