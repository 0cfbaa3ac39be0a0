//! Small files and directories, loaded by other threads before the walk comes to them.
//!
//! ```text
//!  walk ── names to come ──> jobs ──> threads: open, stat, attributes, data, stat
//!   ^                          │         │
//!   │          not begun, or   │         │ done
//!   └── in its own order <─────┴─────────┘
//! ```
//!
//! A small file is seven system calls and the tar one long stream, so the writer alone is what an
//! export of many files waits for. It stays the only one that writes, in the walk's order, and what
//! it writes does not depend on who has loaded it. When it comes to a job that nobody has begun it
//! does that itself, and when it must wait for one it does another: with two processors both are
//! busy, with one there are no threads.

use std::collections::VecDeque;
use std::num::NonZero;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use crate::directory_listing::DirectoryListing;
use crate::inode_attributes::InodeType;
use crate::load::{FileBatch, LoadedDirectory, Loader};
use crate::overlay_marks::OverlayXattrs;

/// Jobs that may wait for the walk: each holds up to 256 KiB, or a descriptor.
const MAX_OUTSTANDING: usize = 16;
/// Jobs that a directory may queue when its ancestors already use up the limit above.
const MIN_OWN: usize = 2;
/// Descriptors and memory stay bounded in a deep tree as well.
const MAX_OUTSTANDING_DEEP: usize = 64;
/// Jobs that must wait before threads are started: a small layer is done sooner without them.
const JOBS_FOR_THREADS: usize = if cfg!(test) { 1 } else { 4 };
/// More do not help: one thread writes what they load.
const MAX_THREADS: usize = 4;

/// What is to be loaded: names of a listing that are either one directory or no directories.
#[derive(Debug)]
struct Wanted {
    directory: Arc<OwnedFd>,
    listing: Arc<DirectoryListing>,
    names: Range<usize>,
}

/// What a job has brought.
#[derive(Debug, Default)]
pub(crate) enum Loaded {
    /// The writer has to look itself.
    #[default]
    Nothing,
    Files(FileBatch),
    Directory(Box<LoadedDirectory>),
}

#[derive(Debug)]
enum State {
    Waiting,
    Running,
    Done(Loaded),
}

/// A part of the walk that is loaded ahead of it.
#[derive(Debug)]
pub(crate) struct Job {
    wanted: Wanted,
    state: Mutex<State>,
    done: Condvar,
}

impl Job {
    /// Positions in the listing of its directory.
    pub(crate) fn names(&self) -> Range<usize> {
        self.wanted.names.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True for the one who has to do it.
    fn claim(&self) -> bool {
        let mut state = self.lock();
        let is_free = matches!(*state, State::Waiting);
        if is_free {
            *state = State::Running;
        }
        is_free
    }

    fn load(&self, loader: &mut Loader) -> Loaded {
        let Wanted {
            directory,
            listing,
            names,
        } = &self.wanted;
        match listing.get(names.start) {
            Some((name, Some(InodeType::Directory))) => loader
                .load_directory(directory.as_fd(), name)
                .map_or(Loaded::Nothing, |loaded| {
                    Loaded::Directory(Box::new(loaded))
                }),
            _ => Loaded::Files(loader.load_files(directory.as_fd(), listing, names.clone())),
        }
    }

    fn run(&self, loader: &mut Loader) {
        // A panic must not leave the writer waiting: it then comes to the same place and panics.
        let loaded = catch_unwind(AssertUnwindSafe(|| self.load(loader))).unwrap_or_default();
        *self.lock() = State::Done(loaded);
        self.done.notify_all();
    }
}

#[derive(Debug, Default)]
struct Queue {
    jobs: VecDeque<Arc<Job>>,
    is_closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A job that nobody has begun, now claimed.
    fn claim_any(queue: &mut Queue) -> Option<Arc<Job>> {
        std::iter::from_fn(|| queue.jobs.pop_front()).find(|job| job.claim())
    }

