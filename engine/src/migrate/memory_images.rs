//! Memory as images of our own making, which build on each other as those of `criu pre-dump` do.
//!
//! ```text
//!  while it runs, round after round             in the freeze
//!   memory-1/pagemap-<pid>.img, pages-<n>.img    checkpoint/pagemap-<pid>.img of CRIU, which has left the pages in
//!   memory-2/...  what is new; the rest          the processes (dump_hold)  ──> checkpoint/pagemap-<pid>.img,
//!                 is said to be in memory-1           pages-<n>.img: what is new; the rest is in memory-<last>
//! ```
//!
//! What is new is found by the hash of a page (XXH3 with 64 bits and a seed that nobody else knows), compared with
//! that of the same address in the round before. So no kernel support is needed: not soft-dirty bits, which many
//! kernels lack, nor userfaultfd in a process that is not ours. Who could make two pages with one hash would damage
//! memory of its own.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use procfs::process::Process;
use ring::rand::{SecureRandom as _, SystemRandom};
use transship_checkpoint::criu_images::pagemap::{PagePlace, PageRun, Pagemap};
use transship_checkpoint::manifest::{self, IMAGES_DIR, MEMORY_DIR};
use transship_checkpoint::wire::{Check, Sender, SendingFile, WireError};
use twox_hash::XxHash3_64;

use super::process_memory::{Buffers, PAGE, PAGE_LEN, PIECE, ProcessMemory, TakePages};
use crate::error::{Error, Result};

/// More pages than this are not remembered, 20 GB: their hashes have 40 MB.
const MOST: usize = 5_000_000;

