//! Sockets for root alone.

use std::io;
use std::path::Path;

use nix::sys::stat::{Mode, umask};
use nix::unistd::geteuid;
use tokio::net::{UnixListener, UnixStream};

/// Binds a socket with mode 0600, which nobody else can connect to, not even between the bind and a chmod.
///
/// The umask is the whole process's: to be called while no other thread makes files.
///
/// # Errors
/// Those of bind(2) and listen(2).
pub fn bind_private(path: &Path) -> io::Result<UnixListener> {
    let before = umask(Mode::from_bits_truncate(0o177));
    let bound = UnixListener::bind(path);
    umask(before);
    bound
}

/// Asks the kernel who has connected: the mode of a socket that was handed over, or of its directory, is
/// somebody else's decision.
///
/// # Errors
/// It is neither root nor the user of this process.
pub fn require_trusted_peer(connection: &UnixStream) -> io::Result<()> {
    let uid = connection.peer_cred()?.uid();
    if uid == 0 || uid == geteuid().as_raw() {
        return Ok(());
    }
    let reason = format!("user {uid} is not root");
    Err(io::Error::new(io::ErrorKind::PermissionDenied, reason))
}
