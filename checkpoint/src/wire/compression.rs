//! Data that is compressed on its way, where the link is slower than the processor.
//!
//! ```text
//!   'c'  (size u32le) (zstd frame): so many bytes of a file, at most 1 MiB
//!
//!  pieces ──> Compression ──as they are──────────────────────────────> 'd'
//!                  │   └───> threads, each with a piece ──smaller────> 'c'   in the order of the pieces
//!                  └── bytes, and time in writes of all senders <──────┘
//! ```
//!
//! The link is what the writes of all connections bring through while there is one; the processor is what its threads
//! compress. A link of more than 1 Gbit/s is never asked about: there the processor has enough to do with TLS. What does
//! not get smaller goes as it is, and for the next megabytes nothing is tried.
//!
//! A link that waits for the processor has buffers in front of it that are empty, and take all at once: then its writes
//! say nothing of it. What was known before holds, and after some time a few megabytes go as they are, to find out anew:
//! the first fill the buffers, the next are judged.

use std::collections::VecDeque;
use std::io;
use std::num::NonZero;
use std::sync::mpsc::{self, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use zstd::bulk::{Compressor, Decompressor};

use super::{DATA_LIMIT, WireError};

/// The level of zstd: the next ones leave a few percent less and take half as long again.
const LEVEL: i32 = 1;
/// More threads than these outrun every link that is asked about.
const MOST_THREADS: usize = 4;
/// Pieces in hand for each thread: one that it has, one that waits, so that memory has a bound.
const IN_HAND: usize = 2;
/// Bytes that are worth a thread. Smaller pieces are put together.
const PIECE: usize = 256 << 10;
/// Bytes a second of a link that is quick enough for everything; one of 1 Gbit/s has less.
const QUICK: u64 = 160_000_000;
/// So many times quicker than the link the processor has to be: it has other things to do as well.
const MARGIN: u64 = 3;
/// A link is judged by so many bytes, or by what goes through it in that time. Less may be in the kernel's buffers alone.
const WINDOW: (u64, Duration) = (8 << 20, Duration::from_millis(200));
/// Bytes that go compressed to a link that waits before it is looked at anew, and those that fill its buffers then.
const UNHEARD: u64 = 256 << 20;
const BUFFERS: u64 = 8 << 20;
/// Bytes that go as they are before it is tried again whether they get smaller.
const PAUSE: u64 = 32 << 20;
/// The same where they do, and the processor has not been quick enough: it may have had something else to do.
const SOON: u64 = 2 << 20;
/// A trial of less says less: where it does not get smaller, so many times its bytes go before the next one. What is
/// small may be just that, like most images of a dump, and something else follows it.
const PAUSE_OF_TRIAL: u64 = PAUSE / PIECE as u64;
/// So many bytes in a row that do not get smaller end it.
const VAIN: u64 = 1 << 20;

/// Bytes of files that have gone compressed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Compressed {
    /// How many they were.
    pub bytes: u64,
    /// How many have been sent instead.
    pub sent: u64,
}

/// The link of a migration, for what goes through it beside the streams.
#[derive(Debug, Clone)]
pub struct Link(pub(super) Arc<Compression>);

impl Link {
    /// Compressed, where the link is slower than the processor and it gets smaller.
    pub(super) fn compress(&self, data: &[u8]) -> Option<Vec<u8>> {
        let bytes = data.len() as u64;
        if !self.0.pace().wants(bytes) {
            return None;
        }
        let began = Instant::now();
        let smaller = zstd::bulk::compress(data, LEVEL).ok();
        let smaller = smaller.filter(|it| is_smaller(it, data));
        let mut pace = self.0.pace();
        pace.tried(bytes, began.elapsed(), smaller.is_some(), 1);
        let smaller = smaller.filter(|_| pace.compresses)?;
        pace.count(bytes, smaller.len() as u64);
        Some(smaller)
    }

    #[cfg(test)]
    pub(super) fn of_rate(bytes_per_second: u64) -> Self {
        let link = Self(Arc::default());
        link.set_rate(bytes_per_second);
        link
    }

    #[cfg(test)]
    pub(super) fn set_rate(&self, bytes_per_second: u64) {
        self.0.pace().link = Some(bytes_per_second);
    }
}

/// Less than a tenth is not worth the other side's work.
fn is_smaller(compressed: &[u8], data: &[u8]) -> bool {
    compressed.len() + size_of::<u32>() < data.len() / 10 * 9
}

/// What is known of a link, and who compresses for it.
#[derive(Debug, Default)]
pub(super) struct Compression {
    pace: Mutex<Pace>,
    threads: OnceLock<Option<Threads>>,
}

