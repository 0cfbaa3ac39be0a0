//! The daemon around the service: one per root, one per socket, ready when it says so, and out of the
//! way in an orderly manner.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixStream as StdUnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use crate::config::Config;
use crate::disk;
use crate::error::{IoContext, Result, SnapshotError, chain};
use crate::fault::Faults;
use crate::metadata::Metadata;
use crate::metrics::{self, Metrics};
use crate::mounts::SnapshotPaths;
use crate::probe;
use crate::service::{self, Service};
use crate::snapshots::{Options, Snapshots};

/// How long calls in flight may take after the order to stop; a List of a stuck client must not keep
/// the node from shutting down.
const STOP_PATIENCE: Duration = Duration::from_secs(20);
/// How long connections may take to close once all calls are answered: the last answers have to be
/// written out, but a client that does not react holds nothing worth waiting for.
const CLOSE_PATIENCE: Duration = Duration::from_millis(500);

/// Holds a root directory against other daemons, for as long as it lives.
#[derive(Debug)]
pub struct RootLock(#[expect(dead_code, reason = "held, not used")] Flock<File>);

impl RootLock {
    /// Creates `root` (0700) when missing and locks it.
    ///
    /// # Errors
    /// I/O errors, and a root that another process has locked.
    pub fn take(root: &Path) -> Result<Self> {
        disk::create_private_dir(root)?;
        let path = root.join("lock");
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .during("open", &path)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self(lock)),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(SnapshotError::Invalid {
                reason: format!("another transship-snapshotter uses {}", root.display()),
            }),
            Err((_, error)) => Err(error).during("lock", path),
        }
    }
}

/// Opens the snapshots that `config` describes; the lock of their root comes along. `metrics` are told
/// about transactions.
///
/// # Errors
/// I/O errors, a root in use, a damaged database.
pub fn open_snapshots(
    config: &Config,
    metrics: &Arc<Metrics>,
    faults: Faults,
) -> Result<(RootLock, Snapshots)> {
    let lock = RootLock::take(&config.root)?;
    let root = fs::canonicalize(&config.root).during("resolve", &config.root)?;
    let paths = SnapshotPaths::below(&root)?;
    match probe::require_entry_types(&root) {
        Err(error)
            if error
                .io_source()
                .is_some_and(|io| io.kind() == io::ErrorKind::StorageFull) =>
        {
            // Snapshots must be removable on a full disk, and so the daemon must start on it.
            tracing::warn!(
                error = chain(&error),
                "not looking whether directories have types"
            );
        }
        outcome => outcome?,
    }
    let options = Options {
        overlay_options: probe::overlay_options(&config.mount_options, &root)?,
        remap_ids: config.remap_ids,
        upperdir_label: config.upperdir_label,
        sync_remove: config.sync_remove,
        durable_commit: config.durable_commit,
        import_dir: Some(config.import_dir.clone()),
    };
    tracing::info!(root = %root.display(), options = ?options.overlay_options, "overlay options");
    let batches = Arc::clone(metrics);
    let metadata = Metadata::open(&root.join("metadata.redb"), config.metadata_cache_mib << 20)?
        .observed_by(move |changes| batches.note_batch(changes));
    Ok((lock, Snapshots::open(paths, metadata, options, faults)?))
}

/// A listening socket that removes its path when it is told to stop.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    pub(crate) path: PathBuf,
}

