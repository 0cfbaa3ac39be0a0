//! Pages of memory that the target has already, when their container is dumped.
//!
//! ```text
//!  sender                                    receiver
//!   KnownPages: hash of a page --> number     PageStore: a file without a name, page after page
//!   offer: a new page gets the next number    'p'  pages, appended
//!   split: a piece of pages-<n>.img into      'r'  (number u32le, count u32le)*: runs of them, copied into
//!          runs that are known, and the rest       the file that arrives
//! ```
//!
//! Number 0 is the page of zeros, which is never sent. What a page is the same as is told by its content: it
//! need not be where it was, and nothing has to be known of the dump. The hash is XXH3 with 128 bits and a
//! seed that nobody else knows; two pages of one container that have the same by chance do not occur, and
//! who could make such pages would damage memory of its own.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use twox_hash::XxHash3_128;

use super::{DATA_LIMIT, WireError};

/// Bytes of a page. Where the machine has larger ones, pages of the images are of whole pieces.
pub const PAGE: usize = 4096;
/// More pages than this are not remembered, 3.5 GB: their table has less than 40 MB.
const MOST: u32 = 900_000;
/// How long a page that was referred to may be on its way through another connection.
const ON_ITS_WAY: Duration = Duration::from_secs(60);
/// Bytes of one run in a frame.
const RUN: usize = 8;

static ZEROS: [u8; PAGE] = [0; PAGE];

/// What the target has, as the source knows it.
#[derive(Debug)]
pub struct KnownPages {
    seed: u64,
    numbers: HashMap<u128, u32>,
}

/// A part of a piece of memory.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part<'a> {
    /// Not known there.
    New(&'a [u8]),
    /// Runs of known pages, as in a frame.
    Known(Vec<u8>),
}

impl KnownPages {
    /// The page of zeros alone. `seed` is known to nobody else.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut known = Self {
            seed,
            numbers: HashMap::new(),
        };
        known.numbers.insert(known.hash(&ZEROS), 0);
        known
    }

    /// Whether a page is to be sent: it is not known, and there is room for one more. It is known then, under
    /// the next number.
    pub fn offer(&mut self, page: &[u8]) -> bool {
        let Ok(next) = u32::try_from(self.numbers.len()) else {
            return false;
        };
        let hash = self.hash(page);
        if next >= MOST || self.numbers.contains_key(&hash) {
            return false;
        }
        self.numbers.insert(hash, next);
        true
    }

    fn hash(&self, page: &[u8]) -> u128 {
        XxHash3_128::oneshot_with_seed(self.seed, page)
    }

    /// The parts of a piece, in their order. What is no whole page is new.
    pub(super) fn split<'a>(&self, piece: &'a [u8]) -> Vec<Part<'a>> {
        let mut parts = Vec::new();
        let (mut new_since, mut runs) = (0, Runs::default());
        for (at, page) in piece.chunks(PAGE).enumerate() {
            let at = at * PAGE;
            let number = (page.len() == PAGE).then(|| self.numbers.get(&self.hash(page)));
            if let Some(number) = number.flatten() {
                if new_since < at {
                    parts.push(Part::New(&piece[new_since..at]));
                }
                runs.add(*number);
                new_since = at + PAGE;
            } else {
                parts.extend(runs.take());
            }
        }
        parts.extend(runs.take());
        if new_since < piece.len() {
            parts.push(Part::New(&piece[new_since..]));
        }
        parts
    }
}

/// Runs in the making.
#[derive(Default)]
struct Runs(Vec<(u32, u32)>);

impl Runs {
    fn add(&mut self, number: u32) {
        match self.0.last_mut() {
            // Zeros follow each other in another way.
            Some((first, count)) if *first > 0 && *first + *count == number => *count += 1,
            Some((0, count)) if number == 0 => *count += 1,
            _ => self.0.push((number, 1)),
        }
    }

    fn take(&mut self) -> Option<Part<'static>> {
        let runs = std::mem::take(&mut self.0);
        let bytes = { runs.iter() }.flat_map(|(first, count)| {
            let (first, count) = (first.to_le_bytes(), count.to_le_bytes());
            first.into_iter().chain(count)
        });
        (!runs.is_empty()).then(|| Part::Known(bytes.collect()))
    }
}

/// The pages that have come.
#[derive(Debug, Default)]
pub(super) struct PageStore {
    held: Mutex<Held>,
    grown: Condvar,
}

#[derive(Debug)]
struct Held {
    file: Option<File>,
    pages: u64,
}

impl Default for Held {
    fn default() -> Self {
        Self {
            file: None,
            // That of zeros.
            pages: 1,
        }
    }
}

