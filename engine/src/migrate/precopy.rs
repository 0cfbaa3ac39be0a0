//! Memory that is sent before the freeze, while the container runs.
//!
//! ```text
//!  /proc/PID/maps, pagemap ──> pages that a dump would have ──process_vm_readv──> hash
//!                                                                      new: sent, and known
//!  once more from the beginning, until little is new (the rules of phaul)
//! ```
//!
//! No kernel support is needed, and nothing of the container is changed: what has been written since is
//! found by its content. In the freeze, pages that are known are referred to; so a page that was read here too
//! early, too late or in vain costs its transfer, and nothing else.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use procfs::process::{MMPermissions, MMapPath, MemoryMap, Process};
use ring::rand::{SecureRandom as _, SystemRandom};
use transship_checkpoint::wire::{KnownPages, PAGE};

use crate::error::{Error, Result};

/// A round that finds less new pages than this is the last one.
const FEW: u64 = 64;
/// So is one that finds this much more than the one before it, in percent.
const GROWTH: u64 = 132;
/// Bytes that are read at once.
const PIECE: usize = 1 << 20;
/// Entries of a pagemap that are read at once.
const ENTRIES: usize = 8192;
/// Bits of an entry: the page is there; it is of a file, or shared.
const PRESENT: u64 = 1 << 63;
const FILE_OR_SHARED: u64 = 1 << 61;

/// How long memory may be sent before the freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// How often it is gone through; 0: not at all.
    pub rounds: u32,
    /// After this time no other round begins.
    pub time: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            rounds: 8,
            time: Duration::from_secs(60),
        }
    }
}

/// The rounds so far.
#[derive(Debug)]
pub(super) struct Rounds {
    bounds: Bounds,
    began: Instant,
    /// The last one has found so much that more of them would not end it.
    grows: bool,
    pub(super) done: u32,
    /// Bytes that were sent in all of them.
    pub(super) bytes: u64,
    last: Option<u64>,
}

impl Rounds {
    pub(super) fn within(bounds: Bounds) -> Self {
        Self {
            bounds,
            began: Instant::now(),
            grows: false,
            done: 0,
            bytes: 0,
            last: None,
        }
    }

    /// Whether there is another one.
    pub(super) fn go_on(&self) -> bool {
        let enough = self.last.is_some_and(|pages| pages < FEW);
        !enough
            && !self.grows
            && self.done < self.bounds.rounds
            && self.began.elapsed() < self.bounds.time
    }

    /// A round has sent so many pages.
    pub(super) fn add(&mut self, pages: u64) {
        let last = self.last;
        self.grows = last.is_some_and(|last| pages > last.saturating_mul(GROWTH) / 100);
        self.done += 1;
        self.bytes += pages * PAGE as u64;
        self.last = Some(pages);
    }
}

/// A number that nobody else knows.
///
/// # Errors
/// The system has no random numbers.
pub(super) fn seed() -> Result<u64> {
    let mut bytes = [0; 8];
    { SystemRandom::new().fill(&mut bytes) }
        .map_err(|_| Error::failed("the system has no random numbers"))?;
    Ok(u64::from_le_bytes(bytes))
}

/// Goes through the memory of these processes, and gives what is new to `send`, a whole number of pages at
/// once. Gives the number of new pages. A process that has ended has none.
///
/// # Errors
/// Those of `send`.
pub(super) fn go_through<E>(
    pids: &[u32],
    known: &mut KnownPages,
    send: &mut dyn FnMut(&[u8]) -> std::result::Result<(), E>,
) -> std::result::Result<u64, E> {
    let mut new = Vec::with_capacity(PIECE);
    let mut buffers = Buffers {
        entries: vec![0; ENTRIES * 8],
        pages: vec![0; PIECE],
    };
    let mut sent = 0;
    for pid in pids {
        let Ok(memory) = Memory::of(*pid) else {
            continue;
        };
        for map in memory.maps.iter().filter(|map| is_dumped(map)) {
            memory.each_page(map, &mut buffers, &mut |page| {
                if known.offer(page) {
                    new.extend_from_slice(page);
                    sent += 1;
                }
                if new.len() >= PIECE {
                    send(&new)?;
                    new.clear();
                }
                Ok(())
            })?;
        }
    }
    if !new.is_empty() {
        send(&new)?;
    }
    Ok(sent)
}

/// For all mappings: a program may have thousands.
struct Buffers {
    entries: Vec<u8>,
    pages: Vec<u8>,
}