/// How quick the link is, and the processor.
#[derive(Debug, Default)]
struct Pace {
    /// Who sits in a write, and since when anybody does.
    writers: u32,
    since: Option<Instant>,
    /// When the last write has ended.
    ended: Option<Instant>,
    /// Of the window: bytes, the time in which somebody wrote, and that in which nobody did.
    bytes: u64,
    busy: Duration,
    idle: Duration,
    /// Bytes that have gone compressed since something was heard of the link.
    unheard: u64,
    /// Bytes that fill its buffers before it is judged anew.
    fills: u64,
    /// It was slow when it was judged the last time, and is being judged anew.
    was_slow: bool,
    /// Bytes a second; none: not known yet.
    link: Option<u64>,
    processor: Option<u64>,
    compresses: bool,
    /// What has been tried last has got smaller.
    gets_smaller: bool,
    /// Bytes before the next trial.
    pause: u64,
    /// Bytes in a row that have not got smaller.
    vain: u64,
    compressed: Compressed,
}

#[derive(Debug)]
struct Threads {
    jobs: mpsc::Sender<Job>,
    count: usize,
}

struct Job {
    piece: Vec<u8>,
    done: mpsc::SyncSender<Done>,
}

/// A piece that a thread has had.
#[derive(Debug)]
struct Done {
    piece: Vec<u8>,
    /// What a frame says instead of it, where that is smaller.
    frame: Option<Vec<u8>>,
    took: Duration,
}

/// What comes next of a file.
pub(super) enum Next {
    Data(Vec<u8>),
    Compressed(Vec<u8>),
    Zeros(u32),
}

/// The pieces of one file that threads have, in their order.
#[derive(Default)]
pub(super) struct Queue {
    /// What is not worth a thread yet.
    begun: Vec<u8>,
    waiting: VecDeque<Waiting>,
}

enum Waiting {
    Piece(mpsc::Receiver<Done>),
    Zeros(u32),
    Ready(Done),
}

impl Pace {
    /// A write begins.
    fn begin(&mut self) {
        if self.writers == 0 {
            let now = Instant::now();
            self.since = Some(now);
            self.idle += self.ended.map(|ended| now - ended).unwrap_or_default();
        }
        self.writers += 1;
    }

    /// A write has ended, by which so many bytes have gone.
    fn end(&mut self, bytes: u64) {
        self.writers = self.writers.saturating_sub(1);
        let took = self.since.map(|since| since.elapsed());
        // Another one goes on.
        let now = Instant::now();
        self.since = (self.writers > 0).then_some(now);
        self.ended = Some(now);
        self.add(bytes, took.unwrap_or_default());
    }

    fn add(&mut self, bytes: u64, took: Duration) {
        if self.fills > 0 && took < WINDOW.1 {
            self.fills = self.fills.saturating_sub(bytes);
            (self.bytes, self.busy, self.idle) = Default::default();
            return;
        }
        self.fills = 0;
        self.bytes += bytes;
        self.busy += took;
        if self.bytes < WINDOW.0 && self.busy < WINDOW.1 {
            return;
        }
        let waits = self.compresses && self.busy < self.idle;
        let (bytes, busy) = (self.bytes, self.busy);
        (self.bytes, self.busy, self.idle) = Default::default();
        if waits {
            self.unheard += bytes;
            if self.unheard >= UNHEARD {
                self.look_anew();
            }
            return;
        }
        self.unheard = 0;
        self.link = Some(per_second(bytes, busy));
        self.compresses = self.gets_smaller && self.is_slow();
        self.was_slow = false;
    }

    /// Nothing is known of the link until some megabytes have gone as they are.
    fn look_anew(&mut self) {
        (self.link, self.unheard, self.fills) = (None, 0, BUFFERS);
        (self.compresses, self.was_slow) = (false, true);
    }

    /// Whether the link is slower than the processor: by far, until there is reason to think that it is not.
    fn is_slow(&self) -> bool {
        let margin = if self.compresses || self.was_slow {
            1
        } else {
            MARGIN
        };
        let known = self.link.zip(self.processor);
        known.is_some_and(|(link, processor)| link <= QUICK && link * margin < processor)
    }

    /// Whether a thread is to have the next piece: because it is worth it, or to see whether it is.
    fn wants(&mut self, bytes: u64) -> bool {
        if self.compresses {
            return true;
        }
        if self.link.is_none_or(|link| link > QUICK) {
            return false;
        }
        let is_trial = self.pause == 0;
        self.pause = match is_trial {
            true => PAUSE,
            false => self.pause.saturating_sub(bytes),
        };
        is_trial
    }

