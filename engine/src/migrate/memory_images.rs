//! Memory as images of our own making, which build on each other as those of `criu pre-dump` do.
//!
//! ```text
//!  while it runs, round after round             in the freeze (frozen_memory)
//!   memory-1/pagemap-<pid>.img, pages-<n>.img    checkpoint/pagemap-<pid>.img, pages-<n>.img
//!   memory-2/...  what is new; the rest                        what is new; the rest
//!                 is said to be in memory-1                    is said to be in memory-<last>
//! ```
//!
//! What is new is found by the hash of a page (XXH3 with 64 bits and a seed that nobody else knows), compared with
//! that of the same address in the round before. So no kernel support is needed: not soft-dirty bits, which many
//! kernels lack, nor userfaultfd in a process that is not ours. Who could make two pages with one hash would damage
//! memory of its own.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::Write;
use std::time::Instant;

use ring::rand::{SecureRandom as _, SystemRandom};
use transship_checkpoint::criu_images::pagemap::{PagePlace, PageRun, Pagemap};
use transship_checkpoint::manifest::{self, MEMORY_DIR};
use transship_checkpoint::wire::{Check, Sender, SendingFile, WireError};
use twox_hash::XxHash3_64;

use super::process_memory::{Buffers, PAGE, PAGE_LEN, ProcessMemory};
use crate::error::{Error, Result};
use crate::process_files;

/// More pages than this are not remembered, 20 GB: their hashes have 40 MB.
const MOST: usize = 5_000_000;

/// What the target has of a container's memory.
#[derive(Debug)]
pub(super) struct KnownMemory {
    seed: u64,
    rounds: u32,
    /// By the name of the image, `<pid>` in the container.
    pub(super) images: BTreeMap<String, Hashes>,
}

/// What has been sent.
#[derive(Debug, Default)]
pub(super) struct SentMemory {
    /// For the manifest.
    pub(super) files: Vec<manifest::File>,
    /// Pages that were new.
    pub(super) pages: u64,
    /// Bytes that they took.
    pub(super) bytes: u64,
}

/// The hashes of pages, in the order of their addresses.
#[derive(Debug, Default)]
pub(super) struct Hashes(pub(super) Vec<HashRun>);

/// Those of pages that follow each other.
#[derive(Debug)]
pub(super) struct HashRun {
    pub(super) start: u64,
    pub(super) hashes: Vec<u64>,
}

impl HashRun {
    pub(super) fn end(&self) -> u64 {
        self.start + self.hashes.len() as u64 * PAGE
    }
}

impl Hashes {
    fn push(&mut self, at: u64, hash: u64) {
        match self.0.last_mut() {
            Some(last) if last.end() == at => last.hashes.push(hash),
            _ => self.0.push(HashRun {
                start: at,
                hashes: vec![hash],
            }),
        }
    }
}

/// The processes of a container by their ids in its own pid namespace, which `init` is in.
pub(super) fn by_pid_inside(init: u32, pids: &[u32]) -> BTreeMap<u32, u32> {
    let inside = |pid: u32| -> Option<Vec<i32>> { process_files::status(pid).ok()?.nspid };
    let Some(level) = inside(init).map(|ids| ids.len()) else {
        return BTreeMap::new();
    };
    let mut found = BTreeMap::new();
    for pid in pids {
        let ids = inside(*pid).unwrap_or_default();
        if let Some(id) = level.checked_sub(1).and_then(|last| ids.get(last)) {
            found.insert(id.cast_unsigned(), *pid);
        }
    }
    found
}

