//! Memory that is taken out of the images of one restore: whoever holds the restored processes puts it into them.
//!
//! ```text
//! mm-7.img        14 vmas: 1 start  2 end  5 prot  6 flags  7 status       which memory may be put in later
//! core-<tid>.img  5 thread_core: 15 rseq_entry: 1 address  2 length        which the kernel writes to before that
//!
//! pagemap-7.img   1000-9000        ──┬─> pagemap-7.img, pages-<new>.img    what CRIU restores; builds on nothing
//!                                    └─> 2000-8000: of which file, where   what is put in later
//! ```
//!
//! CRIU (3.17 to 4.2) fills the memory of a process by one thread, and only then does what else is to be done. A process
//! that is held has all its mappings, and its memory can be written from outside by as many threads as there are
//! processors.
//!
//! Processes that share pages since a fork do so after a restore by CRIU as well, which compares each page with the
//! parent's. Memory that is put in has nothing in common with any other; so it is taken out of one process only, which
//! has nearly all of it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use nix::fcntl::{FallocateFlags, FcntlArg, FdFlag, fallocate, fcntl};
use serde::{Deserialize, Serialize};

use super::page_levels::{Levels, Place, Span};
use super::pagemap::{PagePlace, PageRun, Pagemap};
use super::{Image, ImageError, Kind, list};

/// Less memory than this is left to CRIU, in bytes: it takes no longer for it than this does.
const LEAST: u64 = 8 << 20;
/// What other processes have may be this part of all.
const OTHERS: u64 = 8;
/// What is left for CRIU is written once more; at most so much, in bytes.
const MOST_LEFT: u64 = 128 << 20;
/// Mappings with less memory in the dump are left to CRIU, in bytes.
const LEAST_MAPPING: u64 = 1 << 20;
/// Memory in more pieces than this is left to CRIU: what is known of each is kept until the last one is put in.
const MOST_RUNS: usize = 200_000;
/// How much is put in at once, at most: bytes, also those between two multiples of it in the file, and ranges of addresses.
const BATCH: u64 = 1 << 20;
const BATCH_RANGES: usize = 256;

/// `PROT_READ`, `PROT_WRITE`.
const READ_WRITE: u32 = 1 | 2;
/// `MAP_GROWSDOWN`, `MAP_LOCKED`, `MAP_HUGETLB`: memory with ways of its own.
const ODD_FLAGS: u32 = 0x100 | 0x2000 | 0x4_0000;
/// `VMA_AREA_REGULAR`, `VMA_ANON_PRIVATE`; `VMA_AREA_HEAP` besides makes no difference.
const PRIVATE: u32 = 1 | 1 << 9;
const HEAP: u32 = 1 << 5;

/// Memory of one process that CRIU does not restore.
#[derive(Debug)]
pub struct MemoryApart {
    pid: u32,
    batches: Vec<Batch>,
    files: Vec<File>,
    /// The same, where what is read is given back.
    given_back: Vec<File>,
}

/// The same for another process, which has the files as descriptors of these numbers.
#[derive(Debug, Serialize, Deserialize)]
pub struct HandedOver {
    pid: u32,
    batches: Vec<Batch>,
    files: Vec<RawFd>,
    gives_back: bool,
}