/// What the target has of a container's memory.
#[derive(Debug)]
pub(super) struct KnownMemory {
    seed: u64,
    rounds: u32,
    /// By the name of the image, `<pid>` in the container.
    images: BTreeMap<String, Hashes>,
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
struct Hashes(Vec<HashRun>);

#[derive(Debug)]
struct HashRun {
    start: u64,
    hashes: Vec<u64>,
}

impl HashRun {
    fn end(&self) -> u64 {
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
    let inside = |pid: u32| -> Option<Vec<i32>> {
        let process = Process::new(pid.cast_signed()).ok()?;
        process.status().ok()?.nspid
    };
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

    /// Sends a round of what these processes have, by their ids inside. One that has ended has nothing.
    ///
    /// # Errors
    /// Those of the stream.
    pub(super) fn send_round<W: Write>(
        &mut self,
        sender: &Sender<W>,
        container: &str,
        processes: &BTreeMap<u32, u32>,
        progress: &mut dyn FnMut(u64),
    ) -> std::result::Result<SentMemory, WireError> {
        let dir = format!("{MEMORY_DIR}{}", self.rounds + 1);
        let mut buffers = Buffers::default();
        let (mut sent, mut images) = (SentMemory::default(), BTreeMap::new());
        let mut room = MOST;
        for (pages_id, (inside, pid)) in (1..).zip(processes) {
            let Ok(memory) = ProcessMemory::of(*pid) else {
                continue;
            };
            let name = inside.to_string();
            let mut writer = self.writer(sender, (container, &dir), &name, pages_id)?;
            let mut hashes = Hashes::default();
            memory.each_piece(&mut buffers, &mut |start, piece| {
                progress(piece.len() as u64);
                let found = hashes_of(self.seed, piece);
                for (at, hash) in (start..).step_by(PAGE_LEN).zip(&found).take(room) {
                    hashes.push(at, *hash);
                }
                room = room.saturating_sub(found.len());
                writer.add(start, piece, &found, true)
            })?;
            writer.end(sender, &mut sent)?;
            images.insert(name, hashes);
        }
        self.rounds += 1;
        self.images = images;
        Ok(sent)
    }

    /// Sends an image of a dump that has left its pages in the processes: `path` is that of its pagemap in `dir`,
    /// the container's directory.
    ///
    /// # Errors
    /// A page that cannot be read; those of the stream.
    pub(super) fn send_image<W: Write>(
        &self,
        sender: &Sender<W>,
        (container, dir): (&str, &Path),
        path: &str,
        processes: &BTreeMap<u32, u32>,
        progress: &mut dyn FnMut(u64),
    ) -> std::result::Result<SentMemory, WireError> {
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
        let memory = { name.parse().ok() }
            .and_then(|inside: u32| processes.get(&inside))
            .and_then(|pid| ProcessMemory::of(*pid).ok());
        let mut writer = self.writer(sender, (container, IMAGES_DIR), name, pagemap.pages_id)?;
        let seed = self.seed;
        // CRIU begins a run with each of its pipes, at most 1 MiB.
        let mut joined = Pagemap::default();
        { pagemap.runs.iter() }.for_each(|run| joined.push(*run, PAGE));
        for run in &joined.runs {
            let add = &mut |start, piece: &[u8], hashes: &[u64]| {
                progress(piece.len() as u64);
                writer.add(start, piece, hashes, run.lazy)
            };
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
                    let add = &mut |start, piece: &[u8]| add(start, piece, &hashes_of(seed, piece));
                    copy_run(from, run, add, unread)?;
                }
                (PagePlace::Process, Some(memory)) => {
                    let unread = |e| failed("read in their process the pages of", e);
                    let hash = |page: &[u8]| hash_of(seed, page);
                    memory.read_run((run.start, run.pages), hash, add, &unread)?;
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

    fn writer<'a, W: Write>(
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

fn hash_of(seed: u64, page: &[u8]) -> u64 {
    XxHash3_64::oneshot_with_seed(seed, page)
}

fn hashes_of(seed: u64, pages: &[u8]) -> Vec<u64> {
    { pages.chunks(PAGE_LEN) }
        .map(|page| hash_of(seed, page))
        .collect()
}

/// The pages of a run that CRIU has written.
fn copy_run(
    from: &mut File,
    run: &PageRun,
    add: &mut TakePages<'_, WireError>,
    failed: impl Fn(io::Error) -> WireError,
) -> std::result::Result<(), WireError> {
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

/// Of `checkpoint/pagemap-<name>.img`.
pub(super) fn image_name(path: &str) -> Option<&str> {
    let name = path.rsplit('/').next()?;
    name.strip_prefix("pagemap-")?.strip_suffix(".img")
}

/// One image on its way.
struct ImageWriter<'a, W> {
    /// What the target has of it, from the address on that was looked up last.
    known: &'a [HashRun],
    pagemap: Pagemap,
    sending: SendingFile<'a, W>,
    container: &'a str,
    path: String,
    new: u64,
}

impl<W: Write> ImageWriter<'_, W> {
    /// Adds whole pages with their hashes; their addresses ascend.
    fn add(
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

    fn end(self, sender: &Sender<W>, sent: &mut SentMemory) -> std::result::Result<(), WireError> {
        sent.pages += self.new;
        sent.bytes += self.sending.sent();
        sent.files.push(self.sending.end()?);
        let mut image = sender.begin_file(self.container, &self.path, Check::Xxh3)?;
        image.write(&self.pagemap.to_bytes())?;
        sent.bytes += image.sent();
        sent.files.push(image.end()?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use transship_checkpoint::wire::{Arriving, Limits, Message, Receiver};

    use super::*;

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
        let sender = Sender::new(&mut stream);
        let round = known.send_round(&sender, "c", &own, &mut |_| {}).unwrap();
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
        let sent = known.send_image(&sender, from, &path, &own, &mut |_| {});
        assert_eq!(sent.unwrap().pages, 2);
        let nobody = BTreeMap::new();
        let lost = known.send_image(&sender.clone(), from, &path, &nobody, &mut |_| {});
        assert!(lost.is_err(), "pages that no process has");
        sender.send(&Message::FilesEnd).unwrap();
        drop(sender);

        let target = tempfile::tempdir().unwrap();
        let limits = Limits {
            max_bytes: u64::MAX,
            keep_free: 0,
        };
        let arriving = Arriving::into_dir(target.path(), limits, Check::Xxh3);
        // The one that was lost has been begun.
        assert!(
            Receiver::new(&stream[..])
                .receive_files(&arriving, &mut |_| {})
                .is_err()
        );
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
}
