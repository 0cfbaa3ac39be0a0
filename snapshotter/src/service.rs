//! The snapshots service on the wire.
//!
//! A request comes in, is logged once with its key, duration and result, and goes to the thread where
//! [`Snapshots`] does it (dispatch.rs). gRPC codes are decided in `From<SnapshotError> for Status` alone.

use std::io;
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use containerd_client::services::v1::snapshots as wire;
use containerd_client::tonic::transport::Server;
use containerd_client::tonic::{self, Code, Request, Response, Status};
use containerd_client::types::Mount as WireMount;
use prost_types::Timestamp;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use transship_proto::MESSAGE_LIMIT;
use transship_proto::snapshots_api::{
    CommitSnapshotRequest, Empty, Snapshots as SnapshotsApi, SnapshotsServer,
};

use crate::dispatch::{Dispatch, InFlight, Work};
use crate::error::{SnapshotError, one_line};
use crate::filter::Filter;
use crate::metrics::Metrics;
use crate::mounts::Mount;
use crate::record::{Info, Kind};
use crate::snapshots::Snapshots;

/// Snapshots in one message of List, as containerd's own service has them.
const LIST_MESSAGE: usize = 100;
/// Messages of List that are read ahead of its client.
const LIST_AHEAD: usize = 2;

/// Serves the snapshots API on `connections` until there are no more to come; calls in flight are
/// finished.
///
/// # Errors
/// When the HTTP/2 server fails.
pub async fn serve(
    service: Service,
    connections: impl Stream<Item = io::Result<UnixStream>>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let service = SnapshotsServer::new(service).max_decoding_message_size(MESSAGE_LIMIT);
    Server::builder()
        .add_service(service)
        .serve_with_incoming_shutdown(connections, std::future::pending())
        .await?;
    Ok(())
}

/// The snapshots service.
#[derive(Debug)]
pub struct Service {
    snapshots: Arc<Snapshots>,
    metrics: Arc<Metrics>,
    dispatch: Dispatch,
}

impl Service {
    /// A service that works on `concurrent_calls` at the same time.
    ///
    /// # Errors
    /// When their threads cannot be started.
    pub fn new(
        snapshots: Arc<Snapshots>,
        metrics: Arc<Metrics>,
        concurrent_calls: usize,
    ) -> Result<Self, SnapshotError> {
        Ok(Self {
            snapshots,
            metrics,
            dispatch: Dispatch::start(concurrent_calls)?,
        })
    }

    /// Tells when the calls that have come in are answered.
    #[must_use]
    pub fn calls_in_flight(&self) -> InFlight {
        self.dispatch.in_flight()
    }

    /// Runs `act` where its `work` belongs and logs how it went.
    async fn call<T: Send + 'static>(
        &self,
        rpc: &'static str,
        key: &str,
        work: Work,
        act: impl FnOnce(&Arc<Snapshots>) -> Result<T, SnapshotError> + Send + 'static,
    ) -> Result<T, Status> {
        let start = Instant::now();
        let snapshots = Arc::clone(&self.snapshots);
        let result = match self.dispatch.run(work, move || act(&snapshots)).await {
            Some(result) => result.map_err(Status::from),
            None => Err(Status::internal(format!("{rpc} panicked"))),
        };
        let failure = result.as_ref().err();
        note_call(&self.metrics, rpc, key, start.elapsed(), failure);
        result
    }
}

