//! When something last went through a pipe.
//!
//! ```text
//!  read, write, flush ──> Watched ──> pipe
//!                            └──mark──> Activity    idle: since the last of them;  stuck: in a write that has not come back
//! ```

use std::io::{self, IoSlice, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Nobody writes.
const NEVER: u64 = u64::MAX;

/// When something last went through a pipe, in milliseconds of a common clock.
#[derive(Debug)]
pub(super) struct Activity {
    began: Instant,
    last: AtomicU64,
    /// Since when somebody sits in a write.
    writing: AtomicU64,
}

impl Activity {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            began: Instant::now(),
            last: AtomicU64::new(0),
            writing: AtomicU64::new(NEVER),
        })
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    pub(super) fn mark(&self) {
        self.last.store(self.now(), Ordering::Relaxed);
    }

    pub(super) fn idle(&self) -> Duration {
        let last = self.last.load(Ordering::Relaxed);
        Duration::from_millis(self.now().saturating_sub(last))
    }

    /// How long one write has not come back.
    pub(super) fn stuck(&self) -> Duration {
        // Nobody writes: later than now.
        let since = self.writing.load(Ordering::Relaxed);
        Duration::from_millis(self.now().saturating_sub(since))
    }

    fn during_write<T>(&self, write: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.writing.store(self.now(), Ordering::Relaxed);
        let written = write();
        self.writing.store(NEVER, Ordering::Relaxed);
        let written = written?;
        self.mark();
        Ok(written)
    }
}

/// A pipe that remembers when it last moved.
#[derive(Debug)]
pub struct Watched<P> {
    pipe: P,
    activity: Arc<Activity>,
}

impl<P> Watched<P> {
    /// The pipe, and what tells when it has moved.
    pub(super) fn new(pipe: P) -> (Self, Arc<Activity>) {
        let activity = Activity::new();
        let watched = Self {
            pipe,
            activity: Arc::clone(&activity),
        };
        (watched, activity)
    }
}

impl<P: Write> Write for Watched<P> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let Self { pipe, activity } = self;
        activity.during_write(|| pipe.write(buffer))
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let Self { pipe, activity } = self;
        activity.during_write(|| pipe.write_vectored(pieces))
    }

    fn flush(&mut self) -> io::Result<()> {
        let Self { pipe, activity } = self;
        activity.during_write(|| pipe.flush())
    }
}

impl<P: Read> Read for Watched<P> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.pipe.read(buffer)?;
        self.activity.mark();
        Ok(read)
    }
}