struct Memory {
    pid: Pid,
    maps: Vec<MemoryMap>,
    pagemap: File,
}

/// Whether a dump may have pages of it.
fn is_dumped(map: &MemoryMap) -> bool {
    let is_shared = map.perms.contains(MMPermissions::SHARED);
    match &map.pathname {
        MMapPath::Vdso | MMapPath::Vvar | MMapPath::Vsyscall => false,
        MMapPath::Vsys(_) => true,
        // Shared memory without a name has one that is deleted (/dev/zero, /memfd:x).
        MMapPath::Path(path) if is_shared => path.to_string_lossy().ends_with(" (deleted)"),
        _ => map.perms.contains(MMPermissions::READ),
    }
}

impl Memory {
    fn of(pid: u32) -> io::Result<Self> {
        let process = Process::new(pid.cast_signed()).map_err(io::Error::other)?;
        Ok(Self {
            pid: Pid::from_raw(pid.cast_signed()),
            maps: process
                .maps()
                .map_err(io::Error::other)?
                .into_iter()
                .collect(),
            pagemap: File::open(format!("/proc/{pid}/pagemap"))?,
        })
    }

    fn each_page<E>(
        &self,
        map: &MemoryMap,
        buffers: &mut Buffers,
        take: &mut dyn FnMut(&[u8]) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let is_shared = map.perms.contains(MMPermissions::SHARED);
        let wanted =
            |entry: u64| entry & PRESENT != 0 && (is_shared || entry & FILE_OR_SHARED == 0);
        let size = PAGE as u64;
        let (mut at, end) = map.address;
        while at < end {
            let count = usize::try_from((end - at) / size)
                .unwrap_or(ENTRIES)
                .min(ENTRIES);
            let bytes = &mut buffers.entries[..count * 8];
            // What has gone meanwhile is not read; the dump has what is there then.
            if self.pagemap.read_exact_at(bytes, at / size * 8).is_err() {
                return Ok(());
            }
            let there = bytes.chunks_exact(8).map(|entry| {
                let entry: [u8; 8] = entry.try_into().unwrap_or_default();
                wanted(u64::from_le_bytes(entry))
            });
            for (first, pages) in runs(there, PIECE / PAGE) {
                let from = at + first as u64 * size;
                let piece = &mut buffers.pages[..pages * PAGE];
                let read = self.read(from, piece);
                { piece[..read].chunks_exact(PAGE) }.try_for_each(&mut *take)?;
            }
            at += count as u64 * size;
        }
        Ok(())
    }

    /// Gives how many bytes could be read.
    fn read(&self, from: u64, into: &mut [u8]) -> usize {
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
    use std::convert::Infallible;

    use super::*;

    #[test]
    fn runs_are_what_is_there() {
        let there = [true, true, false, true, true, true];
        assert_eq!(runs(there.into_iter(), 2), [(0, 2), (3, 2), (5, 1)]);
    }

    #[test]
    fn rounds_end_by_the_rules() {
        let bounds = Bounds {
            rounds: 4,
            time: Duration::from_secs(3600),
        };
        let after = |pages: &[u64]| {
            let mut rounds = Rounds::within(bounds);
            pages.iter().for_each(|pages| rounds.add(*pages));
            assert_eq!(rounds.done as usize, pages.len());
            rounds.go_on()
        };
        assert!(after(&[]) && after(&[5000]) && after(&[5000, 900, 1000]));
        assert!(!after(&[5000, 63]));
        assert!(!after(&[5000, 900, 2000]));
        assert!(!after(&[5000, 900, 900, 900]));
        let none = Bounds {
            rounds: 0,
            ..bounds
        };
        assert!(!Rounds::within(none).go_on());
    }

    #[test]
    fn own_memory_is_found() {
        let mark = format!("transship finds {:016x}", seed().unwrap()).into_bytes();
        let (mut known, mut seen) = (KnownPages::new(3), Vec::new());
        let mut send = |pages: &[u8]| -> std::result::Result<(), Infallible> {
            seen.push(pages.to_vec());
            Ok(())
        };
        let first = go_through(&[std::process::id(), u32::MAX], &mut known, &mut send).unwrap();
        assert!(
            first > 60
                && seen
                    .iter()
                    .all(|pages| pages.len() % PAGE == 0 && !pages.is_empty()),
            "{first}"
        );
        let found = |pages: &Vec<u8>| pages.windows(mark.len()).any(|at| at == mark);
        assert!(seen.iter().any(found));
    }
}
