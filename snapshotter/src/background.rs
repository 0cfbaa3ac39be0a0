//! Work that no answer waits for: deleting `gone-*` directories, counting large layers.
//!
//! One thread does it in the order in which it was ordered, `GATHERING` after the first order: a
//! removal seldom comes alone (garbage collection takes many, an ended container makes room for the next)
//! and each deletion would contend with the call after it for the lock of `snapshots/`. What fails is
//! logged; directories that cannot be deleted (busy, immutable) stay `gone-*`, and Cleanup and the next
//! start try again.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use transship_path_error::During as _;

use crate::error::{Result, SnapshotError, one_line};

/// How long orders are gathered before the first is carried out; a stop does not wait for it.
const GATHERING: Duration = Duration::from_millis(100);

type Task = Box<dyn FnOnce() -> Result<()> + Send>;

/// The thread and its queue.
pub struct Background {
    queue: Mutex<Option<Sender<Task>>>,
    backlog: Arc<AtomicUsize>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl fmt::Debug for Background {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Background")
            .field("backlog", &self.backlog)
            .finish_non_exhaustive()
    }
}

impl Background {
    /// Starts the thread.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start() -> Result<Self> {
        let (sender, receiver) = channel::<Task>();
        let backlog = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&backlog);
        let run = move || {
            while let Ok(first) = receiver.recv() {
                let (mut gathered, end) = (vec![first], Instant::now() + GATHERING);
                // Ends early when nobody can order any more.
                while let Ok(task) =
                    receiver.recv_timeout(end.saturating_duration_since(Instant::now()))
                {
                    gathered.push(task);
                }
                for task in gathered {
                    carry_out(task);
                    count.fetch_sub(1, Ordering::Relaxed);
                }
            }
        };
        let thread = thread::Builder::new()
            .name("background".to_owned())
            .spawn(run)
            .during("start a thread for", "background work")?;
        Ok(Self {
            queue: Mutex::new(Some(sender)),
            backlog,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Has `task` done soon; after [`Background::stop`] it is left for the next start.
    pub fn order(&self, task: impl FnOnce() -> Result<()> + Send + 'static) {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = queue.as_ref() {
            self.backlog.fetch_add(1, Ordering::Relaxed);
            if sender.send(Box::new(task)).is_err() {
                self.backlog.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    /// Tasks that are not finished.
    #[must_use]
    pub fn backlog(&self) -> usize {
        self.backlog.load(Ordering::Relaxed)
    }

    /// Ends the thread after what is ordered.
    pub fn stop(&self) {
        drop(
            self.queue
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the background thread panicked");
        }
    }
}
fn carry_out(task: Task) {
    match task() {
        // Removed before its turn came.
        Ok(()) | Err(SnapshotError::NotFound { .. }) => {}
        Err(error) => tracing::warn!(error = one_line(&error), "left for later"),
    }
}
