//! containerd's content store, seen through one namespace; and the leases that keep new content.
//!
//! The lease of whoever called containerd does not reach a proxied differ (its gRPC header is not
//! forwarded), so content is written under a lease of our own, which outlives the call for a while:
//! see leases.rs.

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::introspection_client::IntrospectionClient;
use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::{
    AbortRequest, AddResourceRequest, CreateRequest, DeleteRequest, Info, InfoRequest,
    ListStatusesRequest, PluginsRequest, ReadContentRequest, ReadContentResponse, Resource,
    UpdateRequest,
};
use containerd_client::tonic::metadata::{Ascii, MetadataValue};
use containerd_client::tonic::transport::{Channel, Error as TransportError};
use containerd_client::tonic::{Code, Request, Status, Streaming};
use containerd_client::types::Descriptor;
use prost_types::{FieldMask, Timestamp};
use tokio::sync::OnceCell;

use super::blob_file;

/// Label with the digest of a layer's uncompressed tar.
pub(super) const UNCOMPRESSED: &str = "containerd.io/uncompressed";
/// Label of what is kept for its own sake.
pub(super) const GC_ROOT: &str = "containerd.io/gc.root";
/// Label of a lease: when it ends by itself.
const GC_EXPIRE: &str = "containerd.io/gc.expire";

/// When a lease ends whose differ was killed: as containerd's own clients have it.
const LEASE_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// containerd's own limit for messages, in bytes.
const MAX_MESSAGE: usize = 16 << 20;

/// A call to containerd that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {act}")]
pub(super) struct CallError {
    /// What was asked for.
    pub(super) act: String,
    /// The answer.
    pub(super) source: Box<Refusal>,
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    /// containerd's answer.
    #[error("{}", .0.message())]
    Status(Status),
    /// There is no connection.
    #[error(transparent)]
    Transport(TransportError),
}

impl CallError {
    pub(super) fn code(&self) -> Code {
        match &*self.source {
            Refusal::Status(status) => status.code(),
            Refusal::Transport(_) => Code::Unavailable,
        }
    }
}

/// Adds the act to a failed call.
pub(super) trait During<T> {
    fn during(self, act: impl FnOnce() -> String) -> Result<T, CallError>;
}

impl<T> During<T> for Result<T, Status> {
    fn during(self, act: impl FnOnce() -> String) -> Result<T, CallError> {
        self.map_err(|status| CallError {
            act: act(),
            source: Box::new(Refusal::Status(status)),
        })
    }
}

/// The containerd that this differ belongs to. The connection is made at the first call, because
/// containerd starts after its plugins, and is made again after containerd was restarted.
#[derive(Debug)]
pub(super) struct Containerd {
    address: PathBuf,
    channel: OnceCell<Channel>,
    /// Where the content store says that it lies.
    content_root: OnceCell<Option<PathBuf>>,
}

impl Containerd {
    pub(super) fn at(address: PathBuf) -> Self {
        Self {
            address,
            channel: OnceCell::new(),
            content_root: OnceCell::new(),
        }
    }

    pub(super) async fn channel(&self) -> Result<Channel, CallError> {
        let channel = self
            .channel
            .get_or_try_init(|| containerd_client::connect(&self.address))
            .await
            .map_err(|error| CallError {
                act: format!("connect to containerd at {}", self.address.display()),
                source: Box::new(Refusal::Transport(error)),
            })?;
        Ok(channel.clone())
    }

    /// Opens a blob that the namespace has where it lies; None when it has to be read through
    /// [`Store::read`].
    pub(super) async fn open_blob(
        &self,
        store: &Store,
        layer: &Descriptor,
    ) -> Result<Option<File>, CallError> {
        let root = self
            .content_root
            .get_or_try_init(|| store.content_root())
            .await?;
        let Some(root) = root else {
            return Ok(None);
        };
        let info = store.info(&layer.digest).await?;
        if info.size != layer.size {
            // Reading it tells what is wrong.
            return Ok(None);
        }
        let size = u64::try_from(layer.size).unwrap_or(0);
        Ok(blob_file::open_blob(root, &layer.digest, size))
    }

    /// The store as the namespace sees it.
    pub(super) async fn store(&self, namespace: MetadataValue<Ascii>) -> Result<Store, CallError> {
        Ok(Store {
            channel: self.channel().await?,
            namespace,
            lease: None,
        })
    }
}

/// The content store in a namespace, perhaps under a lease.
#[derive(Debug, Clone)]
pub(super) struct Store {
    channel: Channel,
    namespace: MetadataValue<Ascii>,
    lease: Option<MetadataValue<Ascii>>,
}

