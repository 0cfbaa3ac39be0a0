//! containerd's diff service, served as a proxy plugin: layers out of upperdirs and into them.
//!
//! ```text
//!  containerd ── Diff ───> service ──> plan ──> pack (export, hash, compress) ──> Upload ──┐
//!             ── Apply ──> service ──> plan ──> unpack (decompress, hash, import) <──┐     │
//!                             │                                                      │     v
//!             <── content store, leases ───────── store ──── blob_file ──────────────┴──────
//! ```
//!
//! containerd asks its differs in order and goes on to the next after `Unimplemented`. So `plan` takes
//! only mounts whose directories already are the answer, and everything else (mounts of other kinds,
//! trees that must be compared) is left to containerd's walking differ. An Apply is handed on to it
//! (handed_on.rs), because the transfer service would not.

mod blob_file;
mod chunks;
mod compress;
mod error;
mod handed_on;
mod leases;
mod media_type;
mod namespace;
mod pack;
mod plan;
mod service;
mod store;
mod unpack;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use containerd_client::tonic::transport;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use transship_proto::MESSAGE_LIMIT;
use transship_proto::diff_server::DiffServer;

use crate::metrics::Metrics;
use crate::socket::Socket;
use service::{Calls, DiffService};
use store::Connection;

/// How long calls in flight may take after the order to stop.
const STOP_PATIENCE: Duration = Duration::from_secs(5);
/// How long those that were given up then have to clean up behind themselves.
const CLEAN_PATIENCE: Duration = Duration::from_secs(3);

/// A diff service that runs.
#[derive(Debug)]
pub struct RunningDiffer {
    stop: watch::Sender<bool>,
    give_up: watch::Sender<bool>,
    server: JoinHandle<Result<(), transport::Error>>,
}

/// Serves the diff API on `socket`; layers are kept by the containerd that listens on `containerd`. Those that are
/// applied below `durable_below` are on the disk before the answer.
pub fn start(
    socket: Socket,
    containerd: PathBuf,
    durable_below: Option<PathBuf>,
    metrics: Arc<Metrics>,
) -> RunningDiffer {
    let (give_up, given_up) = watch::channel(false);
    let (stop, stopped) = watch::channel(false);
    let connection = Connection::to(containerd);
    let service = DiffService::new(socket.path(), connection, durable_below, given_up, metrics);
    let connections = socket.accept_until(ordered(stopped));
    let server = transport::Server::builder()
        .add_service(DiffServer::new(Calls(service)).max_decoding_message_size(MESSAGE_LIMIT))
        .serve_with_incoming_shutdown(connections, std::future::pending());
    RunningDiffer {
        stop,
        give_up,
        server: tokio::spawn(server),
    }
}

/// Resolves with the order, or when nobody is left who could give it.
async fn ordered(mut stopped: watch::Receiver<bool>) {
    drop(stopped.wait_for(|stop| *stop).await);
}

impl RunningDiffer {
    /// Lets calls in flight finish for a while; those that do not are undone.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        if let Ok(ended) = tokio::time::timeout(STOP_PATIENCE, &mut self.server).await {
            report(ended);
            return;
        }
        self.give_up.send_replace(true);
        match tokio::time::timeout(CLEAN_PATIENCE, &mut self.server).await {
            Ok(ended) => report(ended),
            Err(_) => {
                tracing::warn!("some layers were not finished in time");
                self.server.abort();
            }
        }
    }
}

fn report(ended: Result<Result<(), transport::Error>, tokio::task::JoinError>) {
    match ended {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "the diff service failed"),
        Err(error) => tracing::warn!(%error, "the diff service failed"),
    }
}
