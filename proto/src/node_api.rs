//! The API of a node, `transship.node.v1.Node`, on `/run/transship/node.sock`; proto/node.proto says
//! the same for other languages.
//!
//! ```text
//! POST /transship.node.v1.Node/CheckpointPod    CheckpointPodRequest -> CheckpointPodResponse
//! POST /transship.node.v1.Node/RestorePod       RestorePodRequest    -> RestorePodResponse
//! POST /transship.node.v1.Node/ExportSnapshot   ExportSnapshotRequest -> stream of Chunk
//! POST /transship.node.v1.Node/ImportSnapshot   stream of ImportSnapshotRequest -> ImportSnapshotResponse
//! ```
//!
//! The first two have the fields that KEP-5823 gives to CheckpointPod and RestorePod of the CRI, so
//! that a runtime can hand them on as they come; what they share with the CRI (`PodSandboxConfig`,
//! `ContainerConfig`) is the CRI's own message.

use std::collections::HashMap;
use std::sync::Arc;

use k8s_cri::v1::{ContainerConfig, PodSandboxConfig};
use tonic::body::Body;
use tonic::client::Grpc as ClientGrpc;
use tonic::codegen::http;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};
use tonic_prost::ProstCodec;

use crate::grpc_service::{
    Answers, GrpcServer, Methods, client_streaming, no_method, server_streaming, unary,
};

/// Where it listens unless somebody says otherwise.
pub const NODE_SOCKET: &str = "/run/transship/node.sock";

/// What becomes of a pod after its checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum PostCheckpointState {
    /// It goes on.
    Running = 0,
    /// It is stopped, and has not run since the moment of the checkpoint.
    Stopped = 1,
}

/// Takes a checkpoint of a pod.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CheckpointPodRequest {
    /// Id of the sandbox; `namespace/name` is understood, too.
    #[prost(string, tag = "1")]
    pub pod_sandbox_id: String,
    /// The directory that the checkpoint becomes; it must not exist.
    #[prost(string, tag = "2")]
    pub path: String,
    /// Options of CRIU: those of the annotations `dev.transship/*`, without their prefix.
    #[prost(map = "string, string", tag = "3")]
    pub options: HashMap<String, String>,
    /// What becomes of the pod.
    #[prost(enumeration = "PostCheckpointState", tag = "4")]
    pub post_checkpoint_state: i32,
}

/// It has been taken.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct CheckpointPodResponse {}

/// Makes a pod of a checkpoint.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RestorePodRequest {
    /// The checkpoint's directory.
    #[prost(string, tag = "1")]
    pub path: String,
    /// The new sandbox.
    #[prost(message, optional, tag = "2")]
    pub config: Option<PodSandboxConfig>,
    /// Options of CRIU, in the place of those of the checkpoint.
    #[prost(map = "string, string", tag = "3")]
    pub options: HashMap<String, String>,
    /// The new containers, matched by name.
    #[prost(message, repeated, tag = "4")]
    pub container_configs: Vec<ContainerConfig>,
    /// The runtime of the sandbox; empty: the default one.
    #[prost(string, tag = "5")]
    pub runtime_handler: String,
}

/// It runs.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct RestorePodResponse {
    /// Id of the new sandbox.
    #[prost(string, tag = "1")]
    pub pod_sandbox_id: String,
}

/// Names a snapshot.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ExportSnapshotRequest {
    /// containerd's namespace.
    #[prost(string, tag = "1")]
    pub namespace: String,
    /// The snapshotter; empty: the container's, else the node's default.
    #[prost(string, tag = "2")]
    pub snapshotter: String,
    /// Key of the snapshot, or id of a container.
    #[prost(string, tag = "3")]
    pub key: String,
}

/// A part of an OCI layer.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Chunk {
    /// Its bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub data: Vec<u8>,
}

/// A part of a layer for a snapshot; the first one names it.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ImportSnapshotRequest {
    /// The snapshot, in the first message.
    #[prost(message, optional, tag = "1")]
    pub snapshot: Option<ImportTarget>,
    /// Bytes of the layer.
    #[prost(bytes = "vec", tag = "2")]
    pub data: Vec<u8>,
}

/// The snapshot that a layer is imported into.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ImportTarget {
    /// containerd's namespace.
    #[prost(string, tag = "1")]
    pub namespace: String,
    /// The snapshotter; empty: the node's default.
    #[prost(string, tag = "2")]
    pub snapshotter: String,
    /// Its key.
    #[prost(string, tag = "3")]
    pub key: String,
    /// The committed snapshot to make it on; absent: it exists, and is empty.
    #[prost(string, optional, tag = "4")]
    pub parent: Option<String>,
}

/// It has been imported.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct ImportSnapshotResponse {
    /// Files, directories and whiteouts of the layer.
    #[prost(uint64, tag = "1")]
    pub entries: u64,
    /// Bytes of its files.
    #[prost(uint64, tag = "2")]
    pub bytes: u64,
}

/// The layer on its way out.
pub type Chunks = Answers<Chunk>;

