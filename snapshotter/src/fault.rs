//! Named places between the steps of snapshots.rs at which a test kills the daemon.
//!
//! In release builds [`KillAt`] cannot be constructed and `Faults::reach` is empty.

#[cfg(debug_assertions)]
use std::sync::atomic::{AtomicU32, Ordering};

/// A place between two steps of an RPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Step(pub(crate) &'static str);

/// All steps, for tests that go through them.
pub const STEPS: &[&str] = &[
    "prepare:id-allocated",
    "prepare:directory-made",
    "prepare:described",
    "prepare:published",
    "prepare:recorded",
    "commit:counted",
    "commit:synced",
    "commit:recorded",
    "commit:described",
    "remove:recorded",
    "remove:retired",
    "remove:deleted",
    "update:recorded",
    "cleanup:listed",
];

/// Kill the process when `step` is reached for the `count`th time.
#[cfg(debug_assertions)]
#[derive(Debug, Clone)]
pub struct KillAt {
    step: String,
    count: u32,
}

#[cfg(debug_assertions)]
impl std::str::FromStr for KillAt {
    type Err = String;

    /// Parses `STEP` or `STEP=COUNT`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (step, count) = match text.split_once('=') {
            Some((step, count)) => (step, count.parse().map_err(|e| format!("{count:?}: {e}"))?),
            None => (text, 1),
        };
        if !STEPS.contains(&step) {
            return Err(format!("no such step; there are {}", STEPS.join(" ")));
        }
        Ok(Self {
            step: step.to_owned(),
            count,
        })
    }
}

/// Where to die, if anywhere.
#[derive(Debug, Default)]
pub struct Faults {
    #[cfg(debug_assertions)]
    kill_at: Option<KillAt>,
    #[cfg(debug_assertions)]
    reached: AtomicU32,
}

impl Faults {
    /// Dies at the given place.
    #[cfg(debug_assertions)]
    #[must_use]
    pub fn kill_at(kill_at: Option<KillAt>) -> Self {
        Self {
            kill_at,
            reached: AtomicU32::new(0),
        }
    }

    #[cfg(debug_assertions)]
    pub(crate) fn reach(&self, step: Step) {
        debug_assert!(STEPS.contains(&step.0), "{step:?} is missing in STEPS");
        if let Some(kill_at) = &self.kill_at
            && kill_at.step == step.0
            && self.reached.fetch_add(1, Ordering::Relaxed) + 1 == kill_at.count
        {
            // SIGKILL, as the kernel's OOM killer would: no destructor, no flush.
            nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL).ok();
        }
    }

    #[cfg(not(debug_assertions))]
    #[inline(always)]
    pub(crate) fn reach(&self, _step: Step) {}
}
