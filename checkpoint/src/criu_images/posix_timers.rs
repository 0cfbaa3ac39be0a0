//! `core-<pid>.img`: POSIX timers that CRIU would set otherwise than they were.
//!
//! ```text
//! core_entry         3 tc
//! task_core_entry    7 timers
//! task_timers_entry  4 posix, repeated
//! posix_timer_entry  1 it_id   2 clock_id   4 it_sigev_notify   11 notify_thread_id
//!                    7 isec    8 insec    (its period)
//!                    9 vsec   10 vnsec    (what was left of it at the dump; nothing: it is not set)
//! ```
//!
//! Those that signal one thread (`SIGEV_THREAD_ID`):
//! CRIU 4.2.0 writes the thread's id down as `/proc/PID/timers` tells it outside of the container, and asks
//! for that id inside, where no thread has it: "Can't create posix timer - 0: -22". Later ones translate it,
//! but for the first thread of a process, of which they write what was in memory. So what CRIU has written does
//! not count: the ids are set right after the dump, while the threads are still there to be asked.
//!
//! Those that are set to a moment of the wall clock (`TIMER_ABSTIME`):
//! CRIU sets them to the moment of the restore and what was left, so they would be late by the time between. The
//! images do not tell them from others, see `wall_clock_timers.rs` of the engine.

use std::path::Path;
use std::time::Duration;

use super::strict::{edit_submessages, fields, set_varints, submessage};
use super::{Image, ImageError, Kind, list, push_bytes};

const TC: u64 = 3;
const TIMERS: u64 = 7;
const POSIX: u64 = 4;
const NOTIFY_THREAD_ID: u64 = 11;
const VSEC: u64 = 9;
const VNSEC: u64 = 10;
/// `SIGEV_THREAD_ID`.
const TO_A_THREAD: u32 = 4;

/// `posix_timer_entry` of `images/timer.proto`, as far as it matters.
#[derive(Clone, PartialEq, prost::Message)]
struct Entry {
    #[prost(uint64, required, tag = "1")]
    id: u64,
    #[prost(uint32, required, tag = "2")]
    clock: u32,
    #[prost(uint32, required, tag = "4")]
    notify: u32,
    #[prost(uint64, required, tag = "7")]
    period_seconds: u64,
    #[prost(uint64, required, tag = "8")]
    period_nanoseconds: u64,
    #[prost(uint64, required, tag = "9")]
    seconds: u64,
    #[prost(uint64, required, tag = "10")]
    nanoseconds: u64,
    #[prost(uint64, optional, tag = "11")]
    thread: Option<u64>,
}

/// A timer of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PosixTimer {
    /// The process's id in the container.
    pub process: u32,
    /// The timer's in the process.
    pub id: u64,
    /// `CLOCK_*`
    pub clock: u32,
    /// What was left of it when CRIU asked; nothing: it was not set.
    pub left: Duration,
    /// How often it fires; nothing: once.
    pub period: Duration,
}

/// The timers of all processes in the images of `dir`.
///
/// # Errors
/// An image that cannot be read.
pub fn timers(dir: &Path) -> Result<Vec<PosixTimer>, ImageError> {
    let mut found = Vec::new();
    edit(dir, |timer| {
        found.push(timer);
        None
    })?;
    Ok(found)
}

/// Sets what is left of each timer for which `left` knows something.
///
/// # Errors
/// An image that cannot be read or replaced.
pub fn set_left(
    dir: &Path,
    left: impl Fn(PosixTimer) -> Option<Duration>,
) -> Result<(), ImageError> {
    edit(dir, |timer| left(timer).map(Edit::Left))
}

/// Gives each timer that signals a thread the thread's id in the container. `translate` knows it by the
/// process's id in the container and the timer's; what it does not know is left.
///
/// # Errors
/// An image that cannot be read or replaced.
pub fn translate_threads(
    dir: &Path,
    translate: impl Fn(u32, u64) -> Option<u32>,
) -> Result<(), ImageError> {
    edit(dir, |timer| {
        translate(timer.process, timer.id).map(Edit::Thread)
    })
}

/// What is to be another in a timer.
enum Edit {
    Left(Duration),
    /// Of one that signals a thread.
    Thread(u32),
}

fn edit(dir: &Path, mut change: impl FnMut(PosixTimer) -> Option<Edit>) -> Result<(), ImageError> {
    for (process, path) in list(dir, Kind::Core)? {
        let image = Image::read(&path, Kind::Core)?;
        let mut entries = image.entries();
        let Some(core) = entries.next_bytes()? else {
            continue;
        };
        let Some(edited) = edited(&image, core, |entry| change(entry.of(process)))? else {
            continue;
        };
        let mut body = Vec::with_capacity(image.body().len());
        push_bytes(&mut body, &edited);
        body.extend(&image.body()[entries.position()..]);
        image.with_body(body).replace(&path)?;
    }
    Ok(())
}

/// The edited message; none when there is nothing to edit.
fn edited(
    image: &Image,
    core: &[u8],
    mut change: impl FnMut(&Entry) -> Option<Edit>,
) -> Result<Option<Vec<u8>>, ImageError> {
    let has_some = { submessage(core, TC).and_then(|tc| submessage(tc, TIMERS)) }
        .and_then(fields)
        .is_some_and(|all| all.iter().any(|field| field.number == POSIX));
    if !has_some {
        return Ok(None);
    }
    let mut changed = false;
    let new = edit_submessages(core, TC, |tc| {
        edit_submessages(tc, TIMERS, |timers| {
            edit_submessages(timers, POSIX, |timer| {
                let entry: Entry = image.decode(timer)?;
                let new = change(&entry).and_then(|edit| entry.with(timer, &edit));
                changed |= new.is_some();
                Ok(new)
            })
            .map(Some)
        })
        .map(Some)
    })?;
    Ok(changed.then_some(new))
}