impl KnownMemory {
    /// Nothing.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub(super) fn new() -> Result<Self> {
        let mut seed = [0; 8];
        { SystemRandom::new().fill(&mut seed) }
            .map_err(|_| Error::failed("the system has no random numbers"))?;
        Ok(Self {
            seed: u64::from_le_bytes(seed),
            rounds: 0,
            images: BTreeMap::new(),
        })
    }

    /// Whether the target has any.
    pub(super) fn has_rounds(&self) -> bool {
        self.rounds > 0
    }

    /// Sends a round of what these processes have, by their ids inside, until that moment. One that has ended has nothing.
    /// What is not reached any more is said to be as the last round has it, whatever it is now: it is compared with that in
    /// the freeze.
    ///
    /// # Errors
    /// Those of the stream.
    pub(super) fn send_round<W: Write>(
        &mut self,
        sender: &Sender<W>,
        (container, processes): (&str, &BTreeMap<u32, u32>),
        until: Instant,
        progress: &mut dyn FnMut(u64),
    ) -> std::result::Result<SentMemory, WireError> {
        let dir = format!("{MEMORY_DIR}{}", self.rounds + 1);
        let mut buffers = Buffers::default();
        let (mut sent, mut images) = (SentMemory::default(), BTreeMap::new());
        let mut room = MOST;
        for (pages_id, (inside, pid)) in (1..).zip(processes) {
            let name = inside.to_string();
            if Instant::now() >= until && !self.images.contains_key(&name) {
                continue;
            }
            let Ok(memory) = ProcessMemory::of(*pid) else {
                continue;
            };
            let mut writer = self.writer(sender, (container, &dir), &name, pages_id)?;
            let mut hashes = Hashes::default();
            let cut_at = Cell::new(None);
            let in_time = |from: u64| {
                if cut_at.get().is_none() && Instant::now() >= until {
                    cut_at.set(Some(from));
                }
                cut_at.get().is_none()
            };
            memory.each_piece(&in_time, &mut buffers, &mut |start, piece| {
                progress(piece.len() as u64);
                let found = self.hashes_of(piece);
                for (at, hash) in (start..).step_by(PAGE_LEN).zip(&found).take(room) {
                    hashes.push(at, *hash);
                }
                room = room.saturating_sub(found.len());
                writer.add(start, piece, &found, true)
            })?;
            for (start, left) in { cut_at.get() }
                .into_iter()
                .flat_map(|from| self.known_from(&name, from))
            {
                writer.add_unchanged(start, left.len() as u64, true);
                for (at, hash) in (start..).step_by(PAGE_LEN).zip(left).take(room) {
                    hashes.push(at, *hash);
                }
                room = room.saturating_sub(left.len());
            }
            writer.end(sender, &mut sent)?;
            images.insert(name, hashes);
        }
        if sent.files.is_empty() {
            // There is no directory of this round to build on.
            return Ok(sent);
        }
        self.rounds += 1;
        self.images = images;
        Ok(sent)
    }

    /// What the target has of an image from an address on, as runs of pages.
    fn known_from(&self, name: &str, from: u64) -> impl Iterator<Item = (u64, &[u64])> {
        let runs = self.images.get(name).map_or(&[][..], |hashes| &hashes.0);
        runs.iter().filter_map(move |run| {
            let before = from.saturating_sub(run.start).div_ceil(PAGE);
            let left = run.hashes.get(usize::try_from(before).ok()?..)?;
            (!left.is_empty()).then_some((run.start + before * PAGE, left))
        })
    }

    pub(super) fn hash_of(&self, page: &[u8]) -> u64 {
        XxHash3_64::oneshot_with_seed(self.seed, page)
    }

    pub(super) fn hashes_of(&self, pages: &[u8]) -> Vec<u64> {
        { pages.chunks(PAGE_LEN) }
            .map(|page| self.hash_of(page))
            .collect()
    }

    /// Begins an image of pages, in which what the last round has sent is not sent again.
    ///
    /// # Errors
    /// Those of the stream.
    pub(super) fn writer<'a, W: Write>(
        &'a self,
        sender: &'a Sender<W>,
        (container, dir): (&'a str, &'a str),
        name: &'a str,
        pages_id: u32,
    ) -> std::result::Result<ImageWriter<'a, W>, WireError> {
        let pages = format!("{dir}/pages-{pages_id}.img");
        Ok(ImageWriter {
            known: { self.images.get(name) }.map_or(&[], |hashes| &hashes.0),
            pagemap: Pagemap {
                pages_id,
                runs: Vec::new(),
            },
            sending: sender.begin_file(container, &pages, Check::Xxh3)?,
            container,
            path: format!("{dir}/pagemap-{name}.img"),
            new: 0,
        })
    }
}

/// Of `checkpoint/pagemap-<name>.img`.
pub(super) fn image_name(path: &str) -> Option<&str> {
    let name = path.rsplit('/').next()?;
    name.strip_prefix("pagemap-")?.strip_suffix(".img")
}

/// One image on its way.
pub(super) struct ImageWriter<'a, W> {
    /// What the target has of it, from the address on that was looked up last.
    known: &'a [HashRun],
    pagemap: Pagemap,
    sending: SendingFile<'a, W>,
    container: &'a str,
    path: String,
    new: u64,
}

