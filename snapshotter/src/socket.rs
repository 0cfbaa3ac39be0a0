//! The sockets that the services listen on: made here, or handed over by the service manager.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

use crate::disk;
use crate::error::{IoContext, Result, SnapshotError};

/// Sockets that the service manager listens on for us (systemd's socket activation): they stay when the
/// daemon goes, and who connects meanwhile waits for the next one.
#[derive(Debug, Default)]
pub struct Inherited(Vec<StdUnixListener>);

impl Inherited {
    /// Sockets that were handed over.
    #[must_use]
    pub fn new(listeners: Vec<StdUnixListener>) -> Self {
        Self(listeners)
    }

    /// The socket at `path`: the one that was handed over, else a new one.
    ///
    /// # Errors
    /// As [`Socket::listen`].
    pub fn take_or_listen(&mut self, path: &Path) -> Result<Socket> {
        let is_at_path = |listener: &StdUnixListener| {
            let address = listener.local_addr();
            address.is_ok_and(|address| address.as_pathname() == Some(path))
        };
        let Some(found) = self.0.iter().position(is_at_path) else {
            return Socket::listen(path);
        };
        let listener = self.0.swap_remove(found);
        listener
            .set_nonblocking(true)
            .and_then(|()| UnixListener::from_std(listener))
            .map(|listener| Socket {
                listener,
                path: path.to_path_buf(),
                remove_path: false,
            })
            .during("listen on", path)
    }

    /// To be called when every address of the configuration has its socket.
    ///
    /// # Errors
    /// A socket that was handed over and is none of them: calls to it would wait for ever.
    pub fn require_none_left(&self) -> Result<()> {
        let Some(left) = self.0.first() else {
            return Ok(());
        };
        let address = left
            .local_addr()
            .during("read the address of", "a socket")?;
        Err(SnapshotError::Invalid {
            reason: format!(
                "the service manager hands over a socket at {address:?}, which is neither address nor \
                 diff_address of the configuration"
            ),
        })
    }
}

/// A listening socket.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Whether the path goes when the daemon is told to stop.
    remove_path: bool,
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
            remove_path: true,
        })
    }

    /// Where it listens.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The connections until `stop` resolves; see [`Socket::accept_until`].
    pub(crate) fn into_connections(
        self,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> ReceiverStream<io::Result<UnixStream>> {
        self.accept_until(stop).0
    }

    /// Accepts until `stop` resolves; then the path is removed if it is ours, and the task ends. To be waited for
    /// before connections are closed: containerd's dialer waits for a missing socket to appear, but
    /// its calls fail on one that refuses.
    pub(crate) fn accept_until(
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
            if self.remove_path
                && let Err(error) = fs::remove_file(&self.path)
            {
                tracing::warn!(%error, path = %self.path.display(), "cannot remove the socket");
            }
        });
        (ReceiverStream::new(receiver), task)
    }
}