/// Logs a call and counts it.
fn note_call(
    metrics: &Metrics,
    rpc: &'static str,
    key: &str,
    took: Duration,
    failure: Option<&Status>,
) {
    metrics.note_call(rpc, code_name(failure.map_or(Code::Ok, Status::code)), took);
    let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    match failure {
        None => tracing::debug!(rpc, key, took_us, "ok"),
        Some(status) => {
            let (code, error) = (status.code(), status.message());
            if matches!(
                code,
                Code::NotFound | Code::AlreadyExists | Code::FailedPrecondition
            ) {
                // Part of containerd's normal work: it asks first and prepares when told "not found".
                tracing::debug!(rpc, key, took_us, ?code, error, "refused");
            } else {
                tracing::warn!(rpc, key, took_us, ?code, error, "failed");
            }
        }
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl SnapshotsApi for Service {
    type ListStream = ReceiverStream<Result<wire::ListSnapshotsResponse, Status>>;

    async fn prepare(
        &self,
        request: Request<wire::PrepareSnapshotRequest>,
    ) -> Answer<wire::PrepareSnapshotResponse> {
        let request = request.into_inner();
        let asked = request.key.clone();
        let prepare = move |s: &Arc<Snapshots>| {
            let labels = request.labels.into_iter().collect();
            s.prepare(&request.key, &request.parent, labels)
        };
        let mounts = self.call("prepare", &asked, Work::Write, prepare).await?;
        Ok(Response::new(wire::PrepareSnapshotResponse {
            mounts: mounts_to_wire(mounts),
        }))
    }

    async fn view(
        &self,
        request: Request<wire::ViewSnapshotRequest>,
    ) -> Answer<wire::ViewSnapshotResponse> {
        let request = request.into_inner();
        let asked = request.key.clone();
        let view = move |s: &Arc<Snapshots>| {
            let labels = request.labels.into_iter().collect();
            s.view(&request.key, &request.parent, labels)
        };
        let mounts = self.call("view", &asked, Work::Write, view).await?;
        Ok(Response::new(wire::ViewSnapshotResponse {
            mounts: mounts_to_wire(mounts),
        }))
    }

    async fn mounts(&self, request: Request<wire::MountsRequest>) -> Answer<wire::MountsResponse> {
        let key = request.into_inner().key;
        let asked = key.clone();
        let mounts = move |s: &Arc<Snapshots>| s.mounts(&key);
        let mounts = self.call("mounts", &asked, Work::Read, mounts).await?;
        Ok(Response::new(wire::MountsResponse {
            mounts: mounts_to_wire(mounts),
        }))
    }

    async fn commit(&self, request: Request<CommitSnapshotRequest>) -> Answer<Empty> {
        let request = request.into_inner();
        let asked = request.key.clone();
        let work = self.snapshots.work_of_commit(&asked);
        let commit = move |s: &Arc<Snapshots>| {
            if !request.parent.is_empty() {
                s.require_parent(&request.key, &request.parent)?;
            }
            let labels = request.labels.into_iter().collect();
            s.commit(&request.name, &request.key, labels)
        };
        self.call("commit", &asked, work, commit).await?;
        Ok(Response::new(Empty {}))
    }

    async fn remove(&self, request: Request<wire::RemoveSnapshotRequest>) -> Answer<Empty> {
        let key = request.into_inner().key;
        let asked = key.clone();
        let work = self.snapshots.work_of_remove();
        let remove = move |s: &Arc<Snapshots>| s.remove(&key);
        self.call("remove", &asked, work, remove).await?;
        Ok(Response::new(Empty {}))
    }

    async fn stat(
        &self,
        request: Request<wire::StatSnapshotRequest>,
    ) -> Answer<wire::StatSnapshotResponse> {
        let key = request.into_inner().key;
        let asked = key.clone();
        let stat = move |s: &Arc<Snapshots>| s.stat(&key);
        let info = self.call("stat", &asked, Work::Read, stat).await?;
        Ok(Response::new(wire::StatSnapshotResponse {
            info: Some(to_wire(info)),
        }))
    }

    async fn update(
        &self,
        request: Request<wire::UpdateSnapshotRequest>,
    ) -> Answer<wire::UpdateSnapshotResponse> {
        let request = request.into_inner();
        let wanted = request.info.unwrap_or_default();
        let fields = request.update_mask.unwrap_or_default().paths;
        let asked = wanted.name.clone();
        let update = move |s: &Arc<Snapshots>| {
            s.update(&wanted.name, wanted.labels.into_iter().collect(), &fields)
        };
        let info = self.call("update", &asked, Work::Write, update).await?;
        Ok(Response::new(wire::UpdateSnapshotResponse {
            info: Some(to_wire(info)),
        }))
    }

    async fn list(&self, request: Request<wire::ListSnapshotsRequest>) -> Answer<Self::ListStream> {
        let filters = request.into_inner().filters;
        let asked = filters.join(" or ");
        let filter = Filter::parse(&filters)
            .map_err(Status::from)
            .inspect_err(|status| {
                note_call(&self.metrics, "list", &asked, Duration::ZERO, Some(status));
            })?;
        let snapshots = Arc::clone(&self.snapshots);
        let call = self.dispatch.enter();
        let metrics = Arc::clone(&self.metrics);
        let (sender, receiver) = mpsc::channel(LIST_AHEAD);
        tokio::task::spawn_blocking(move || {
            let _call = call;
            let start = Instant::now();
            let failure = send_list(&snapshots, filter, &sender)
                .map_err(Status::from)
                .err();
            if let Some(status) = &failure {
                // A client that has gone away does not want to know.
                drop(sender.blocking_send(Err(status.clone())));
            }
            note_call(&metrics, "list", &asked, start.elapsed(), failure.as_ref());
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn usage(&self, request: Request<wire::UsageRequest>) -> Answer<wire::UsageResponse> {
        let key = request.into_inner().key;
        let asked = key.clone();
        let count = move |s: &Arc<Snapshots>| s.usage(&key);
        let usage = self.call("usage", &asked, Work::Count, count).await?;
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        Ok(Response::new(wire::UsageResponse {
            inodes: number(usage.inodes),
            size: number(usage.size),
        }))
    }

    async fn cleanup(&self, _request: Request<wire::CleanupRequest>) -> Answer<Empty> {
        let cleanup = |s: &Arc<Snapshots>| s.cleanup();
        self.call("cleanup", "", Work::LongWrite, cleanup).await?;
        Ok(Response::new(Empty {}))
    }
}

/// Sends the snapshots that `filter` lets through, until the client has gone away.
fn send_list(
    snapshots: &Arc<Snapshots>,
    filter: Filter,
    sender: &mpsc::Sender<Result<wire::ListSnapshotsResponse, Status>>,
) -> Result<(), SnapshotError> {
    let mut info = Vec::with_capacity(LIST_MESSAGE);
    for listed in snapshots.list(filter)? {
        info.push(to_wire(listed?));
        if info.len() == LIST_MESSAGE {
            let info = mem::take(&mut info);
            if { sender.blocking_send(Ok(wire::ListSnapshotsResponse { info })) }.is_err() {
                return Ok(());
            }
        }
    }
    if !info.is_empty() {
        drop(sender.blocking_send(Ok(wire::ListSnapshotsResponse { info })));
    }
    Ok(())
}

fn to_wire(info: Info) -> wire::Info {
    let kind = match info.kind {
        Kind::View => wire::Kind::View,
        Kind::Active => wire::Kind::Active,
        Kind::Committed => wire::Kind::Committed,
    };
    wire::Info {
        kind: kind.into(),
        name: info.name,
        parent: info.parent,
        labels: info.labels.into_iter().collect(),
        created_at: Some(to_timestamp(info.created)),
        updated_at: Some(to_timestamp(info.updated)),
    }
}

fn to_timestamp(nanoseconds: i64) -> Timestamp {
    let nanoseconds = nanoseconds.max(0);
    Timestamp {
        seconds: nanoseconds / 1_000_000_000,
        nanos: i32::try_from(nanoseconds % 1_000_000_000).expect("less than a second"),
    }
}

fn mounts_to_wire(mounts: Vec<Mount>) -> Vec<WireMount> {
    mounts
        .into_iter()
        .map(|mount| WireMount {
            r#type: mount.fs_type.to_owned(),
            source: mount.source,
            options: mount.options,
            ..WireMount::default()
        })
        .collect()
}

impl From<SnapshotError> for Status {
    fn from(error: SnapshotError) -> Self {
        Status::new(code_of(&error), one_line(&error))
    }
}

/// The codes that containerd turns back into its own errors.
fn code_of(error: &SnapshotError) -> Code {
    use SnapshotError as E;
    match error {
        E::NotFound { .. } | E::ParentNotFound { .. } => Code::NotFound,
        E::AlreadyExists { .. } => Code::AlreadyExists,
        E::ParentNotCommitted { .. } | E::ImmutableField { .. } | E::Invalid { .. } => {
            Code::InvalidArgument
        }
        E::NotActive { .. }
        | E::NoMounts { .. }
        | E::HasChildren { .. }
        | E::ParentAtCommit { .. } => Code::FailedPrecondition,
        E::DamagedDatabase { .. } | E::Damaged { .. } => Code::DataLoss,
        E::OverQuota => Code::ResourceExhausted,
        E::Io(_) | E::Database { .. } | E::UnknownOutcome { .. } | E::LeaderPanicked => {
            match error.io_source().map(io::Error::kind) {
                _ if error.is_disk_full() => Code::ResourceExhausted,
                // EMFILE and ENFILE have no stable kind.
                Some(io::ErrorKind::ReadOnlyFilesystem) => Code::FailedPrecondition,
                _ if error.io_source().is_some_and(is_out_of_files) => Code::ResourceExhausted,
                _ => Code::Internal,
            }
        }
    }
}

/// The code as metrics show it.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::InvalidArgument => "invalid_argument",
        Code::NotFound => "not_found",
        Code::AlreadyExists => "already_exists",
        Code::FailedPrecondition => "failed_precondition",
        Code::ResourceExhausted => "resource_exhausted",
        Code::DataLoss => "data_loss",
        Code::Internal => "internal",
        _ => "other",
    }
}

fn is_out_of_files(error: &io::Error) -> bool {
    use nix::errno::Errno;
    // The kernel's number may be wrapped by whoever walked the directories.
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        let number = error.downcast_ref().and_then(io::Error::raw_os_error);
        if let Some(number) = number {
            return matches!(Errno::from_raw(number), Errno::EMFILE | Errno::ENFILE);
        }
        next = error.source();
    }
    false
}
