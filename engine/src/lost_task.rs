//! A task that containerd has lost from its list: its shim lives on, and its bundle and the runtime's state stay.
//!
//! ```text
//!  while its processes end, containerd is killed and comes back:
//!  containerd: no process any more ──> Delete ──> shim: it is paused (2.1), of whose end the shim has not heard yet
//!          └─ the shim is not listed: "not found" for whoever asks, until containerd is restarted once more
//!
//!  delete_of_runtime      its record is there still: the runtime lets go of it
//!  remove                 and then its shim, its bundle and its work directory, once it has no record any more
//! ```
//!
//! Calls of `Create` and `Delete` whose callers have gone in the middle leave the same (seen with containerd 2.1.9).

use std::path::{Path, PathBuf};

use containerd_client::services::v1::Container as Record;
use transship_checkpoint::manifest::check_name;
use transship_containerd::{Containerd, ContainerdError};
use transship_sandbox::forgotten_bundle;

use crate::error::{Context, Result};
use crate::oci_runtime::OciRuntime;

/// Lets the runtime delete a container all of whose processes have ended, if containerd has lost its task: the front
/// takes away what belonged to its restore as well.
///
/// # Errors
/// What the runtime says.
pub(crate) async fn delete_of_runtime(node: &Containerd, record: &Record) -> Result<()> {
    let id = &record.id;
    if bundle_of(node, id).is_none() || !is_unknown(node.task(id).await.err()) {
        return Ok(());
    }
    let runtime = OciRuntime::of_record(record, node.namespace());
    { runtime.delete(id).await }.with_context(|| format!("{id:?} could not be deleted"))
}

/// Removes what containerd has left of a container that it does not know any more; see
/// `transship_sandbox::forgotten_bundle`.
///
/// # Errors
/// It cannot be removed.
pub(crate) async fn remove(node: &Containerd, id: &str) -> Result<()> {
    let Some(bundle) = bundle_of(node, id).filter(|it| forgotten_bundle::has_ended(it)) else {
        return Ok(());
    };
    let (record, task) = (node.container(id).await, node.task(id).await);
    if !(is_unknown(record.err()) && is_unknown(task.err())) {
        return Ok(());
    }
    let removed = tokio::task::spawn_blocking(move || forgotten_bundle::remove(&bundle)).await?;
    removed.with_context(|| format!("what containerd has left of {id:?} could not be removed"))
}

fn is_unknown(error: Option<ContainerdError>) -> bool {
    error.is_some_and(|it| it.is_not_found())
}

/// Its bundle, if there is one. containerd's state is where its socket is, unless it is configured otherwise: then
/// nothing is found.
fn bundle_of(node: &Containerd, id: &str) -> Option<PathBuf> {
    check_name("the name", id).ok()?;
    let state = node.address().parent().unwrap_or(Path::new("/"));
    let tasks = state.join("io.containerd.runtime.v2.task");
    let bundle = tasks.join(node.namespace()).join(id);
    bundle.symlink_metadata().is_ok().then_some(bundle)
}
