//! The processes of a frozen container.
//!
//! ```text
//!  shim: Start of an exec ── runc exec ── waits for its process ── which the freezer holds
//!    `── holds the lock that the shim's Pids waits for
//! ```
//!
//! So the shim may not answer until the container is let go: when kubelet's probe was just being started at the freeze, for
//! example. The runtime knows them as well, and is asked first.

use transship_containerd::Containerd;

use crate::error::Result;
use crate::oci_runtime::OciRuntime;
use crate::thaw::{ANSWER, answered};

/// All processes of a frozen container.
///
/// # Errors
/// What the runtime says, where containerd does not answer either.
pub(crate) async fn pids_of_frozen(
    node: &Containerd,
    runtime: &OciRuntime,
    id: &str,
) -> Result<Vec<u32>> {
    match runtime.pids(id).await {
        Ok(pids) => Ok(pids),
        Err(error) => answered(ANSWER, node.pids(id)).await.map_err(|_| error),
    }
}
