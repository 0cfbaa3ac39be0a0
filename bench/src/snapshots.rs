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

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::runtime::Runtime;
use transship_testbed::Testbed;

use self::load::{CALLS, Target, Turns};
use crate::daemon::Process;
use crate::report::Row;
use crate::sizes::Sizes;

/// How long [`load_socket`] goes on.
const LOAD: Duration = Duration::from_secs(5);

/// One thread makes the load: with more, each call wakes several on its way, which would count as the
/// daemon's time, and they would take processors from it on a small machine.
fn start_load() -> Result<Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the load")
}

/// Puts load on a daemon that runs, for a profiler to look at, and says what came of it.
///
/// # Errors
/// When the daemon fails, or a call of it.
pub(crate) fn load_socket(socket: PathBuf, clients: usize) -> Result<String> {
    let target = Target {
        process: Process::behind(&socket)?,
        disk: PathBuf::from("/"),
        socket,
        snapshotter: "transship".to_owned(),
        present: 0,
    };
    let turn = start_load()?.block_on(target.run(clients, LOAD))?;
    let calls: Vec<_> = (CALLS.iter().zip(turn.calls))
        .map(|(call, took)| format!("{call} {took:.2}"))
        .collect();
    let turns = Turns(vec![turn]);
    Ok(format!(
        "{:.0} cycles/s; p50 in ms: {}; {}",
        turns.median(|turn| turn.cycles),
        calls.join(", "),
        turns.profile()
    ))
}

/// Measures the part.
///
/// # Errors
/// When a daemon fails, or a call of it.
pub(crate) fn measure(bed: &Testbed, sizes: &Sizes) -> Result<Vec<Row>> {
    let runtime = start_load()?;
    let mut rows = direct::measure(bed, sizes, &runtime)?;
    rows.extend(through_containerd::measure(bed, sizes, &runtime)?);
    Ok(rows)
}
