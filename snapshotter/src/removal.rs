//! Deletes `snapshots/gone-*` in the background, so that Remove answers at once.
//!
//! One thread takes ids from a queue. What cannot be deleted (busy, immutable) is logged and stays
//! `gone-*`; Cleanup and the next start try again.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use crate::disk;
use crate::error::{IoContext, Result, chain};
use crate::mounts::SnapshotPaths;

/// The queue of directories to delete.
#[derive(Debug)]
pub struct Removal {
    queue: Mutex<Option<Sender<u64>>>,
    backlog: Arc<AtomicUsize>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Removal {
    /// Starts the thread.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(paths: SnapshotPaths) -> Result<Self> {
        let (sender, receiver) = channel::<u64>();
        let backlog = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&backlog);
        let thread = thread::Builder::new()
            .name("delete-gone".to_owned())
            .spawn(move || {
                for id in receiver {
                    if let Err(error) = disk::delete_tree(&paths.gone_dir(id)) {
                        tracing::warn!(error = chain(&error), "will be deleted later");
                    }
                    count.fetch_sub(1, Ordering::Relaxed);
                }
            })
            .during("start the deleting thread for", "snapshots")?;
        Ok(Self {
            queue: Mutex::new(Some(sender)),
            backlog,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Has `snapshots/gone-<id>` deleted soon.
    pub fn enqueue(&self, id: u64) {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = queue.as_ref() {
            self.backlog.fetch_add(1, Ordering::Relaxed);
            // Fails only after `stop`; the directory goes at the next start then.
            if sender.send(id).is_err() {
                self.backlog.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    /// Directories that wait for their deletion.
    #[must_use]
    pub fn backlog(&self) -> usize {
        self.backlog.load(Ordering::Relaxed)
    }

    /// Ends the thread after what is queued.
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
            tracing::error!("the deleting thread panicked");
        }
    }
}
