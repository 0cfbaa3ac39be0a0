//! The memory of a container that stands still while CRIU dumps it without its pages (`dump_hold`).
//!
//! ```text
//!  freeze ──> CRIU: tasks, files, parasite ──> pagemaps; waits ──> all pages of them ──> checkpoint/pagemap-<pid>.img
//!         ──> here: which pages of the last round are as they were ──────^                          pages-<n>.img
//! ```
//!
//! Nearly all pages of a program that does little are looked at while CRIU is at work, which needs one processor and
//! waits often. When it waits for us, what remains is what has changed, what can be executed, and what is new.
//!
//! Where nothing was sent before the freeze, what is at rest goes over in its beginning, in two shares, which two
//! connections take side by side:
//!
//! ```text
//!  freeze ──> CRIU ...  waits ──> what is left                    ──> checkpoint/, builds on memory-2
//!         ──> pieces of 1 MiB, every second one                   ──> memory-1/
//!         ──> the others                                          ──> memory-2/, builds on memory-1
//! ```
//!
//! Of a lazy migration the pages that have changed stay in the processes; the target asks for them one piece after the
//! other, while the copy runs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::process::{getpriority_process, setpriority_process};
use transship_checkpoint::criu_images::pagemap::{PagePlace, PageRun, Pagemap};
use transship_checkpoint::manifest::{IMAGES_DIR, MEMORY_DIR};
use transship_checkpoint::wire::missing_pages::Wanted;
use transship_checkpoint::wire::{Sender as StreamSender, WireError};

use super::memory_images::{HashRun, KnownMemory, SentMemory, image_name};
use super::process_memory::{Buffers, PAGE, PAGE_LEN, PIECE, ProcessMemory, READERS, TakePages};

/// From one address up to another.
type Range = (u64, u64);
/// Ranges of pages, each with the name of its image.
type InImages = Vec<(String, Range)>;

/// What the target has of it, and its processes.
#[derive(Debug)]
pub(super) struct FrozenMemory {
    held: Arc<Held>,
    /// Who looks which pages have not changed.
    looking: Mutex<Vec<JoinHandle<InImages>>>,
    /// By the name of the image, in their order.
    unchanged: OnceLock<BTreeMap<String, Vec<Range>>>,
    /// What is sent in the freeze first; none where it was sent before.
    shares: Option<Shares>,
    /// Whether what has changed is not sent.
    is_late: bool,
}

/// What is at rest, in two shares.
#[derive(Debug)]
struct Shares {
    /// What each has sent; nothing where it has failed.
    sent: [OnceLock<InImages>; SHARES],
    /// From the first to the second, process by process.
    of_first: Mutex<Option<Sender<Vec<Range>>>>,
    for_second: Mutex<Receiver<Vec<Range>>>,
}

/// Steps of niceness: with fifteen, a thirtieth of the processor time of a thread that is as busy. A pod has as many readers
/// for each of its containers, and all wait for the CRIU of the largest.
const STEPS_BACK: i32 = 15;
/// Into how many shares what is at rest is split.
const SHARES: usize = 2;

#[derive(Debug)]
struct Held {
    known: KnownMemory,
    /// By their ids inside.
    processes: BTreeMap<u32, u32>,
    /// Whether CRIU waits for those who look.
    is_waited_for: AtomicBool,
}

impl FrozenMemory {
    /// That of these processes, by their ids inside, all of which stand still from now on.
    pub(super) fn of(known: KnownMemory, processes: BTreeMap<u32, u32>) -> Self {
        let held = Arc::new(Held::of(known, processes));
        let looking = (0..READERS).map(|reader| {
            let held = Arc::clone(&held);
            thread::spawn(move || held.unchanged(reader))
        });
        Self {
            looking: Mutex::new(looking.collect()),
            unchanged: OnceLock::new(),
            shares: None,
            is_late: false,
            held,
        }
    }

    /// The same, but what has changed is asked for ([`Self::read`]).
    pub(super) fn late(known: KnownMemory, processes: BTreeMap<u32, u32>) -> Self {
        Self {
            is_late: true,
            ..Self::of(known, processes)
        }
    }

    /// Fills the buffer with these pages.
    ///
    /// # Errors
    /// There is no such process, it is gone, or has no such pages.
    pub(super) fn read(&self, wanted: Wanted, pages: &mut Vec<u8>) -> io::Result<()> {
        let pid = self.held.processes.get(&wanted.pid);
        let pid = pid.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let length = usize::try_from(wanted.pages).map_or(0, |pages| pages * PAGE_LEN);
        ProcessMemory::of(*pid)?.read_whole(wanted.start, length, pages)
    }