impl Store {
    pub(super) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let headers = request.metadata_mut();
        headers.insert("containerd-namespace", self.namespace.clone());
        if let Some(lease) = &self.lease {
            headers.insert("containerd-lease", lease.clone());
        }
        request
    }

    pub(super) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    pub(super) fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE)
    }

    /// Namespace of the requests.
    pub(super) fn namespace(&self) -> &MetadataValue<Ascii> {
        &self.namespace
    }

    fn leases(&self) -> LeasesClient<Channel> {
        LeasesClient::new(self.channel.clone())
    }

    /// The same store under a new lease called `id`.
    pub(super) async fn with_lease(&self, id: &str) -> Result<Self, CallError> {
        let act = || format!("make the lease {id}");
        let expires = Timestamp::from(SystemTime::now() + LEASE_LIFETIME);
        let expires = Timestamp {
            nanos: 0,
            ..expires
        };
        let request = CreateRequest {
            id: id.to_owned(),
            labels: [(GC_EXPIRE.to_owned(), expires.to_string())].into(),
        };
        self.leases()
            .create(self.request(request))
            .await
            .during(act)?;
        let lease = id
            .parse()
            .map_err(|_| Status::invalid_argument("not a header"))
            .during(act)?;
        Ok(Self {
            lease: Some(lease),
            ..self.clone()
        })
    }

    /// Ends the lease, if there is one; what nobody refers to may be collected.
    pub(super) async fn end_lease(&self) -> Result<(), CallError> {
        let Some(lease) = &self.lease else {
            return Ok(());
        };
        let id = lease.to_str().unwrap_or_default().to_owned();
        let act = format!("end the lease {id}");
        let bare = Self {
            lease: None,
            ..self.clone()
        };
        let request = DeleteRequest { id, sync: false };
        match self.leases().delete(bare.request(request)).await {
            Err(status) if status.code() == Code::NotFound => Ok(()),
            answer => answer.during(|| act).map(drop),
        }
    }

    /// Puts a blob that was there before under the lease and gives it the labels that it lacks.
    pub(super) async fn adopt(
        &self,
        digest: &str,
        labels: &HashMap<String, String>,
    ) -> Result<(), CallError> {
        if let Some(lease) = &self.lease {
            let resource = AddResourceRequest {
                id: lease.to_str().unwrap_or_default().to_owned(),
                resource: Some(Resource {
                    id: digest.to_owned(),
                    r#type: "content".to_owned(),
                }),
            };
            self.leases()
                .add_resource(self.request(resource))
                .await
                .during(|| format!("keep the blob {digest}"))?;
        }
        let present = self.info(digest).await?.labels;
        let missing: HashMap<_, _> = labels
            .iter()
            .filter(|(name, _)| !present.contains_key(*name))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let request = UpdateRequest {
            update_mask: Some(FieldMask {
                paths: missing
                    .keys()
                    .map(|name| format!("labels.{name}"))
                    .collect(),
            }),
            info: Some(Info {
                digest: digest.to_owned(),
                labels: missing,
                ..Info::default()
            }),
        };
        self.content()
            .update(self.request(request))
            .await
            .during(|| format!("label the blob {digest}"))?;
        Ok(())
    }

    async fn info(&self, digest: &str) -> Result<Info, CallError> {
        let request = InfoRequest {
            digest: digest.to_owned(),
        };
        let answer = self.content().info(self.request(request)).await;
        let info = answer.during(|| format!("look up the blob {digest}"))?;
        Ok(info.into_inner().info.unwrap_or_default())
    }

    /// The root that containerd's own content store exports, when it is the only one.
    async fn content_root(&self) -> Result<Option<PathBuf>, CallError> {
        let request = PluginsRequest {
            filters: vec!["type==io.containerd.content.v1".to_owned()],
        };
        let answer = IntrospectionClient::new(self.channel())
            .plugins(self.request(request))
            .await
            .during(|| "list the content stores".to_owned())?;
        let stores = answer.into_inner().plugins.into_iter();
        let mut stores = stores.filter(|plugin| plugin.init_err.is_none());
        let root = match (stores.next(), stores.next()) {
            (Some(mut only), None) if only.id == "content" => only.exports.remove("root"),
            _ => None,
        };
        Ok(root.map(PathBuf::from).filter(|root| root.is_absolute()))
    }

    /// The content of a blob from its start, piece by piece.
    pub(super) async fn read(
        &self,
        digest: &str,
    ) -> Result<Streaming<ReadContentResponse>, CallError> {
        let request = ReadContentRequest {
            digest: digest.to_owned(),
            offset: 0,
            size: 0,
        };
        let answer = self.content().read(self.request(request)).await;
        Ok(answer
            .during(|| format!("read the blob {digest}"))?
            .into_inner())
    }

    /// Removes what was written under `reference` and not committed; nothing is fine.
    pub(super) async fn abort(&self, reference: &str) -> Result<(), CallError> {
        let request = AbortRequest {
            r#ref: reference.to_owned(),
        };
        match self.content().abort(self.request(request)).await {
            Err(status) if status.code() == Code::NotFound => Ok(()),
            answer => answer
                .during(|| format!("remove the unfinished content {reference:?}"))
                .map(drop),
        }
    }

    /// References of unfinished content that begin with `prefix`, which is plain letters.
    pub(super) async fn unfinished(&self, prefix: &str) -> Result<Vec<String>, CallError> {
        let request = ListStatusesRequest {
            filters: vec![format!("ref~=^{prefix}")],
        };
        let answer = self
            .content()
            .list_statuses(self.request(request))
            .await
            .during(|| "list unfinished content".to_owned())?;
        let statuses = answer.into_inner().statuses.into_iter();
        Ok(statuses
            .map(|status| status.r#ref)
            .filter(|reference| reference.starts_with(prefix))
            .collect())
    }
}
