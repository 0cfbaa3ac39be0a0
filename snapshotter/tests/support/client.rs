//! A client of the daemon's socket, or of containerd's.

use std::path::Path;

use transship_containerd::ContainerdError;
pub use transship_containerd::Snapshotter as Client;

/// Connects to `socket`; `snapshotter` matters to containerd only.
pub async fn connect(socket: &Path, snapshotter: &str) -> Result<Client, ContainerdError> {
    Client::connect(socket, "conformance", snapshotter).await
}
