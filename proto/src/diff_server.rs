//! The server side of containerd's diff service, `containerd.services.diff.v1.Diff`.
//!
//! ```text
//! POST /containerd.services.diff.v1.Diff/Diff    DiffRequest  -> DiffResponse
//! POST /containerd.services.diff.v1.Diff/Apply   ApplyRequest -> ApplyResponse
//! ```
//!
//! The same from containerd 1.6 to 2.x, but for fields that older ones do not send:
//! `source_date_epoch` (1.7) and `sync_fs` (2.0).

use std::sync::Arc;

use containerd_client::services::v1::{ApplyRequest, ApplyResponse, DiffRequest, DiffResponse};
use tonic::body::Body;
use tonic::codegen::http;
use tonic::{Request, Status};

use crate::grpc_service::{GrpcServer, Methods, no_method, unary};

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
pub type DiffServer<D> = GrpcServer<DiffMethods<D>>;

/// The calls of the diff service.
#[derive(Debug)]
pub struct DiffMethods<D>(Arc<D>);

impl<D: Differ> DiffServer<D> {
    /// Serves `differ`.
    pub fn new(differ: D) -> Self {
        Self::of(DiffMethods(Arc::new(differ)))
    }
}

impl<D: Differ> Methods for DiffMethods<D> {
    const NAME: &'static str = "containerd.services.diff.v1.Diff";

    async fn answer(&self, method: &str, request: http::Request<Body>) -> http::Response<Body> {
        let differ = || Arc::clone(&self.0);
        match method {
            "Diff" => {
                let call = |request| {
                    let differ = differ();
                    async move { differ.diff(request).await }
                };
                unary(request, call).await
            }
            "Apply" => {
                let call = |request| {
                    let differ = differ();
                    async move { differ.apply(request).await }
                };
                unary(request, call).await
            }
            _ => no_method(&request),
        }
    }
}