    /// So many bytes go compressed.
    fn count(&mut self, bytes: u64, sent: u64) {
        self.compressed.bytes += bytes;
        self.compressed.sent += sent;
    }

    /// So many threads would have taken `took` for a piece of so many bytes each, which has got smaller, or not.
    fn tried(&mut self, bytes: u64, took: Duration, is_smaller: bool, threads: u64) {
        let now = per_second(bytes, took).saturating_mul(threads);
        // It is as quick as the best of the last ones: those that were not had to wait.
        let before = self.processor.map_or(0, |before| before / 8 * 7);
        self.processor = Some(now.max(before));
        (self.vain, self.pause) = match is_smaller {
            true => (0, self.pause.min(SOON)),
            false => {
                let next = bytes.saturating_mul(PAUSE_OF_TRIAL);
                (self.vain.saturating_add(bytes), self.pause.min(next))
            }
        };
        if self.vain >= VAIN {
            self.pause = PAUSE;
        }
        self.gets_smaller = match self.compresses {
            true => self.vain < VAIN,
            false => is_smaller,
        };
        self.compresses = self.gets_smaller && self.is_slow();
    }
}

fn per_second(bytes: u64, took: Duration) -> u64 {
    let rate = u128::from(bytes) * 1_000_000_000 / took.as_nanos().max(1);
    u64::try_from(rate).unwrap_or(u64::MAX)
}

impl Compression {
    /// Runs a write to the link, and remembers how long it took.
    pub(super) fn measured<T>(
        &self,
        bytes: usize,
        write: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        self.pace().begin();
        let written = write();
        let bytes = if written.is_ok() { bytes as u64 } else { 0 };
        self.pace().end(bytes);
        written
    }

    /// What has gone compressed so far.
    pub(super) fn compressed(&self) -> Compressed {
        self.pace().compressed
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        // One that panicked has counted, or has not.
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn threads(&self) -> Option<&Threads> {
        self.threads.get_or_init(Threads::start).as_ref()
    }

    fn most_waiting(&self) -> usize {
        IN_HAND * self.threads().map_or(1, |threads| threads.count)
    }

    /// Hands a piece to a thread.
    fn begin(&self, piece: Vec<u8>) -> Waiting {
        let (done, waiting) = mpsc::sync_channel(1);
        let job = Job { piece, done };
        match self.threads() {
            None => Waiting::Ready(job.into_undone()),
            Some(threads) => match threads.jobs.send(job) {
                Ok(()) => Waiting::Piece(waiting),
                Err(mpsc::SendError(job)) => Waiting::Ready(job.into_undone()),
            },
        }
    }

    /// What goes for a piece that a thread has had.
    fn judge(&self, done: Done) -> Next {
        let Done { piece, frame, took } = done;
        let threads = self.threads().map_or(1, |threads| threads.count as u64);
        let mut pace = self.pace();
        pace.tried(piece.len() as u64, took, frame.is_some(), threads);
        match frame {
            Some(frame) if pace.compresses => {
                pace.count(piece.len() as u64, frame.len() as u64);
                Next::Compressed(frame)
            }
            _ => Next::Data(piece),
        }
    }
}

impl Queue {
    /// Takes data that follows, at most 1 MiB; unless it is to go as it is, and nothing before it waits.
    pub(super) fn takes(&mut self, compression: &Compression, data: &[u8]) -> bool {
        if self.begun.is_empty() && !compression.pace().wants(data.len() as u64) {
            return false;
        }
        if self.begun.len() + data.len() > DATA_LIMIT {
            self.begin(compression);
        }
        self.begun.extend_from_slice(data);
        if self.begun.len() >= PIECE {
            self.begin(compression);
        }
        true
    }

    /// Takes zeros that follow, unless nothing before them waits.
    pub(super) fn takes_zeros(&mut self, compression: &Compression, count: u32) -> bool {
        self.begin(compression);
        let has_others = !self.waiting.is_empty();
        if has_others {
            self.waiting.push_back(Waiting::Zeros(count));
        }
        has_others
    }

    fn begin(&mut self, compression: &Compression) {
        if !self.begun.is_empty() {
            let piece = std::mem::take(&mut self.begun);
            self.waiting.push_back(compression.begin(piece));
        }
    }

