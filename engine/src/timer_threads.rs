//! Timers that signal one thread, in the images of a dump whose container still stands still.
//!
//! ```text
//!  /proc/PID/timers    ID: 3
//!                      notify: signal/tid.4711 --> /proc/4711/status: NSpid ... 7
//! ```

use std::collections::BTreeMap;
use std::path::Path;

use transship_checkpoint::criu_images::posix_timers::translate_threads;
use transship_sandbox::{TaskStatus, read_proc};

use crate::error::{Context, Error, Result};

/// A process as the container knows it, and one of its timers.
type Timer = (u32, u64);

/// Names the threads that timers of these processes signal as the container knows them.
///
/// # Errors
/// The images cannot be read or replaced.
pub(crate) async fn translate(images: &Path, pids: &[u32]) -> Result<()> {
    let (dir, pids) = (images.to_path_buf(), pids.to_vec());
    let translated = tokio::task::spawn_blocking(move || {
        let known: BTreeMap<Timer, u32> = pids.into_iter().flat_map(timers).collect();
        translate_threads(&dir, |process, timer| known.get(&(process, timer)).copied())
    });
    let failed = || format!("cannot edit the timers in {}", images.display());
    translated
        .await?
        .map_err(Error::caused_by)
        .with_context(failed)
}

/// The timers of a process that signal one thread, with the thread's id in the container.
fn timers(pid: u32) -> Vec<(Timer, u32)> {
    // A zombie has none.
    let text = read_proc(format!("/proc/{pid}/timers")).unwrap_or_default();
    let told = threads(&text);
    let process = (!told.is_empty()).then(|| inside(pid)).flatten();
    let named = |process| {
        let inside = |(timer, thread)| Some(((process, timer), inside(thread)?));
        told.into_iter().filter_map(inside).collect()
    };
    process.map(named).unwrap_or_default()
}

/// Timers and threads in `/proc/PID/timers`.
fn threads(text: &str) -> Vec<(u64, u32)> {
    let mut timer = None;
    let mut found = Vec::new();
    for line in text.lines() {
        if let Some(id) = line.strip_prefix("ID: ") {
            timer = id.parse().ok();
        } else if let Some((_, thread)) = line
            .strip_prefix("notify: ")
            .and_then(|how| how.split_once("/tid."))
        {
            found.extend(timer.zip(thread.parse().ok()));
        }
    }
    found
}

/// The id of a process or thread in its container.
fn inside(id: u32) -> Option<u32> {
    TaskStatus::of(format!("/proc/{id}"))
        .ok()?
        .id_in_container()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_of_threads_are_told_from_others() {
        let text = "ID: 0\nsignal: 34/0000000000000000\nnotify: signal/pid.4711\nClockID: 1\n\
                    ID: 12\nsignal: 34/0000000000000000\nnotify: signal/tid.4712\nClockID: 1\n\
                    ID: 13\nsignal: 0/0000000000000000\nnotify: none/pid.4711\nClockID: 0\n";
        assert_eq!(threads(text), [(12, 4712)]);
        assert_eq!(threads(""), []);
        assert_eq!(
            threads("notify: signal/tid.4712\nID: x\nnotify: signal/tid.1\n"),
            []
        );
    }

    #[test]
    fn a_program_without_timers_has_none() {
        let own = std::process::id();
        assert_eq!(timers(own), []);
        assert_eq!(timers(u32::MAX), []);
        assert_eq!(inside(u32::MAX), None);
    }
}
