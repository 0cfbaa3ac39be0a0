//! The processes of a frozen container.
//!
//! ```text
//!  shim: Start of an exec ── runc exec ── waits for its process ── which the freezer holds
//!    `── holds the lock that the shim's Pids waits for
//! ```
//!
//! So the shim may not answer until the container is let go: when kubelet's probe was just being started at the freeze, for
//! example. The runtime knows them as well, and is asked where the shim does not answer at once: to start it takes longer.

use std::time::Duration;

use transship_containerd::Containerd;

use crate::error::Result;
use crate::oci_runtime::OciRuntime;
use crate::thaw::{ANSWER, answered};

/// A shim that is not in the way of itself answers in a few milliseconds.
const AT_ONCE: Duration = Duration::from_millis(300);

/// All processes of a frozen container.
///
/// # Errors
/// What the runtime says, where containerd does not answer either.
pub(crate) async fn pids_of_frozen(
    node: &Containerd,
    runtime: &OciRuntime,
    id: &str,
) -> Result<Vec<u32>> {
    if let Ok(pids) = answered(AT_ONCE, node.pids(id)).await {
        return Ok(pids);
    }
    match runtime.pids(id).await {
        Ok(pids) => Ok(pids),
        Err(error) => answered(ANSWER, node.pids(id)).await.map_err(|_| error),
    }
}
