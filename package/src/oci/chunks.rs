//! Where a file is cut, by its content, so that two checkpoints of one program have most pieces in common.
//!
//! ```text
//!  page page page page | page page | page page page ...      | after a page whose hash ends in zeros
//!  '----- chunk ------'  '- chunk -'                          at least 16 pages, at most 1024; 2040 of a
//!                                                             checkpoint above 16 GiB
//! ```
//!
//! Boundaries depend on the pages around them alone: a page that changes spoils its own chunk, pages that are
//! put in between spoil one more. A chunk of zeros alone is a hole.

use std::io::{self, Read};

/// Bytes of a page, wherever the file is from: a boundary lies on a multiple of it.
pub(crate) const PAGE: usize = 4096;
/// Fewest and most pages of a chunk.
const FEWEST: usize = 16;
const MOST: usize = 1024;
/// Most pages of one of a large checkpoint: readers take 8 MiB, also of what has not become smaller.
const MOST_OF_LARGE: usize = 2040;
/// A chunk has 64 pages at least in the mean, as long as there are not too many of them: a registry takes
/// manifests of 4 MB.
const FEWEST_BITS: u32 = 6;
const MOST_CHUNKS: u64 = 8192;

/// How large the chunks of a checkpoint are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChunkSize {
    /// Most pages of one.
    most: usize,
    /// It ends after a page in whose hash these bits are zeros.
    mask: u64,
}

impl ChunkSize {
    /// `total` is how many bytes the checkpoint has: of a large one the chunks are larger.
    pub(crate) fn of(total: u64) -> Self {
        let mut bits = FEWEST_BITS;
        while (total >> bits) / PAGE as u64 > MOST_CHUNKS && bits < 12 {
            bits += 1;
        }
        let (bits, most) = match bits {
            ..10 => (bits, MOST),
            10 => (bits, MOST_OF_LARGE),
            // What would be longer than the longest is as long as that: it takes more bits to have fewer chunks.
            11 => (12, MOST_OF_LARGE),
            _ => (16, MOST_OF_LARGE),
        };
        Self {
            most,
            mask: (1 << bits) - 1,
        }
    }

    /// Bytes of the longest one.
    pub(crate) fn longest(self) -> usize {
        self.most * PAGE
    }
}

/// Cuts what it reads.
pub(crate) struct Chunks<R> {
    source: R,
    size: ChunkSize,
    offset: u64,
    is_at_end: bool,
}

impl<R: Read> Chunks<R> {
    pub(crate) fn new(source: R, size: ChunkSize) -> Self {
        Self {
            source,
            size,
            offset: 0,
            is_at_end: false,
        }
    }

    /// Where the next chunk that is no hole begins in the file, and its content in `bytes`; none at the end.
    pub(crate) fn next(&mut self, bytes: &mut Vec<u8>) -> io::Result<Option<u64>> {
        while !self.is_at_end {
            bytes.clear();
            let mut pages = 0;
            let mut has_data = false;
            while pages < self.size.most {
                let start = bytes.len();
                let read = (&mut self.source).take(PAGE as u64).read_to_end(bytes)?;
                let page = &bytes[start..];
                has_data |= page.iter().any(|byte| *byte != 0);
                pages += 1;
                if read < PAGE {
                    self.is_at_end = true;
                    break;
                }
                if pages >= FEWEST && hash(page) & self.size.mask == 0 {
                    break;
                }
            }
            let offset = self.offset;
            self.offset += bytes.len() as u64;
            if has_data {
                return Ok(Some(offset));
            }
        }
        Ok(None)
    }
}

/// Any hash would do that depends on every byte and is the same everywhere.
fn hash(page: &[u8]) -> u64 {
    let mut hash = 0x9e37_79b9_7f4a_7c15_u64;
    let (words, _) = page.as_chunks::<8>();
    for word in words {
        hash = (hash ^ u64::from_le_bytes(*word)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        hash ^= hash >> 32;
    }
    hash ^ hash >> 29
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn noise(pages: usize, seed: u64) -> Vec<u8> {
        let mut state = seed;
        let mut bytes = Vec::with_capacity(pages * PAGE);
        while bytes.len() < pages * PAGE {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            bytes.extend((state >> 33).to_le_bytes());
        }
        bytes
    }

    struct Chunk {
        offset: u64,
        bytes: Vec<u8>,
    }

    fn cut(bytes: &[u8]) -> Vec<Chunk> {
        cut_as(bytes, ChunkSize::of(bytes.len() as u64))
    }

    fn cut_as(bytes: &[u8], size: ChunkSize) -> Vec<Chunk> {
        let mut chunks = Chunks::new(bytes, size);
        let next = || {
            let mut bytes = Vec::new();
            let offset = chunks.next(&mut bytes).unwrap();
            offset.map(|offset| Chunk { offset, bytes })
        };
        std::iter::from_fn(next).collect()
    }

    #[test]
    fn a_large_checkpoint_has_larger_chunks_and_not_too_many() {
        let bytes = noise(40_000, 5);
        for gibibytes in [1, 2, 8, 16, 17, 32, 33, 64, 65, 96] {
            let size = ChunkSize::of(gibibytes << 30);
            assert!(size.longest() <= 8 << 20);
            let chunks = cut_as(&bytes, size).len() as u64;
            let of_all = chunks * (gibibytes << 30) / bytes.len() as u64;
            assert!(of_all < 13_500, "{gibibytes} GiB: {of_all}");
        }
    }

    #[test]
    fn chunks_make_up_the_file_without_its_holes() {
        let mut bytes = noise(500, 1);
        bytes.extend(vec![0; 3000 * PAGE]);
        bytes.extend(noise(100, 2));
        bytes.extend(b"the end");
        let chunks = cut(&bytes);
        let mut again = vec![0; bytes.len()];
        for chunk in &chunks {
            assert!(chunk.offset.is_multiple_of(PAGE as u64) && chunk.bytes.len() <= MOST * PAGE);
            let at = usize::try_from(chunk.offset).unwrap();
            again[at..at + chunk.bytes.len()].copy_from_slice(&chunk.bytes);
        }
        assert!(again == bytes);
        let stored: usize = chunks.iter().map(|it| it.bytes.len()).sum();
        assert!(stored < (500 + 100 + 1 + 2 * MOST) * PAGE, "{stored}");
        assert!(cut(&[]).is_empty() && cut(&vec![0; 5 * PAGE]).is_empty());
    }

    #[test]
    fn what_is_changed_or_put_in_between_spoils_little() {
        let old = noise(4000, 3);
        let mut new = old.clone();
        new[1000 * PAGE + 17] ^= 1;
        new.splice(2000 * PAGE..2000 * PAGE, noise(3, 4));
        let known: BTreeSet<Vec<u8>> = cut(&old).into_iter().map(|it| it.bytes).collect();
        let fresh = cut(&new)
            .into_iter()
            .filter(|it| !known.contains(&it.bytes));
        let fresh: usize = fresh.map(|it| it.bytes.len()).sum();
        assert!(fresh < old.len() / 8, "{fresh} of {}", old.len());
    }
}
