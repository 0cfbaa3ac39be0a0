//! Which thread works on a call.
//!
//! ```text
//!                           +- Read ----------------------------------> at once, on the thread of the sockets
//!  a call comes in: enter --+- Write --- alone, and the disk is quick -> at once
//!                           |       `--- beside others ----------------> call threads: they share a transaction
//!                           +- LongWrite ------------------------------> call threads
//!                           `- Count ----------------------------------> count threads: large trees keep nobody
//!                                                                        else waiting
//! ```
//!
//! Handing a call to another thread and back costs two wake-ups, as much as the rest of a write on a good
//! disk. While the sockets' thread works, other calls wait in their sockets; they are then found
//! together, and none of them is alone.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::error::Result;
use crate::workers::Workers;

/// Counts that are made at the same time.
const COUNT_THREADS: usize = 2;
/// When the last write took longer than this, the next one does not run on the sockets' thread.
const INLINE_WRITE_LIMIT: Duration = Duration::from_millis(2);

/// What a call has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Read the database.
    Read,
    /// One transaction, and a handful of directories.
    Write,
    /// A write that may take long in itself.
    LongWrite,
    /// Walk a directory tree.
    Count,
}

/// The threads for calls.
#[derive(Debug)]
pub(crate) struct Dispatch {
    in_flight: InFlight,
    callers: Workers,
    counters: Workers,
    /// Whether the last write took at most `inline_write_limit`.
    is_quick: Arc<AtomicBool>,
    inline_write_limit: Duration,
}

impl Dispatch {
    /// Starts threads for `concurrent_calls` at the same time.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub(crate) fn start(concurrent_calls: usize) -> Result<Self> {
        Ok(Self {
            in_flight: InFlight::default(),
            callers: Workers::start("call", concurrent_calls.max(1))?,
            counters: Workers::start("count", COUNT_THREADS)?,
            is_quick: Arc::new(AtomicBool::new(true)),
            inline_write_limit: INLINE_WRITE_LIMIT,
        })
    }

    /// Another limit than [`INLINE_WRITE_LIMIT`].
    #[cfg(test)]
    fn with_inline_write_limit(mut self, limit: Duration) -> Self {
        self.inline_write_limit = limit;
        self
    }

    /// The calls that have come in and are not answered yet.
    #[must_use]
    pub(crate) fn in_flight(&self) -> InFlight {
        self.in_flight.clone()
    }

    /// Counts a call among those in flight until the answer is dropped.
    pub(crate) fn enter(&self) -> InFlightCall {
        self.in_flight.enter()
    }

    /// Does `act`; `None` when it panicked.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: Work,
        act: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let _call = self.enter();
        match work {
            Work::Read => at_once(act),
            Work::Count => self.counters.run(act).await,
            Work::LongWrite => self.callers.run(act).await,
            Work::Write => {
                // All other calls that have come in enter before this goes on.
                tokio::task::yield_now().await;
                let (is_quick, limit) = (Arc::clone(&self.is_quick), self.inline_write_limit);
                let act = move || {
                    let start = Instant::now();
                    let result = act();
                    is_quick.store(start.elapsed() <= limit, Ordering::Relaxed);
                    result
                };
                if self.in_flight.count() == 1 && self.is_quick.load(Ordering::Relaxed) {
                    at_once(act)
                } else {
                    self.callers.run(act).await
                }
            }
        }
    }
}

fn at_once<T>(act: impl FnOnce() -> T) -> Option<T> {
    // The panic has been printed; it must end this call and not its connection.
    catch_unwind(AssertUnwindSafe(act)).ok()
}

/// The calls that have come in and are not answered yet.
#[derive(Debug, Clone)]
pub struct InFlight(watch::Sender<usize>);

impl Default for InFlight {
    fn default() -> Self {
        Self(watch::Sender::new(0))
    }
}

impl InFlight {
    /// Resolves when there are none.
    pub async fn ended(&self) {
        // Fails only without a sender, and `self` is one.
        drop(self.0.subscribe().wait_for(|count| *count == 0).await);
    }

    fn count(&self) -> usize {
        *self.0.borrow()
    }

    fn enter(&self) -> InFlightCall {
        self.0.send_modify(|count| *count += 1);
        InFlightCall(self.clone())
    }
}

/// One call; it ends when this is dropped.
pub(crate) struct InFlightCall(InFlight);

impl Drop for InFlightCall {
    fn drop(&mut self) {
        self.0.0.send_modify(|count| *count -= 1);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn name_of_thread() -> String {
        std::thread::current().name().unwrap_or_default().to_owned()
    }

    fn block_on<T>(test: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(test)
    }

    #[test]
    fn a_write_on_its_own_stays_and_writes_together_share_the_call_threads() {
        let dispatch = Dispatch::start(2)
            .unwrap()
            .with_inline_write_limit(Duration::MAX);
        block_on(async {
            let own = name_of_thread();
            let alone = dispatch.run(Work::Write, name_of_thread).await;
            assert_eq!(alone, Some(own));
            // Each goes on when the other has begun: one that ended first would leave the other alone.
            let (to_one, for_one) = mpsc::channel();
            let (to_other, for_other) = mpsc::channel();
            let meet = |to: mpsc::Sender<()>, own: mpsc::Receiver<()>| {
                move || {
                    to.send(()).unwrap();
                    own.recv_timeout(Duration::from_secs(30)).unwrap();
                    name_of_thread()
                }
            };
            let (one, other) = tokio::join!(
                dispatch.run(Work::Write, meet(to_other, for_one)),
                dispatch.run(Work::Write, meet(to_one, for_other)),
            );
            assert!(one.unwrap().starts_with("call-"));
            assert!(other.unwrap().starts_with("call-"));
        });
    }

    #[test]
    fn a_slow_disk_keeps_writes_off_the_thread_of_the_sockets() {
        // Nothing is as quick as this.
        let dispatch = Dispatch::start(1)
            .unwrap()
            .with_inline_write_limit(Duration::ZERO);
        block_on(async {
            // Before the first write the disk counts as quick.
            let first = dispatch.run(Work::Write, name_of_thread).await;
            assert_eq!(first, Some(name_of_thread()));
            let next = dispatch.run(Work::Write, name_of_thread).await;
            assert_eq!(next.as_deref(), Some("call-0"));
            let dispatch = dispatch.with_inline_write_limit(Duration::MAX);
            let next = dispatch.run(Work::Write, name_of_thread).await;
            assert_eq!(next.as_deref(), Some("call-0"), "that one was quick");
            let next = dispatch.run(Work::Write, name_of_thread).await;
            assert_eq!(next, Some(name_of_thread()));
        });
    }

    #[test]
    fn a_panic_ends_the_call_alone() {
        let dispatch = Dispatch::start(1).unwrap();
        block_on(async {
            for work in [Work::Read, Work::Write, Work::LongWrite, Work::Count] {
                let panicked: Option<()> = dispatch.run(work, || panic!("as planned")).await;
                assert_eq!(panicked, None);
            }
            dispatch.in_flight().ended().await;
        });
    }
}