impl Entry {
    fn of(&self, process: u32) -> PosixTimer {
        let time = |seconds, nanoseconds| {
            Duration::from_secs(seconds).saturating_add(Duration::from_nanos(nanoseconds))
        };
        PosixTimer {
            process,
            id: self.id,
            clock: self.clock,
            left: time(self.seconds, self.nanoseconds),
            period: time(self.period_seconds, self.period_nanoseconds),
        }
    }

    /// Its bytes with what is to be another; none when it is so already.
    fn with(&self, timer: &[u8], edit: &Edit) -> Option<Vec<u8>> {
        match *edit {
            Edit::Left(left) => {
                let timer = set_varints(timer, VSEC, &[left.as_secs()]);
                Some(set_varints(&timer, VNSEC, &[left.subsec_nanos().into()]))
            }
            Edit::Thread(inside) => {
                let inside = u64::from(inside);
                let is_other = self.thread.is_some_and(|written| written != inside);
                (self.notify & TO_A_THREAD != 0 && is_other)
                    .then(|| set_varints(timer, NOTIFY_THREAD_ID, &[inside]))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::strict::edit_submessage;
    use super::*;

    fn entry(id: u64, notify: u32, thread: u64) -> Entry {
        Entry {
            id,
            notify,
            thread: Some(thread),
            ..Entry::default()
        }
    }

    fn core(timers: &[Entry]) -> Vec<u8> {
        use prost::Message as _;
        let mut all = set_varints(&[], 1, &[9]);
        for timer in timers {
            // A signal number and a value, of which nothing is known here.
            let timer = set_varints(&timer.encode_to_vec(), 3, &[34]);
            all.extend(edit_submessage(&[], POSIX, |_| timer));
        }
        let tc = edit_submessage(&set_varints(&[], 1, &[1]), TIMERS, |_| all);
        edit_submessage(&set_varints(&[], 1, &[1]), TC, |_| tc)
    }

    fn written(dir: &Path, core: &[u8]) {
        let path = dir.join("core-3.img");
        let mut body = Vec::new();
        push_bytes(&mut body, core);
        Image::new(&path, Kind::Core, body).replace(&path).unwrap();
    }

    fn read(dir: &Path) -> Vec<u8> {
        let image = Image::read(&dir.join("core-3.img"), Kind::Core).unwrap();
        image.entries().next_bytes().unwrap().unwrap().to_vec()
    }

    #[test]
    fn threads_are_named_as_the_container_knows_them() {
        let dir = tempfile::tempdir().unwrap();
        let inside = |process: u32, timer: u64| (timer < 3).then_some(process + 4);
        // What a CRIU has written that had nothing to write is negative.
        let garbage = u64::MAX - 4711;
        let old = core(&[
            entry(0, 4, 4711),
            entry(1, 4, garbage),
            entry(2, 0, 4711),
            entry(3, 4, 12),
        ]);
        written(dir.path(), &old);
        translate_threads(dir.path(), inside).unwrap();
        let threads = |core: &[u8]| -> Vec<Option<u64>> {
            let image = Image::new(Path::new("core-3.img"), Kind::Core, Vec::new());
            let mut all = Vec::new();
            let change = |entry: &Entry| {
                all.push(entry.thread);
                None
            };
            edited(&image, core, change).unwrap();
            all
        };
        let new = read(dir.path());
        assert_eq!(threads(&new), [Some(7), Some(7), Some(4711), Some(12)]);
        // A second time there is nothing to do.
        let before = std::fs::metadata(dir.path().join("core-3.img")).unwrap();
        translate_threads(dir.path(), inside).unwrap();
        assert_eq!(read(dir.path()), new);
        let after = std::fs::metadata(dir.path().join("core-3.img")).unwrap();
        assert_eq!(before.modified().unwrap(), after.modified().unwrap());
        let image = Image::new(Path::new("core-3.img"), Kind::Core, Vec::new());
        for cut in 0..old.len() {
            drop(edited(&image, &old[..cut], |_| Some(Edit::Thread(7))));
        }
    }

    #[test]
    fn what_is_left_is_set_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let timer = |id, seconds| Entry {
            seconds,
            nanoseconds: 5,
            period_seconds: 60,
            ..entry(id, 0, 0)
        };
        written(dir.path(), &core(&[timer(0, 30), timer(1, 31)]));
        set_left(dir.path(), |timer| {
            (timer.id == 1).then_some(Duration::new(1, 2))
        })
        .unwrap();
        let found = timers(dir.path()).unwrap();
        let left: Vec<Duration> = found.iter().map(|timer| timer.left).collect();
        assert_eq!(left, [Duration::new(30, 5), Duration::new(1, 2)]);
        assert!(
            found
                .iter()
                .all(|timer| timer.period == Duration::from_secs(60))
        );
        assert!(found.iter().all(|timer| timer.process == 3));
        // What has no timers is left alone.
        written(dir.path(), &core(&[]));
        assert_eq!(timers(dir.path()).unwrap(), []);
    }
}
