//! The memory of a process, read from outside.
//!
//! ```text
//!  /proc/PID/maps, pagemap ──> pages that a dump would have ──process_vm_readv──> pieces of them
//!  while CRIU looks at a process that stands still ──> pieces that it does not change meanwhile
//! ```
//!
//! No kernel support is needed, and nothing of the process is changed.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt as _;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use procfs::process::{MMPermissions, MMapPath, MemoryMap};

use crate::process_files;

/// Bytes of a page. Machines with larger ones have no pre-copy.
pub(super) const PAGE: u64 = PAGE_LEN as u64;
pub(super) const PAGE_LEN: usize = 4096;
/// Bytes that are read at once.
pub(super) const PIECE: usize = 1 << 20;
/// Entries of a pagemap that are read at once.
const ENTRIES: usize = 8192;
/// Threads that read memory in the freeze.
pub(super) const READERS: usize = 2;
/// Bits of an entry: the page is there; it is of a file, or shared.
const PRESENT: u64 = 1 << 63;
const FILE_OR_SHARED: u64 = 1 << 61;

/// Whether a page of this machine is one of those that are compared.
pub(super) fn can_compare_pages() -> bool {
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
    page.is_ok_and(|page| page.and_then(|page| u64::try_from(page).ok()) == Some(PAGE))
}

/// Whether CRIU has the memory for a lazy dump of these processes: it allocates a vector (16 bytes) for each page
/// of the private mappings of a process at once, also for those that are only reserved (`create_page_pipe` of
/// `criu/page-pipe.c`). MariaDB reserves 8 TiB.
pub(super) fn fits_lazy_dump(pids: &[u32], free: u64) -> bool {
    let private = |map: &MemoryMap| !map.perms.contains(MMPermissions::SHARED);
    let pages = |pid: &u32| -> u64 {
        let maps = process_files::maps(*pid);
        // A process that is gone has none.
        let maps = maps.into_iter().flatten().filter(private);
        maps.map(|map| (map.address.1 - map.address.0) / PAGE).sum()
    };
    pids.iter().all(|pid| pages(pid).saturating_mul(16) <= free)
}

/// Takes whole pages that begin at an address.
pub(super) type TakePages<'a, E> = dyn FnMut(u64, &[u8]) -> Result<(), E> + 'a;

/// The same with their hashes.
type TakeHashed<'a, E> = dyn FnMut(u64, &[u8], &[u64]) -> Result<(), E> + 'a;

/// For all mappings: a program may have thousands.
pub(super) struct Buffers {
    entries: Vec<u8>,
    pages: Vec<u8>,
}

impl Default for Buffers {
    fn default() -> Self {
        Self {
            entries: vec![0; ENTRIES * 8],
            pages: vec![0; PIECE],
        }
    }
}

/// Pages and their hashes.
#[derive(Default)]
struct Piece {
    bytes: Vec<u8>,
    hashes: Vec<u64>,
}

/// Begins the name of the mapping that asynchronous I/O of the kernel has.
const AIO: &str = "/[aio]";

/// The memory of one process.
pub(super) struct ProcessMemory {
    pid: Pid,
    pagemap: File,
    /// Reads what the process itself may not.
    mem: File,
}

/// How the kernel names anonymous memory of huge pages (`fs/hugetlbfs/inode.c`).
const HUGE_PAGES: &str = "/anon_hugepage (deleted)";

/// Whether a dump may have pages of it that nobody else shares. What is shared is sent in the freeze.
fn is_dumped(map: &MemoryMap) -> bool {
    match &map.pathname {
        MMapPath::Vdso | MMapPath::Vvar | MMapPath::Vsyscall | MMapPath::Vsys(_) => false,
        // Of huge pages CRIU reads no images that build on others.
        MMapPath::Path(path) if path.starts_with(HUGE_PAGES) => false,
        _ => !map.perms.contains(MMPermissions::SHARED) && map.perms.contains(MMPermissions::READ),
    }
}

impl ProcessMemory {
    /// That of a process of this node.
    ///
    /// # Errors
    /// It has ended, or may not be read.
    pub(super) fn of(pid: u32) -> io::Result<Self> {
        Ok(Self {
            pid: Pid::from_raw(pid.cast_signed()),
            pagemap: File::open(format!("/proc/{pid}/pagemap"))?,
            mem: File::open(format!("/proc/{pid}/mem"))?,
        })
    }

