//! How often memory is sent before the freeze, while the container runs: the rules of phaul, and the room that the target
//! has for it. What a round is, is in `memory_images`.

use std::time::{Duration, Instant};

use super::process_memory::PAGE;
use crate::room::most_bytes;

/// A round that finds less new pages than this is the last one.
const FEW: u64 = 64;
/// So is one that finds this much of what the one before it has found, in percent: another one would find as much again,
/// and would not make the freeze shorter.
const NO_GAIN: u64 = 90;

/// How long memory may be sent before the freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// How often it is gone through; 0: not at all.
    pub rounds: u32,
    /// After this time no other round begins, and the one under way ends.
    pub time: Duration,
}

impl Bounds {
    /// When what began then ends; one that no clock can tell is as good as none.
    pub(super) fn end_of(&self, began: Instant) -> Instant {
        const AGES: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
        began + self.time.min(AGES)
    }
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            rounds: 8,
            time: Duration::from_secs(60),
        }
    }
}

/// The rounds so far.
#[derive(Debug)]
pub(super) struct Rounds {
    bounds: Bounds,
    began: Instant,
    /// Bytes of memory and files, as the target knows them.
    estimate: u64,
    /// The last one has found so much that more of them would not end it.
    gains_nothing: bool,
    pub(super) done: u32,
    /// Bytes that were sent in all of them.
    pub(super) bytes: u64,
    last: Option<u64>,
}

impl Rounds {
    pub(super) fn within(bounds: Bounds, estimate: u64) -> Self {
        Self {
            bounds,
            began: Instant::now(),
            estimate,
            gains_nothing: false,
            done: 0,
            bytes: 0,
            last: None,
        }
    }

    /// When the one under way ends.
    pub(super) fn until(&self) -> Instant {
        self.bounds.end_of(self.began)
    }

    /// Whether there is another one, when the target has taken so many bytes. It ends a migration that brings too many, so
    /// what the freeze may bring, all of it once more, has to fit as well.
    pub(super) fn go_on(&self, taken: u64) -> bool {
        let enough = self.last.is_some_and(|pages| pages < FEW);
        let next = { self.last }.map_or(self.estimate, |pages| pages.saturating_mul(PAGE));
        let may_come = next.saturating_add(self.estimate);
        !enough
            && !self.gains_nothing
            && taken.saturating_add(may_come) <= most_bytes(self.estimate)
            && self.done < self.bounds.rounds
            && Instant::now() < self.until()
    }

    /// A round has found so many new pages, and sent so many bytes.
    pub(super) fn add(&mut self, pages: u64, bytes: u64) {
        let last = self.last;
        self.gains_nothing = last.is_some_and(|last| pages > last.saturating_mul(NO_GAIN) / 100);
        self.done += 1;
        self.bytes += bytes;
        self.last = Some(pages);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds {
        rounds: 4,
        time: Duration::from_secs(3600),
    };

    #[test]
    fn rounds_end_by_the_rules() {
        let after = |pages: &[u64]| {
            let mut rounds = Rounds::within(BOUNDS, 0);
            pages.iter().for_each(|pages| rounds.add(*pages, 1));
            assert_eq!(rounds.done as usize, pages.len());
            rounds.go_on(0)
        };
        assert!(after(&[]) && after(&[5000]) && after(&[5000, 900, 800]));
        assert!(!after(&[5000, 63]));
        // Another one would find as much again.
        assert!(!after(&[5000, 900, 2000]));
        assert!(!after(&[5000, 900, 900]));
        assert!(!after(&[5000, 4900]));
        assert!(!after(&[5000, 900, 800, 700]));
        let none = Bounds {
            rounds: 0,
            ..BOUNDS
        };
        assert!(!Rounds::within(none, 0).go_on(0));
    }

    #[test]
    fn rounds_leave_room_for_the_freeze() {
        const GB: u64 = 1 << 30;
        let estimate = 10 * GB;
        // Contents of files have gone before.
        let rounds = Rounds::within(BOUNDS, estimate);
        assert!(rounds.go_on(0) && rounds.go_on(11 * GB) && !rounds.go_on(12 * GB));
        let mut rounds = Rounds::within(BOUNDS, estimate);
        rounds.add(10 * GB / 4096, 10 * GB);
        assert!(rounds.go_on(11 * GB) && !rounds.go_on(12 * GB));
        rounds.add(8 * GB / 4096, 8 * GB);
        // 18 have come, another 8 may, and 10 in the freeze; 31 are taken.
        assert!(!rounds.go_on(18 * GB));
        let mut rounds = Rounds::within(BOUNDS, u64::MAX);
        rounds.add(u64::MAX, 0);
        assert!(rounds.go_on(u64::MAX), "nothing overflows");
    }
}
