//! What `transship container-base ID` prints for the runtime front: which image a container is made
//! of. The front has no connection to containerd, so that it starts in a millisecond.
//!
//! ```text
//! { "image": "docker.io/library/web:1", "digest": "sha256:...", "chain_id": "sha256:..." }
//! ```

use serde::{Deserialize, Serialize};

/// The image of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerBase {
    /// Its name.
    pub image: String,
    /// Digest of its manifest or index.
    pub digest: String,
    /// Chain id of its layers: of the snapshot below the container's own.
    pub chain_id: String,
}
