//! What answers the calls of the node's API: the same functions as those of the commands.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::{RwLock, mpsc};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};
use transship_checkpoint::cri_names::CRI_NAMESPACE;
use transship_checkpoint::store::{DEFAULT_ROOT, Store, StoreError};
use transship_containerd::Containerd;
use transship_proto::node_api::{
    CheckpointPodRequest, CheckpointPodResponse, Chunk, ExportSnapshotRequest,
    ImportSnapshotRequest, ImportSnapshotResponse, ImportTarget, NodeApi, PostCheckpointState,
    RestorePodRequest, RestorePodResponse,
};

use crate::checkpoint::{self, Afterwards, Selection};
use crate::error::{Context, Error, Kind, Result};
use crate::interrupt::Interrupt;
use crate::progress::Silent;
use crate::restore_pod;
use crate::room::{KEEP_FREE, require_room};
use crate::snapshot::{self, Sink, Source, Target, WhileRead};

/// Bytes of a message with a part of a layer; containerd's clients take 16 MiB, tonic's 4.
const CHUNK: usize = 1 << 20;
/// Messages that wait for a slow reader.
const WAITING: usize = 4;

/// How long a client may leave what it is sent unread, or send nothing.
const CLIENT_PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of a layer that come between two looks at the disk.
const BETWEEN_LOOKS: u64 = 64 << 20;

/// A layer on its way out.
type Chunks = ReceiverStream<Result<Chunk, Status>>;

/// The node's API.
#[derive(Debug, Clone)]
pub(crate) struct NodeService {
    node: Containerd,
    interrupt: Interrupt,
    /// Read by each call as long as it lasts.
    calls: Arc<RwLock<()>>,
}

impl NodeService {
    /// Answers for this containerd; `interrupt` ends what is under way.
    pub(crate) fn new(node: Containerd, interrupt: Interrupt) -> Self {
        Self {
            node,
            interrupt,
            calls: Arc::default(),
        }
    }

    /// Can be written when no call is under way.
    pub(crate) fn calls(&self) -> Arc<RwLock<()>> {
        Arc::clone(&self.calls)
    }

    /// Does what is called for whether or not who has called still waits: cut off in the middle it would leave half a
    /// pod, which the next call makes a second time.
    async fn to_its_end<T, F>(&self, act: impl FnOnce(Self) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let call = Arc::clone(&self.calls).read_owned().await;
        let act = act(self.clone());
        let acting = tokio::spawn(async move {
            let _call = call;
            act.await
        });
        acting.await?
    }

    async fn checkpoint(&self, request: CheckpointPodRequest) -> Result<()> {
        let afterwards = match PostCheckpointState::try_from(request.post_checkpoint_state) {
            Ok(PostCheckpointState::Stopped) => Afterwards::Killed,
            Ok(_) => Afterwards::Run,
            Err(_) => {
                let message = format!("{} is no state", request.post_checkpoint_state);
                return Err(Error::refused(message));
            }
        };
        let path = Path::new(&request.path);
        let name = path.file_name().and_then(|name| name.to_str());
        let (Some(name), Some(parent), true) = (name, path.parent(), path.is_absolute()) else {
            let message = format!("{:?} is no path of a checkpoint", request.path);
            return Err(Error::refused(message));
        };
        let wanted = checkpoint::Request {
            criu: restore_pod::overrides(&request.options)?,
            empty_dirs: true,
            ..checkpoint::Request::of(Selection::Pod(request.pod_sandbox_id))
        };
        let target = checkpoint::find(&self.node, &wanted).await?;
        let (store, interrupt) = (Store::at(parent), &self.interrupt);
        checkpoint::checkpoint(&target, name, &store, afterwards, interrupt, &Silent).await?;
        if let (Afterwards::Killed, Some(sandbox)) = (afterwards, target.sandbox()) {
            let node = self.node.in_namespace(CRI_NAMESPACE)?;
            restore_pod::stop_pod(&node, sandbox.to_owned()).await?;
        }
        Ok(())
    }

    async fn export(&self, request: ExportSnapshotRequest) -> Result<Chunks> {
        let node = self.node.in_namespace(&request.namespace)?;
        let snapshotter = Some(request.snapshotter.as_str()).filter(|name| !name.is_empty());
        let found = snapshot::find(&node, &request.key, snapshotter).await?;
        let (reader, writer) = io::pipe().context("cannot make a pipe")?;
        let mut reader = pipe::Receiver::from_owned_fd(OwnedFd::from(reader))
            .context("cannot read from a pipe")?;
        let (sender, receiver) = mpsc::channel(WAITING);
        let interrupt = self.interrupt.clone();
        let call = Arc::clone(&self.calls).read_owned().await;
        tokio::spawn(async move {
            let _call = call;
            let sink = Sink::pipe(writer);
            let export = snapshot::export(&node, &found, sink, WhileRead::Frozen, &interrupt);
            let send = async {
                loop {
                    let mut data = Vec::with_capacity(CHUNK);
                    match reader.read_buf(&mut data).await {
                        Ok(0) => break,
                        Ok(_) if told(&sender, Ok(Chunk { data }), &interrupt).await => {}
                        // Nobody listens any more, or only in form: the export fails with EPIPE.
                        _ => break,
                    }
                }
                drop(reader);
            };
            let (exported, ()) = tokio::join!(export, send);
            if let Err(error) = exported {
                // The client may be gone.
                told(&sender, Err(status(&error)), &interrupt).await;
            }
        });
        Ok(ReceiverStream::new(receiver))
    }