    /// What can go now, or has to because too much waits; with `all`, whatever there is.
    ///
    /// # Errors
    /// [`WireError::Stream`]: a thread has lost its piece.
    pub(super) fn next(
        &mut self,
        compression: &Compression,
        all: bool,
    ) -> Result<Option<Next>, WireError> {
        if all {
            self.begin(compression);
        }
        let waits = self.waiting.len();
        let done = match self.waiting.pop_front() {
            None => return Ok(None),
            Some(Waiting::Zeros(count)) => return Ok(Some(Next::Zeros(count))),
            Some(Waiting::Ready(done)) => done,
            Some(Waiting::Piece(waiting)) => match waiting.try_recv() {
                Ok(done) => done,
                Err(TryRecvError::Empty) if !all && waits <= compression.most_waiting() => {
                    self.waiting.push_front(Waiting::Piece(waiting));
                    return Ok(None);
                }
                Err(_) => waiting.recv().map_err(|lost| WireError::Stream {
                    act: "compress a piece of",
                    source: io::Error::other(lost),
                })?,
            },
        };
        Ok(Some(compression.judge(done)))
    }
}

impl Job {
    /// Nobody has had it.
    fn into_undone(self) -> Done {
        Done {
            piece: self.piece,
            frame: None,
            took: Duration::ZERO,
        }
    }

    fn compress(self, compressor: &mut Compressor<'_>) {
        let began = Instant::now();
        let size = u32::try_from(self.piece.len()).unwrap_or_default();
        let frame = compressor.compress(&self.piece).ok();
        let frame = { frame }
            .filter(|frame| is_smaller(frame, &self.piece))
            .map(|frame| [&size.to_le_bytes(), &*frame].concat());
        let done = Done {
            piece: self.piece,
            frame,
            took: began.elapsed(),
        };
        // Who has given up takes nothing.
        drop(self.done.send(done));
    }
}

impl Threads {
    /// None where there can be none.
    fn start() -> Option<Self> {
        let count = thread::available_parallelism().map_or(1, NonZero::get);
        let count = count.min(MOST_THREADS);
        let (jobs, waiting) = mpsc::channel::<Job>();
        let waiting = Arc::new(Mutex::new(waiting));
        for _ in 0..count {
            let waiting = Arc::clone(&waiting);
            let mut compressor = Compressor::new(LEVEL).ok()?;
            let work = move || {
                loop {
                    let job = waiting
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .recv();
                    // Nobody sends any more.
                    let Ok(job) = job else { break };
                    job.compress(&mut compressor);
                }
            };
            let name = "compress".to_owned();
            thread::Builder::new().name(name).spawn(work).ok()?;
        }
        Some(Self { jobs, count })
    }
}

/// The other side's half.
#[derive(Default)]
pub(super) struct Decompression(Decompressor<'static>);

impl std::fmt::Debug for Decompression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decompression").finish_non_exhaustive()
    }
}

