//! The node's API on a socket that only root can open.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use transship_checkpoint::store::Store;
use transship_containerd::Containerd;
use transship_proto::node_api::NodeServer;
use transship_proto::{MESSAGE_LIMIT, bind_private, require_trusted_peer};
use transship_sandbox::admission::node_config::{NODE_CONFIG, NodeConfig};

use crate::error::{Context, Error, Result, one_line};
use crate::interrupt::{Interrupt, Interrupted};
use crate::memory_dir::remove_unused;
use crate::migrate::{Decision, Recovered, recover_all};
use crate::node_service::NodeService;
use crate::pulls::{fetch_wanted, forget_old};
use crate::retention::{Due, Records, Rules, prune};

/// How often node.toml's rules are applied to the checkpoints.
const PRUNE_INTERVAL: Duration = Duration::from_secs(60 * 60);
/// How long the answers to the last calls may take on their way.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// Serves the node's API until somebody asks to give up; calls under way come to their end. Migrations that were
/// cut off are decided meanwhile.
///
/// # Errors
/// When the socket is in use or cannot be made.
pub async fn serve(
    node: Containerd,
    store: &Store,
    socket: &Path,
    interrupt: Interrupt,
) -> Result<()> {
    let listener = listen(socket)?;
    let recovering = tokio::spawn(recover(node.clone(), store.clone(), interrupt.clone()));
    let pruning = tokio::spawn(prune_every_hour(store.clone()));
    let fetching = tokio::spawn(fetch_wanted(store.clone()));
    let service = NodeService::new(node, interrupt.clone());
    let calls = service.calls();
    tracing::info!(socket = %socket.display(), "listening");
    let asked = interrupt.clone();
    let connections = UnixListenerStream::new(listener).filter(|connection| {
        let trusted = connection.as_ref().map_or(Ok(()), require_trusted_peer);
        trusted
            .inspect_err(|error| tracing::warn!(%error, "refused a connection"))
            .is_ok()
    });
    let server = Server::builder()
        .add_service(NodeServer::new(service).max_decoding_message_size(MESSAGE_LIMIT))
        .serve_with_incoming_shutdown(connections, async move {
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
    pruning.abort();
    fetching.abort();
    // Another one may have taken its place only after this one has ended.
    drop(fs::remove_file(socket));
    // What is not decided stays as it is, and has its record.
    recovering.abort();
    served.context("cannot serve")
}

/// Asks the other node of each migration that was cut off until it answers.
async fn recover(node: Containerd, store: Store, interrupt: Interrupt) {
    let ask = Decision::Ask(None);
    let Recovered { decided, failed } = match recover_all(&node, &store, |_| true, ask, &interrupt)
        .await
    {
        Ok(recovered) => recovered,
        Err(error) => {
            tracing::warn!(error = %one_line(&error), "migrations that were cut off stay as they are");
            return;
        }
    };
    for error in failed {
        tracing::warn!(error = %error.one_line(), "not all that was cut off can be brought to its end");
    }
    for (pending, decided) in decided {
        let container = format!("{}/{}", pending.namespace, pending.called());
        match decided {
            Ok(decided) => tracing::info!(%container, ?decided, "a migration that was cut off"),
            Err(error) => {
                tracing::warn!(%container, error = %one_line(&error), "a migration that was cut off");
            }
        }
    }
}

/// Removes the checkpoints that node.toml does not keep, as long as this runs.
async fn prune_every_hour(store: Store) {
    let mut hours = tokio::time::interval(PRUNE_INTERVAL);
    loop {
        hours.tick().await;
        let store = store.clone();
        let pruned = tokio::task::spawn_blocking(move || {
            let config = NodeConfig::read(Path::new(NODE_CONFIG))
                .context("cannot tell which checkpoints are kept")?;
            forget_old()?;
            remove_unused();
            let rules = Rules::from(&config.checkpoints);
            prune(&store, &Records::default(), &rules)
        });
        match pruned.await.map_err(Error::from).flatten() {
            Ok(removed) => {
                for Due { name, reason, .. } in removed {
                    tracing::info!("removed the checkpoint {name:?}: {reason}");
                }
            }
            Err(error) => tracing::warn!("checkpoints were not pruned: {}", error.one_line()),
        }
    }
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
        let listener = bind_private(&new)?;
        fs::rename(&new, socket)?;
        Ok::<_, std::io::Error>(listener)
    };
    bind().with_context(|| format!("cannot listen on {}", socket.display()))
}