    async fn import(
        &self,
        mut requests: Streaming<ImportSnapshotRequest>,
    ) -> Result<ImportSnapshotResponse> {
        let first = next(&mut requests, &self.interrupt).await?;
        let Some((target, data)) = first.and_then(|first| Some((first.snapshot?, first.data)))
        else {
            let message = "the first message names no snapshot";
            return Err(Error::refused(message));
        };
        let ImportTarget {
            namespace,
            snapshotter,
            key,
            parent,
        } = target;
        let node = self.node.in_namespace(&namespace)?;
        // Into a file first: a stream that breaks off has changed nothing then.
        Store::of_node().make_root()?;
        let layer = nameless_file().context("cannot make a file for the layer")?;
        let mut layer = tokio::fs::File::from_std(layer);
        let keep = "cannot keep the layer";
        let root = Path::new(DEFAULT_ROOT);
        let mut since_look = BETWEEN_LOOKS;
        let mut data = Some(data);
        while let Some(piece) = data {
            since_look += piece.len() as u64;
            if since_look >= BETWEEN_LOOKS {
                require_room(root, BETWEEN_LOOKS + KEEP_FREE)?;
                since_look = 0;
            }
            layer.write_all(&piece).await.context(keep)?;
            data = next(&mut requests, &self.interrupt)
                .await?
                .map(|it| it.data);
        }
        layer.rewind().await.context(keep)?;
        let target = Target {
            key: &key,
            parent: parent.as_deref(),
            snapshotter: Some(snapshotter.as_str()).filter(|name| !name.is_empty()),
        };
        let source = Source::Layer(layer.into_std().await);
        let (_, stats) = snapshot::import(&node, &target, source, &self.interrupt).await?;
        let stats = stats.unwrap_or_default();
        Ok(ImportSnapshotResponse {
            entries: stats.entries,
            bytes: stats.bytes,
        })
    }
}

#[tonic::async_trait]
impl NodeApi for NodeService {
    type ExportSnapshotStream = Chunks;

    async fn checkpoint_pod(
        &self,
        request: Request<CheckpointPodRequest>,
    ) -> Result<Response<CheckpointPodResponse>, Status> {
        let taken = self
            .to_its_end(|service| async move { service.checkpoint(request.into_inner()).await });
        answer(taken.await.map(|()| CheckpointPodResponse {}))
    }

    async fn restore_pod(
        &self,
        request: Request<RestorePodRequest>,
    ) -> Result<Response<RestorePodResponse>, Status> {
        let restored = self.to_its_end(|service| async move {
            let store = Store::of_node();
            restore_pod::restore_pod(&service.node, &store, request.into_inner()).await
        });
        answer({ restored.await }.map(|pod_sandbox_id| RestorePodResponse { pod_sandbox_id }))
    }

    async fn export_snapshot(
        &self,
        request: Request<ExportSnapshotRequest>,
    ) -> Result<Response<Chunks>, Status> {
        answer(self.export(request.into_inner()).await)
    }

    async fn import_snapshot(
        &self,
        requests: Request<Streaming<ImportSnapshotRequest>>,
    ) -> Result<Response<ImportSnapshotResponse>, Status> {
        let imported =
            self.to_its_end(|service| async move { service.import(requests.into_inner()).await });
        answer(imported.await)
    }
}

/// Whether the client takes it: the container stands still meanwhile.
async fn told(
    client: &mpsc::Sender<Result<Chunk, Status>>,
    chunk: Result<Chunk, Status>,
    interrupt: &Interrupt,
) -> bool {
    tokio::select! {
        taken = client.send_timeout(chunk, CLIENT_PATIENCE) => taken.is_ok(),
        _ = interrupt.wait() => false,
    }
}

fn answer<T>(result: Result<T>) -> Result<Response<T>, Status> {
    result.map(Response::new).map_err(|error| status(&error))
}

async fn next(
    requests: &mut Streaming<ImportSnapshotRequest>,
    interrupt: &Interrupt,
) -> Result<Option<ImportSnapshotRequest>> {
    let broken = "the stream of the layer has broken off";
    tokio::select! {
        next = timeout(CLIENT_PATIENCE, requests.message()) => match next {
            Ok(next) => next.context(broken),
            Err(_) => Err(Error::failed(format!(
                "{broken}: nothing has come for {} s",
                CLIENT_PATIENCE.as_secs()
            ))),
        },
        signal = interrupt.wait() => Err(signal.into()),
    }
}

/// A file that is gone with its last descriptor, on the disk of the checkpoints.
fn nameless_file() -> io::Result<std::fs::File> {
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(nix::libc::O_TMPFILE)
        .open(DEFAULT_ROOT)
}

/// The kind of an error as gRPC has it.
fn status(error: &Error) -> Status {
    let exists = matches!(error.cause(), Some(StoreError::Exists { .. }));
    let code = match error.kind() {
        Kind::NotFound => Code::NotFound,
        Kind::Refused => Code::FailedPrecondition,
        _ if exists => Code::AlreadyExists,
        _ => Code::Unknown,
    };
    Status::new(code, error.one_line())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_codes() {
        assert_eq!(
            status(&Error::refused("no")).code(),
            Code::FailedPrecondition
        );
        let exists = Error::from(StoreError::Exists { name: "web".into() });
        assert_eq!(status(&exists).code(), Code::AlreadyExists);
        assert_eq!(status(&Error::failed("disk full")).code(), Code::Unknown);
    }
}
