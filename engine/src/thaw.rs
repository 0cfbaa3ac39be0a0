//! A paused task is let go, and looked at: only one that has been seen to run does run.

use std::time::Duration;

use containerd_client::types::v1::Status;
use tokio::time::timeout;
use transship_containerd::Containerd;

use crate::error::{Error, Result};
use crate::task_to_freeze::TaskToFreeze;

/// How long containerd may take for one answer.
pub(crate) const ANSWER: Duration = Duration::from_secs(5);

/// How long a shim may take to resume a task: within [`ANSWER`] the runtime is asked as well where it does not.
const RESUME: Duration = Duration::from_secs(2);

/// What containerd answers, for which somebody waits who stands still.
///
/// # Errors
/// Those of the answer, or it has not come in time.
pub(crate) async fn answered<T, E>(
    patience: Duration,
    answer: impl Future<Output = Result<T, E>>,
) -> Result<T>
where
    Error: From<E>,
{
    match timeout(patience, answer).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(Error::failed(format!(
            "containerd has not answered within {} s",
            patience.as_secs()
        ))),
    }
}

/// What a task does, as containerd says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    /// It runs, and the runtime says so, too.
    Running,
    /// The runtime says that it runs, and its shim does not answer.
    RunsUnseen,
    /// It stands still.
    Paused,
    /// There is no task, or it has ended.
    Gone,
}

/// Lets a task run, and looks what it does then. Fails when containerd does not answer.
pub(crate) async fn resume_once(node: &Containerd, task: &TaskToFreeze) -> Result<Seen> {
    // What counts is what is seen afterwards.
    let resumed = answered(RESUME, node.resume(&task.id)).await;
    let seen = look(node, &task.id).await?;
    if seen == Seen::RunsUnseen {
        // The shim may be silent for ever, and what stands still waits.
        if task.runtime.state(&task.id).await?.status == "paused" {
            task.runtime.resume(&task.id).await?;
        }
        return Ok(seen);
    }
    // A runtime that was killed in the middle of a pause (with its caller, say) has frozen it all the same. Its shim, which
    // has seen it fail, says that it runs (containerd 2.1), or that what it takes for running cannot be resumed (1.6).
    let may_be_frozen = match seen {
        Seen::Running => true,
        Seen::Paused => resumed.is_err(),
        Seen::RunsUnseen | Seen::Gone => false,
    };
    let is_frozen = seen != Seen::Gone && task.runtime.has_paused(&task.id).await;
    if is_frozen && may_be_frozen {
        task.runtime.resume(&task.id).await?;
    } else if seen == Seen::Paused && !is_frozen {
        // It runs, and the shim has not seen the runtime let it: that was done past containerd, by a CRIU that was
        // killed, or the runtime was killed when it had. The shim would refuse execs, and each resume, for ever: once
        // more from the beginning, for a moment.
        task.runtime.pause(&task.id).await?;
        if node.resume(&task.id).await.is_err() {
            task.runtime.resume(&task.id).await?;
        }
    } else {
        return Ok(seen);
    }
    look(node, &task.id).await
}

async fn look(node: &Containerd, id: &str) -> Result<Seen> {
    Ok(match node.task(id).await {
        Err(error) if error.is_not_found() => Seen::Gone,
        Err(error) if error.is_silent() => Seen::RunsUnseen,
        task => match task?.status() {
            Status::Running | Status::Created => Seen::Running,
            Status::Stopped => Seen::Gone,
            Status::Unknown | Status::Paused | Status::Pausing => Seen::Paused,
        },
    })
}
