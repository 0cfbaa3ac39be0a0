//! Timers that are set to a moment of the wall clock, in the images of a dump.
//!
//! ```text
//!  /proc/PID/timers    ClockID: 0                                      it may have one
//!  /proc/timer_list    clock 1:                                       (0 monotonic, 1 wall clock; 4 and 5 the same)
//!                        .offset:     1795948864858006102 nsecs       (from the monotonic clock)
//!                       #0: <...>, posix_timer_fn, S:01
//!                       # expires at 1795962936000000000-1795962936000000000 nsecs [in ...]
//! ```
//!
//! Neither the images nor `/proc/PID/timers` tell whether a POSIX timer of `CLOCK_REALTIME` was set with `TIMER_ABSTIME`. The
//! kernel keeps it by the wall clock then, else by the monotonic one, and its list of all timers says when each one
//! fires, not whose it is. CRIU asks all timers of a process at one moment, writes down what is left of each, and then the
//! image of the process: the moment is known by that, and by the process's timers, all of which must be in the list. Where
//! the timers of others leave a doubt nothing is told.
//!
//! Of a timer of a descriptor `/proc/PID/fdinfo` says all; its number in the images is found by the time that was left.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use transship_checkpoint::criu_images::ImageError;
use transship_checkpoint::criu_images::posix_timers::{PosixTimer, timers};
use transship_checkpoint::criu_images::timers::of_wall_clock;
use transship_checkpoint::task_attributes::{TaskAttributes, WallClockDescriptor, WallClockTimer};
use transship_sandbox::read_proc;

use crate::error::{Context, Error, Result};

const ALL_TIMERS: &str = "/proc/timer_list";
const CLOCK_REALTIME: u32 = 0;
const CLOCK_MONOTONIC: u32 = 1;
/// Between the first and the last timer of a process that CRIU asks, and where a clock is slewed meanwhile.
const AT_ONE_MOMENT: u64 = 1_000_000;
/// Between the question and the image is what CRIU asks of the threads.
const BEFORE_IMAGE: u64 = 200_000_000;
/// The times of files are those of the last tick of the clock.
const CLOCK_TICK: u64 = 10_000_000;
/// By so many of its timers the moment is known at which those of a process were asked.
const WITNESSES: usize = 16;

/// When timers fire, while a container stands still. In nanoseconds of the wall clock, and sorted.
#[derive(Debug, Clone, Default)]
pub(crate) struct Expiries {
    /// When the list was read.
    read_at: u64,
    /// When each POSIX timer of the node fires, and whether it is kept by the wall clock.
    posix: Vec<(u64, bool)>,
    /// When each timer of a descriptor of the container fires that is.
    descriptors: Vec<u64>,
}

impl Expiries {
    /// Reads the list, where one of these processes has a POSIX timer of the wall clock. Where it may not be read there are
    /// none. `descriptors` are the moments of those of descriptors.
    pub(crate) fn read(pids: &[u32], mut descriptors: Vec<u64>) -> Self {
        let read_at = wall_clock_now();
        let has_one = pids.iter().any(|pid| {
            let text = read_proc(format!("/proc/{pid}/timers")).unwrap_or_default();
            text.lines().any(|line| line == "ClockID: 0")
        });
        let list = has_one.then(|| std::fs::read_to_string(ALL_TIMERS).ok());
        descriptors.sort_unstable();
        Self {
            read_at,
            posix: posix_timers(&list.flatten().unwrap_or_default()),
            descriptors,
        }
    }

    /// Writes down of the timers in these images which are set to a moment, and to which.
    ///
    /// # Errors
    /// The images cannot be read.
    pub(crate) async fn tell_moments(
        self,
        images: &Path,
        attributes: &mut TaskAttributes,
    ) -> Result<()> {
        let has_posix = self.posix.iter().any(|(_, by_wall_clock)| *by_wall_clock);
        if !has_posix && self.descriptors.is_empty() {
            return Ok(());
        }
        let dir = images.to_path_buf();
        let found = tokio::task::spawn_blocking(move || {
            let until = wall_clock_now();
            let mut of_processes: BTreeMap<u32, Vec<PosixTimer>> = BTreeMap::new();
            for timer in timers(&dir)? {
                of_processes.entry(timer.process).or_default().push(timer);
            }
            let posix = of_processes.iter().flat_map(|(process, timers)| {
                self.of_process(timers, self.asked_between(&dir, *process))
            });
            let descriptors = of_wall_clock(&dir)?.into_iter().filter_map(|timer| {
                let at = self.of_descriptor(timer.left, until)?;
                Some(WallClockDescriptor { id: timer.id, at })
            });
            Ok::<_, ImageError>((posix.collect(), descriptors.collect()))
        });
        let failed = || format!("cannot read the timers in {}", images.display());
        let found = found
            .await?
            .map_err(Error::caused_by)
            .with_context(failed)?;
        (attributes.timers, attributes.descriptor_timers) = found;
        Ok(())
    }

