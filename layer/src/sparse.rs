//! Holes: found in a file, written as GNU tar's sparse format 1.0, and read in every format in use.
//!
//! The OCI image specification advises against sparse entries because readers differ; a 1 TiB
//! database file with 1 MiB of data leaves no other choice. Format 1.0 in a PAX header is the one
//! that GNU tar, libarchive, Python's tarfile and Go's archive/tar (so containerd, Docker, podman,
//! umoci) all read. A file without a hole is written as any other.
//!
//! ```text
//! 'x' header   GNU.sparse.major=1  GNU.sparse.minor=0
//!              GNU.sparse.name=<real name>  GNU.sparse.realsize=<size with the holes>
//! '0' header   name <dir>/GNUSparseFile.0/<base>, size = map + data
//! map          "<count>\n" then "<offset>\n<length>\n" per piece of data, padded with NUL to 512
//! data         the pieces, one behind the other, padded to 512
//! ```
//!
//! Read as well: 0.0 (repeated `GNU.sparse.offset`/`numbytes`), 0.1 (`GNU.sparse.map`), and the old
//! GNU type `S` with its map in the header and extension blocks (tar_read.rs).

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

/// One piece of data between holes, in bytes of the real file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// Smallest total of holes for which an entry becomes sparse: one page, the unit in which file
/// systems have holes, and already more than the map and its PAX records cost.
const MIN_HOLES: u64 = 4096;

/// Largest map that is written. Go 1.24.8 and 1.25.2 refuse more (CVE-2025-58183). A file with more
/// pieces than fit loses its smallest holes, which are written as zeros.
const MAX_WRITTEN_MAP: usize = 1 << 20;

/// Most bytes of holes that are written as zeros.
const MOST_FILLED: u64 = 1 << 30;

/// Most pieces of data that are accepted from a tar (16 bytes each): above what fits the map that
/// Go accepts.
pub(crate) const MAX_READ_SEGMENTS: usize = 1 << 19;

/// Finds the data of a file of `size` bytes. None when it has no hole worth telling.
pub(crate) fn find_segments(file: impl AsFd, size: u64) -> io::Result<Option<Vec<Segment>>> {
    find_segments_for_map(file.as_fd(), size, MAX_WRITTEN_MAP)
}

fn find_segments_for_map(
    fd: BorrowedFd<'_>,
    size: u64,
    max_map: usize,
) -> io::Result<Option<Vec<Segment>>> {
    if size <= MIN_HOLES || seek(fd, 0, Whence::SeekHole)?.is_none_or(|hole| hole >= size) {
        return Ok(None);
    }
    let mut kept = Kept::all();
    let (segments, filled) = match scan(fd, size, &mut kept, max_map)? {
        Some(found) => found,
        None => {
            let most = max_map.saturating_sub(1024) / (2 * (size.to_string().len() + 1));
            let mut kept = largest_holes(fd, size, most.max(1))?;
            scan(fd, size, &mut kept, max_map)?
                .ok_or_else(|| io::Error::other("its holes change while they are looked for"))?
        }
    };
    if filled > MOST_FILLED {
        return Err(io::Error::other(
            "it has more holes than a layer can name, and they are too large to be written as zeros",
        ));
    }
    let data: u64 = segments.iter().map(|segment| segment.len).sum();
    Ok((size.saturating_sub(data) >= MIN_HOLES).then_some(segments))
}

/// Which holes are kept: all longer than `len`, and the first `equal` of that length.
struct Kept {
    len: u64,
    equal: usize,
}

impl Kept {
    fn all() -> Self {
        Self { len: 0, equal: 0 }
    }

    fn keeps(&mut self, hole: u64) -> bool {
        if hole == self.len && self.equal > 0 {
            self.equal -= 1;
            return true;
        }
        hole > self.len
    }
}

/// The `most` largest holes between pieces of data: the fewest bytes are written as zeros then.
fn largest_holes(fd: BorrowedFd<'_>, size: u64, most: usize) -> io::Result<Kept> {
    let mut largest = BinaryHeap::new();
    let mut position = 0;
    let mut last_end = None;
    while let Some(start) = seek(fd, position, Whence::SeekData)?.filter(|start| *start < size) {
        if let Some(end) = last_end {
            largest.push(Reverse(start - end));
            if largest.len() > most {
                largest.pop();
            }
        }
        let end = seek(fd, start, Whence::SeekHole)?.unwrap_or(size).min(size);
        last_end = Some(end);
        position = end.max(start + 1);
    }
    let len = largest.peek().map_or(0, |Reverse(len)| *len);
    let equal = largest.iter().filter(|it| it.0 == len).count();
    Ok(Kept { len, equal })
}

/// All pieces of data, with the holes that are not kept taken as data, and the bytes of those; None when
/// there are more than the map may hold.
fn scan(
    fd: BorrowedFd<'_>,
    size: u64,
    kept: &mut Kept,
    max_map: usize,
) -> io::Result<Option<(Vec<Segment>, u64)>> {
    let mut segments: Vec<Segment> = Vec::new();
    let mut map_bytes = 32;
    let mut filled = 0u64;
    let mut position = 0;
    while position < size {
        let Some(start) = seek(fd, position, Whence::SeekData)?.filter(|start| *start < size)
        else {
            break;
        };
        let end = seek(fd, start, Whence::SeekHole)?.unwrap_or(size).min(size);
        match segments.last_mut() {
            Some(last) if !kept.keeps(start - (last.offset + last.len)) => {
                filled += start - (last.offset + last.len);
                last.len = end - last.offset;
            }
            _ => {
                let segment = Segment {
                    offset: start,
                    len: end - start,
                };
                map_bytes += segment_text(segment).len();
                if map_bytes > max_map {
                    return Ok(None);
                }
                segments.push(segment);
            }
        }
        position = end.max(start + 1);
    }
    // Lengths grow after a piece was counted; its text can only get longer by the digits of `size`.
    if encoded_len(&segments, size) > max_map {
        return Ok(None);
    }
    Ok(Some((segments, filled)))
}

