//! How often memory is sent before the freeze, while the container runs: the rules of phaul. What a round is, is in
//! `memory_images`.

use std::time::{Duration, Instant};

/// A round that finds less new pages than this is the last one.
const FEW: u64 = 64;
/// So is one that finds this much more than the one before it, in percent.
const GROWTH: u64 = 132;

/// How long memory may be sent before the freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// How often it is gone through; 0: not at all.
    pub rounds: u32,
    /// After this time no other round begins.
    pub time: Duration,
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
    /// The last one has found so much that more of them would not end it.
    grows: bool,
    pub(super) done: u32,
    /// Bytes that were sent in all of them.
    pub(super) bytes: u64,
    last: Option<u64>,
}

impl Rounds {
    pub(super) fn within(bounds: Bounds) -> Self {
        Self {
            bounds,
            began: Instant::now(),
            grows: false,
            done: 0,
            bytes: 0,
            last: None,
        }
    }

    /// Whether there is another one.
    pub(super) fn go_on(&self) -> bool {
        let enough = self.last.is_some_and(|pages| pages < FEW);
        !enough
            && !self.grows
            && self.done < self.bounds.rounds
            && self.began.elapsed() < self.bounds.time
    }

    /// A round has found so many new pages, and sent so many bytes.
    pub(super) fn add(&mut self, pages: u64, bytes: u64) {
        let last = self.last;
        self.grows = last.is_some_and(|last| pages > last.saturating_mul(GROWTH) / 100);
        self.done += 1;
        self.bytes += bytes;
        self.last = Some(pages);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_end_by_the_rules() {
        let bounds = Bounds {
            rounds: 4,
            time: Duration::from_secs(3600),
        };
        let after = |pages: &[u64]| {
            let mut rounds = Rounds::within(bounds);
            pages.iter().for_each(|pages| rounds.add(*pages, 1));
            assert_eq!(rounds.done as usize, pages.len());
            rounds.go_on()
        };
        assert!(after(&[]) && after(&[5000]) && after(&[5000, 900, 1000]));
        assert!(!after(&[5000, 63]));
        assert!(!after(&[5000, 900, 2000]));
        assert!(!after(&[5000, 900, 900, 900]));
        let none = Bounds {
            rounds: 0,
            ..bounds
        };
        assert!(!Rounds::within(none).go_on());
    }
}