    /// The same of processes of which nothing was sent: [`Self::send_share`] does, of each share.
    pub(super) fn unsent(known: KnownMemory, processes: BTreeMap<u32, u32>) -> Self {
        let (of_first, for_second) = channel();
        Self {
            held: Arc::new(Held::of(known, processes)),
            looking: Mutex::default(),
            unchanged: OnceLock::new(),
            shares: Some(Shares {
                sent: Default::default(),
                of_first: Mutex::new(Some(of_first)),
                for_second: Mutex::new(for_second),
            }),
            is_late: false,
        }
    }

    /// How many shares are to be sent, in their order, before an image of the dump can be.
    pub(super) fn shares(&self) -> usize {
        self.shares.as_ref().map_or(0, |shares| shares.sent.len())
    }

    /// Sends a share of what is at rest.
    ///
    /// # Errors
    /// Those of the stream.
    pub(super) fn send_share<W: Write>(
        &self,
        share: usize,
        sender: &StreamSender<W>,
        container: &str,
        progress: &mut dyn FnMut(u64),
    ) -> Result<SentMemory, WireError> {
        let Some(shares) = &self.shares else {
            return Ok(SentMemory::default());
        };
        let mut found = Vec::new();
        let sent = self.send_pieces(shares, (share, &mut found), sender, container, progress);
        if sent.is_err() {
            // Who waits for it must not wait for ever.
            found.clear();
        }
        drop(shares.sent[share].set(found));
        sent
    }

    fn send_pieces<W: Write>(
        &self,
        shares: &Shares,
        (share, found): (usize, &mut InImages),
        sender: &StreamSender<W>,
        container: &str,
        progress: &mut dyn FnMut(u64),
    ) -> Result<SentMemory, WireError> {
        let Held {
            known, processes, ..
        } = &*self.held;
        let dir = format!("{MEMORY_DIR}{}", share + 1);
        let wanted = |at: u64| at / PIECE as u64 % SHARES as u64 == share as u64;
        // Dropped when this share has come to its end, whatever ends it.
        let of_first = match share {
            0 => lock(&shares.of_first).take(),
            _ => None,
        };
        let (mut buffers, mut sent) = (Buffers::default(), SentMemory::default());
        for (pages_id, (inside, pid)) in (1..).zip(processes) {
            let name = inside.to_string();
            let mut writer = known.writer(sender, (container, &dir), &name, pages_id)?;
            let mut ranges: Vec<Range> = Vec::new();
            if let Ok(memory) = ProcessMemory::of(*pid) {
                memory.each_piece_at_rest(&wanted, &mut buffers, &mut |start, piece| {
                    progress(piece.len() as u64);
                    push(&mut ranges, (start, start + piece.len() as u64));
                    // Nothing is known that could be the same.
                    writer.add(start, piece, &vec![0; piece.len() / PAGE_LEN], true)
                })?;
            }
            match &of_first {
                Some(of_first) => drop(of_first.send(ranges.clone())),
                None => writer.build_on(&lock(&shares.for_second).recv().unwrap_or_default()),
            }
            writer.end(sender, &mut sent)?;
            found.extend(ranges.into_iter().map(|range| (name.clone(), range)));
        }
        Ok(sent)
    }