    /// Gives all pages that a dump would have, in the order of their addresses and in pieces of whole pages, as far as the
    /// address of a piece is `wanted`. What goes meanwhile is left out.
    ///
    /// # Errors
    /// Those of `take`.
    pub(super) fn each_piece<E>(
        &self,
        wanted: &dyn Fn(u64) -> bool,
        buffers: &mut Buffers,
        take: &mut TakePages<'_, E>,
    ) -> Result<(), E> {
        let maps = process_files::maps(self.pid.as_raw().cast_unsigned());
        for map in maps.into_iter().flatten().filter(is_dumped) {
            self.of_mapping(map.address, wanted, buffers, take)?;
        }
        Ok(())
    }

    /// The same of those that are at rest.
    ///
    /// # Errors
    /// Those of `take`.
    pub(super) fn each_piece_at_rest<E>(
        &self,
        wanted: &dyn Fn(u64) -> bool,
        buffers: &mut Buffers,
        take: &mut TakePages<'_, E>,
    ) -> Result<(), E> {
        for mapping in self.mappings_at_rest() {
            self.of_mapping(mapping, wanted, buffers, take)?;
        }
        Ok(())
    }

    /// Mappings, by their ends, whose pages stay as they are from the freeze on, also while CRIU dumps the process.
    /// CRIU calls into a process by changing code of it for a moment, so those that can be executed are left out;
    /// so are all where I/O that was begun before may still end.
    pub(super) fn mappings_at_rest(&self) -> Vec<(u64, u64)> {
        let maps = process_files::maps(self.pid.as_raw().cast_unsigned());
        let maps: Vec<_> = maps.into_iter().flatten().collect();
        let is_aio = |map: &MemoryMap| match &map.pathname {
            MMapPath::Path(path) => path.to_string_lossy().starts_with(AIO),
            _ => false,
        };
        if maps.iter().any(is_aio) {
            return Vec::new();
        }
        { maps.into_iter() }
            .filter(|map| is_dumped(map) && !map.perms.contains(MMPermissions::EXECUTE))
            .map(|map| map.address)
            .collect()
    }

    fn of_mapping<E>(
        &self,
        (mut at, end): (u64, u64),
        wanted: &dyn Fn(u64) -> bool,
        buffers: &mut Buffers,
        take: &mut TakePages<'_, E>,
    ) -> Result<(), E> {
        while at < end {
            let count = usize::try_from((end - at) / PAGE)
                .unwrap_or(ENTRIES)
                .min(ENTRIES);
            let bytes = &mut buffers.entries[..count * 8];
            if self.pagemap.read_exact_at(bytes, at / PAGE * 8).is_err() {
                return Ok(());
            }
            let there = bytes.chunks_exact(8).map(|entry| {
                let entry = u64::from_le_bytes(entry.try_into().unwrap_or_default());
                entry & PRESENT != 0 && entry & FILE_OR_SHARED == 0
            });
            for (first, pages) in runs(there, PIECE / PAGE_LEN) {
                let from = at + first as u64 * PAGE;
                if !wanted(from) {
                    continue;
                }
                let piece = &mut buffers.pages[..pages * PAGE_LEN];
                let read = self.read(from, piece);
                let whole = read - read % PAGE_LEN;
                if whole > 0 {
                    take(from, &piece[..whole])?;
                }
            }
            at += count as u64 * PAGE;
        }
        Ok(())
    }

