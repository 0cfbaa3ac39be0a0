//! `core-<pid>.img`: of each task only whether it was stopped when it was dumped. A held restore
//! stops every task; those that were stopped before must stay so when the others go on.

use std::path::Path;

use super::{Image, ImageError, Kind, list};

/// `COMPEL_TASK_STOPPED` of `compel/include/uapi/task-state.h`.
const TASK_STOPPED: u32 = 3;

/// `core_entry` of `images/core.proto`; threads have no `tc`.
#[derive(Clone, PartialEq, prost::Message)]
struct CoreEntry {
    #[prost(message, optional, tag = "3")]
    tc: Option<TaskCoreEntry>,
}

/// `task_core_entry` of `images/core.proto`.
#[derive(Clone, PartialEq, prost::Message)]
struct TaskCoreEntry {
    #[prost(uint32, required, tag = "1")]
    task_state: u32,
}

/// The ids of all processes and threads, in the container.
///
/// # Errors
/// The directory cannot be listed.
pub fn ids(dir: &Path) -> Result<Vec<u32>, ImageError> {
    let images = list(dir, Kind::Core)?;
    Ok(images.into_iter().map(|(id, _)| id).collect())
}

/// The tasks that were stopped when they were dumped, by their pid in the container.
///
/// # Errors
/// An image that cannot be read.
pub fn stopped(dir: &Path) -> Result<Vec<u32>, ImageError> {
    let mut stopped = Vec::new();
    for (pid, path) in list(dir, Kind::Core)? {
        let entry: Option<CoreEntry> = Image::read(&path, Kind::Core)?.entries().next()?;
        if entry
            .and_then(|core| core.tc)
            .is_some_and(|tc| tc.task_state == TASK_STOPPED)
        {
            stopped.push(pid);
        }
    }
    Ok(stopped)
}
