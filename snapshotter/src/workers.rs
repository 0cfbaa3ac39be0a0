//! The threads on which calls are worked on.
//!
//! A fixed number, because each thread costs memory for as long as the daemon runs; tokio's own pool
//! for blocking work starts a new one whenever none happens to be idle.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use tokio::sync::oneshot;

use crate::error::{IoContext, Result};

type Job = Box<dyn FnOnce() + Send>;

/// Some threads that share a queue; they end when this is dropped and the queue is empty.
pub struct Workers {
    queue: Sender<Job>,
}

impl fmt::Debug for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workers").finish_non_exhaustive()
    }
}

impl Workers {
    /// Starts `count` threads.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(name: &str, count: usize) -> Result<Self> {
        let (queue, jobs) = channel();
        let jobs = Arc::new(Mutex::new(jobs));
        for n in 0..count {
            let jobs = Arc::clone(&jobs);
            thread::Builder::new()
                .name(format!("{name}-{n}"))
                .spawn(move || work(&jobs))
                .during("start a thread for", name)?;
        }
        Ok(Self { queue })
    }

    /// Does `act` on the next free thread; `None` when it panicked.
    pub async fn run<T: Send + 'static>(
        &self,
        act: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let (sender, receiver) = oneshot::channel();
        let job = move || {
            let result = act();
            // Fails when the client has gone away meanwhile; the work is done all the same.
            drop(sender.send(result));
        };
        self.queue.send(Box::new(job)).ok()?;
        receiver.await.ok()
    }
}

fn work(jobs: &Mutex<Receiver<Job>>) {
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        // The panic has been printed; one call must not take a thread from the others.
        drop(catch_unwind(AssertUnwindSafe(job)));
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
