//! How long a registry is waited for: what fails for now is tried again, a few times, and what gets nowhere ends.

use std::time::{Duration, Instant};

use crate::oci::transfers::MOST_THREADS;

/// How long a registry is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// A connection that is silent for so long, or gives less than `least` in that time, is given up.
    pub silence: Duration,
    /// Bytes that each of the connections at once has to give.
    pub least: usize,
    /// How long the second attempt waits; each further one waits four times as long, 15 s at most.
    pub first_wait: Duration,
    /// Attempts that get nowhere.
    pub attempts: u32,
    /// Time in which they get nowhere.
    pub longest: Duration,
}

/// What a busy registry needs, and what somebody waits for at a terminal.
impl Default for Patience {
    fn default() -> Self {
        Self {
            silence: Duration::from_secs(30),
            // They may share one slow link.
            least: (64 << 10) / MOST_THREADS,
            first_wait: Duration::from_millis(200),
            attempts: 6,
            longest: Duration::from_secs(120),
        }
    }
}

const LONGEST_OWN_WAIT: Duration = Duration::from_secs(15);
/// Fewer new bytes than these are no progress: a registry could give one for each attempt. In `longest` they are what
/// one connection has to give that is not taken for a silent one.
const PROGRESS: u64 = (256 << 10) / MOST_THREADS as u64;

/// The attempts of one exchange.
pub(super) struct Attempts {
    patience: Patience,
    left: u32,
    wait: Duration,
    since: Instant,
    reached: u64,
}

impl Attempts {
    pub(super) fn new(patience: Patience) -> Self {
        Self {
            patience,
            left: patience.attempts.saturating_sub(1),
            wait: patience.first_wait,
            since: Instant::now(),
            reached: 0,
        }
    }

    /// So many bytes are there: when they are more than before, everything begins anew.
    pub(super) fn reached(&mut self, bytes: u64) {
        if bytes >= self.reached.saturating_add(PROGRESS) {
            *self = Self {
                reached: bytes,
                ..Self::new(self.patience)
            };
        }
    }

    /// Waits for the next attempt, as long as the registry has asked for; false: there is none.
    pub(super) fn wait(&mut self, asked: Option<Duration>) -> bool {
        let wait = asked.unwrap_or(self.wait);
        if self.left == 0 || self.since.elapsed().saturating_add(wait) > self.patience.longest {
            return false;
        }
        std::thread::sleep(wait);
        self.left -= 1;
        self.wait = self.wait.saturating_mul(4).min(LONGEST_OWN_WAIT);
        true
    }
}
