//! The daemon around the service: one per root, ready when it says so, and out of the way in an orderly
//! manner.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use tokio::sync::oneshot;

use crate::config::Config;
use crate::disk;
use transship_path_error::During as _;

use crate::error::{Result, SnapshotError, one_line};
use crate::fault::Faults;
use crate::from_redb;
use crate::fsck::{self, Problem};
use crate::metadata::{self, Metadata};
use crate::metrics::{self, Metrics};
use crate::mounts::SnapshotPaths;
use crate::probe;
use crate::service::{self, Service};
use crate::snapshots::{Options, Snapshots};
use crate::socket::Socket;

/// How long calls in flight may take after the order to stop; a List of a stuck client must not keep
/// the node from shutting down.
const STOP_PATIENCE: Duration = Duration::from_secs(20);
/// How long connections may take to close once all calls are answered: the last answers have to be
/// written out, but a client that does not react holds nothing worth waiting for.
const CLOSE_PATIENCE: Duration = Duration::from_millis(250);

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
            Err((_, error)) => Ok(Err(error).during("lock", path)?),
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
        Err(error) if error.is_disk_full() => {
            // Snapshots must be removable on a full disk, and so the daemon must start on it.
            tracing::warn!(
                error = one_line(&error),
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
    };
    tracing::info!(root = %root.display(), options = ?options.overlay_options, "overlay options");
    let batches = Arc::clone(metrics);
    let mut metadata = Metadata::open(&root.join(metadata::FILE), config.metadata_cache_mib << 20)?
        .observed_by(move |changes| batches.note_batch(changes));
    from_redb::take_over(&root, &mut metadata)?;
    Ok((lock, Snapshots::open(paths, metadata, options, faults)?))
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
    let connections = socket.accept_until(async { drop(accepting_stops.await) });
    let service = Service::new(Arc::clone(&snapshots), metrics, config.concurrent_calls)?;
    let calls = service.calls_in_flight();
    let mut server = tokio::spawn(service::serve(service, connections));
    let outcome = tokio::select! {
        outcome = &mut server => outcome?,
        () = stop => {
            drop(stop_accepting);
            let all_closed = async {
                // Twice: a connection that came late may have begun a call meanwhile.
                for _ in 0..2 {
                    if tokio::time::timeout(STOP_PATIENCE, calls.ended()).await.is_err() {
                        tracing::warn!("some calls did not finish in time");
                    }
                    tokio::time::sleep(CLOSE_PATIENCE).await;
                }
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

/// Compares the database below `root` with the directories; the daemon must not be running.
///
/// # Errors
/// I/O errors, a root in use.
pub fn check_root(root: &Path, repair: bool) -> Result<Vec<Problem>> {
    let _lock = RootLock::take(root)?;
    let root = fs::canonicalize(root).during("resolve", root)?;
    fsck::check(&root, repair)
}

/// Where systemd hears of the daemon's state (`sd_notify`, Type=notify).
#[derive(Debug, Clone)]
pub struct Systemd {
    socket: Option<PathBuf>,
}

impl Systemd {
    /// `socket` is the value of `NOTIFY_SOCKET`; without one nobody wants to know.
    #[must_use]
    pub fn at(socket: Option<PathBuf>) -> Self {
        Self { socket }
    }

    /// Tells a state, for example `READY=1`.
    ///
    /// # Errors
    /// I/O errors.
    pub fn notify(&self, state: &str) -> Result<()> {
        use std::os::linux::net::SocketAddrExt;
        let Some(socket) = &self.socket else {
            return Ok(());
        };
        let send = || {
            let datagram = UnixDatagram::unbound()?;
            match socket.as_os_str().as_encoded_bytes() {
                // A leading @ stands for the abstract namespace.
                [b'@', name @ ..] => {
                    let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
                    datagram.send_to_addr(state.as_bytes(), &address)
                }
                _ => datagram.send_to(state.as_bytes(), socket),
            }
        };
        Ok(send().map(drop).during("notify systemd through", socket)?)
    }
}