/// What lies together in a file, and goes to these ranges of addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    file: usize,
    offset: u64,
    /// Start and length of each range, in bytes.
    ranges: Vec<(u64, u64)>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PstreeEntry {
    #[prost(uint32, required, tag = "1")]
    pid: u32,
    #[prost(uint32, repeated, packed = "false", tag = "5")]
    threads: Vec<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct MmEntry {
    #[prost(message, repeated, tag = "14")]
    vmas: Vec<VmaEntry>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct VmaEntry {
    #[prost(uint64, required, tag = "1")]
    start: u64,
    #[prost(uint64, required, tag = "2")]
    end: u64,
    #[prost(uint32, required, tag = "5")]
    prot: u32,
    #[prost(uint32, required, tag = "6")]
    flags: u32,
    #[prost(uint32, required, tag = "7")]
    status: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CoreEntry {
    #[prost(message, optional, tag = "5")]
    thread_core: Option<ThreadCoreEntry>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ThreadCoreEntry {
    #[prost(message, optional, tag = "15")]
    rseq: Option<RseqEntry>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct RseqEntry {
    #[prost(uint64, required, tag = "1")]
    address: u64,
    #[prost(uint32, required, tag = "2")]
    length: u32,
}

impl MemoryApart {
    /// Takes memory out of the images in `dir`, which nobody else uses, where that makes a restore from them shorter.
    /// `page` is the size of a page in bytes.
    ///
    /// # Errors
    /// An image cannot be read or written, or names pages that are nowhere.
    pub fn take(dir: &Path, page: u64) -> Result<Option<Self>, ImageError> {
        let Some((pid, threads)) = process_with_most(dir, page)? else {
            return Ok(None);
        };
        let mm = dir.join(format!("{}{pid}.img", Kind::Mm.prefix()));
        let mm = Image::read(&mm, Kind::Mm)?.entries().next::<MmEntry>()?;
        let levels = match Levels::open(dir, pid, page)? {
            Some((levels, _)) if levels.count() <= MOST_RUNS => levels,
            _ => return Ok(None),
        };
        let mut mappings: Vec<_> = { mm.iter().flat_map(|mm| &mm.vmas) }
            .filter(|vma| may_be_apart(vma))
            .map(|vma| (vma.start, vma.end))
            .collect();
        mappings.sort_unstable();
        let kernels = pages_of_the_kernel(dir, &threads, page)?;
        let (mut apart, mut rest) = (Vec::new(), Vec::new());
        for run in levels.runs() {
            for (start, end, may_be) in split((run.start, run.end), &mappings, &kernels, page) {
                let spans = if may_be { &mut apart } else { &mut rest };
                levels.find((start, end), spans)?;
            }
        }
        give_small_ones_back(&mappings, &mut apart, &mut rest);
        let bytes_of = |spans: &[Span]| spans.iter().map(|it| it.end - it.start).sum::<u64>();
        let (bytes, left) = (bytes_of(&apart), bytes_of(&rest));
        let mut all = apart.iter().chain(&rest);
        let is_worth_it = bytes >= LEAST
            && left <= MOST_LEFT.min(bytes / 2)
            && all.all(|span| span.place != Place::Process);
        if !is_worth_it {
            return Ok(None);
        }
        let files = levels.into_files();
        let path = dir.join(format!("{}{pid}.img", Kind::Pagemap.prefix()));
        write_rest(dir, &rest, &files, page)?.replace(&path)?;
        Ok(Some(Self {
            pid,
            batches: batches(&apart),
            files,
            given_back: Vec::new(),
        }))
    }

    /// From now on the memory that the files are in is given back, batch by batch. Nobody restores from them again. Where
    /// one piece of a file goes to two places, which no dump has, nothing is.
    ///
    /// # Errors
    /// A file cannot be opened for writing.
    pub fn give_back(&mut self) -> io::Result<()> {
        self.given_back.clear();
        let place = |batch: &Batch| (batch.file, batch.offset, batch.bytes());
        let mut places: Vec<_> = self.batches.iter().map(place).collect();
        places.sort_unstable();
        let mut pairs = places.iter().zip(places.iter().skip(1));
        let is_apart = pairs.all(|((file, offset, bytes), (next, at, _))| {
            file != next || offset.saturating_add(*bytes) <= *at
        });
        if !is_apart {
            return Ok(());
        }
        let again = |file: &File| File::options().write(true).open(path_of(file.as_raw_fd()));
        self.given_back = self.files.iter().map(again).collect::<io::Result<_>>()?;
        Ok(())
    }

    /// What a program that this process starts from now on can [take over](Self::take_over): it gets the files too.
    ///
    /// # Errors
    /// A system call failed.
    pub fn hand_over(&self) -> io::Result<HandedOver> {
        for file in &self.files {
            fcntl(file, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        Ok(HandedOver {
            pid: self.pid,
            batches: self.batches.clone(),
            files: self.files.iter().map(|file| file.as_raw_fd()).collect(),
            gives_back: !self.given_back.is_empty(),
        })
    }

    /// What the process that has started this one has handed over.
    ///
    /// # Errors
    /// A file is not there.
    pub fn take_over(from: HandedOver) -> io::Result<Self> {
        let open = |writes: bool| {
            let files = from.files.iter();
            let open = move |fd: &RawFd| {
                File::options()
                    .read(!writes)
                    .write(writes)
                    .open(path_of(*fd))
            };
            files.map(open).collect::<io::Result<Vec<_>>>()
        };
        let invalid = from
            .batches
            .iter()
            .any(|batch| batch.file >= from.files.len());
        if invalid {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Self {
            pid: from.pid,
            files: open(false)?,
            given_back: if from.gives_back {
                open(true)?
            } else {
                Vec::new()
            },
            batches: from.batches,
        })
    }

    /// The process, by its id in the container.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What is to be put into it, in an order in which files are read from their beginning to their end.
    #[must_use]
    pub fn batches(&self) -> &[Batch] {
        &self.batches
    }

    /// Fills the buffer with what the ranges of a batch have, one behind the other.
    ///
    /// # Errors
    /// The file cannot be read, or ends before.
    pub fn read(&self, batch: &Batch, bytes: &mut Vec<u8>) -> io::Result<()> {
        let length = usize::try_from(batch.bytes()).map_err(io::Error::other)?;
        bytes.resize(length, 0);
        self.files[batch.file].read_exact_at(bytes, batch.offset)
    }

    /// The batch has been put in.
    pub fn done_with(&self, batch: &Batch) {
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        if let Some(file) = self.given_back.get(batch.file)
            && let (Ok(offset), Ok(length)) = (batch.offset.try_into(), batch.bytes().try_into())
        {
            // What is not given back now goes with the file.
            let _ = fallocate(file, hole, offset, length);
        }
    }
}

impl Batch {
    /// Start and length of each range, in bytes.
    #[must_use]
    pub fn ranges(&self) -> &[(u64, u64)] {
        &self.ranges
    }

    fn bytes(&self) -> u64 {
        self.ranges.iter().map(|(_, length)| length).sum()
    }
}

fn path_of(fd: RawFd) -> String {
    format!("/proc/self/fd/{fd}")
}

/// The process that has nearly all of the memory, with its threads.
fn process_with_most(dir: &Path, page: u64) -> Result<Option<(u32, Vec<u32>)>, ImageError> {
    let image = Image::read(&dir.join("pstree.img"), Kind::Pstree)?;
    let mut entries = image.entries();
    let (mut most, mut all): (Option<(u64, PstreeEntry)>, u64) = (None, 0);
    while let Some(entry) = entries.next::<PstreeEntry>()? {
        let path = dir.join(format!("{}{}.img", Kind::Pagemap.prefix(), entry.pid));
        // A process that has ended has no memory.
        if path.symlink_metadata().is_err() {
            continue;
        }
        let runs = Pagemap::read(&path)?.runs.into_iter();
        let bytes = runs.fold(0, |sum: u64, run| {
            sum.saturating_add(run.pages.saturating_mul(page))
        });
        all = all.saturating_add(bytes);
        if most.as_ref().is_none_or(|(most, _)| bytes > *most) {
            most = Some((bytes, entry));
        }
    }
    let most = most.filter(|(bytes, _)| *bytes >= LEAST && all - bytes <= all / OTHERS);
    Ok(most.map(|(_, entry)| (entry.pid, entry.threads)))
}

/// Whether memory of the mapping is what is written to it and nothing else.
fn may_be_apart(vma: &VmaEntry) -> bool {
    vma.prot & READ_WRITE == READ_WRITE
        && vma.flags & ODD_FLAGS == 0
        && vma.status & !HEAP == PRIVATE
}

/// Pages that the kernel writes to when it restores threads: it tells each at which address of theirs to find the
/// processor that they run on (rseq(2)), and from Linux 6.19 on writes only what has changed since it wrote last.
fn pages_of_the_kernel(
    dir: &Path,
    threads: &[u32],
    page: u64,
) -> Result<BTreeSet<u64>, ImageError> {
    let threads: BTreeSet<_> = threads.iter().collect();
    let mut pages = BTreeSet::new();
    for (id, path) in list(dir, Kind::Core)? {
        if !threads.contains(&id) {
            continue;
        }
        let core = Image::read(&path, Kind::Core)?
            .entries()
            .next::<CoreEntry>()?;
        let rseq = core
            .and_then(|core| core.thread_core)
            .and_then(|it| it.rseq);
        if let Some(RseqEntry { address, length }) = rseq {
            let last = address.saturating_add(u64::from(length).max(1) - 1);
            pages.extend([address / page * page, last / page * page]);
        }
    }
    Ok(pages)
}

/// A range in parts, with whether each is in the mappings and none of the pages.
fn split(
    (start, end): (u64, u64),
    mappings: &[(u64, u64)],
    pages: &BTreeSet<u64>,
    page: u64,
) -> Vec<(u64, u64, bool)> {
    let mut parts = Vec::new();
    let mut at = start;
    let mut push = |from: &mut u64, to: u64, may_be| {
        if *from < to {
            parts.push((*from, to, may_be));
            *from = to;
        }
    };
    let first = mappings.partition_point(|mapping| mapping.1 <= start);
    for mapping in mappings[first..].iter().take_while(|it| it.0 < end) {
        let (from, to) = (mapping.0.max(at), mapping.1.min(end));
        // Only what nobody has dumped has one in another.
        if from >= to {
            continue;
        }
        push(&mut at, from, false);
        for &of_kernel in pages.range(from..to) {
            push(&mut at, of_kernel, true);
            push(&mut at, of_kernel.saturating_add(page).min(to), false);
        }
        push(&mut at, to, true);
    }
    push(&mut at, end, false);
    parts
}

/// Leaves to CRIU what is of a mapping with little memory.
fn give_small_ones_back(mappings: &[(u64, u64)], apart: &mut Vec<Span>, rest: &mut Vec<Span>) {
    let of_mapping = |span: &Span| mappings.partition_point(|mapping| mapping.1 <= span.start);
    let mut bytes = vec![0_u64; mappings.len()];
    for span in apart.iter() {
        if let Some(sum) = bytes.get_mut(of_mapping(span)) {
            *sum += span.end - span.start;
        }
    }
    let is_small = |span: &Span| {
        let bytes = bytes.get(of_mapping(span));
        bytes.is_none_or(|bytes| *bytes < LEAST_MAPPING)
    };
    let small = apart.extract_if(.., |span| is_small(span));
    rest.extend(small);
    rest.sort_unstable_by_key(|span| span.start);
}

/// Writes the pages that are left for CRIU into a file of their own; gives its pagemap.
fn write_rest(dir: &Path, rest: &[Span], files: &[File], page: u64) -> Result<Pagemap, ImageError> {
    let free = |number: &u32| {
        let name = format!("pages-{number}.img");
        dir.join(name).symlink_metadata().is_err()
    };
    let pages_id = (1..u32::MAX).find(free).unwrap_or(u32::MAX);
    let path = dir.join(format!("pages-{pages_id}.img"));
    let failed = |act| {
        let path = path.clone();
        move |source| ImageError::Io { act, path, source }
    };
    let mut to = File::create_new(&path).map_err(failed("create"))?;
    let mut pagemap = Pagemap {
        pages_id,
        runs: Vec::new(),
    };
    let mut bytes = Vec::new();
    for span in rest {
        let mut at = span.start;
        while at < span.end {
            let length = (span.end - at).min(BATCH);
            bytes.resize(usize::try_from(length).unwrap_or_default(), 0);
            if let Place::File { level, offset } = span.place {
                let from = offset + (at - span.start);
                let read = files[level].read_exact_at(&mut bytes, from);
                read.map_err(failed("read the pages for"))?;
            }
            to.write_all(&bytes).map_err(failed("write"))?;
            at += length;
        }
        let run = PageRun {
            start: span.start,
            pages: (span.end - span.start) / page,
            place: PagePlace::File,
            lazy: false,
        };
        pagemap.push(run, page);
    }
    Ok(pagemap)
}

/// The spans in batches.
fn batches(spans: &[Span]) -> Vec<Batch> {
    let mut all: Vec<Batch> = Vec::new();
    for span in spans {
        let Place::File { level, offset } = span.place else {
            continue;
        };
        let mut at = span.start;
        while at < span.end {
            let from = offset + (at - span.start);
            // Whole large pages of the file are given back without being split.
            let room = BATCH - from % BATCH;
            let batch = match all.last_mut() {
                Some(last)
                    if last.file == level
                        && last.offset + last.bytes() == from
                        && room < BATCH
                        && last.ranges.len() < BATCH_RANGES =>
                {
                    last
                }
                _ => {
                    all.push(Batch {
                        file: level,
                        offset: from,
                        ranges: Vec::new(),
                    });
                    all.last_mut().expect("it was pushed")
                }
            };
            let length = (span.end - at).min(room);
            match batch.ranges.last_mut() {
                Some((start, known)) if *start + *known == at => *known += length,
                _ => batch.ranges.push((at, length)),
            }
            at += length;
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};

    use super::super::file_names::PARENT_DIR;
    use super::super::push_entry;
    use super::*;

    const PAGE: u64 = 4096;
    const PAGE_LEN: usize = 4096;
    /// Where the large mapping begins, and how many pages it has.
    const HEAP_START: u64 = 0x10_0000;
    const HEAP_PAGES: u64 = (64 << 20) / PAGE;
    const STACK: u64 = 0x7fff_0000_0000;
    /// The page of the heap that the kernel writes to.
    const RSEQ: u64 = HEAP_START + 5 * PAGE;

    fn write(dir: &Path, name: &str, kind: Kind, push: impl FnOnce(&mut Vec<u8>)) {
        let mut body = Vec::new();
        push(&mut body);
        let path = dir.join(name);
        Image::new(&path, kind, body).replace(&path).unwrap();
    }

    fn vma(start: u64, pages: u64, flags: u32, status: u32) -> VmaEntry {
        VmaEntry {
            start,
            end: start + pages * PAGE,
            prot: READ_WRITE,
            flags,
            status,
        }
    }

    fn run(start: u64, pages: u64, place: PagePlace) -> PageRun {
        PageRun {
            start,
            pages,
            place,
            lazy: true,
        }
    }

    /// Process 7 with a heap, half of it in images before, and a stack; `other` has so many pages.
    fn dump(dir: &Path, other: u64) {
        write(dir, "pstree.img", Kind::Pstree, |body| {
            for (pid, threads) in [(1, vec![1]), (7, vec![7, 9])] {
                push_entry(body, &PstreeEntry { pid, threads });
            }
        });
        write(dir, "core-9.img", Kind::Core, |body| {
            let rseq = Some(RseqEntry {
                address: RSEQ + 64,
                length: 32,
            });
            let thread_core = Some(ThreadCoreEntry { rseq });
            push_entry(body, &CoreEntry { thread_core });
        });
        write(dir, "mm-7.img", Kind::Mm, |body| {
            let vmas = vec![
                vma(HEAP_START, HEAP_PAGES, 0x22, PRIVATE | HEAP),
                vma(STACK, 4, 0x122, PRIVATE | 2),
            ];
            push_entry(body, &MmEntry { vmas });
        });
        let half = HEAP_PAGES / 2;
        let second = HEAP_START + half * PAGE;
        let pagemap = |pages_id, runs| Pagemap { pages_id, runs };
        let top = pagemap(
            3,
            vec![
                run(HEAP_START, half, PagePlace::File),
                run(second, half, PagePlace::Parent),
                run(STACK, 2, PagePlace::File),
            ],
        );
        fs::write(dir.join("pagemap-7.img"), top.to_bytes()).unwrap();
        let one = pagemap(1, vec![run(STACK, other, PagePlace::File)]);
        fs::write(dir.join("pagemap-1.img"), one.to_bytes()).unwrap();
        let below = dir.join(PARENT_DIR);
        fs::create_dir(&below).unwrap();
        let parent = pagemap(1, vec![run(second, half, PagePlace::File)]);
        fs::write(below.join("pagemap-7.img"), parent.to_bytes()).unwrap();
        let pages = |path: &Path, pages: u64, marks: &[u64]| {
            let file = File::create(path).unwrap();
            file.set_len(pages * PAGE).unwrap();
            for page in marks {
                let mark = [u8::try_from(page % 251).unwrap()];
                file.write_all_at(&mark, page * PAGE).unwrap();
            }
        };
        pages(&dir.join("pages-3.img"), half + 2, &[5, half - 1, half + 1]);
        pages(&below.join("pages-1.img"), half, &[3]);
        pages(&dir.join("pages-1.img"), other, &[]);
    }

    #[test]
    fn large_memory_is_taken_out_and_the_rest_stays() {
        let dir = tempfile::tempdir().unwrap();
        dump(dir.path(), 2);
        let apart = MemoryApart::take(dir.path(), PAGE).unwrap().unwrap();
        assert_eq!(apart.pid(), 7);

        // For CRIU: the page of the kernel and the stack, in a file of their own.
        let left = Pagemap::read(&dir.path().join("pagemap-7.img")).unwrap();
        let places: Vec<_> = left.runs.iter().map(|run| (run.start, run.pages)).collect();
        assert_eq!(places, [(RSEQ, 1), (STACK, 2)]);
        assert!(left.runs.iter().all(|run| run.place == PagePlace::File));
        let pages = fs::read(dir.path().join(format!("pages-{}.img", left.pages_id))).unwrap();
        let marks = [0, 1, 2].map(|page| pages[page * PAGE_LEN]);
        let half = HEAP_PAGES / 2;
        assert_eq!(marks, [5, 0, u8::try_from((half + 1) % 251).unwrap()]);

        // For whoever holds it: all others, each once, with what they had.
        let (mut found, mut bytes) = (Vec::new(), Vec::new());
        let mut marked = Vec::new();
        for batch in apart.batches() {
            apart.read(batch, &mut bytes).unwrap();
            let mut rest = &bytes[..];
            for (start, length) in batch.ranges() {
                found.push((*start, *length));
                let (range, behind) = rest.split_at(usize::try_from(*length).unwrap());
                let pages = range.chunks(PAGE_LEN).zip(*start / PAGE..);
                marked.extend(pages.filter(|(page, _)| page[0] != 0).map(|(_, at)| at));
                rest = behind;
            }
            assert!(rest.is_empty() && batch.bytes() <= BATCH);
        }
        let total: u64 = found.iter().map(|(_, length)| length).sum();
        assert_eq!(total, (HEAP_PAGES - 1) * PAGE);
        assert!(found.is_sorted_by(|a, b| a.0 + a.1 <= b.0));
        let first = HEAP_START / PAGE;
        assert_eq!(marked, [first + half - 1, first + half + 3]);
    }

    #[test]
    fn what_was_put_in_takes_no_room_twice() {
        let dir = tempfile::tempdir().unwrap();
        dump(dir.path(), 2);
        let mut apart = MemoryApart::take(dir.path(), PAGE).unwrap().unwrap();
        let batch = &apart.batches()[0].clone();
        let (mut before, mut after) = (Vec::new(), Vec::new());
        apart.read(batch, &mut before).unwrap();
        apart.done_with(batch);
        apart.read(batch, &mut after).unwrap();
        assert_eq!(before, after);
        let bytes = vec![7; before.len()];
        apart.files[batch.file] = tempfile::tempfile().unwrap();
        { apart.files[batch.file].write_all_at(&bytes, batch.offset) }.unwrap();
        let blocks = |apart: &MemoryApart| apart.files[batch.file].metadata().unwrap().blocks();
        let full = blocks(&apart);
        apart.give_back().unwrap();
        assert_eq!(blocks(&apart), full);
        apart.done_with(batch);
        assert!(blocks(&apart) < full);
        apart.read(batch, &mut after).unwrap();
        assert!(after.iter().all(|byte| *byte == 0));

        apart.batches.push(batch.clone());
        apart.give_back().unwrap();
        assert!(apart.given_back.is_empty());
    }

    #[test]
    fn another_process_reads_the_same() {
        let dir = tempfile::tempdir().unwrap();
        dump(dir.path(), 2);
        let mut apart = MemoryApart::take(dir.path(), PAGE).unwrap().unwrap();
        // Files that cannot be opened by any name.
        for file in &mut apart.files {
            let unnamed = tempfile::tempfile().unwrap();
            io::copy(file, &mut &unnamed).unwrap();
            *file = unnamed;
        }
        apart.give_back().unwrap();
        let handed = apart.hand_over().unwrap();
        let json = serde_json::to_vec(&handed).unwrap();
        let handed = serde_json::from_slice(&json).unwrap();
        let other = MemoryApart::take_over(handed).unwrap();
        assert_eq!(other.pid(), apart.pid());
        assert_eq!(other.batches(), apart.batches());
        assert_eq!(other.given_back.len(), apart.files.len());
        for batch in apart.batches() {
            let (mut here, mut there) = (Vec::new(), Vec::new());
            apart.read(batch, &mut here).unwrap();
            other.read(batch, &mut there).unwrap();
            assert_eq!(here, there);
        }
        let flags = fcntl(&apart.files[0], FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags, 0, "a program that is started has it");
        let mut handed: HandedOver = serde_json::from_slice(&json).unwrap();
        handed.files.clear();
        assert!(MemoryApart::take_over(handed).is_err());
    }

    #[test]
    fn memory_that_others_may_share_is_left() {
        let dir = tempfile::tempdir().unwrap();
        dump(dir.path(), HEAP_PAGES / 4);
        let before = fs::read(dir.path().join("pagemap-7.img")).unwrap();
        assert!(MemoryApart::take(dir.path(), PAGE).unwrap().is_none());
        assert_eq!(fs::read(dir.path().join("pagemap-7.img")).unwrap(), before);
    }

    #[test]
    fn mappings_with_ways_of_their_own_are_left() {
        let good = vma(0, 1, 0x22, PRIVATE);
        assert!(may_be_apart(&good));
        let odd = [
            VmaEntry { prot: 1, ..good },
            VmaEntry { prot: 0, ..good },
            vma(0, 1, 0x122, PRIVATE),
            vma(0, 1, 0x4_0022, PRIVATE),
            // The stack, shared memory, a file, the ring of asynchronous I/O, a shadow stack, guards.
            vma(0, 1, 0x22, PRIVATE | 1 << 1),
            vma(0, 1, 0x21, 1 | 1 << 8),
            vma(0, 1, 0x02, 1 | 1 << 6),
            vma(0, 1, 0x22, PRIVATE | 1 << 13),
            vma(0, 1, 0x22, PRIVATE | 1 << 15),
            vma(0, 1, 0x22, PRIVATE | 1 << 16),
        ];
        assert!(!odd.iter().any(may_be_apart));
    }

    #[test]
    fn ranges_are_split_whatever_the_mappings_are() {
        let kernels = BTreeSet::from([3 * PAGE]);
        // Beside each other, one in another, one that ends before it begins.
        let mappings = [(PAGE, 5 * PAGE), (2 * PAGE, 3 * PAGE), (9 * PAGE, 4 * PAGE)];
        let parts = split((0, 8 * PAGE), &mappings, &kernels, PAGE);
        let parts: Vec<_> = { parts.iter() }
            .map(|(start, end, may_be)| (start / PAGE, end / PAGE, *may_be))
            .collect();
        let expected = [
            (0, 1, false),
            (1, 3, true),
            (3, 4, false),
            (4, 5, true),
            (5, 8, false),
        ];
        assert_eq!(parts, expected);
    }

    #[test]
    fn fragments_go_together() {
        let span = |start: u64, pages: u64, offset: u64| Span {
            start: start * PAGE,
            end: (start + pages) * PAGE,
            place: Place::File {
                level: 0,
                offset: offset * PAGE,
            },
        };
        // Behind each other in the file, then not.
        let found = batches(&[
            span(1, 1, 0),
            span(5, 1, 1),
            span(6, 400, 2),
            span(900, 1, 700),
        ]);
        let ranges: Vec<_> = found.iter().map(|batch| batch.ranges.clone()).collect();
        let pages = |start: u64, count: u64| (start * PAGE, count * PAGE);
        let expected = [
            vec![pages(1, 1), pages(5, 255)],
            vec![pages(260, 146)],
            vec![pages(900, 1)],
        ];
        assert_eq!(ranges, expected);
        assert_eq!(found[1].offset, 256 * PAGE);
    }
}