    /// The moment of a timer of a descriptor of which so much was left when CRIU asked, before `until`.
    fn of_descriptor(&self, left: Duration, until: u64) -> Option<u64> {
        let left = nanoseconds(left);
        let from = self.read_at.saturating_add(left);
        let from = from.saturating_sub(AT_ONE_MOMENT);
        let first = self.descriptors.partition_point(|at| *at < from);
        let at = self.descriptors.get(first).copied();
        at.filter(|at| at.saturating_sub(left) <= until)
    }

    /// When CRIU has asked the timers of a process: shortly before it has written the image of it.
    fn asked_between(&self, images: &Path, process: u32) -> Range<u64> {
        let written = std::fs::metadata(images.join(format!("core-{process}.img")));
        let written = written.and_then(|image| image.modified());
        let written = written.map_or_else(|_| wall_clock_now(), since_1970);
        self.read_at.max(written.saturating_sub(BEFORE_IMAGE))..written.saturating_add(CLOCK_TICK)
    }

    /// Those of one process, which were asked at one moment of these.
    fn of_process(&self, timers: &[PosixTimer], asked: Range<u64>) -> Vec<WallClockTimer> {
        let armed = |timer: &&PosixTimer| {
            [CLOCK_REALTIME, CLOCK_MONOTONIC].contains(&timer.clock) && !timer.left.is_zero()
        };
        let witnesses: Vec<&PosixTimer> = timers.iter().filter(armed).take(WITNESSES).collect();
        let moments = witnesses.iter().flat_map(|timer| {
            let left = nanoseconds(timer.left);
            let first = self
                .posix
                .partition_point(|(at, _)| *at < asked.start.saturating_add(left));
            let within = self.posix[first..].iter().map(move |(at, _)| at - left);
            within.take_while(|moment| *moment < asked.end)
        });
        // How many of the timers speak for each.
        let moments: Vec<(u64, usize)> = moments
            .map(|moment| {
                let found = witnesses.iter();
                (
                    moment,
                    found
                        .filter_map(|timer| self.nearest(timer, moment))
                        .count(),
                )
            })
            .collect();
        let most = moments.iter().map(|(_, count)| *count).max();
        let best = { moments.iter() }.filter(|(_, count)| Some(*count) == most);
        let moments: Vec<u64> = best.map(|(moment, _)| *moment).collect();
        let of_wall_clock = |timer: &PosixTimer| {
            let mut found = moments.iter().map(|moment| {
                let expiry = self.nearest(timer, *moment)?;
                expiry.by_wall_clock.then_some(expiry.at)
            });
            let at = found.next()?;
            // As many timers speak for another moment, at which it was another one.
            let is_certain = found.all(|other| other == at);
            (timer.clock == CLOCK_REALTIME && is_certain).then_some(WallClockTimer {
                process: timer.process,
                timer: timer.id,
                at: at?,
            })
        };
        timers
            .iter()
            .filter(armed)
            .filter_map(of_wall_clock)
            .collect()
    }

    /// What the list has of a timer that was asked at that moment.
    fn nearest(&self, timer: &PosixTimer, moment: u64) -> Option<Expiry> {
        let expected = moment.saturating_add(nanoseconds(timer.left));
        let from = expected.saturating_sub(AT_ONE_MOMENT);
        let first = self.posix.partition_point(|(at, _)| *at < from);
        let near = self.posix[first..]
            .iter()
            .map(|(at, by_wall_clock)| Expiry {
                at: *at,
                by_wall_clock: *by_wall_clock,
                apart: at.abs_diff(expected),
            });
        // Of two that are as near, the one by the wall clock, of which there are fewer.
        near.take_while(|it| it.at <= expected.saturating_add(AT_ONE_MOMENT))
            .filter(|it| timer.clock == CLOCK_REALTIME || !it.by_wall_clock)
            .min_by_key(|it| (it.apart, !it.by_wall_clock))
    }
}

struct Expiry {
    at: u64,
    by_wall_clock: bool,
    apart: u64,
}

/// The POSIX timers in the kernel's list: when each fires by the wall clock, and whether it is kept by that; sorted.
fn posix_timers(list: &str) -> Vec<(u64, bool)> {
    let offset = |of: &str| {
        let lines = list.lines().map(str::trim).skip_while(|line| *line != of);
        let mut offsets = lines.filter_map(|line| line.strip_prefix(".offset:"));
        offsets.next()?.trim().strip_suffix(" nsecs")?.parse().ok()
    };
    let Some(wall_clock): Option<u64> = offset("clock 1:") else {
        return Vec::new();
    };
    let mut found = Vec::new();
    let (mut clock, mut is_posix) = (None, false);
    for line in list.lines().map(str::trim) {
        if let Some(number) = line.strip_prefix("clock ") {
            clock = number.trim_end_matches(':').parse::<u32>().ok();
        } else if let Some(at) = line.strip_prefix("# expires at ").filter(|_| is_posix) {
            let at = at.split('-').next().and_then(|at| at.parse::<u64>().ok());
            match clock {
                Some(0 | 4) => found.extend(at.map(|at| (at.saturating_add(wall_clock), false))),
                Some(1 | 5) => found.extend(at.map(|at| (at, true))),
                _ => {}
            }
        } else if line.starts_with('#') {
            is_posix = line.contains(" posix_timer_fn,");
        }
    }
    found.sort_unstable();
    found
}

