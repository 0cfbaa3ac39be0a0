//! One snapshotter: in a containerd, or behind the socket of a proxy plugin.

use std::path::Path;

use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, ListSnapshotsResponse,
    MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
    UpdateSnapshotRequest, UsageRequest, UsageResponse, ViewSnapshotRequest,
};
use containerd_client::tonic::Streaming;
use containerd_client::tonic::transport::Channel;
use containerd_client::types::Mount;
use prost_types::FieldMask;

use crate::labels::owned;
use crate::{Containerd, ContainerdError, During, MESSAGE_LIMIT, present};

/// A snapshotter, seen through a namespace and, if there is one, under a lease.
#[derive(Debug, Clone)]
pub struct Snapshotter {
    containerd: Containerd,
    name: String,
}

impl Containerd {
    /// The snapshotter called `name`.
    #[must_use]
    pub fn snapshotter(&self, name: &str) -> Snapshotter {
        Snapshotter {
            containerd: self.clone(),
            name: name.to_owned(),
        }
    }
}

/// A list of snapshots on its way, page by page.
#[derive(Debug)]
pub struct SnapshotPages {
    snapshotter: String,
    stream: Streaming<ListSnapshotsResponse>,
}

impl SnapshotPages {
    /// The next page; None at the end.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn next(&mut self) -> Result<Option<Vec<Info>>, ContainerdError> {
        let page = self.stream.message().await;
        let page = page.during(|| format!("list the snapshots of {}", self.snapshotter))?;
        Ok(page.map(|page| page.info))
    }
}

impl Snapshotter {
    /// Connects to the socket `address`, a containerd's or a proxy plugin's; a plugin takes no notice of
    /// `name`.
    ///
    /// # Errors
    /// Nobody listens there, or `namespace` cannot be a gRPC header.
    pub async fn connect(
        address: &Path,
        namespace: &str,
        name: &str,
    ) -> Result<Self, ContainerdError> {
        let containerd = Containerd::connect(address, namespace).await?;
        Ok(containerd.snapshotter(name))
    }

