//! The server side of containerd's diff service, `containerd.services.diff.v1.Diff`.
//!
//! ```text
//! POST /containerd.services.diff.v1.Diff/Diff    DiffRequest  -> DiffResponse
//! POST /containerd.services.diff.v1.Diff/Apply   ApplyRequest -> ApplyResponse
//! ```
//!
//! The same from containerd 1.6 to 2.x, but for fields that older ones do not send:
//! `source_date_epoch` (1.7) and `sync_fs` (2.0).

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use containerd_client::services::v1::{ApplyRequest, ApplyResponse, DiffRequest, DiffResponse};
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

/// containerd's own limit for messages, in bytes.
const MAX_MESSAGE: usize = 16 << 20;

/// What answers the two calls.
pub trait Differ: Send + Sync + 'static {
    /// Writes what distinguishes the right mounts from the left ones to the content store.
    fn diff(
        &self,
        request: Request<DiffRequest>,
    ) -> impl Future<Output = Result<DiffResponse, Status>> + Send;

    /// Applies a layer of the content store to the mounts.
    fn apply(
        &self,
        request: Request<ApplyRequest>,
    ) -> impl Future<Output = Result<ApplyResponse, Status>> + Send;
}

/// A [`Differ`] as a service of a tonic server.
#[derive(Debug)]
pub struct DiffServer<D>(Arc<D>);

impl<D> DiffServer<D> {
    /// Serves `differ`.
    pub fn new(differ: D) -> Self {
        Self(Arc::new(differ))
    }
}

impl<D> Clone for DiffServer<D> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<D> NamedService for DiffServer<D> {
    const NAME: &'static str = "containerd.services.diff.v1.Diff";
}

impl<D: Differ> Service<http::Request<Body>> for DiffServer<D> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let differ = Arc::clone(&self.0);
        Box::pin(async move {
            Ok(match request.uri().path() {
                "/containerd.services.diff.v1.Diff/Diff" => {
                    let mut grpc =
                        Grpc::new(ProstCodec::default()).max_decoding_message_size(MAX_MESSAGE);
                    grpc.unary(DiffCall(differ), request).await
                }
                "/containerd.services.diff.v1.Diff/Apply" => {
                    let mut grpc =
                        Grpc::new(ProstCodec::default()).max_decoding_message_size(MAX_MESSAGE);
                    grpc.unary(ApplyCall(differ), request).await
                }
                path => Status::unimplemented(format!("there is no method {path}")).into_http(),
            })
        })
    }
}

struct DiffCall<D>(Arc<D>);

impl<D: Differ> UnaryService<DiffRequest> for DiffCall<D> {
    type Response = DiffResponse;
    type Future = BoxFuture<Response<DiffResponse>, Status>;

    fn call(&mut self, request: Request<DiffRequest>) -> Self::Future {
        let differ = Arc::clone(&self.0);
        Box::pin(async move { differ.diff(request).await.map(Response::new) })
    }
}

struct ApplyCall<D>(Arc<D>);

impl<D: Differ> UnaryService<ApplyRequest> for ApplyCall<D> {
    type Response = ApplyResponse;
    type Future = BoxFuture<Response<ApplyResponse>, Status>;

    fn call(&mut self, request: Request<ApplyRequest>) -> Self::Future {
        let differ = Arc::clone(&self.0);
        Box::pin(async move { differ.apply(request).await.map(Response::new) })
    }
}