    fn work(&self, loader: &mut Loader) {
        let mut queue = self.lock();
        while !queue.is_closed {
            match Self::claim_any(&mut queue) {
                Some(job) => {
                    drop(queue);
                    job.run(loader);
                    queue = self.lock();
                }
                None => {
                    queue = self
                        .changed
                        .wait(queue)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }
}

/// The jobs of one export, and the threads that do them.
#[derive(Debug)]
pub(crate) struct ReadAhead {
    shared: Arc<Shared>,
    /// None until it is worth while.
    threads: Option<Vec<JoinHandle<()>>>,
    outstanding: usize,
    namespace: OverlayXattrs,
    fill_holes: bool,
    in_use: bool,
    loader: Loader,
}

impl ReadAhead {
    pub(crate) fn new(namespace: OverlayXattrs, fill_holes: bool, in_use: bool) -> Self {
        ReadAhead {
            shared: Arc::default(),
            threads: None,
            outstanding: 0,
            namespace,
            fill_holes,
            in_use,
            loader: Loader::new(namespace, fill_holes, in_use),
        }
    }

    /// Nothing is loaded ahead.
    #[cfg(test)]
    pub(crate) fn without_threads() -> Self {
        let mut alone = ReadAhead::new(OverlayXattrs::Trusted, false, false);
        alone.threads = Some(Vec::new());
        alone
    }

    /// Whether a directory that has `own` jobs already may have one more.
    pub(crate) fn has_room(&self, own: usize) -> bool {
        let is_alone = self.threads.as_ref().is_some_and(Vec::is_empty);
        let limit = if own < MIN_OWN {
            MAX_OUTSTANDING_DEEP
        } else {
            MAX_OUTSTANDING
        };
        !is_alone && self.outstanding < limit
    }

    /// Has names of a directory loaded: one directory, or what are no directories.
    pub(crate) fn begin(
        &mut self,
        directory: &Arc<OwnedFd>,
        listing: &Arc<DirectoryListing>,
        names: Range<usize>,
    ) -> Arc<Job> {
        let job = Arc::new(Job {
            wanted: Wanted {
                directory: Arc::clone(directory),
                listing: Arc::clone(listing),
                names,
            },
            state: Mutex::new(State::Waiting),
            done: Condvar::new(),
        });
        self.outstanding += 1;
        if self.threads.is_none() && self.outstanding >= JOBS_FOR_THREADS {
            self.start_threads();
        }
        self.shared.lock().jobs.push_back(Arc::clone(&job));
        self.shared.changed.notify_one();
        job
    }

    fn start_threads(&mut self) {
        let processors = thread::available_parallelism().map_or(1, NonZero::get);
        let threads = (1..processors).take(MAX_THREADS).map_while(|_| {
            let shared = Arc::clone(&self.shared);
            let mut loader = Loader::new(self.namespace, self.fill_holes, self.in_use);
            let thread = thread::Builder::new().name("read-ahead".to_owned());
            // Where no thread can be had, the writer does everything.
            thread.spawn(move || shared.work(&mut loader)).ok()
        });
        self.threads = Some(threads.collect());
    }

    /// What the job has brought. Does it now if nobody has begun.
    pub(crate) fn redeem(&mut self, job: &Job) -> Loaded {
        self.outstanding -= 1;
        if job.claim() {
            return job.load(&mut self.loader);
        }
        loop {
            if let State::Done(loaded) = &mut *job.lock() {
                return std::mem::take(loaded);
            }
            let other = Shared::claim_any(&mut self.shared.lock());
            if let Some(other) = other {
                other.run(&mut self.loader);
                continue;
            }
            let mut state = job.lock();
            while !matches!(*state, State::Done(_)) {
                state = job.done.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Forgets a job that is not needed.
    pub(crate) fn forget(&mut self, job: &Job) {
        self.outstanding -= 1;
        // A thread that has begun comes to its end; the result goes with the job.
        job.claim();
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        let mut queue = self.shared.lock();
        queue.is_closed = true;
        queue.jobs.clear();
        drop(queue);
        self.shared.changed.notify_all();
        for thread in self.threads.take().into_iter().flatten() {
            // `run` lets no panic out.
            drop(thread.join());
        }
    }
}