fn seek(fd: BorrowedFd<'_>, position: u64, whence: Whence) -> io::Result<Option<u64>> {
    let position = i64::try_from(position).map_err(io::Error::other)?;
    match lseek(fd, position, whence) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        // Beyond the last data, or beyond a file that shrank meanwhile.
        Err(Errno::ENXIO) => Ok(None),
        // A file system that cannot tell: everything is data.
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => match whence {
            Whence::SeekData => Ok(u64::try_from(position).ok()),
            _ => Ok(None),
        },
        Err(errno) => Err(errno.into()),
    }
}

fn segment_text(segment: Segment) -> String {
    format!("{}\n{}\n", segment.offset, segment.len)
}

fn encoded_len(segments: &[Segment], size: u64) -> usize {
    let digits = size.to_string().len() + 1;
    512 + segments.len() * 2 * digits
}

/// The map of format 1.0, padded. GNU tar ends the map of a file that ends in a hole with an empty
/// piece at the end, and so do we.
pub(crate) fn encode_map(segments: &[Segment], size: u64) -> Vec<u8> {
    let end = segments.last().map_or(0, |last| last.offset + last.len);
    let tail = (end < size).then_some(Segment {
        offset: size,
        len: 0,
    });
    let mut map = format!("{}\n", segments.len() + usize::from(tail.is_some())).into_bytes();
    for segment in segments.iter().copied().chain(tail) {
        map.extend_from_slice(segment_text(segment).as_bytes());
    }
    map.resize(map.len().next_multiple_of(512), 0);
    map
}

/// Whether a map from outside is one: ascending, without overlap, inside `size`, and naming as many
/// bytes as the archive holds.
pub(crate) fn is_valid_map(segments: &[Segment], size: u64, archived: u64) -> bool {
    let mut end = 0u64;
    let mut total = 0u64;
    for segment in segments {
        let Some(next) = segment.offset.checked_add(segment.len) else {
            return false;
        };
        if segment.offset < end || next > size {
            return false;
        }
        end = next;
        total += segment.len;
    }
    total == archived
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn holes_are_found_and_dense_files_left_alone() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"x", 1 << 20).unwrap();
        file.set_len(3 << 20).unwrap();
        let segments = find_segments(&file, 3 << 20).unwrap().unwrap();
        let data: u64 = segments.iter().map(|segment| segment.len).sum();
        assert!(data <= 64 * 1024, "{segments:?}");
        assert!(segments[0].offset <= 1 << 20);

        let dense = tempfile::tempfile().unwrap();
        dense.write_all_at(&vec![0; 100_000], 0).unwrap();
        assert_eq!(find_segments(&dense, 100_000).unwrap(), None);

        let empty = tempfile::tempfile().unwrap();
        empty.set_len(1 << 40).unwrap();
        assert_eq!(find_segments(&empty, 1 << 40).unwrap(), Some(Vec::new()));
    }

    #[test]
    fn a_file_of_very_many_holes_fits_the_map() {
        let file = tempfile::tempfile().unwrap();
        let pieces = 300u64;
        for piece in 0..pieces {
            // Holes of growing size: the smallest are given up first.
            file.write_all_at(&[1; 4096], piece * piece * 4096).unwrap();
        }
        let size = pieces * pieces * 4096;
        file.set_len(size).unwrap();
        let all = find_segments(&file, size).unwrap().unwrap();
        for max_map in [2048, 4096, 1 << 20] {
            let segments = find_segments_for_map(file.as_fd(), size, max_map)
                .unwrap()
                .unwrap();
            assert!(encode_map(&segments, size).len() <= max_map);
            let inside = |piece: &Segment| {
                let end = piece.offset + piece.len;
                segments
                    .iter()
                    .any(|kept| kept.offset <= piece.offset && end <= kept.offset + kept.len)
            };
            assert!(all.iter().all(inside));
            assert!(segments.len() > 3, "{}", segments.len());
        }
    }

    #[test]
    fn holes_that_fit_no_map_do_not_become_zeros_without_bound() {
        for (step, fits) in [(1 << 20, true), (1 << 30, false)] {
            let file = tempfile::tempfile().unwrap();
            for piece in 0..100u64 {
                file.write_all_at(b"x", piece * step).unwrap();
            }
            let found = find_segments_for_map(file.as_fd(), 100 * step, 2048);
            match fits {
                true => assert!(found.unwrap().unwrap().len() > 20),
                false => assert!(found.unwrap_err().to_string().contains("more holes")),
            }
        }
    }

    #[test]
    fn maps_from_outside_are_checked() {
        let at = |offset, len| Segment { offset, len };
        assert!(is_valid_map(&[at(0, 5), at(5, 0), at(9, 1)], 10, 6));
        assert!(!is_valid_map(&[at(0, 5), at(4, 1)], 10, 6));
        assert!(!is_valid_map(&[at(0, 5)], 10, 6));
        assert!(!is_valid_map(&[at(u64::MAX, 2)], 10, 2));
        assert!(!is_valid_map(&[at(8, 3)], 10, 3));
    }
}
