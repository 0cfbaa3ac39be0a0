//! What answers the calls of the node's API: the same functions as those of the commands.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::{RwLock, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};
use transship_checkpoint::store::{DEFAULT_ROOT, Store, StoreError};
use transship_proto::node_api::{
    CheckpointPodRequest, CheckpointPodResponse, Chunk, ExportSnapshotRequest,
    ImportSnapshotRequest, ImportSnapshotResponse, ImportTarget, NodeApi, PostCheckpointState,
    RestorePodRequest, RestorePodResponse,
};

use crate::commands::checkpoint::{self, Order};
use crate::commands::snapshot;
use crate::progress::Progress;
use transship_containerd::Node;
use transship_engine::interrupt::Interrupt;
use transship_engine::problem::{Kind, Problem, one_line};
use transship_engine::restore_pod;

/// Bytes of a message with a part of a layer; containerd's clients take 16 MiB, tonic's 4.
const CHUNK: usize = 1 << 20;
/// Messages that wait for a slow reader.
const WAITING: usize = 4;

/// A layer on its way out.
type Chunks = ReceiverStream<Result<Chunk, Status>>;

/// The node's API.
#[derive(Debug)]
pub(crate) struct NodeService {
    node: Node,
    interrupt: Interrupt,
    /// Read by each call as long as it lasts.
    calls: Arc<RwLock<()>>,
}

