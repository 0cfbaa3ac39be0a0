//! The snapshots service on the wire: the only module that knows the crate `containerd-snapshots`
//! (release 0.3 brings tonic 0.9 and prost 0.11; when a release on tonic 0.14 appears, only this
//! module and its dependency change).
//!
//! A request comes in as the crate's trait call, is logged once with its key, duration and result, and
//! goes to the thread where [`Snapshots`] does it (dispatch.rs). gRPC codes are decided in
//! `From<SnapshotError> for Status` alone.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use containerd_snapshots as api;
use containerd_snapshots::tonic::transport::Server;
use containerd_snapshots::tonic::{self, Code, Status};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;

use crate::dispatch::{Dispatch, InFlight, Work};
use crate::error::{SnapshotError, chain};
use crate::filter::Filter;
use crate::metrics::Metrics;
use crate::mounts::Mount;
use crate::record::{Info, Kind};
use crate::snapshots::Snapshots;

/// containerd's own limit for messages.
const MAX_MESSAGE: usize = 16 << 20;
/// Snapshots that List reads ahead of its client.
const LIST_AHEAD: usize = 256;

/// Serves the snapshots API on `connections` until there are no more to come; calls in flight are
/// finished.
///
/// # Errors
/// When the HTTP/2 server fails.
pub async fn serve(
    service: Service,
    connections: impl Stream<Item = io::Result<UnixStream>>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let service = api::server(Arc::new(service)).max_decoding_message_size(MAX_MESSAGE);
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

#[tonic::async_trait]
impl api::Snapshotter for Service {
    type Error = Status;
    type InfoStream = Pin<Box<dyn Stream<Item = Result<api::Info, Status>> + Send>>;

    async fn stat(&self, key: String) -> Result<api::Info, Status> {
        let asked = key.clone();
        self.call("stat", &asked, Work::Read, move |s| s.stat(&key))
            .await
            .map(to_wire)
    }

    async fn update(
        &self,
        info: api::Info,
        fields: Option<Vec<String>>,
    ) -> Result<api::Info, Status> {
        let asked = info.name.clone();
        let fields = fields.unwrap_or_default();
        let update = move |s: &Arc<Snapshots>| {
            s.update(&info.name, info.labels.into_iter().collect(), &fields)
        };
        self.call("update", &asked, Work::Write, update)
            .await
            .map(to_wire)
    }

    async fn usage(&self, key: String) -> Result<api::Usage, Status> {
        let asked = key.clone();
        let usage = self
            .call("usage", &asked, Work::Count, move |s| s.usage(&key))
            .await?;
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        Ok(api::Usage {
            inodes: number(usage.inodes),
            size: number(usage.size),
        })
    }

    async fn mounts(&self, key: String) -> Result<Vec<api::api::types::Mount>, Status> {
        let asked = key.clone();
        self.call("mounts", &asked, Work::Read, move |s| s.mounts(&key))
            .await
            .map(mounts_to_wire)
    }

    async fn prepare(
        &self,
        key: String,
        parent: String,
        labels: HashMap<String, String>,
    ) -> Result<Vec<api::api::types::Mount>, Status> {
        let asked = key.clone();
        let prepare =
            move |s: &Arc<Snapshots>| s.prepare(&key, &parent, labels.into_iter().collect());
        self.call("prepare", &asked, Work::Write, prepare)
            .await
            .map(mounts_to_wire)
    }

    async fn view(
        &self,
        key: String,
        parent: String,
        labels: HashMap<String, String>,
    ) -> Result<Vec<api::api::types::Mount>, Status> {
        let asked = key.clone();
        let view = move |s: &Arc<Snapshots>| s.view(&key, &parent, labels.into_iter().collect());
        self.call("view", &asked, Work::Write, view)
            .await
            .map(mounts_to_wire)
    }

    async fn commit(
        &self,
        name: String,
        key: String,
        labels: HashMap<String, String>,
    ) -> Result<(), Status> {
        let asked = key.clone();
        let commit = move |s: &Arc<Snapshots>| s.commit(&name, &key, labels.into_iter().collect());
        let work = self.snapshots.work_of_commit(&asked);
        self.call("commit", &asked, work, commit).await
    }

    async fn remove(&self, key: String) -> Result<(), Status> {
        let asked = key.clone();
        let work = self.snapshots.work_of_remove();
        self.call("remove", &asked, work, move |s| s.remove(&key))
            .await
    }

    async fn clear(&self) -> Result<(), Status> {
        self.call("cleanup", "", Work::LongWrite, |s| s.cleanup())
            .await
    }

    async fn list(
        &self,
        _snapshotter: String,
        filters: Vec<String>,
    ) -> Result<Self::InfoStream, Status> {
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
            let failure = match snapshots.list(filter) {
                Ok(mut infos) => infos.find_map(|info| {
                    let info = info.map(to_wire).map_err(Status::from);
                    let failure = info.as_ref().err().cloned();
                    // A client that has gone away wants no more.
                    match sender.blocking_send(info) {
                        Ok(()) => failure.map(Some),
                        Err(_) => Some(failure),
                    }
                }),
                Err(error) => {
                    let status = Status::from(error);
                    drop(sender.blocking_send(Err(status.clone())));
                    Some(Some(status))
                }
            };
            note_call(
                &metrics,
                "list",
                &asked,
                start.elapsed(),
                failure.flatten().as_ref(),
            );
        });
        Ok(Box::pin(ReceiverStream::new(receiver)))
    }
}

fn to_wire(info: Info) -> api::Info {
    api::Info {
        kind: match info.kind {
            Kind::View => api::Kind::View,
            Kind::Active => api::Kind::Active,
            Kind::Committed => api::Kind::Committed,
        },
        name: info.name,
        parent: info.parent,
        labels: info.labels.into_iter().collect(),
        created_at: to_system_time(info.created),
        updated_at: to_system_time(info.updated),
    }
}

fn to_system_time(nanoseconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(0))
}

fn mounts_to_wire(mounts: Vec<Mount>) -> Vec<api::api::types::Mount> {
    mounts
        .into_iter()
        .map(|mount| api::api::types::Mount {
            r#type: mount.fs_type.to_owned(),
            source: mount.source,
            options: mount.options,
            ..Default::default()
        })
        .collect()
}

impl From<SnapshotError> for Status {
    fn from(error: SnapshotError) -> Self {
        Status::new(code_of(&error), chain(&error))
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
        E::NotActive { .. } | E::NoMounts { .. } | E::HasChildren { .. } => {
            Code::FailedPrecondition
        }
        E::Damaged { .. } => Code::DataLoss,
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
