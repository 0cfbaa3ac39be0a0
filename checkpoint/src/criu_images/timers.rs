//! `files.img`: timers of descriptors that CRIU would set otherwise than they were.
//!
//! ```text
//! file_entry     12 tfd: timerfd_entry
//! timerfd_entry  1 id   4 clockid   5 ticks   6 settime_flags   7 vsec   8 vnsec   (what was left of it at the dump)
//!                                                              9 isec  10 insec   (its period)
//! ```
//!
//! A periodic timer that has expired, and has not been read since, stands still in the kernel until it is read, and has
//! nothing left: CRIU would set it to nothing, which disarms it for ever. It fires at once instead.
//!
//! Those that are set to a moment of the wall clock:
//!
//! CRIU sets such a timer to the second of the restore and what was left: it would be late by the time
//! between, and early by the part of that second which had passed. Of another clock, or not set at all, it is so with any that
//! was ever set to a moment: those wait for a time instead, which for such a clock is the same. The seconds are added as signed ones, so a moment that
//! has passed can be said, too: the timer fires at once, and a periodic one keeps its beat.

use std::path::Path;
use std::time::Duration;

use super::strict::{edit_submessage, set_varints, submessage};
use super::{Image, ImageError, Kind, push_bytes};

const FILES_IMAGE: &str = "files.img";
const TFD: u64 = 12;
const FLAGS: u64 = 6;
const VSEC: u64 = 7;
const VNSEC: u64 = 8;
/// `CLOCK_REALTIME` and `CLOCK_REALTIME_ALARM`.
const WALL_CLOCKS: [u32; 2] = [0, 8];
const TFD_TIMER_ABSTIME: u32 = 1;
const NANOSECONDS: i128 = 1_000_000_000;

/// `timerfd_entry` of `images/timerfd.proto`, as far as it matters.
#[derive(Clone, PartialEq, prost::Message)]
struct TimerFd {
    #[prost(uint32, required, tag = "1")]
    id: u32,
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

/// The wall clock, in nanoseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WallClock {
    /// When the container stood still; not known: as `now`.
    pub frozen_at: u64,
    /// The time of the restore.
    pub now: u64,
}

/// A timer of a descriptor that is set to a moment of the wall clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DescriptorTimer {
    /// Its id in the images.
    pub id: u32,
    /// What was left of it when CRIU asked.
    pub left: Duration,
}

/// Those in the images of `dir`.
///
/// # Errors
/// The image cannot be read.
pub fn of_wall_clock(dir: &Path) -> Result<Vec<DescriptorTimer>, ImageError> {
    let mut found = Vec::new();
    edit(dir, |timer| {
        if timer.is_of_wall_clock() {
            let left = Duration::from_secs(timer.seconds);
            let left = left.saturating_add(Duration::from_nanos(timer.nanoseconds));
            found.push(DescriptorTimer { id: timer.id, left });
        }
        None
    })?;
    Ok(found)
}

/// Sets its timers of the wall clock in the images of `dir` to their moments, and wakes those that wait to be read. `at`
/// knows the moment of a timer by its id; of others it is what was left at the freeze. Gives how many there are.
///
/// # Errors
/// The image cannot be read or written.
pub fn correct(
    dir: &Path,
    clock: WallClock,
    at: impl Fn(u32) -> Option<u64>,
) -> Result<usize, ImageError> {
    edit(dir, |timer| timer.setting_at(clock, at(timer.id)))
}

/// How a timer is to be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Setting {
    flags: u32,
    seconds: u64,
    nanoseconds: u64,
}