    /// The snapshotter's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn client(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.containerd.channel()).max_decoding_message_size(MESSAGE_LIMIT)
    }

    /// The record of the snapshot `key`.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn stat(&self, key: &str) -> Result<Info, ContainerdError> {
        let act = || format!("read the snapshot {key:?} of {}", self.name);
        let request = self.containerd.request(StatSnapshotRequest {
            snapshotter: self.name.clone(),
            key: key.to_owned(),
        });
        let answer = self.client().stat(request).await.during(act)?;
        present(answer.into_inner().info, "info", act)
    }

    /// Whether the snapshot `key` is there; it stays as long as the lease then, see [`Containerd::hold_blob`].
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn hold(&self, key: &str) -> Result<bool, ContainerdError> {
        let kind = format!("snapshots/{}", self.name);
        self.containerd.hold(&kind, key).await?;
        match self.stat(key).await {
            Err(error) if error.is_not_found() => Ok(false),
            answer => answer.map(|_| true),
        }
    }

    /// The mounts of the active snapshot or view `key`.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn mounts(&self, key: &str) -> Result<Vec<Mount>, ContainerdError> {
        let request = self.containerd.request(MountsRequest {
            snapshotter: self.name.clone(),
            key: key.to_owned(),
        });
        let answer = self.client().mounts(request).await;
        let answer = answer.during(|| format!("get the mounts of {key:?} from {}", self.name))?;
        Ok(answer.into_inner().mounts)
    }

    /// Makes an active snapshot on the committed one `parent`; an empty name is no parent.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn prepare(
        &self,
        key: &str,
        parent: &str,
        labels: &[(&str, &str)],
    ) -> Result<Vec<Mount>, ContainerdError> {
        let request = self.containerd.request(PrepareSnapshotRequest {
            snapshotter: self.name.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: owned(labels),
        });
        let answer = self.client().prepare(request).await;
        let answer = answer.during(|| format!("prepare the snapshot {key:?} of {}", self.name))?;
        Ok(answer.into_inner().mounts)
    }

    /// Makes a view of the committed snapshot `parent`; an empty name is no parent.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn view(
        &self,
        key: &str,
        parent: &str,
        labels: &[(&str, &str)],
    ) -> Result<Vec<Mount>, ContainerdError> {
        let request = self.containerd.request(ViewSnapshotRequest {
            snapshotter: self.name.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: owned(labels),
        });
        let answer = self.client().view(request).await;
        let answer = answer.during(|| format!("view the snapshot {parent:?} of {}", self.name))?;
        Ok(answer.into_inner().mounts)
    }

    /// Turns the active snapshot `key` into the committed one `name`.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn commit(
        &self,
        name: &str,
        key: &str,
        labels: &[(&str, &str)],
    ) -> Result<(), ContainerdError> {
        let request = self.containerd.request(CommitSnapshotRequest {
            snapshotter: self.name.clone(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels: owned(labels),
        });
        let answer = self.client().commit(request).await;
        answer.during(|| format!("commit the snapshot {name:?} of {}", self.name))?;
        Ok(())
    }

    /// Removes the snapshot `key`.
    ///
    /// # Errors
    /// The answer of containerd, also when the snapshot does not exist:
    /// [`ContainerdError::is_not_found`].
    pub async fn remove(&self, key: &str) -> Result<(), ContainerdError> {
        let request = self.containerd.request(RemoveSnapshotRequest {
            snapshotter: self.name.clone(),
            key: key.to_owned(),
        });
        let answer = self.client().remove(request).await;
        answer.during(|| format!("remove the snapshot {key:?} of {}", self.name))?;
        Ok(())
    }

    /// Removes the snapshot `key`, if it exists.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn remove_if_exists(&self, key: &str) -> Result<(), ContainerdError> {
        match self.remove(key).await {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    /// Changes the fields `fields` of a snapshot's record to those of `info`; gives the new record.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn update(&self, info: Info, fields: &[&str]) -> Result<Info, ContainerdError> {
        let act = format!("change the snapshot {:?} of {}", info.name, self.name);
        let paths = fields.iter().map(|field| (*field).to_owned()).collect();
        let request = self.containerd.request(UpdateSnapshotRequest {
            snapshotter: self.name.clone(),
            info: Some(info),
            update_mask: Some(FieldMask { paths }),
        });
        let answer = self.client().update(request).await;
        let answer = answer.during(|| act.clone())?;
        present(answer.into_inner().info, "info", || act)
    }

    /// Bytes and inodes of the snapshot `key` alone, without its parents.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn usage(&self, key: &str) -> Result<UsageResponse, ContainerdError> {
        let request = self.containerd.request(UsageRequest {
            snapshotter: self.name.clone(),
            key: key.to_owned(),
        });
        let answer = self.client().usage(request).await;
        let answer = answer.during(|| format!("get the usage of {key:?} from {}", self.name))?;
        Ok(answer.into_inner())
    }

    /// The records of all snapshots that pass one of the filters; without filters, of all.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn list(&self, filters: &[&str]) -> Result<Vec<Info>, ContainerdError> {
        let mut pages = self.list_pages(filters).await?;
        let mut infos = Vec::new();
        while let Some(page) = pages.next().await? {
            infos.extend(page);
        }
        Ok(infos)
    }

    /// What [`Self::list`] gives, page by page.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn list_pages(&self, filters: &[&str]) -> Result<SnapshotPages, ContainerdError> {
        let request = self.containerd.request(ListSnapshotsRequest {
            snapshotter: self.name.clone(),
            filters: filters.iter().map(|filter| (*filter).to_owned()).collect(),
        });
        let answer = self.client().list(request).await;
        let answer = answer.during(|| format!("list the snapshots of {}", self.name))?;
        Ok(SnapshotPages {
            snapshotter: self.name.clone(),
            stream: answer.into_inner(),
        })
    }

    /// Lets the snapshotter delete what belongs to no snapshot any more.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn cleanup(&self) -> Result<(), ContainerdError> {
        let request = self.containerd.request(CleanupRequest {
            snapshotter: self.name.clone(),
        });
        let answer = self.client().cleanup(request).await;
        answer.during(|| format!("clean up the snapshotter {}", self.name))?;
        Ok(())
    }
}