/// Nanoseconds of the wall clock since 1970.
pub(crate) fn wall_clock_now() -> u64 {
    since_1970(SystemTime::now())
}

fn since_1970(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map(nanoseconds)
        .unwrap_or_default()
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_without_timers_has_none() {
        let own = std::process::id();
        assert_eq!(Expiries::read(&[own, u32::MAX], Vec::new()).posix, []);
    }

    const LIST: &str = "Timer List Version: v0.10\ncpu: 0\n clock 0:\n  .index:      0\n  .offset:     0 nsecs\n\
        active timers:\n #0: <00000000972d4b8a>, tick_nohz_handler, S:01\n \
        # expires at 100-100 nsecs [in 3 to 3 nsecs]\n #1: <0>, posix_timer_fn, S:01\n \
        # expires at 7000-7005 nsecs [in 3 to 3 nsecs]\n clock 1:\n  .offset:     1000000 nsecs\nactive timers:\n \
        #0: <0>, hrtimer_wakeup, S:01\n # expires at 1000100-1000100 nsecs [in 3 to 3 nsecs]\n \
        #1: <0>, posix_timer_fn, S:01\n # expires at 1006000-1006000 nsecs [in 3 to 3 nsecs]\n clock 2:\n  \
        .offset:     0 nsecs\n #0: <0>, posix_timer_fn, S:01\n # expires at 9-9 nsecs [in 3 to 3 nsecs]\n clock 5:\n \
        #0: <0>, posix_timer_fn, S:01\n # expires at 1005000-1005000 nsecs [in 3 to 3 nsecs]\n #1: <0>, timerfd_tmrproc, S:01\n \
        # expires at 1009000-1009000 nsecs [in 3 to 3 nsecs]\n";

    #[test]
    fn the_list_of_the_kernel_has_posix_timers_of_two_clocks() {
        let found = posix_timers(LIST);
        assert_eq!(
            found,
            [(1_005_000, true), (1_006_000, true), (1_007_000, false)]
        );
        assert_eq!(posix_timers(""), []);
        for cut in 0..LIST.len() {
            assert!(posix_timers(&LIST[..cut]).len() <= 3);
        }
    }

    const SECOND: u64 = 1_000_000_000;

    fn timer(id: u64, clock: u32, left: u64) -> PosixTimer {
        PosixTimer {
            process: 7,
            id,
            clock,
            left: Duration::from_nanos(left),
            period: Duration::ZERO,
        }
    }

    #[test]
    fn a_timer_of_a_moment_is_told_from_one_of_a_time() {
        // Asked 300 ms after the list was read; one second is the time of the dump.
        let (read_at, asked) = (100 * SECOND, 100 * SECOND + 300_000_000);
        let left = |at: u64| at - asked;
        let posix = vec![
            // Of somebody else, of this process by the wall clock, and by the monotonic one.
            (129 * SECOND + 900_000_000, true),
            (130 * SECOND, true),
            (130 * SECOND + 20_000_000, false),
            (150 * SECOND, false),
        ];
        let descriptors = vec![120 * SECOND, 121 * SECOND, 125 * SECOND];
        let expiries = Expiries {
            read_at,
            posix,
            descriptors,
        };
        let timers = [
            timer(0, 0, left(130 * SECOND) - 3000),
            timer(1, 0, left(130 * SECOND + 20_000_000)),
            timer(2, 1, left(150 * SECOND)),
            timer(3, 0, 0),
        ];
        let until = read_at + SECOND;
        let found = expiries.of_process(&timers, read_at..until);
        let expected = WallClockTimer {
            process: 7,
            timer: 0,
            at: 130 * SECOND,
        };
        assert_eq!(found, [expected]);
        let left = |at: u64| Duration::from_nanos(left(at));
        let at = |left| expiries.of_descriptor(left, until);
        assert_eq!(at(left(121 * SECOND)), Some(121 * SECOND));
        assert_eq!(at(left(123 * SECOND)), None);
        assert_eq!(at(left(130 * SECOND)), None);
        // Nothing in the list fits; all that speaks is one timer, and two in the list are its.
        assert_eq!(
            expiries.of_process(&[timer(0, 0, 5 * SECOND)], read_at..until),
            []
        );
        assert_eq!(expiries.of_process(&[], read_at..until), []);
        let alone = [timer(0, 0, 29 * SECOND + 700_000_000)];
        assert_eq!(expiries.of_process(&alone, read_at..until), []);
        let near = asked - 10_000_000..asked + 10_000_000;
        let found = expiries.of_process(&alone, near);
        assert_eq!(
            found.iter().map(|it| it.at).collect::<Vec<_>>(),
            [130 * SECOND]
        );
    }
}