impl Decompression {
    /// What a frame stands for: as many bytes as it says, at most `most`, whatever is in it.
    pub(super) fn unpack(&mut self, frame: &[u8], most: usize) -> Result<Vec<u8>, WireError> {
        let untrue = || WireError::Protocol {
            what: "compressed data that is not what it says".to_owned(),
        };
        let (size, data) = frame.split_first_chunk().ok_or_else(untrue)?;
        let size = usize::try_from(u32::from_le_bytes(*size)).unwrap_or(usize::MAX);
        if size > most {
            return Err(untrue());
        }
        // Into a buffer of that size, and no other.
        let data = self.0.decompress(data, size).map_err(|_| untrue())?;
        match data.len() == size {
            true => Ok(data),
            false => Err(untrue()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const MB: u64 = 1_000_000;

    #[test]
    fn a_quick_link_is_left_alone() {
        let mut pace = Pace::default();
        assert!(!pace.wants(1), "nothing is known");
        pace.add(QUICK + MB, SECOND);
        assert!(!pace.wants(1));
        assert!(!pace.compresses);
    }

    #[test]
    fn a_slow_link_gets_less_as_long_as_it_is_slow() {
        let mut pace = Pace::default();
        pace.add(100 * MB, SECOND);
        assert!(pace.wants(1), "a trial");
        pace.tried(200 * MB, SECOND, true, 1);
        assert!(!pace.compresses, "the processor is not quicker by far");
        assert!(!pace.wants(SOON) && pace.wants(1), "soon again");
        // As soon as the link is known to be slower.
        pace.add(60 * MB, SECOND);
        assert!(pace.compresses && pace.wants(1) && pace.wants(1));
        pace.add(140 * MB, SECOND);
        assert!(pace.compresses, "still slower");
        pace.add(QUICK + MB, SECOND);
        assert!(!pace.compresses, "it has become quicker");
        pace.add(120 * MB, SECOND);
        assert!(!pace.compresses);
        pace.tried(600 * MB, SECOND, true, 2);
        assert!(pace.compresses, "more threads");
    }

    #[test]
    fn a_link_that_waits_for_the_processor_is_not_quick() {
        let mut pace = Pace::default();
        pace.add(10 * MB, SECOND);
        assert!(pace.wants(1));
        pace.tried(15 * MB, SECOND, true, 2);
        assert!(!pace.compresses);
        pace.tried(31 * MB, SECOND, true, 1);
        assert!(pace.compresses);
        // The buffers take all of a window at once, and again.
        let window = |pace: &mut Pace| {
            pace.idle = SECOND;
            pace.add(WINDOW.0, SECOND / 1000);
        };
        for _ in 1..UNHEARD / WINDOW.0 {
            window(&mut pace);
            assert!(pace.compresses && pace.wants(1));
        }
        // It may have become quick: some goes as it is.
        window(&mut pace);
        assert!(!pace.compresses && !pace.wants(1));
        pace.tried(31 * MB, SECOND, true, 1);
        assert!(
            !pace.compresses,
            "what was being compressed decides nothing"
        );
        pace.add(BUFFERS, SECOND / 1000);
        assert!(!pace.compresses, "its buffers");
        // It has not, and need not be slower by far once more.
        pace.add(WINDOW.0, SECOND / 2);
        assert!(pace.compresses && pace.wants(1));
        pace.add(20 * MB, SECOND);
        assert!(pace.compresses, "{pace:?}");
        pace.add(QUICK + MB, SECOND);
        assert!(!pace.compresses, "it does not wait, and is quick");
    }

    #[test]
    fn what_does_not_get_smaller_is_left_alone() {
        let mut pace = Pace::default();
        pace.add(MB, SECOND);
        assert!(pace.wants(1));
        let piece = PIECE as u64;
        pace.tried(piece, SECOND / 1000, false, 1);
        assert!(!pace.compresses && !pace.wants(1));
        pace.pause = 0;
        assert!(pace.wants(1));
        pace.tried(piece, SECOND / 1000, true, 1);
        for _ in 1..VAIN / piece {
            pace.tried(piece, SECOND / 1000, false, 1);
        }
        assert!(pace.compresses);
        pace.tried(piece, SECOND / 1000, false, 1);
        assert!(!pace.compresses && !pace.wants(PAUSE) && pace.wants(1));
    }

    #[test]
    fn a_small_trial_in_vain_does_not_decide_for_the_next_megabytes() {
        let mut pace = Pace::default();
        pace.add(MB, SECOND);
        assert!(pace.wants(300), "a trial");
        pace.tried(300, SECOND / 10_000, false, 2);
        assert!(!pace.wants(300 * PAUSE_OF_TRIAL), "not at once");
        assert!(pace.wants(MB), "and soon again");
        pace.tried(MB, SECOND / 100, true, 2);
        assert!(pace.compresses);
        for _ in 0..100 {
            pace.tried(300, SECOND / 10_000, false, 2);
        }
        assert!(pace.compresses, "they were 30 KB");
    }

    #[test]
    fn time_in_which_two_write_counts_once() {
        let mut pace = Pace::default();
        let began = Instant::now();
        pace.begin();
        pace.begin();
        thread::sleep(Duration::from_millis(20));
        pace.end(1);
        pace.end(1);
        let busy = pace.busy;
        assert!(busy >= Duration::from_millis(20) && busy <= began.elapsed());
        assert!(pace.since.is_none() && pace.writers == 0);
    }

    #[test]
    fn a_frame_is_what_it_says_or_refused() {
        let text = b"again and again ".repeat(1000);
        let packed = zstd::bulk::compress(&text, LEVEL).unwrap();
        let frame = |size: usize, packed: &[u8]| {
            let size = u32::try_from(size).unwrap();
            [&size.to_le_bytes(), packed].concat()
        };
        let mut decompression = Decompression::default();
        let mut unpack = |frame: &[u8]| decompression.unpack(frame, DATA_LIMIT);
        assert_eq!(unpack(&frame(text.len(), &packed)).unwrap(), text);
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], LEVEL).unwrap();
        assert!(bomb.len() < 64 << 10);
        for lie in [
            frame(64 << 20, &bomb),
            frame(DATA_LIMIT, &bomb),
            frame(DATA_LIMIT + 1, &packed),
            frame(text.len() - 1, &packed),
            frame(text.len() + 1, &packed),
            frame(text.len(), &packed[..packed.len() - 1]),
            frame(7, b"nothing"),
            vec![0; 3],
        ] {
            assert!(unpack(&lie).is_err());
        }
        assert_eq!(unpack(&frame(text.len(), &packed)).unwrap(), text);
    }
}