/// What answers the calls.
pub trait NodeApi: Send + Sync + 'static {
    /// Takes a checkpoint of a pod.
    fn checkpoint_pod(
        &self,
        request: CheckpointPodRequest,
    ) -> impl Future<Output = Result<CheckpointPodResponse, Status>> + Send;

    /// Makes a pod of a checkpoint.
    fn restore_pod(
        &self,
        request: RestorePodRequest,
    ) -> impl Future<Output = Result<RestorePodResponse, Status>> + Send;

    /// Writes what a snapshot changes.
    fn export_snapshot(
        &self,
        request: ExportSnapshotRequest,
    ) -> impl Future<Output = Result<Chunks, Status>> + Send;

    /// Fills a snapshot.
    fn import_snapshot(
        &self,
        request: Streaming<ImportSnapshotRequest>,
    ) -> impl Future<Output = Result<ImportSnapshotResponse, Status>> + Send;
}

/// A [`NodeApi`] as a service of a tonic server.
pub type NodeServer<N> = GrpcServer<NodeMethods<N>>;

/// The calls of the node's API.
#[derive(Debug)]
pub struct NodeMethods<N>(Arc<N>);

impl<N: NodeApi> NodeServer<N> {
    /// Serves `node`.
    pub fn new(node: N) -> Self {
        Self::of(NodeMethods(Arc::new(node)))
    }
}

impl<N: NodeApi> Methods for NodeMethods<N> {
    const NAME: &'static str = "transship.node.v1.Node";

    async fn answer(&self, method: &str, request: http::Request<Body>) -> http::Response<Body> {
        let node = || Arc::clone(&self.0);
        match method {
            "CheckpointPod" => {
                let call = |request: Request<_>| {
                    let node = node();
                    async move { node.checkpoint_pod(request.into_inner()).await }
                };
                unary(request, call).await
            }
            "RestorePod" => {
                let call = |request: Request<_>| {
                    let node = node();
                    async move { node.restore_pod(request.into_inner()).await }
                };
                unary(request, call).await
            }
            "ExportSnapshot" => {
                let call = |request: Request<_>| {
                    let node = node();
                    async move { node.export_snapshot(request.into_inner()).await }
                };
                server_streaming(request, call).await
            }
            "ImportSnapshot" => {
                let call = |request: Request<_>| {
                    let node = node();
                    async move { node.import_snapshot(request.into_inner()).await }
                };
                client_streaming(request, call).await
            }
            _ => no_method(&request),
        }
    }
}

/// A client of the API.
#[derive(Debug, Clone)]
pub struct NodeClient {
    grpc: ClientGrpc<Channel>,
}

impl NodeClient {
    /// Speaks over `channel`.
    #[must_use]
    pub fn new(channel: Channel) -> Self {
        Self {
            grpc: ClientGrpc::new(channel),
        }
    }

    /// Takes a checkpoint of a pod.
    ///
    /// # Errors
    /// What the node answers.
    pub async fn checkpoint_pod(
        &mut self,
        request: CheckpointPodRequest,
    ) -> Result<CheckpointPodResponse, Status> {
        self.ready().await?;
        let path = http::uri::PathAndQuery::from_static("/transship.node.v1.Node/CheckpointPod");
        let (request, codec) = (Request::new(request), ProstCodec::default());
        let answer = self.grpc.unary(request, path, codec).await?;
        Ok(answer.into_inner())
    }

    /// Makes a pod of a checkpoint.
    ///
    /// # Errors
    /// What the node answers.
    pub async fn restore_pod(
        &mut self,
        request: RestorePodRequest,
    ) -> Result<RestorePodResponse, Status> {
        self.ready().await?;
        let path = http::uri::PathAndQuery::from_static("/transship.node.v1.Node/RestorePod");
        let (request, codec) = (Request::new(request), ProstCodec::default());
        let answer = self.grpc.unary(request, path, codec).await?;
        Ok(answer.into_inner())
    }

    /// Reads what a snapshot changes.
    ///
    /// # Errors
    /// What the node answers.
    pub async fn export_snapshot(
        &mut self,
        request: ExportSnapshotRequest,
    ) -> Result<Streaming<Chunk>, Status> {
        self.ready().await?;
        let path = http::uri::PathAndQuery::from_static("/transship.node.v1.Node/ExportSnapshot");
        let (request, codec) = (Request::new(request), ProstCodec::default());
        let answer = self.grpc.server_streaming(request, path, codec).await?;
        Ok(answer.into_inner())
    }

    /// Fills a snapshot.
    ///
    /// # Errors
    /// What the node answers.
    pub async fn import_snapshot(
        &mut self,
        requests: Vec<ImportSnapshotRequest>,
    ) -> Result<ImportSnapshotResponse, Status> {
        self.ready().await?;
        let path = http::uri::PathAndQuery::from_static("/transship.node.v1.Node/ImportSnapshot");
        let requests = tonic::codegen::tokio_stream::iter(requests);
        let (request, codec) = (Request::new(requests), ProstCodec::default());
        let answer = self.grpc.client_streaming(request, path, codec).await?;
        Ok(answer.into_inner())
    }

    async fn ready(&mut self) -> Result<(), Status> {
        let ready = self.grpc.ready().await;
        ready.map_err(|error| Status::unavailable(format!("the node is not ready: {error}")))
    }
}
