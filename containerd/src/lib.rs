//! The client of containerd that all of Transship uses.
//!
//! ```text
//!  Containerd::connect ──> Containerd   one connection, one namespace, perhaps a lease
//!                            ├─ containers   records and specs
//!                            ├─ tasks        freeze, dump, create, start, kill
//!                            ├─ images       image -> manifest, config, chain id; unpack
//!                            ├─ rebuilt_image  an image whose blobs are gone, out of its snapshots
//!                            ├─ content      blobs out of the store, their labels
//!                            ├─ upload       one blob into the store
//!                            ├─ diffs        two snapshots compared; a layer applied
//!                            ├─ leases       what protects new objects from garbage collection
//!                            ├─ events       what others hear of
//!                            ├─ plugins      which snapshotters and differs work
//!                            └─ snapshotter(name) ──> Snapshotter   prepare, mounts, commit, remove ...
//! ```
//!
//! Every request carries containerd's namespace and, if there is one, the lease. Requests and answers
//! are the generated types of `containerd_client` where they are of use to the caller. Clones share the
//! connection, which is made again after containerd was restarted. [`Snapshotter`] speaks to the socket
//! of a proxy plugin as well.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_client::services::v1::ListNamespacesRequest;
use containerd_client::services::v1::namespaces_client::NamespacesClient;
use containerd_client::services::v1::version_client::VersionClient;
use containerd_client::tonic;
use tonic::Request;
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use tonic::transport::Channel;

mod containers;
mod content;
mod diffs;
mod error;
mod events;
mod images;
pub mod labels;
mod leases;
mod plugins;
mod rebuilt_image;
mod snapshots;
mod tasks;
mod upload;

pub use containers::NewContainer;
pub use content::BlobPieces;
pub use error::{Cause, ContainerdError};
pub use images::{ImageBase, ResolvedImage, chain_id};
pub use labels::rfc3339;
pub use snapshots::{SnapshotPages, Snapshotter};
pub use tasks::Output;
pub use upload::Upload;

pub(crate) use error::{During, present};
pub(crate) use transship_proto::MESSAGE_LIMIT;

/// gRPC header with containerd's namespace.
const NAMESPACE_HEADER: &str = "containerd-namespace";
/// gRPC header with the id of the lease that new objects belong to.
const LEASE_HEADER: &str = "containerd-lease";

/// The namespace that the headers of a request to a plugin name, if they do.
#[must_use]
pub fn namespace_of(headers: &MetadataMap) -> Option<&str> {
    headers.get(NAMESPACE_HEADER)?.to_str().ok()
}

/// A containerd, seen through one of its namespaces.
#[derive(Debug, Clone)]
pub struct Containerd {
    channel: Channel,
    address: Arc<PathBuf>,
    namespace: MetadataValue<Ascii>,
    lease: Option<MetadataValue<Ascii>>,
}

impl Containerd {
    /// Connects to the containerd that listens on the socket `address`.
    ///
    /// # Errors
    /// Nobody listens there, or `namespace` cannot be a gRPC header.
    pub async fn connect(address: &Path, namespace: &str) -> Result<Self, ContainerdError> {
        let channel = containerd_client::connect(address)
            .await
            .during(|| format!("connect to containerd at {}", address.display()))?;
        Ok(Self {
            channel,
            address: Arc::new(address.to_path_buf()),
            namespace: header(namespace)?,
            lease: None,
        })
    }

    /// The same containerd in another namespace. A lease belongs to its namespace and is left behind.
    ///
    /// # Errors
    /// `namespace` cannot be a gRPC header.
    pub fn in_namespace(&self, namespace: &str) -> Result<Self, ContainerdError> {
        Ok(Self {
            namespace: header(namespace)?,
            lease: None,
            ..self.clone()
        })
    }

    /// The namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        self.namespace.to_str().unwrap_or_default()
    }

    /// containerd's socket.
    #[must_use]
    pub fn address(&self) -> &Path {
        &self.address
    }

    /// The connection, for the CRI, which has a client of its own.
    #[must_use]
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let headers = request.metadata_mut();
        headers.insert(NAMESPACE_HEADER, self.namespace.clone());
        if let Some(lease) = &self.lease {
            headers.insert(LEASE_HEADER, lease.clone());
        }
        request
    }

    /// containerd's version.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn version(&self) -> Result<String, ContainerdError> {
        let answer = VersionClient::new(self.channel())
            .version(self.request(()))
            .await
            .during(|| "ask containerd for its version".to_owned())?;
        Ok(answer.into_inner().version)
    }

    /// Names of all namespaces.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn namespaces(&self) -> Result<Vec<String>, ContainerdError> {
        let answer = NamespacesClient::new(self.channel())
            .list(ListNamespacesRequest::default())
            .await
            .during(|| "list the namespaces".to_owned())?;
        let namespaces = answer.into_inner().namespaces.into_iter();
        Ok(namespaces.map(|namespace| namespace.name).collect())
    }
}

fn header(value: &str) -> Result<MetadataValue<Ascii>, ContainerdError> {
    let header = value.parse().map_err(|_| Cause::Header(value.to_owned()));
    header.during(|| "call containerd".to_owned())
}

/// A suffix for keys and ids that no other call on this machine gets.
#[must_use]
pub fn unique() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos());
    format!("{now:x}-{:x}", COUNT.fetch_add(1, Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unique_is_unique() {
        assert_ne!(unique(), unique());
    }
}