    /// Gives these pages of a process that stands still, in pieces with the hash of each page. Two threads read, as
    /// nothing else goes on meanwhile.
    ///
    /// # Errors
    /// One of them cannot be read, as `failed` says it; those of `take`.
    pub(super) fn read_run<E: Send>(
        &self,
        (start, pages): (u64, u64),
        hash: impl Fn(&[u8]) -> u64 + Sync,
        take: &mut TakeHashed<'_, E>,
        failed: &dyn Fn(io::Error) -> E,
    ) -> Result<(), E> {
        let end = start.saturating_add(pages.saturating_mul(PAGE));
        let count = end.saturating_sub(start).div_ceil(PIECE as u64);
        let piece_at = |number: u64| {
            let at = start + number * PIECE as u64;
            (at, usize::try_from(end - at).unwrap_or(PIECE).min(PIECE))
        };
        let read_all =
            |first: u64, ready: &SyncSender<io::Result<Piece>>, used: &Receiver<Piece>| {
                let numbers = (first..count).step_by(READERS);
                for number in numbers {
                    let (at, length) = piece_at(number);
                    let mut piece = used.try_recv().unwrap_or_default();
                    let read = self.read_whole(at, length, &mut piece.bytes);
                    let hashes = piece.bytes.chunks_exact(PAGE_LEN).map(&hash);
                    piece.hashes.clear();
                    piece.hashes.extend(hashes);
                    // Nobody takes more of them after a failure.
                    if ready.send(read.map(|()| piece)).is_err() {
                        return;
                    }
                }
            };
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..READERS as u64)
                .map(|first| {
                    let (ready, pieces) = sync_channel(2);
                    let (used, again) = channel();
                    scope.spawn(move || read_all(first, &ready, &again));
                    (pieces, used)
                })
                .collect();
            for (number, (pieces, used)) in (0..count).zip(readers.iter().cycle()) {
                let read = pieces
                    .recv()
                    .unwrap_or_else(|_| Err(io::Error::other("who reads it has ended")));
                let piece = read.map_err(failed)?;
                take(piece_at(number).0, &piece.bytes, &piece.hashes)?;
                // A buffer that is there already has its pages.
                drop(used.send(piece));
            }
            Ok(())
        })
    }

    /// Fills the buffer with so many bytes, also with those that the process itself may not read.
    ///
    /// # Errors
    /// Not all of them are there.
    pub(super) fn read_whole(&self, at: u64, length: usize, into: &mut Vec<u8>) -> io::Result<()> {
        into.resize(length, 0);
        if self.read(at, into) < length {
            // Not readable for the process itself (PROT_NONE).
            self.mem.read_exact_at(into, at)?;
        }
        Ok(())
    }

    /// Gives how many bytes could be read.
    pub(super) fn read(&self, from: u64, into: &mut [u8]) -> usize {
        let Ok(base) = usize::try_from(from) else {
            return 0;
        };
        let len = into.len();
        let mut local = [IoSliceMut::new(into)];
        process_vm_readv(self.pid, &mut local, &[RemoteIoVec { base, len }]).unwrap_or_default()
    }
}

/// The runs of what is there, as the first one and how many, none longer than `most`.
fn runs(there: impl Iterator<Item = bool>, most: usize) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (at, _) in there.enumerate().filter(|(_, there)| *there) {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == at && *count < most => *count += 1,
            _ => runs.push((at, 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_memory_counts_for_a_lazy_dump() {
        let own = [std::process::id()];
        assert!(fits_lazy_dump(&own, u64::MAX));
        assert!(!fits_lazy_dump(&own, 16 * 100));
        assert!(fits_lazy_dump(&[], 0));
    }

    #[test]
    fn runs_are_what_is_there() {
        let there = [true, true, false, true, true, true];
        assert_eq!(runs(there.into_iter(), 2), [(0, 2), (3, 2), (5, 1)]);
    }

    #[test]
    fn own_memory_is_found() {
        let mark = format!("transship finds {:016x}", std::process::id()).into_bytes();
        let memory = ProcessMemory::of(std::process::id()).unwrap();
        let mut buffers = Buffers::default();
        let (mut found, mut last) = (None, 0);
        memory
            .each_piece(&|_| true, &mut buffers, &mut |start, piece| {
                assert!(start >= last && piece.len().is_multiple_of(PAGE_LEN));
                last = start + piece.len() as u64;
                if piece.windows(mark.len()).any(|at| at == mark) {
                    found.get_or_insert((start, piece.len()));
                }
                io::Result::Ok(())
            })
            .unwrap();
        let (start, length) = found.unwrap();
        let (mut again, mut hashed) = (Vec::new(), 0);
        let take = &mut |at, piece: &[u8], hashes: &[u64]| {
            assert_eq!(at, start + again.len() as u64);
            again.extend_from_slice(piece);
            hashed += hashes.len();
            io::Result::Ok(())
        };
        let pages = length / PAGE_LEN;
        let run = (start, pages as u64);
        memory.read_run(run, |_| 1, take, &|error| error).unwrap();
        assert_eq!(hashed, pages);
        let nowhere = memory.read_run((PAGE, 1), |_| 1, &mut |_, _, _| Ok(()), &|error| error);
        assert!(nowhere.is_err());
        assert!(again.windows(mark.len()).any(|at| at == mark));
    }
}
