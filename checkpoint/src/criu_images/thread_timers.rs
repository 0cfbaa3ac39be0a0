//! `core-<pid>.img`: POSIX timers that signal one thread (`SIGEV_THREAD_ID`).
//!
//! ```text
//! core_entry         3 tc
//! task_core_entry    7 timers
//! task_timers_entry  4 posix, repeated
//! posix_timer_entry  1 it_id   4 it_sigev_notify   11 notify_thread_id
//! ```
//!
//! CRIU 4.2.0 writes the thread's id down as `/proc/PID/timers` tells it outside of the container, and asks
//! for that id inside, where no thread has it: "Can't create posix timer - 0: -22". Later ones translate it,
//! but for the first thread of a process, of which they write what was in memory. So what CRIU has written does
//! not count: the ids are set right after the dump, while the threads are still there to be asked.

use std::path::Path;

use super::strict::{edit_submessage, fields, set_varints, submessage};
use super::{Image, ImageError, Kind, list, push_bytes};

const TC: u64 = 3;
const TIMERS: u64 = 7;
const POSIX: u64 = 4;
const ID: u64 = 1;
const NOTIFY: u64 = 4;
const NOTIFY_THREAD_ID: u64 = 11;
/// `SIGEV_THREAD_ID`.
const TO_A_THREAD: u64 = 4;

/// Gives each timer that signals a thread the thread's id in the container. `translate` knows it by the
/// process's id in the container and the timer's; what it does not know is left.
///
/// # Errors
/// An image that cannot be read or replaced.
pub fn translate_threads(
    dir: &Path,
    translate: impl Fn(u32, u64) -> Option<u32>,
) -> Result<(), ImageError> {
    for (pid, path) in list(dir, Kind::Core)? {
        let image = Image::read(&path, Kind::Core)?;
        let mut entries = image.entries();
        let Some(core) = entries.next_bytes()? else {
            continue;
        };
        let Some(edited) = edited(core, |timer| translate(pid, timer)) else {
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
fn edited(core: &[u8], translate: impl Fn(u64) -> Option<u32>) -> Option<Vec<u8>> {
    let timers = submessage(submessage(core, TC)?, TIMERS)?;
    let mut new = Vec::with_capacity(timers.len());
    let mut changed = false;
    for field in fields(timers)? {
        let timer = timers.get(field.value)?;
        let to_thread = (field.number == POSIX).then(|| of_thread(timer)).flatten();
        match to_thread
            .and_then(|(id, written)| translate(id).filter(|inside| u64::from(*inside) != written))
        {
            Some(inside) => {
                changed = true;
                let timer = set_varints(timer, NOTIFY_THREAD_ID, &[inside.into()]);
                new.extend(edit_submessage(&[], POSIX, |_| timer));
            }
            None => new.extend(timers.get(field.whole)?),
        }
    }
    changed.then(|| edit_submessage(core, TC, |tc| edit_submessage(tc, TIMERS, |_| new)))
}

/// The id of a timer that signals a thread, and which thread CRIU has written.
fn of_thread(timer: &[u8]) -> Option<(u64, u64)> {
    let notify = submessage_varint(timer, NOTIFY)?;
    let thread = submessage_varint(timer, NOTIFY_THREAD_ID)?;
    let id = submessage_varint(timer, ID)?;
    (notify & TO_A_THREAD != 0).then_some((id, thread))
}

fn submessage_varint(message: &[u8], number: u64) -> Option<u64> {
    prost::encoding::decode_varint(&mut submessage(message, number)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timer(id: u64, notify: u64, thread: u64) -> Vec<u8> {
        let timer = set_varints(&[], ID, &[id]);
        let timer = set_varints(&timer, NOTIFY, &[notify]);
        set_varints(&timer, NOTIFY_THREAD_ID, &[thread])
    }

    fn core(timers: &[Vec<u8>]) -> Vec<u8> {
        let mut all = set_varints(&[], 1, &[9]);
        for timer in timers {
            all.extend(edit_submessage(&[], POSIX, |_| timer.clone()));
        }
        let tc = edit_submessage(&set_varints(&[], 1, &[1]), TIMERS, |_| all);
        edit_submessage(&set_varints(&[], 1, &[1]), TC, |_| tc)
    }

    #[test]
    fn threads_are_named_as_the_container_knows_them() {
        let inside = |timer| (timer < 3).then_some(7);
        // What a CRIU has written that had nothing to write is negative.
        let garbage = u64::MAX - 4711;
        let old = core(&[
            timer(0, 4, 4711),
            timer(1, 4, garbage),
            timer(2, 0, 4711),
            timer(3, 4, 12),
        ]);
        let new = core(&[
            timer(0, 4, 7),
            timer(1, 4, 7),
            timer(2, 0, 4711),
            timer(3, 4, 12),
        ]);
        assert_eq!(edited(&old, inside), Some(new.clone()));
        // A second time there is nothing to do.
        assert_eq!(edited(&new, inside), None);
        for cut in 0..old.len() {
            drop(edited(&old[..cut], inside));
        }
    }

    #[test]
    fn images_are_replaced_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let mut body = Vec::new();
        push_bytes(&mut body, &core(&[timer(5, 4, 4711)]));
        let path = dir.path().join("core-3.img");
        Image::new(&path, Kind::Core, body).replace(&path).unwrap();
        translate_threads(dir.path(), |pid, timer| {
            Some(pid + u32::try_from(timer).unwrap())
        })
        .unwrap();
        let image = Image::read(&path, Kind::Core).unwrap();
        let bytes = image.entries().next_bytes().unwrap().unwrap();
        assert_eq!(bytes, core(&[timer(5, 4, 8)]));
    }
}