impl Socket {
    /// Listens on `path` (mode 0600, its directory made with 0700 when missing). The socket of a
    /// daemon that died is replaced.
    ///
    /// # Errors
    /// I/O errors, a live daemon on that socket, something there that is no socket.
    pub fn listen(path: &Path) -> Result<Self> {
        if let Some(dir) = path.parent() {
            disk::create_private_dir(dir)?;
        }
        match fs::symlink_metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).during("stat", path),
            Ok(found) if !found.file_type().is_socket() => {
                return Err(SnapshotError::Invalid {
                    reason: format!("{} is there and is not a socket", path.display()),
                });
            }
            Ok(_) if StdUnixStream::connect(path).is_ok() => {
                return Err(SnapshotError::Invalid {
                    reason: format!("another daemon listens on {}", path.display()),
                });
            }
            Ok(_) => {
                tracing::info!(path = %path.display(), "replacing the socket of a dead daemon");
            }
        }
        // Made under another name and moved: whoever sees the socket finds its mode right and somebody
        // listening.
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".{}", std::process::id()));
        let temporary = PathBuf::from(temporary);
        let listener = UnixListener::bind(&temporary).during("listen on", &temporary)?;
        fs::set_permissions(&temporary, Permissions::from_mode(0o600))
            .during("chmod", &temporary)?;
        fs::rename(&temporary, path).during("rename", temporary)?;
        Ok(Self {
            listener,
            path: path.to_path_buf(),
        })
    }

    /// The connections until `stop` resolves; see [`Socket::accept_until`].
    pub(crate) fn into_connections(
        self,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> ReceiverStream<io::Result<UnixStream>> {
        self.accept_until(stop).0
    }

    /// Accepts until `stop` resolves; then the path is removed, and the task ends. To be waited for
    /// before connections are closed: containerd's dialer waits for a missing socket to appear, but
    /// its calls fail on one that refuses.
    fn accept_until(
        self,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> (ReceiverStream<io::Result<UnixStream>>, JoinHandle<()>) {
        let (sender, receiver) = tokio::sync::mpsc::channel(16);
        let task = tokio::spawn(async move {
            tokio::pin!(stop);
            loop {
                let accepted = tokio::select! {
                    accepted = self.listener.accept() => accepted,
                    () = &mut stop => break,
                };
                match accepted {
                    Ok((connection, _)) => {
                        if sender.send(Ok(connection)).await.is_err() {
                            break;
                        }
                    }
                    Err(error) => {
                        // Out of file descriptors, most likely: calls that end will free some.
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                }
            }
            if let Err(error) = fs::remove_file(&self.path) {
                tracing::warn!(%error, path = %self.path.display(), "cannot remove the socket");
            }
        });
        (ReceiverStream::new(receiver), task)
    }
}

/// Serves `snapshots` on `socket` (and metrics, if `config` says where) until `stop` resolves, then lets
/// calls in flight finish.
///
/// # Errors
/// When the server fails or the address of the metrics cannot be listened on.
pub async fn serve(
    snapshots: Snapshots,
    socket: Socket,
    metrics: Arc<Metrics>,
    config: &Config,
    stop: impl Future<Output = ()>,
) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let snapshots = Arc::new(snapshots);
    if let Some(address) = config.metrics_address {
        metrics::serve(address, Arc::clone(&metrics), Arc::clone(&snapshots)).await?;
    }
    let (stop_accepting, accepting_stops) = oneshot::channel::<()>();
    let (stop_serving, serving_stops) = oneshot::channel::<()>();
    let (connections, socket_gone) = socket.accept_until(async { drop(accepting_stops.await) });
    let service = Service::new(Arc::clone(&snapshots), metrics, config.concurrent_calls)?;
    let calls = service.calls_in_flight();
    let stop_server = async { drop(serving_stops.await) };
    let mut server = tokio::spawn(service::serve(service, connections, stop_server));
    let outcome = tokio::select! {
        outcome = &mut server => outcome?,
        () = stop => {
            drop(stop_accepting);
            socket_gone.await?;
            drop(stop_serving);
            let all_closed = async {
                if tokio::time::timeout(STOP_PATIENCE, calls.ended()).await.is_err() {
                    tracing::warn!("some calls did not finish in time");
                }
                tokio::time::sleep(CLOSE_PATIENCE).await;
            };
            tokio::select! {
                outcome = &mut server => outcome?,
                () = all_closed => {
                    server.abort();
                    Ok(())
                }
            }
        }
    };
    tokio::task::spawn_blocking(move || snapshots.stop()).await?;
    outcome
}

/// Tells systemd (`sd_notify`, Type=notify) about the daemon's state. `socket` is the value of
/// NOTIFY_SOCKET; `state` is for example `READY=1`.
///
/// # Errors
/// I/O errors.
pub fn notify_systemd(socket: &Path, state: &str) -> io::Result<()> {
    use std::os::linux::net::SocketAddrExt;
    let datagram = UnixDatagram::unbound()?;
    match socket.as_os_str().as_encoded_bytes() {
        // A leading @ stands for the abstract namespace.
        [b'@', name @ ..] => {
            let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
            datagram.send_to_addr(state.as_bytes(), &address)?;
        }
        _ => {
            datagram.send_to(state.as_bytes(), socket)?;
        }
    }
    Ok(())
}
