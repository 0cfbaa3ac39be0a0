//! `files.img`: timers of descriptors that CRIU would set otherwise than they were.
//!
//! ```text
//! file_entry     12 tfd: timerfd_entry
//! timerfd_entry  4 clockid   5 ticks   6 settime_flags   7 vsec   8 vnsec   (what was left of it at the dump)
//!                                                        9 isec  10 insec   (its period)
//! ```
//!
//! A periodic timer that has expired, and has not been read since, stands still in the kernel until it is read, and has
//! nothing left: CRIU would set it to nothing, which disarms it for ever. It fires at once instead.
//!
//! Those that are set to a moment of the wall clock:
//!
//! CRIU sets such a timer to the moment of the restore and what was left: it would be late by the time
//! between. The seconds are added as signed ones, so a moment that has passed can be said, too: the timer
//! fires at once, and a periodic one keeps its beat.

use std::path::Path;

use super::strict::{edit_submessage, set_varints, submessage};
use super::{Image, ImageError, Kind, push_bytes};

const FILES_IMAGE: &str = "files.img";
const TFD: u64 = 12;
const VSEC: u64 = 7;
const VNSEC: u64 = 8;
/// `CLOCK_REALTIME` and `CLOCK_REALTIME_ALARM`.
const WALL_CLOCKS: [u32; 2] = [0, 8];
const TFD_TIMER_ABSTIME: u32 = 1;
const NANOSECONDS: i128 = 1_000_000_000;

/// `timerfd_entry` of `images/timerfd.proto`, as far as it matters.
#[derive(Clone, PartialEq, prost::Message)]
struct TimerFd {
    #[prost(uint32, required, tag = "4")]
    clock: u32,
    /// How often it has expired since it was read.
    #[prost(uint64, required, tag = "5")]
    ticks: u64,
    #[prost(uint32, required, tag = "6")]
    flags: u32,
    #[prost(uint64, required, tag = "7")]
    seconds: u64,
    #[prost(uint64, required, tag = "8")]
    nanoseconds: u64,
    #[prost(uint64, required, tag = "9")]
    period_seconds: u64,
    #[prost(uint64, required, tag = "10")]
    period_nanoseconds: u64,
}

/// Lets `passed` nanoseconds of the wall clock go by for its timers in the images of `dir`, and wakes those that wait to be
/// read. Gives how many there are.
///
/// # Errors
/// The image cannot be read or written.
pub fn correct(dir: &Path, passed: u64) -> Result<usize, ImageError> {
    let path = dir.join(FILES_IMAGE);
    if std::fs::symlink_metadata(&path).is_err() {
        return Ok(0);
    }
    let image = Image::read(&path, Kind::Files)?;
    let mut entries = image.entries();
    let (mut body, mut changed) = (Vec::new(), 0);
    while let Some(entry) = entries.next_bytes()? {
        let timer = submessage(entry, TFD).map(|timer| image.decode::<TimerFd>(timer));
        match timer
            .transpose()?
            .and_then(|timer| timer.left_after(passed))
        {
            Some((seconds, nanoseconds)) => {
                let edit = |old: &[u8]| {
                    let new = set_varints(old, VSEC, &[seconds]);
                    set_varints(&new, VNSEC, &[nanoseconds])
                };
                push_bytes(&mut body, &edit_submessage(entry, TFD, edit));
                changed += 1;
            }
            None => push_bytes(&mut body, entry),
        }
    }
    if changed > 0 {
        image.with_body(body).replace(&path)?;
    }
    Ok(changed)
}

impl TimerFd {
    fn is_of_wall_clock(&self) -> bool {
        let is_set = self.seconds != 0 || self.nanoseconds != 0;
        is_set && WALL_CLOCKS.contains(&self.clock) && self.flags & TFD_TIMER_ABSTIME != 0
    }

    fn waits_to_be_read(&self) -> bool {
        let is_periodic = self.period_seconds != 0 || self.period_nanoseconds != 0;
        is_periodic && self.ticks != 0 && self.seconds == 0 && self.nanoseconds == 0
    }

    /// What is to be left of it, where that is not what the image says.
    fn left_after(&self, passed: u64) -> Option<(u64, u64)> {
        if self.waits_to_be_read() {
            return Some((0, 1));
        }
        if !self.is_of_wall_clock() {
            return None;
        }
        let left = i128::from(self.seconds) * NANOSECONDS + i128::from(self.nanoseconds);
        let left = left - i128::from(passed);
        let seconds = i64::try_from(left.div_euclid(NANOSECONDS)).unwrap_or(i64::MIN);
        let nanoseconds = u64::try_from(left.rem_euclid(NANOSECONDS)).unwrap_or_default();
        Some((seconds.cast_unsigned(), nanoseconds))
    }
}

#[cfg(test)]
mod tests {
    use super::super::push_entry;
    use super::*;

    #[derive(Clone, PartialEq, prost::Message)]
    struct FileEntry {
        #[prost(uint32, required, tag = "1")]
        kind: u32,
        #[prost(message, optional, tag = "12")]
        tfd: Option<TimerFd>,
    }

    fn timer(clock: u32, flags: u32, seconds: u64, nanoseconds: u64) -> TimerFd {
        TimerFd {
            clock,
            flags,
            seconds,
            nanoseconds,
            ..TimerFd::default()
        }
    }

    /// Every second; expired that often, and so much is left.
    fn periodic(ticks: u64, nanoseconds: u64) -> TimerFd {
        TimerFd {
            ticks,
            period_seconds: 1,
            ..timer(1, 0, 0, nanoseconds)
        }
    }

    #[test]
    fn only_moments_of_the_wall_clock_come_nearer_and_what_waits_is_woken() {
        let passed = 3_600_000_000;
        let late = (-2_i64).cast_unsigned();
        let cases = [
            (timer(0, 1, 10, 500_000_000), timer(0, 1, 6, 900_000_000)),
            (timer(8, 1, 2, 0), timer(8, 1, late, 400_000_000)),
            // Relative, of another clock, not armed.
            (timer(0, 0, 10, 0), timer(0, 0, 10, 0)),
            (timer(1, 1, 10, 0), timer(1, 1, 10, 0)),
            (timer(0, 1, 0, 0), timer(0, 1, 0, 0)),
            // It waits to be read; it goes; somebody has stopped it.
            (periodic(2, 0), periodic(2, 1)),
            (periodic(2, 7), periodic(2, 7)),
            (periodic(0, 0), periodic(0, 0)),
        ];
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILES_IMAGE);
        assert_eq!(correct(dir.path(), passed).unwrap(), 0);
        let mut body = Vec::new();
        push_entry(&mut body, &FileEntry { kind: 1, tfd: None });
        for (before, _) in &cases {
            let tfd = Some(before.clone());
            push_entry(&mut body, &FileEntry { kind: 11, tfd });
        }
        let image = Image::new(&path, Kind::Files, body);
        std::fs::write(&path, image.to_bytes()).unwrap();
        assert_eq!(correct(dir.path(), passed).unwrap(), 3);
        let image = Image::read(&path, Kind::Files).unwrap();
        let mut entries = image.entries();
        let mut found = Vec::new();
        while let Some(entry) = entries.next::<FileEntry>().unwrap() {
            found.extend(entry.tfd);
        }
        assert_eq!(found, cases.map(|(_, after)| after));
    }
}
