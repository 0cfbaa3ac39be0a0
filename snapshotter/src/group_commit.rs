//! Changes of many threads in one transaction (group commit).
//!
//! ```text
//!  write(change) ─> queue ─┬─ nobody leads: this caller leads a batch ─> run(all that wait) ─> each its answer
//!                          └─ somebody does: wait ─┬─ the answer
//!                                                  └─ the lead of the next batch
//! ```
//!
//! While a batch is being synced, the changes of other threads queue up and become the next one. There is no
//! writer thread: a caller that is alone pays no wake-up. A change that is refused ("already exists") writes
//! nothing and disturbs no other change of its batch.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::batch::{Batch, Change};
use crate::error::{Result, SnapshotError};

/// Upper bound of a batch, so that its first callers do not wait for a crowd.
const BATCH_LIMIT: usize = 256;

/// Makes the change inside the transaction.
pub(crate) type Apply = Box<dyn FnOnce(&mut Batch<'_>) -> Result<Deliver, rusqlite::Error> + Send>;

/// Tells a caller how its transaction ended.
pub(crate) type Deliver = Box<dyn FnOnce() + Send>;

/// The changes that wait for a transaction.
#[derive(Default)]
pub(crate) struct GroupCommit {
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    waiting: Vec<Job>,
    is_led: bool,
}

/// A change waiting for its transaction.
struct Job {
    apply: Apply,
    promote: Box<dyn Fn() + Send>,
    fail: Box<dyn Fn(SnapshotError) + Send>,
}

enum Signal<T> {
    /// Nobody leads any more: lead the next batch, which holds this caller's change.
    Lead,
    Done(Result<T>),
}

impl GroupCommit {
    /// Has `change` made in a transaction that other callers may share, and returns when that is durable. `run`
    /// makes one transaction of changes, in their order, and makes it durable.
    pub(crate) fn write<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Batch<'_>) -> Change<T> + Send + 'static,
        run: impl Fn(Vec<Apply>) -> Result<Vec<Deliver>>,
    ) -> Result<T> {
        let (sender, receiver) = sync_channel(2);
        let leads = {
            let mut queue = self.lock();
            queue.waiting.push(Job::new(change, sender));
            !std::mem::replace(&mut queue.is_led, true)
        };
        if leads {
            self.lead(&run);
        }
        self.wait(&receiver, run)
    }

    fn wait<T>(
        &self,
        receiver: &Receiver<Signal<T>>,
        run: impl Fn(Vec<Apply>) -> Result<Vec<Deliver>>,
    ) -> Result<T> {
        loop {
            match receiver.recv() {
                Ok(Signal::Lead) => self.lead(&run),
                Ok(Signal::Done(result)) => return result,
                Err(_) => return Err(SnapshotError::LeaderPanicked),
            }
        }
    }

    fn lead(&self, run: &impl Fn(Vec<Apply>) -> Result<Vec<Deliver>>) {
        // Hands the lead on even when the transaction panics: others must not wait for ever.
        struct HandOver<'a>(&'a GroupCommit);
        impl Drop for HandOver<'_> {
            fn drop(&mut self) {
                let mut queue = self.0.lock();
                match queue.waiting.first() {
                    Some(next) => (next.promote)(),
                    None => queue.is_led = false,
                }
            }
        }
        let jobs = {
            let mut queue = self.lock();
            let count = queue.waiting.len().min(BATCH_LIMIT);
            queue.waiting.drain(..count).collect::<Vec<_>>()
        };
        let _hand_over = HandOver(self);
        let (applies, fails): (Vec<_>, Vec<_>) =
            jobs.into_iter().map(|job| (job.apply, job.fail)).unzip();
        match run(applies) {
            Ok(deliveries) => deliveries.into_iter().for_each(|deliver| deliver()),
            Err(error) => fails.into_iter().for_each(|fail| fail(error.clone())),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Job {
    fn new<T: Send + 'static>(
        change: impl FnOnce(&mut Batch<'_>) -> Change<T> + Send + 'static,
        sender: SyncSender<Signal<T>>,
    ) -> Self {
        // A send fails only when the caller is gone, and then nobody wants to know.
        let (promoter, failer) = (sender.clone(), sender.clone());
        Self {
            apply: Box::new(move |batch| {
                let result = change(batch)?;
                Ok(Box::new(move || drop(sender.send(Signal::Done(result)))))
            }),
            promote: Box::new(move || drop(promoter.send(Signal::Lead))),
            fail: Box::new(move |error| drop(failer.send(Signal::Done(Err(error))))),
        }
    }
}