impl NodeService {
    pub(crate) fn new(node: Node, interrupt: Interrupt) -> Self {
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

    async fn checkpoint(&self, request: CheckpointPodRequest) -> Result<()> {
        let stop = match PostCheckpointState::try_from(request.post_checkpoint_state) {
            Ok(state) => state == PostCheckpointState::Stopped,
            Err(_) => {
                let message = format!("{} is no state", request.post_checkpoint_state);
                return Err(Problem::new(Kind::Refused, message).into());
            }
        };
        let path = Path::new(&request.path);
        let name = path.file_name().and_then(|name| name.to_str());
        let (Some(name), Some(parent), true) = (name, path.parent(), path.is_absolute()) else {
            let message = format!("{:?} is no path of a checkpoint", request.path);
            return Err(Problem::new(Kind::Refused, message).into());
        };
        let order = Order {
            pod: Some(&request.pod_sandbox_id),
            criu: restore_pod::overrides(&request.options)?,
            leave_paused: stop,
            empty_dirs: true,
            ..Order::default()
        };
        let progress = Progress::new(true);
        let found = checkpoint::find(&self.node, &order).await?;
        let stopped = stop.then(|| found.stop_plan());
        let store = Store::at(parent);
        let stop = order.leave_paused;
        checkpoint::take(found, name, &store, stop, &self.interrupt, &progress).await?;
        if let Some(plan) = stopped {
            let node = self
                .node
                .in_namespace(transship_checkpoint::cri_names::CRI_NAMESPACE)?;
            for id in &plan.containers {
                node.kill_frozen(id).await?;
            }
            restore_pod::stop_pod(&node, plan.sandbox).await?;
        }
        Ok(())
    }

    async fn export(&self, request: ExportSnapshotRequest) -> Result<Chunks> {
        let node = self.node.in_namespace(&request.namespace)?;
        let snapshotter = Some(request.snapshotter.as_str()).filter(|name| !name.is_empty());
        let found = snapshot::find(&node, &request.key, snapshotter).await?;
        let (reader, writer) = io::pipe()?;
        let mut reader = pipe::Receiver::from_owned_fd(OwnedFd::from(reader))?;
        let (sender, receiver) = mpsc::channel(WAITING);
        let interrupt = self.interrupt.clone();
        let call = Arc::clone(&self.calls).read_owned().await;
        tokio::spawn(async move {
            let _call = call;
            let export = snapshot::export_into_pipe(&node, &found, writer, &interrupt);
            let send = async {
                loop {
                    let mut data = Vec::with_capacity(CHUNK);
                    match reader.read_buf(&mut data).await {
                        Ok(0) => break,
                        Ok(_) if sender.send(Ok(Chunk { data })).await.is_ok() => {}
                        // Nobody listens any more: the export fails with EPIPE.
                        _ => break,
                    }
                }
                drop(reader);
            };
            let (exported, ()) = tokio::join!(export, send);
            if let Err(error) = exported {
                // The client may be gone.
                drop(sender.send(Err(status(&error))).await);
            }
        });
        Ok(ReceiverStream::new(receiver))
    }

    async fn import(
        &self,
        mut requests: Streaming<ImportSnapshotRequest>,
    ) -> Result<ImportSnapshotResponse> {
        let first = requests.message().await?;
        let Some((target, data)) = first.and_then(|first| Some((first.snapshot?, first.data)))
        else {
            let message = "the first message names no snapshot";
            return Err(Problem::new(Kind::Refused, message).into());
        };
        let ImportTarget {
            namespace,
            snapshotter,
            key,
            parent,
        } = target;
        let node = self.node.in_namespace(&namespace)?;
        // Into a file first: a stream that breaks off has changed nothing then.
        let mut layer = tokio::fs::File::from_std(nameless_file()?);
        layer.write_all(&data).await?;
        while let Some(request) = requests.message().await? {
            layer.write_all(&request.data).await?;
        }
        layer.rewind().await?;
        let stats = snapshot::import_from_file(
            &node,
            &key,
            parent.as_deref(),
            Some(snapshotter.as_str()).filter(|name| !name.is_empty()),
            layer.into_std().await,
            &self.interrupt,
        )
        .await?;
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
        let _call = self.calls.read().await;
        let taken = self.checkpoint(request.into_inner()).await;
        answer(taken.map(|()| CheckpointPodResponse {}))
    }

    async fn restore_pod(
        &self,
        request: Request<RestorePodRequest>,
    ) -> Result<Response<RestorePodResponse>, Status> {
        let _call = self.calls.read().await;
        let store = Store::at(DEFAULT_ROOT);
        let restored = restore_pod::restore_pod(&self.node, &store, request.into_inner()).await;
        let restored = restored.map_err(anyhow::Error::from);
        answer(restored.map(|pod_sandbox_id| RestorePodResponse { pod_sandbox_id }))
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
        let _call = self.calls.read().await;
        answer(self.import(requests.into_inner()).await)
    }
}

fn answer<T>(result: Result<T>) -> Result<Response<T>, Status> {
    result.map(Response::new).map_err(|error| status(&error))
}

/// A file that is gone with its last descriptor, on the disk of the checkpoints.
fn nameless_file() -> io::Result<std::fs::File> {
    std::fs::create_dir_all(DEFAULT_ROOT)?;
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(nix::libc::O_TMPFILE)
        .open(DEFAULT_ROOT)
}

/// The kind of a problem as gRPC has it.
fn status(error: &anyhow::Error) -> Status {
    let exists = error
        .chain()
        .any(|cause| matches!(cause.downcast_ref(), Some(StoreError::Exists { .. })));
    let of_engine = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<transship_engine::Error>());
    let kind = Problem::in_chain(error).map(Problem::kind);
    let code = match kind.or(of_engine.map(transship_engine::Error::kind)) {
        Some(Kind::NotFound) => Code::NotFound,
        Some(Kind::Refused) => Code::FailedPrecondition,
        _ if exists => Code::AlreadyExists,
        _ => Code::Unknown,
    };
    Status::new(code, one_line(error))
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn kinds_have_codes() {
        let refused = anyhow!(Problem::new(Kind::Refused, "no"));
        assert_eq!(status(&refused).code(), Code::FailedPrecondition);
        let exists = anyhow!(StoreError::Exists { name: "web".into() });
        assert_eq!(status(&exists).code(), Code::AlreadyExists);
        assert_eq!(status(&anyhow!("disk full")).code(), Code::Unknown);
    }
}
