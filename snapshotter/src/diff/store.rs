//! The containerd that a differ belongs to.
//!
//! The lease of whoever called containerd does not reach a proxied differ (its gRPC header is not
//! forwarded), so content is written under a lease of our own, which outlives the call for a while:
//! see leases.rs.

use std::fs::File;
use std::path::PathBuf;

use containerd_client::types::Descriptor;
use tokio::sync::OnceCell;
use transship_containerd::{Containerd, ContainerdError};

use super::blob_file;

/// A connection that is made at the first call, because containerd starts after its plugins.
#[derive(Debug)]
pub(super) struct Connection {
    address: PathBuf,
    containerd: OnceCell<Containerd>,
    /// Where the content store says that it lies.
    content_root: OnceCell<Option<PathBuf>>,
}

impl Connection {
    pub(super) fn to(address: PathBuf) -> Self {
        Self {
            address,
            containerd: OnceCell::new(),
            content_root: OnceCell::new(),
        }
    }

    async fn connected(&self) -> Result<&Containerd, ContainerdError> {
        let connect = || Containerd::connect(&self.address, "default");
        self.containerd.get_or_try_init(connect).await
    }

    /// Names of all namespaces.
    pub(super) async fn namespaces(&self) -> Result<Vec<String>, ContainerdError> {
        self.connected().await?.namespaces().await
    }

    /// containerd as the namespace sees it.
    pub(super) async fn in_namespace(
        &self,
        namespace: &str,
    ) -> Result<Containerd, ContainerdError> {
        self.connected().await?.in_namespace(namespace)
    }

    /// Opens the file of a blob that the namespace has; None when it has to be read through
    /// [`Containerd::read_blob`].
    pub(super) async fn open_blob(
        &self,
        containerd: &Containerd,
        layer: &Descriptor,
    ) -> Result<Option<File>, ContainerdError> {
        let root = self
            .content_root
            .get_or_try_init(|| containerd.content_root())
            .await?;
        let Some(root) = root else {
            return Ok(None);
        };
        match containerd.blob(&layer.digest).await? {
            Some(info) if info.size == layer.size => {
                let size = u64::try_from(layer.size).unwrap_or(0);
                Ok(blob_file::open_blob(root, &layer.digest, size))
            }
            // Reading it tells what is wrong.
            _ => Ok(None),
        }
    }
}