/// Sets each timer for which `set` gives how.
fn edit(dir: &Path, mut set: impl FnMut(&TimerFd) -> Option<Setting>) -> Result<usize, ImageError> {
    let path = dir.join(FILES_IMAGE);
    if std::fs::symlink_metadata(&path).is_err() {
        return Ok(0);
    }
    let image = Image::read(&path, Kind::Files)?;
    let mut entries = image.entries();
    let (mut body, mut changed) = (Vec::new(), 0);
    while let Some(entry) = entries.next_bytes()? {
        let timer = submessage(entry, TFD).map(|timer| image.decode::<TimerFd>(timer));
        match timer.transpose()?.and_then(|timer| set(&timer)) {
            Some(setting) => {
                let edit = |old: &[u8]| {
                    let new = set_varints(old, FLAGS, &[setting.flags.into()]);
                    let new = set_varints(&new, VSEC, &[setting.seconds]);
                    set_varints(&new, VNSEC, &[setting.nanoseconds])
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

    /// How it is to be set, where that is not what the image says. It fires late by a second at most, where one begins
    /// before CRIU looks at the clock, and never early.
    fn setting_at(&self, clock: WallClock, at: Option<u64>) -> Option<Setting> {
        let waits_for_a_time = |seconds, nanoseconds| Setting {
            flags: self.flags & !TFD_TIMER_ABSTIME,
            seconds,
            nanoseconds,
        };
        if self.waits_to_be_read() {
            return Some(waits_for_a_time(0, 1));
        }
        if !self.is_of_wall_clock() {
            let is_of_a_moment = self.flags & TFD_TIMER_ABSTIME != 0;
            return is_of_a_moment.then(|| waits_for_a_time(self.seconds, self.nanoseconds));
        }
        let left = i128::from(self.seconds) * NANOSECONDS + i128::from(self.nanoseconds);
        let at = at.map_or_else(|| left + i128::from(clock.frozen_at), i128::from);
        let seconds = at.div_euclid(NANOSECONDS) - i128::from(clock.now) / NANOSECONDS;
        let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
        Some(Setting {
            flags: self.flags,
            seconds: seconds.cast_unsigned(),
            nanoseconds: u64::try_from(at.rem_euclid(NANOSECONDS)).unwrap_or_default(),
        })
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

    const KNOWN: u32 = 7;

    fn known(timer: TimerFd) -> TimerFd {
        TimerFd { id: KNOWN, ..timer }
    }

    /// Every second; expired that often, and so much is left.
    fn periodic(ticks: u64, nanoseconds: u64) -> TimerFd {
        TimerFd {
            ticks,
            period_seconds: 1,
            ..timer(1, 0, 0, nanoseconds)
        }
    }

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn only_moments_of_the_wall_clock_come_nearer_and_what_waits_is_woken() {
        // 3.6 s have passed; CRIU adds the 1004 whole seconds of the restore.
        let clock = WallClock {
            frozen_at: 1000 * SECOND + 900_000_000,
            now: 1004 * SECOND + 500_000_000,
        };
        let late = (-3_i64).cast_unsigned();
        let cases = [
            // To 1011.4, and by what is known of it to 1011.3.
            (timer(0, 1, 10, 500_000_000), timer(0, 1, 7, 400_000_000)),
            (
                known(timer(0, 1, 10, 500_000_000)),
                known(timer(0, 1, 7, 300_000_000)),
            ),
            (timer(8, 1, 1, 0), timer(8, 1, late, 900_000_000)),
            // Relative, of another clock, not armed any more.
            (timer(0, 0, 10, 0), timer(0, 0, 10, 0)),
            (timer(1, 1, 10, 0), timer(1, 0, 10, 0)),
            (timer(0, 3, 0, 0), timer(0, 2, 0, 0)),
            // It waits to be read; it goes; somebody has stopped it.
            (periodic(2, 0), periodic(2, 1)),
            (periodic(2, 7), periodic(2, 7)),
            (periodic(0, 0), periodic(0, 0)),
        ];
        let at = |id| (id == KNOWN).then_some(1011 * SECOND + 300_000_000);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILES_IMAGE);
        assert_eq!(correct(dir.path(), clock, at).unwrap(), 0);
        let mut body = Vec::new();
        push_entry(&mut body, &FileEntry { kind: 1, tfd: None });
        for (before, _) in &cases {
            let tfd = Some(before.clone());
            push_entry(&mut body, &FileEntry { kind: 11, tfd });
        }
        let image = Image::new(&path, Kind::Files, body);
        std::fs::write(&path, image.to_bytes()).unwrap();
        let left = Duration::new(10, 500_000_000);
        let expected = [(0, left), (KNOWN, left), (0, Duration::from_secs(1))];
        let expected = expected.map(|(id, left)| DescriptorTimer { id, left });
        assert_eq!(of_wall_clock(dir.path()).unwrap(), expected);
        assert_eq!(correct(dir.path(), clock, at).unwrap(), 6);
        let image = Image::read(&path, Kind::Files).unwrap();
        let mut entries = image.entries();
        let mut found = Vec::new();
        while let Some(entry) = entries.next::<FileEntry>().unwrap() {
            found.extend(entry.tfd);
        }
        assert_eq!(found, cases.map(|(_, after)| after));
    }
}
