//! The snapshots API under load.
//!
//! ```text
//!  load.rs    N clients, each with a connection: Prepare, Mounts, Commit, Remove; then Stat, List
//!    ├─> direct.rs              our socket | the Go peer's socket | a second, empty one of ours
//!    └─> through_containerd.rs  containerd's socket: snapshotter transship | overlayfs
//! ```

mod direct;
mod load;
mod through_containerd;

use anyhow::{Context as _, Result};
use transship_testbed::Testbed;

use crate::report::Row;
use crate::sizes::Sizes;

/// Measures the part.
///
/// # Errors
/// When a daemon fails, or a call of it.
pub(crate) fn measure(bed: &Testbed, sizes: &Sizes) -> Result<Vec<Row>> {
    // Two threads make the load: more would take processors from the daemons on a small machine.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the load's threads")?;
    let mut rows = direct::measure(bed, sizes, &runtime)?;
    rows.extend(through_containerd::measure(bed, sizes, &runtime)?);
    Ok(rows)
}
