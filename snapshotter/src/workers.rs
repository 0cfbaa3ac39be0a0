//! The threads on which calls are worked on.
//!
//! A fixed number, because each thread costs memory for as long as the daemon runs; tokio's own pool
//! for blocking work starts a new one whenever none happens to be idle.

use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use tokio::sync::oneshot;

use transship_path_error::During as _;

use crate::error::Result;

type Job = Box<dyn FnOnce() + Send>;

/// Some threads that share a queue; they end when this is dropped and the queue is empty.
pub(crate) struct Workers(Arc<Queue>);

/// What the threads share. A condition variable wakes one of them per job; a channel's receiver behind
/// a lock would wake a second one, to hold the lock.
#[derive(Default)]
struct Queue {
    state: Mutex<State>,
    job_or_end: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    ended: bool,
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workers").finish_non_exhaustive()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.job_or_end.notify_all();
    }
}

impl Workers {
    /// Starts `count` threads.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub(crate) fn start(name: &str, count: usize) -> Result<Self> {
        let workers = Self(Arc::default());
        for n in 0..count {
            let queue = Arc::clone(&workers.0);
            thread::Builder::new()
                .name(format!("{name}-{n}"))
                .spawn(move || queue.work())
                .during("start a thread for", name)?;
        }
        Ok(workers)
    }

    /// Does `act` on the next free thread; `None` when it panicked.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        act: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let (sender, receiver) = oneshot::channel();
        let job = move || {
            let result = act();
            // Fails when the client has gone away meanwhile; the work is done all the same.
            drop(sender.send(result));
        };
        self.0.lock().jobs.push_back(Box::new(job));
        self.0.job_or_end.notify_one();
        receiver.await.ok()
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        while let Some(job) = self.next() {
            // The panic has been printed; one call must not take a thread from the others.
            drop(catch_unwind(AssertUnwindSafe(job)));
        }
    }

    fn next(&self) -> Option<Job> {
        let idle = |state: &mut State| state.jobs.is_empty() && !state.ended;
        let mut state = self
            .job_or_end
            .wait_while(self.lock(), idle)
            .unwrap_or_else(PoisonError::into_inner);
        state.jobs.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_told_and_the_thread_goes_on() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let workers = Workers::start("test", 1).unwrap();
        let panicked: Option<()> = runtime.block_on(workers.run(|| panic!("as planned")));
        assert_eq!(panicked, None);
        assert_eq!(runtime.block_on(workers.run(|| 7)), Some(7));
    }
}
