//! Pods that have been moved: whether they end or run on on the node that they leave.
//!
//! ```text
//!  recover --pod:       --source-runs       ──> runs again, unmarked
//!                       --target-runs       ──> killed while it stands still; stays marked
//! ```

use std::path::Path;

use containerd_client::services::v1::Container as Record;
use containerd_client::types::v1::Status;
use transship_checkpoint::cri_names::CRI_NAMESPACE;
use transship_containerd::Containerd;
use transship_sandbox::moved::{self, DEFAULT_MOVED_DIR};

use crate::cri_record;
use crate::error::{Error, Result};
use crate::frozen::Committed;
use crate::pod;
use crate::source;
use crate::task_to_freeze::TaskToFreeze;

/// Ends the pause in which `checkpoint --moved` has left a pod: it runs on here, or its
/// processes end, without another instruction.
///
/// # Errors
/// There is no such pod, or it cannot be let go or ended.
pub async fn decide(node: &Containerd, selector: &str, source_runs: bool) -> Result<()> {
    let node = node.in_namespace(CRI_NAMESPACE)?;
    let records = node.all_containers().await?;
    let sandbox = pod::find_sandbox(&node, &records, selector).await?;
    let uid = cri_record::pod_of(sandbox, node.namespace())
        .unwrap_or_default()
        .uid;
    let dir = Path::new(DEFAULT_MOVED_DIR);
    if moved::find(dir, &uid)?.is_none() {
        return Err(Error::not_found(format!(
            "the pod {selector:?} has not been moved"
        )));
    }
    let of_pod = |record: &&Record| pod::sandbox_of(record).as_deref() == Some(&sandbox.id);
    let mut paused = Vec::new();
    for record in records.iter().filter(of_pod) {
        if let Ok(task) = source::running_task(&node, &record.id).await?
            && task.status() == Status::Paused
        {
            let task = TaskToFreeze::of(&node, record, &task);
            let was_paused = false;
            paused.push(TaskToFreeze { was_paused, ..task });
        }
    }
    let paused = Committed::of(&node, paused);
    if !source_runs {
        return paused.kill(async {}).await;
    }
    // Whatever ends while it was marked may start again now.
    moved::unmark(dir, &uid)?;
    paused.thaw().await
}
