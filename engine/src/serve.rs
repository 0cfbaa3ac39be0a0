//! The node's API on a socket that only root can open.

use std::fs::{self, DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use transship_containerd::Containerd;
use transship_proto::MESSAGE_LIMIT;
use transship_proto::node_api::NodeServer;

use crate::error::{Context, Error, Result};
use crate::interrupt::{Interrupt, Interrupted};
use crate::node_service::NodeService;

/// How long the answers to the last calls may take on their way.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// Serves the node's API until somebody asks to give up; calls under way come to their end.
///
/// # Errors
/// When the socket is in use or cannot be made.
pub async fn serve(node: Containerd, socket: &Path, interrupt: Interrupt) -> Result<()> {
    let listener = listen(socket)?;
    let service = NodeService::new(node, interrupt.clone());
    let calls = service.calls();
    tracing::info!(socket = %socket.display(), "listening");
    let asked = interrupt.clone();
    let server = Server::builder()
        .add_service(NodeServer::new(service).max_decoding_message_size(MESSAGE_LIMIT))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async move {
            let _: Interrupted = asked.wait().await;
        });
    let mut server = pin!(server);
    let served = tokio::select! {
        served = &mut server => served,
        // A client that only keeps its connection open is not waited for.
        () = async { let _: Interrupted = interrupt.wait().await; drop(calls.write().await) } => {
            tokio::time::timeout(LAST_ANSWERS, server).await.unwrap_or(Ok(()))
        }
    };
    // Another one may have taken its place only after this one has ended.
    drop(fs::remove_file(socket));
    served.context("cannot serve")
}

/// A socket that appears with its mode: nobody can connect before it has it.
fn listen(socket: &Path) -> Result<UnixListener> {
    if UnixStream::connect(socket).is_ok() {
        let message = format!("somebody listens on {} already", socket.display());
        return Err(Error::refused(message));
    }
    let dir = socket.parent().unwrap_or(Path::new("."));
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("cannot make {}", dir.display()))?;
    let new = socket.with_extension("sock.new");
    drop(fs::remove_file(&new));
    let bind = || {
        let listener = UnixListener::bind(&new)?;
        fs::set_permissions(&new, Permissions::from_mode(0o600))?;
        fs::rename(&new, socket)?;
        Ok::<_, std::io::Error>(listener)
    };
    bind().with_context(|| format!("cannot listen on {}", socket.display()))
}