impl PageStore {
    /// Appends pages; `make` makes the file when the first ones come.
    pub(super) fn append(
        &self,
        pages: &[u8],
        make: impl FnOnce() -> Result<File, WireError>,
    ) -> Result<(), WireError> {
        if !pages.len().is_multiple_of(PAGE) {
            return Err(not_whole());
        }
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.file.is_none() {
            held.file = Some(make()?);
        }
        if let Some(file) = &held.file {
            let at = (held.pages - 1) * PAGE as u64;
            file.write_all_at(pages, at)
                .map_err(|e| stream("keep pages of", e))?;
        }
        held.pages += (pages.len() / PAGE) as u64;
        self.grown.notify_all();
        Ok(())
    }

    /// Gives what the runs of a frame stand for, in pieces.
    pub(super) fn resolve(
        &self,
        runs: &[u8],
        sink: &mut dyn FnMut(&[u8]) -> Result<(), WireError>,
    ) -> Result<(), WireError> {
        if !runs.len().is_multiple_of(RUN) {
            return Err(not_whole());
        }
        let mut buffer = Vec::new();
        for run in runs.chunks_exact(RUN) {
            let word = |at: usize| {
                u64::from(u32::from_le_bytes([
                    run[at],
                    run[at + 1],
                    run[at + 2],
                    run[at + 3],
                ]))
            };
            let (first, count) = (word(0), word(4));
            // One frame stands for no more than a frame of data may hold.
            if count == 0 || count > (DATA_LIMIT / PAGE) as u64 {
                return Err(not_whole());
            }
            // Bounded by the line above.
            let bytes = usize::try_from(count).unwrap_or_default() * PAGE;
            buffer.clear();
            buffer.resize(bytes, 0);
            if first > 0 {
                self.read(first, count, &mut buffer)?;
            }
            sink(&buffer)?;
        }
        Ok(())
    }

    fn read(&self, first: u64, count: u64, buffer: &mut [u8]) -> Result<(), WireError> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = |held: &mut Held| held.pages < first + count;
        let waited = self.grown.wait_timeout_while(held, ON_ITS_WAY, missing);
        let (held, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        match &held.file {
            Some(file) if !timeout.timed_out() => {
                let at = (first - 1) * PAGE as u64;
                file.read_exact_at(buffer, at)
                    .map_err(|e| stream("look up pages of", e))
            }
            _ => Err(WireError::Protocol {
                what: "it refers to pages that have not come".to_owned(),
            }),
        }
    }
}

fn stream(act: &'static str, source: io::Error) -> WireError {
    WireError::Stream { act, source }
}

fn not_whole() -> WireError {
    WireError::Protocol {
        what: "a frame of pages that are not whole".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(byte: u8) -> Vec<u8> {
        vec![byte; PAGE]
    }

    fn resolved(store: &PageStore, parts: &[Part<'_>]) -> Result<Vec<u8>, WireError> {
        let mut whole = Vec::new();
        for part in parts {
            match part {
                Part::New(bytes) => whole.extend_from_slice(bytes),
                Part::Known(runs) => store.resolve(runs, &mut |piece| {
                    whole.extend_from_slice(piece);
                    Ok(())
                })?,
            }
        }
        Ok(whole)
    }

    #[test]
    fn what_is_known_is_put_together_again() {
        let (mut known, store) = (KnownPages::new(7), PageStore::default());
        let make = || Ok(tempfile::tempfile().unwrap());
        for byte in [1, 2, 3, 1, 0] {
            if known.offer(&page(byte)) {
                store.append(&page(byte), make).unwrap();
            }
        }
        assert_eq!(known.numbers.len(), 4);
        let memory = [1, 2, 3, 9, 0, 0, 3, 8].map(page).concat();
        let memory = [memory.as_slice(), b"rest"].concat();
        let parts = known.split(&memory);
        let sent: usize = { parts.iter() }
            .map(|part| match part {
                Part::New(bytes) => bytes.len(),
                Part::Known(runs) => runs.len(),
            })
            .sum();
        assert_eq!(sent, 2 * PAGE + 4 + 3 * RUN);
        assert_eq!(resolved(&store, &parts).unwrap(), memory);
    }

    #[test]
    fn frames_that_lie_are_refused() {
        let store = PageStore::default();
        let mut sink = |_: &[u8]| Ok(());
        assert!(store.resolve(&[0; 7], &mut sink).is_err());
        let mut run = |first: u32, count: u32| {
            let run = [first.to_le_bytes(), count.to_le_bytes()].concat();
            store.resolve(&run, &mut sink)
        };
        assert!(run(0, 1).is_ok());
        assert!(run(0, 0).is_err() && run(0, u32::MAX).is_err());
        let make = || Ok(tempfile::tempfile().unwrap());
        assert!(store.append(&[0; 5], make).is_err());
    }
}
