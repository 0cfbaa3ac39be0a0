//! Timers that signal one thread, in the images of a dump whose container still stands still.

use std::path::Path;

use procfs::process::{Process, Status};
use transship_checkpoint::criu_images::thread_timers::translate_threads;

use crate::error::{Context, Error, Result};

/// Names the threads as the container knows them.
///
/// # Errors
/// The images cannot be read or replaced.
pub(crate) async fn translate(images: &Path) -> Result<()> {
    let dir = images.to_path_buf();
    let translated = tokio::task::spawn_blocking(move || translate_threads(&dir, inside)).await?;
    let failed = || format!("cannot edit the timers in {}", images.display());
    translated.map_err(Error::caused_by).with_context(failed)
}

/// The thread's id in the container, if it is a thread of the process that has `process` as its id
/// there: a CRIU that translates by itself must not be corrected.
fn inside(process: u32, thread: u32) -> Option<u32> {
    let of_thread = status(thread.cast_signed())?;
    let of_process = status(of_thread.tgid)?;
    let (process_inside, thread_inside) = (innermost(&of_process)?, innermost(&of_thread)?);
    (process_inside == process).then_some(thread_inside)
}

fn status(id: i32) -> Option<Status> {
    Process::new(id).ok()?.status().ok()
}

/// The id in the namespace of the thread itself, when that is not the one of who asks.
fn innermost(status: &Status) -> Option<u32> {
    let ids = status.nspid.as_deref()?;
    let last = ids.last().filter(|_| ids.len() > 1)?;
    Some(last.cast_unsigned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_no_namespace_of_its_own_is_left() {
        let own = std::process::id();
        let nested = status(own.cast_signed()).and_then(|status| innermost(&status));
        assert_eq!(inside(own, own), nested.filter(|id| *id == own));
        assert_eq!(inside(own, u32::MAX), None);
    }
}
