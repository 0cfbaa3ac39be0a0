//! What `transship container-base ID --expected CHAIN` prints for the runtime front: which image a container is made
//! of, and where its log is. The front has no connection to containerd, so that it starts in a millisecond.
//!
//! ```text
//! { "image": "docker.io/library/web:1", "digest": "sha256:...", "chain_id": "sha256:...",
//!   "log": "/var/log/pods/shop_web_UID/web/0.log" }
//! ```

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The image of a container, and its log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerBase {
    /// Its name.
    pub image: String,
    /// Digest of its manifest or index; empty where its layers are those that were expected, and it was not asked for.
    pub digest: String,
    /// Chain id of its layers: of the snapshot below the container's own.
    pub chain_id: String,
    /// Where its output goes, if that is a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<PathBuf>,
}