    /// Sends an image of the dump: `path` is that of its pagemap in `dir`, the container's directory.
    ///
    /// # Errors
    /// A page that cannot be read; those of the stream.
    pub(super) fn send_image<W: Write>(
        &self,
        sender: &StreamSender<W>,
        (container, dir): (&str, &Path),
        path: &str,
        progress: &mut dyn FnMut(u64),
    ) -> Result<SentMemory, WireError> {
        let file = dir.join(path);
        let failed = |act, source: io::Error| WireError::File {
            act,
            path: file.clone(),
            source,
        };
        let pagemap =
            Pagemap::read(&file).map_err(|error| failed("read", io::Error::other(error)))?;
        let name = image_name(path).unwrap_or_default();
        let pages = format!("pages-{}.img", pagemap.pages_id);
        let mut dumped = None;
        let Held {
            known, processes, ..
        } = &*self.held;
        let memory = { name.parse().ok() }
            .and_then(|inside: u32| processes.get(&inside))
            .and_then(|pid| ProcessMemory::of(*pid).ok());
        let unchanged = self.all_unchanged().get(name).map_or(&[][..], |it| it);
        let place = (container, IMAGES_DIR);
        let mut writer = known.writer(sender, place, name, pagemap.pages_id)?;
        // CRIU begins a run with each of its pipes, at most 1 MiB.
        let mut joined = Pagemap::default();
        { pagemap.runs.iter() }.for_each(|run| joined.push(*run, PAGE));
        for run in &joined.runs {
            match (run.place, &memory) {
                (PagePlace::File, _) => {
                    let from = match &mut dumped {
                        Some(from) => from,
                        none => none.insert(
                            File::open(dir.join(IMAGES_DIR).join(&pages))
                                .map_err(|e| failed("open the pages of", e))?,
                        ),
                    };
                    let unread = |e| failed("read the pages of", e);
                    let add = &mut |start, piece: &[u8]| {
                        progress(piece.len() as u64);
                        writer.add(start, piece, &known.hashes_of(piece), run.lazy)
                    };
                    copy_run(from, run, add, unread)?;
                }
                (PagePlace::Process, Some(memory)) => {
                    let unread = |e| failed("read in their process the pages of", e);
                    let hash = |page: &[u8]| known.hash_of(page);
                    let range = (run.start, run.start + run.pages * PAGE);
                    for (start, end, is_unchanged) in split(range, unchanged) {
                        let pages = (end - start) / PAGE;
                        if is_unchanged {
                            progress(end - start);
                            writer.add_unchanged(start, pages, run.lazy);
                            continue;
                        }
                        if self.is_late {
                            writer.add_late(start, pages);
                            continue;
                        }
                        let add = &mut |start, piece: &[u8], hashes: &[u64]| {
                            progress(piece.len() as u64);
                            writer.add(start, piece, hashes, run.lazy)
                        };
                        memory.read_run((start, pages), hash, add, &unread)?;
                    }
                }
                // No dump of ours has a parent.
                (PagePlace::Process | PagePlace::Parent, _) => {
                    let source = io::Error::other("no process has them");
                    return Err(failed("find the pages of", source));
                }
            }
        }
        let mut sent = SentMemory::default();
        writer.end(sender, &mut sent)?;
        Ok(sent)
    }

    /// Waits for who looks.
    fn all_unchanged(&self) -> &BTreeMap<String, Vec<Range>> {
        self.unchanged.get_or_init(|| {
            self.held.is_waited_for.store(true, Ordering::Relaxed);
            let looking = std::mem::take(&mut *lock(&self.looking));
            // Of a thread that has panicked nothing is known: its pages are read again.
            let found = looking.into_iter().filter_map(|it| it.join().ok());
            let shares = self.shares.iter().flat_map(|shares| &shares.sent);
            let found = found.chain(shares.map(|share| share.wait().clone()));
            let mut all: BTreeMap<String, Vec<Range>> = BTreeMap::new();
            for (name, range) in found.flatten() {
                all.entry(name).or_default().push(range);
            }
            all.values_mut().for_each(|ranges| ranges.sort_unstable());
            all
        })
    }
}

impl Held {
    fn of(known: KnownMemory, processes: BTreeMap<u32, u32>) -> Self {
        let is_waited_for = AtomicBool::new(false);
        Self {
            known,
            processes,
            is_waited_for,
        }
    }

    /// What has not changed of the share of one of those who read.
    fn unchanged(&self, reader: usize) -> InImages {
        let mut gives_way = GivesWay::to_criu();
        let (mut found, mut pieces) = (Vec::new(), 0);
        let mut buffer = vec![0; PIECE];
        for (name, hashes) in &self.known.images {
            let pid = { name.parse().ok() }.and_then(|inside: u32| self.processes.get(&inside));
            let Some(memory) = pid.and_then(|pid| ProcessMemory::of(*pid).ok()) else {
                continue;
            };
            let at_rest = memory.mappings_at_rest();
            let known = { hashes.0.iter() }.flat_map(|run| {
                overlaps((run.start, run.end()), &at_rest)
                    .flat_map(|(start, end)| (start..end).step_by(PIECE).map(move |at| (at, end)))
                    .map(move |piece| (run, piece))
            });
            for (run, (start, end)) in known {
                pieces += 1;
                if pieces % READERS == reader {
                    if self.is_waited_for.load(Ordering::Relaxed) {
                        gives_way.no_more();
                    }
                    let length = usize::try_from(end - start).unwrap_or(PIECE).min(PIECE);
                    let read = memory.read(start, &mut buffer[..length]);
                    let same = self.same_pages(run, start, &buffer[..read]).into_iter();
                    found.extend(same.map(|range| (name.clone(), range)));
                }
            }
        }
        found
    }

