//! One containerd: the connection, and what Transship asks of its services.
//!
//! ```text
//!  commands --> containers   records and specs
//!           --> tasks        freeze, dump, create, start, kill
//!           --> snapshots    prepare, mounts, remove
//!           --> images       image -> manifest, config, chain id; unpack
//!           --> content      blobs in and out
//!           --> diffs        two snapshots compared
//! ```
//!
//! Every call carries containerd's namespace, and the lease that protects new objects from garbage
//! collection while there is one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::version_client::VersionClient;
use containerd_client::services::v1::{CreateRequest, DeleteRequest};
use containerd_client::tonic;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

pub mod containers;
pub mod content;
pub mod diffs;
pub mod images;
pub mod plugins;
pub mod snapshots;
pub mod tasks;

/// A call that containerd refused.
#[derive(Debug, thiserror::Error)]
#[error("cannot {act}")]
pub struct NodeError {
    act: String,
    source: CallError,
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// containerd's answer.
    #[error("{}", .0.message())]
    Status(Status),
    /// There is no answer.
    #[error(transparent)]
    Transport(#[from] tonic::transport::Error),
    /// A value that cannot go into a header.
    #[error("{0:?} cannot be used in a gRPC header")]
    Header(String),
    /// An answer that lacks what it must hold.
    #[error("containerd's answer holds no {0}")]
    Incomplete(&'static str),
}

impl NodeError {
    /// Whether the thing asked for does not exist.
    pub fn is_not_found(&self) -> bool {
        self.code() == Some(Code::NotFound)
    }

    /// Whether the thing to be made exists.
    pub fn is_already_exists(&self) -> bool {
        self.code() == Some(Code::AlreadyExists)
    }

    fn code(&self) -> Option<Code> {
        match &self.source {
            CallError::Status(status) => Some(status.code()),
            _ => None,
        }
    }
}

/// Adds the act to a failed call.
pub trait During<T> {
    fn during(self, act: impl FnOnce() -> String) -> Result<T, NodeError>;
}

impl<T> During<T> for Result<T, Status> {
    fn during(self, act: impl FnOnce() -> String) -> Result<T, NodeError> {
        self.map_err(|status| NodeError {
            act: act(),
            source: CallError::Status(status),
        })
    }
}

/// Takes a field that protobuf makes optional and containerd always fills.
pub fn present<T>(
    field: Option<T>,
    name: &'static str,
    act: impl FnOnce() -> String,
) -> Result<T, NodeError> {
    field.ok_or_else(|| NodeError {
        act: act(),
        source: CallError::Incomplete(name),
    })
}

/// A containerd, seen through one of its namespaces.
#[derive(Debug, Clone)]
pub struct Node {
    channel: Channel,
    address: PathBuf,
    namespace: MetadataValue<Ascii>,
    lease: Option<MetadataValue<Ascii>>,
}

impl Node {
    /// Connects to the containerd that listens on `address`.
    pub async fn connect(address: &Path, namespace: &str) -> Result<Self, NodeError> {
        let act = || format!("connect to containerd at {}", address.display());
        let channel = containerd_client::connect(address)
            .await
            .map_err(|error| NodeError {
                act: act(),
                source: error.into(),
            })?;
        Ok(Self {
            channel,
            address: address.to_path_buf(),
            namespace: header(namespace)?,
            lease: None,
        })
    }

    /// The same containerd, another namespace.
    pub fn in_namespace(&self, namespace: &str) -> Result<Self, NodeError> {
        Ok(Self {
            namespace: header(namespace)?,
            ..self.clone()
        })
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        self.namespace.to_str().unwrap_or_default()
    }

    /// containerd's socket.
    pub fn address(&self) -> &Path {
        &self.address
    }

    /// The connection, for services that have a client of their own.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request
            .metadata_mut()
            .insert("containerd-namespace", self.namespace.clone());
        if let Some(lease) = &self.lease {
            request
                .metadata_mut()
                .insert("containerd-lease", lease.clone());
        }
        request
    }

    /// containerd's version.
    pub async fn version(&self) -> Result<String, NodeError> {
        let answer = VersionClient::new(self.channel())
            .version(self.request(()))
            .await
            .during(|| "ask containerd for its version".to_owned())?;
        Ok(answer.into_inner().version)
    }

    /// The same node, with a lease that keeps what is made under it for `lifetime` at the longest.
    pub async fn with_lease(&self, lifetime: Duration) -> Result<Self, NodeError> {
        let expires = std::time::SystemTime::now() + lifetime;
        let id = format!("transship-{}-{}", std::process::id(), unique());
        let labels = [("containerd.io/gc.expire".to_owned(), rfc3339(expires))].into();
        LeasesClient::new(self.channel())
            .create(self.request(CreateRequest {
                id: id.clone(),
                labels,
            }))
            .await
            .during(|| "make a lease".to_owned())?;
        Ok(Self {
            lease: Some(header(&id)?),
            ..self.clone()
        })
    }

    /// Ends the lease: what nothing else refers to may be collected.
    pub async fn drop_lease(&self) -> Result<(), NodeError> {
        let Some(lease) = &self.lease else {
            return Ok(());
        };
        let id = lease.to_str().unwrap_or_default().to_owned();
        let bare = Self {
            lease: None,
            ..self.clone()
        };
        LeasesClient::new(self.channel())
            .delete(bare.request(DeleteRequest { id, sync: false }))
            .await
            .during(|| "delete a lease".to_owned())?;
        Ok(())
    }
}

fn header(value: &str) -> Result<MetadataValue<Ascii>, NodeError> {
    value.parse().map_err(|_| NodeError {
        act: "call containerd".to_owned(),
        source: CallError::Header(value.to_owned()),
    })
}

/// A number that no other call of this machine gets: for keys of temporary objects.
pub fn unique() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos());
    format!("{now:x}-{:x}", COUNT.fetch_add(1, Ordering::Relaxed))
}

/// A moment as containerd's garbage collector reads it.
pub fn rfc3339(time: std::time::SystemTime) -> String {
    let time = prost_types::Timestamp::from(time);
    prost_types::Timestamp { nanos: 0, ..time }.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_written_as_the_garbage_collector_reads_it() {
        let time = std::time::UNIX_EPOCH + Duration::from_millis(1_700_000_000_500);
        assert_eq!(rfc3339(time), "2023-11-14T22:13:20Z");
    }

    #[test]
    fn unique_is_unique() {
        assert_ne!(unique(), unique());
    }
}
