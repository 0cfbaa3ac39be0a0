//! The sockets that the services listen on: made here, or handed over by the service manager.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc::Sender;
use tokio_stream::wrappers::ReceiverStream;

use crate::disk;
use transship_path_error::During as _;
use transship_proto::{bind_private, require_trusted_peer};

use crate::error::{Result, SnapshotError};

/// How long after its path is gone a socket still takes connections.
const LATE_CONNECTIONS: Duration = Duration::from_millis(20);

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
        Ok(listener
            .set_nonblocking(true)
            .and_then(|()| UnixListener::from_std(listener))
            .map(|listener| Socket {
                listener,
                path: path.to_path_buf(),
                remove_path: false,
            })
            .during("listen on", path)?)
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
            Err(error) => return Ok(Err(error).during("stat", path)?),
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
        let listener = bind_private(&temporary).during("listen on", &temporary)?;
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

    /// The connections of root until `stop` resolves. Then the path is removed if it is ours, and the stream
    /// ends: who serves it answers each connection that it held, then closes them.
    ///
    /// In that order, because containerd's dialer waits for a missing socket to appear, but a call of
    /// its fails when the socket refuses or the connection breaks before the first frame.
    pub(crate) fn accept_until(
        self,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> ReceiverStream<io::Result<UnixStream>> {
        let (sender, receiver) = tokio::sync::mpsc::channel(16);
        tokio::spawn(async move {
            tokio::select! {
                () = self.accept(&sender) => return,
                () = stop => {}
            }
            if !self.remove_path {
                return;
            }
            if let Err(error) = fs::remove_file(&self.path) {
                tracing::warn!(%error, path = %self.path.display(), "cannot remove the socket");
            }
            // Who found the path just before it went is in the queue of the listener, or will be.
            drop(tokio::time::timeout(LATE_CONNECTIONS, self.accept(&sender)).await);
        });
        ReceiverStream::new(receiver)
    }

    /// Hands connections on for as long as somebody takes them.
    async fn accept(&self, connections: &Sender<io::Result<UnixStream>>) {
        loop {
            // Room first: a connection that was accepted is never dropped.
            let Ok(room) = connections.reserve().await else {
                return;
            };
            match self.listener.accept().await {
                Ok((connection, _)) => match require_trusted_peer(&connection) {
                    Ok(()) => room.send(Ok(connection)),
                    Err(error) => {
                        tracing::warn!(%error, path = %self.path.display(), "refused a connection");
                    }
                },
                Err(error) => {
                    // Out of file descriptors, most likely: calls that end will free some.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }
}