    /// The pages from `start` on whose hashes are those of the run.
    fn same_pages(&self, run: &HashRun, start: u64, pages: &[u8]) -> Vec<Range> {
        let skip = usize::try_from((start - run.start) / PAGE).unwrap_or(usize::MAX);
        let known = run.hashes.iter().skip(skip);
        let mut same: Vec<Range> = Vec::new();
        for (at, (page, known)) in (start..)
            .step_by(PAGE_LEN)
            .zip(pages.chunks_exact(PAGE_LEN).zip(known))
        {
            if self.known.hash_of(page) != *known {
                continue;
            }
            push(&mut same, (at, at + PAGE));
        }
        same
    }
}

/// CRIU has much to do before it waits for us, and we have not: where processors are few, this thread takes what CRIU
/// leaves, as long as it does not wait.
struct GivesWay {
    /// The niceness before.
    from: Option<i32>,
}

impl GivesWay {
    fn to_criu() -> Self {
        // The kernel means by nobody the calling thread.
        let niceness = getpriority_process(None).unwrap_or_default();
        let _ = setpriority_process(None, niceness + STEPS_BACK);
        let from = Some(niceness);
        Self { from }
    }

    /// Who may not go back to that stays as it is, and ends soon.
    fn no_more(&mut self) {
        if let Some(niceness) = self.from.take() {
            let _ = setpriority_process(None, niceness);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adds a range that is behind all others.
fn push(ranges: &mut Vec<Range>, range: Range) {
    match ranges.last_mut() {
        Some(last) if last.1 == range.0 => last.1 = range.1,
        _ => ranges.push(range),
    }
}

/// The parts of a range that are in others, which are in order.
fn overlaps(range: Range, others: &[Range]) -> impl Iterator<Item = Range> {
    let first = others.partition_point(|other| other.1 <= range.0);
    { others[first..].iter() }
        .take_while(move |other| other.0 < range.1)
        .map(move |other| (other.0.max(range.0), other.1.min(range.1)))
}

/// A range in parts, with whether each is in the others.
fn split(range: Range, others: &[Range]) -> Vec<(u64, u64, bool)> {
    let mut parts = Vec::new();
    let mut at = range.0;
    for (start, end) in overlaps(range, others) {
        if at < start {
            parts.push((at, start, false));
        }
        parts.push((start, end, true));
        at = end;
    }
    if at < range.1 {
        parts.push((at, range.1, false));
    }
    parts
}

/// The pages of a run that CRIU has written.
fn copy_run(
    from: &mut File,
    run: &PageRun,
    add: &mut TakePages<'_, WireError>,
    failed: impl Fn(io::Error) -> WireError,
) -> Result<(), WireError> {
    let (mut at, end) = (run.start, run.start + run.pages * PAGE);
    let mut piece = Vec::new();
    while at < end {
        let count = (end - at).min(PIECE as u64);
        piece.clear();
        let read = Read::by_ref(from).take(count).read_to_end(&mut piece);
        if read.map_err(&failed)? as u64 != count {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()));
        }
        add(at, &piece)?;
        at += count;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;
    use transship_checkpoint::wire::{
        Arriving, Check, Limits, Message, Receiver as StreamReceiver,
    };

    use super::*;

    fn receive(stream: &[u8]) -> (TempDir, Result<(), WireError>) {
        let target = tempfile::tempdir().unwrap();
        let limits = Limits {
            max_bytes: u64::MAX,
            keep_free: 0,
        };
        let arriving = Arriving::into_dir(target.path(), limits, Check::Xxh3);
        let received = StreamReceiver::new(stream).receive_files(&arriving, &mut |_| {});
        (target, received.map(drop))
    }

    #[test]
    fn ranges_are_split() {
        let others = [(2, 4), (4, 5), (8, 9)];
        let parts = [(1, 2, false), (2, 4, true), (4, 5, true), (5, 7, false)];
        assert_eq!(split((1, 7), &others), parts);
        assert_eq!(split((3, 4), &others), [(3, 4, true)]);
        assert_eq!(split((9, 12), &others), [(9, 12, false)]);
    }

    #[test]
    fn shares_are_the_whole() {
        let memory = vec![7_u8; 5 * PIECE];
        let first = (memory.as_ptr() as u64).next_multiple_of(PAGE);
        let own = BTreeMap::from([(1, std::process::id())]);
        let frozen = FrozenMemory::unsent(KnownMemory::new().unwrap(), own);
        let mut stream = Vec::new();
        let sender = StreamSender::new(&mut stream);
        for share in 0..frozen.shares() {
            let sent = frozen.send_share(share, &sender, "c", &mut |_| {}).unwrap();
            assert!(sent.pages > 2 * (PIECE / PAGE_LEN) as u64 - 1);
        }
        let whole = (first, first + 4 * PIECE as u64);
        let parts = split(whole, frozen.all_unchanged().get("1").unwrap());
        assert!(parts.iter().all(|(.., is_there)| *is_there), "{parts:?}");
        sender.send(&Message::FilesEnd).unwrap();
        drop(sender);

        let (target, received) = receive(&stream);
        received.unwrap();
        let second = Pagemap::read(&target.path().join("c/memory-2/pagemap-1.img")).unwrap();
        let in_order = { second.runs.windows(2) }
            .all(|pair| pair[0].start + pair[0].pages * PAGE <= pair[1].start);
        assert!(in_order, "{second:?}");
        let has = |at: u64, place| {
            let mut runs = second.runs.iter();
            runs.any(|run| {
                run.place == place && (run.start..run.start + run.pages * PAGE).contains(&at)
            })
        };
        for at in (whole.0..whole.1).step_by(PIECE) {
            assert!(
                has(at, PagePlace::Parent) != has(at, PagePlace::File),
                "{at:x}"
            );
        }
    }

    #[test]
    fn what_the_target_has_is_not_sent_again() {
        // Whole pages of this process.
        let mut memory = vec![7_u8; 5 * PAGE_LEN];
        let first = (memory.as_ptr() as u64).next_multiple_of(PAGE);
        let byte =
            |page: u64| usize::try_from(first + page * PAGE).unwrap() - memory.as_ptr() as usize;
        let (second_page, third_page) = (byte(1), byte(2));
        let own = BTreeMap::from([(1, std::process::id())]);
        let (mut known, mut stream) = (KnownMemory::new().unwrap(), Vec::new());
        let sender = StreamSender::new(&mut stream);
        let later = std::time::Instant::now() + std::time::Duration::from_secs(3600);
        let round = { known.send_round(&sender, ("c", &own), later, &mut |_| {}) }.unwrap();
        assert!(round.pages > 60 && round.files.len() == 2);
        memory[second_page] = 8;
        memory[third_page] = 7;

        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(IMAGES_DIR)).unwrap();
        let run = |start, pages, place| PageRun {
            start,
            pages,
            place,
            lazy: place == PagePlace::Process,
        };
        let dumped = Pagemap {
            pages_id: 9,
            runs: vec![
                run(first, 3, PagePlace::Process),
                run(u64::MAX - 3 * PAGE, 1, PagePlace::File),
            ],
        };
        let path = format!("{IMAGES_DIR}/pagemap-1.img");
        fs::write(dir.path().join(&path), dumped.to_bytes()).unwrap();
        let written = [9_u8; PAGE_LEN];
        fs::write(dir.path().join(IMAGES_DIR).join("pages-9.img"), written).unwrap();
        let from = ("c", dir.path());
        let frozen = FrozenMemory::of(known, own);
        let page_of = |number| (first + number * PAGE, first + (number + 1) * PAGE);
        let as_they_were = frozen.all_unchanged().get("1").unwrap();
        let is_unchanged = |page| overlaps(page_of(page), as_they_were).next().is_some();
        assert!(is_unchanged(0) && !is_unchanged(1) && is_unchanged(2));
        let sent = frozen.send_image(&sender, from, &path, &mut |_| {});
        assert_eq!(sent.unwrap().pages, 2);
        let nobody = FrozenMemory::of(KnownMemory::new().unwrap(), BTreeMap::new());
        let lost = nobody.send_image(&sender.clone(), from, &path, &mut |_| {});
        assert!(lost.is_err(), "pages that no process has");
        sender.send(&Message::FilesEnd).unwrap();
        drop(sender);

        let (target, received) = receive(&stream);
        // The one that was lost has been begun.
        assert!(received.is_err());
        let came = target.path().join("c");
        let image = Pagemap::read(&came.join(&path)).unwrap();
        let places: Vec<_> = image
            .runs
            .iter()
            .map(|run| (run.pages, run.place))
            .collect();
        let expected = [
            (1, PagePlace::Parent),
            (1, PagePlace::File),
            (1, PagePlace::Parent),
            (1, PagePlace::File),
        ];
        assert_eq!(places, expected);
        let pages = fs::read(came.join(IMAGES_DIR).join("pages-9.img")).unwrap();
        assert_eq!(pages.len(), 2 * PAGE_LEN);
        assert!(pages.contains(&8) && pages.ends_with(&written));
        let before = Pagemap::read(&came.join("memory-1/pagemap-1.img")).unwrap();
        let has = |at: u64| {
            { before.runs.iter() }
                .any(|run| (run.start..run.start + run.pages * PAGE).contains(&at))
        };
        assert!(has(first) && has(first + 2 * PAGE));
    }
}
