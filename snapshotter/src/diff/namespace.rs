//! In which of containerd's namespaces a call is meant.
//!
//! Calls from within containerd (the CRI's) carry the namespace, and from 2.0 on those that containerd
//! hands on for its clients do. containerd 1.7 hands on no headers (containerd pull request 6130,
//! issue 12328): there the namespace is the one that has the blob to be applied, or the snapshot whose
//! mounts are to be compared. The directories of a snapshot belong to one namespace alone.

use containerd_client::services::v1::introspection_client::IntrospectionClient;
use containerd_client::services::v1::namespaces_client::NamespacesClient;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{ListSnapshotsRequest, MountsRequest};
use containerd_client::services::v1::{InfoRequest, ListNamespacesRequest, PluginsRequest};
use containerd_client::tonic::Code;
use containerd_client::tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use containerd_client::types::Mount;

use super::error::DiffError;
use super::plan::NotOurs;
use super::store::{CallError, Containerd, During, Store};

/// The namespace that the caller has named.
pub(super) fn named(headers: &MetadataMap) -> Option<MetadataValue<Ascii>> {
    headers.get("containerd-namespace").cloned()
}

/// A namespace that has the blob; the content of a blob is the same in all of them.
pub(super) async fn with_blob(
    containerd: &Containerd,
    digest: &str,
) -> Result<MetadataValue<Ascii>, DiffError> {
    for namespace in all(containerd).await? {
        let store = containerd.store(namespace.clone()).await?;
        let request = InfoRequest {
            digest: digest.to_owned(),
        };
        match store.content().info(store.request(request)).await {
            Ok(_) => return Ok(namespace),
            Err(status) if status.code() == Code::NotFound => {}
            Err(status) => Err(status).during(|| format!("look up the blob {digest}"))?,
        }
    }
    Err(NotOurs::because(format!("no namespace has the blob {digest}")).into())
}

/// The namespace of the snapshot that is mounted like this.
pub(super) async fn with_mounts(
    containerd: &Containerd,
    mounts: &[Mount],
) -> Result<MetadataValue<Ascii>, DiffError> {
    for namespace in all(containerd).await? {
        let store = containerd.store(namespace.clone()).await?;
        for snapshotter in snapshotters(&store).await? {
            if has_mounts(&store, &snapshotter, mounts).await? {
                return Ok(namespace);
            }
        }
    }
    Err(NotOurs::because("no namespace has a snapshot with these mounts").into())
}

async fn all(containerd: &Containerd) -> Result<Vec<MetadataValue<Ascii>>, CallError> {
    let channel = containerd.channel().await?;
    let answer = NamespacesClient::new(channel)
        .list(ListNamespacesRequest::default())
        .await
        .during(|| "list the namespaces".to_owned())?;
    let namespaces = answer.into_inner().namespaces.into_iter();
    Ok(namespaces
        .filter_map(|namespace| namespace.name.parse().ok())
        .collect())
}

async fn snapshotters(store: &Store) -> Result<Vec<String>, CallError> {
    let request = PluginsRequest {
        filters: vec!["type==io.containerd.snapshotter.v1".to_owned()],
    };
    let answer = IntrospectionClient::new(store.channel())
        .plugins(store.request(request))
        .await
        .during(|| "list the snapshotters".to_owned())?;
    let plugins = answer.into_inner().plugins.into_iter();
    Ok(plugins
        .filter(|plugin| plugin.init_err.is_none())
        .map(|plugin| plugin.id)
        .collect())
}

async fn has_mounts(store: &Store, snapshotter: &str, mounts: &[Mount]) -> Result<bool, CallError> {
    let act = || format!("list the snapshots of {snapshotter}");
    let mut client = SnapshotsClient::new(store.channel());
    // Committed snapshots have no mounts: they are compared through views.
    let request = ListSnapshotsRequest {
        snapshotter: snapshotter.to_owned(),
        filters: vec!["kind==active".to_owned(), "kind==view".to_owned()],
    };
    let mut list = client
        .list(store.request(request))
        .await
        .during(act)?
        .into_inner();
    while let Some(page) = list.message().await.during(act)? {
        for snapshot in page.info {
            let request = MountsRequest {
                snapshotter: snapshotter.to_owned(),
                key: snapshot.name.clone(),
            };
            match client.mounts(store.request(request)).await {
                Ok(answer) if answer.get_ref().mounts == mounts => return Ok(true),
                Ok(_) => {}
                // It was removed meanwhile, or it is of a kind that has none.
                Err(status)
                    if matches!(status.code(), Code::NotFound | Code::FailedPrecondition) => {}
                Err(status) => {
                    return Err(status).during(|| format!("get the mounts of {}", snapshot.name));
                }
            }
        }
    }
    Ok(false)
}