impl<W: Write> ImageWriter<'_, W> {
    /// Adds pages that another image has, which this one builds on; before the end they are in no order.
    pub(super) fn build_on(&mut self, ranges: &[(u64, u64)]) {
        let runs = ranges.iter().map(|(start, end)| PageRun {
            start: *start,
            pages: (end - start) / PAGE,
            place: PagePlace::Parent,
            lazy: true,
        });
        self.pagemap.runs.extend(runs);
        self.pagemap.runs.sort_by_key(|run| run.start);
    }

    /// Adds pages that the last round has sent as they are.
    pub(super) fn add_unchanged(&mut self, start: u64, pages: u64, lazy: bool) {
        let run = PageRun {
            start,
            pages,
            place: PagePlace::Parent,
            lazy,
        };
        self.pagemap.push(run, PAGE);
    }

    /// Adds pages that stay where they are until somebody asks for them.
    pub(super) fn add_late(&mut self, start: u64, pages: u64) {
        let run = PageRun {
            start,
            pages,
            place: PagePlace::Process,
            lazy: true,
        };
        self.pagemap.push(run, PAGE);
    }

    /// Adds whole pages with their hashes; their addresses ascend.
    ///
    /// # Errors
    /// Those of the stream.
    pub(super) fn add(
        &mut self,
        start: u64,
        piece: &[u8],
        hashes: &[u64],
        lazy: bool,
    ) -> std::result::Result<(), WireError> {
        let mut new_since = 0;
        for ((at, offset), hash) in (start..)
            .step_by(PAGE_LEN)
            .zip((0..).step_by(PAGE_LEN))
            .zip(hashes)
        {
            let is_known = self.known_hash(at) == Some(*hash);
            let run = PageRun {
                start: at,
                pages: 1,
                place: match is_known {
                    true => PagePlace::Parent,
                    false => PagePlace::File,
                },
                lazy,
            };
            self.pagemap.push(run, PAGE);
            if is_known {
                self.sending.write(&piece[new_since..offset])?;
                new_since = offset + PAGE_LEN;
            } else {
                self.new += 1;
            }
        }
        self.sending.write(&piece[new_since..])
    }

    fn known_hash(&mut self, at: u64) -> Option<u64> {
        while let Some((first, rest)) = self.known.split_first()
            && first.end() <= at
        {
            self.known = rest;
        }
        let first = self.known.first()?;
        let index = at.checked_sub(first.start)? / PAGE;
        first.hashes.get(usize::try_from(index).ok()?).copied()
    }

    /// Adds the image to what has been sent.
    ///
    /// # Errors
    /// Those of the stream.
    pub(super) fn end(
        self,
        sender: &Sender<W>,
        sent: &mut SentMemory,
    ) -> std::result::Result<(), WireError> {
        sent.pages += self.new;
        sent.files.push(self.sending.end(&mut sent.bytes)?);
        let mut image = sender.begin_file(self.container, &self.path, Check::Xxh3)?;
        image.write(&self.pagemap.to_bytes())?;
        sent.files.push(image.end(&mut sent.bytes)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pids_are_those_inside() {
        let own = std::process::id();
        assert_eq!(
            by_pid_inside(own, &[own])
                .values()
                .copied()
                .collect::<Vec<_>>(),
            [own]
        );
        assert!(by_pid_inside(u32::MAX, &[own]).is_empty());
    }

    /// What has been sent of it before is said to be as it was, and is looked at again in the freeze.
    #[test]
    fn a_round_that_is_cut_short_forgets_nothing() {
        let own = std::process::id();
        let processes = BTreeMap::from([(7, own)]);
        let sender = Sender::new(std::io::sink());
        let mut known = KnownMemory::new().unwrap();
        let send = |known: &mut KnownMemory, until| {
            let what = ("web", &processes);
            known.send_round(&sender, what, until, &mut |_| {}).unwrap()
        };
        let now = Instant::now();
        let later = now + std::time::Duration::from_secs(3600);
        let mut nothing = KnownMemory::new().unwrap();
        let sent = send(&mut nothing, now);
        assert_eq!((sent.pages, nothing.images.len()), (0, 0));
        assert!(sent.files.is_empty(), "{:?}", sent.files);

        let first = send(&mut known, later);
        assert!(first.pages > 0);
        let before = pages_of(&known);
        let cut = send(&mut known, now);
        assert_eq!((cut.pages, cut.files.len()), (0, 2));
        assert_eq!(pages_of(&known), before);
        // And the round after that finds what is new since the first.
        assert!(send(&mut known, later).pages < first.pages);
    }

    /// By their addresses.
    fn pages_of(known: &KnownMemory) -> BTreeMap<u64, u64> {
        let runs = known.images["7"].0.iter();
        runs.flat_map(|run| {
            (run.start..)
                .step_by(PAGE_LEN)
                .zip(run.hashes.iter().copied())
        })
        .collect()
    }
}
