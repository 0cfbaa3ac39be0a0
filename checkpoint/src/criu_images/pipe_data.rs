//! `pipes-data.img`, `fifo-data.img`: what lies in pipes, and how much each may hold.
//!
//! ```text
//! head                 as of every image, with the magic of the kind
//! repeated:
//!   u32 LE  n  n bytes   pipe_data_entry: 1 pipe_id  2 bytes  3 size (of the pipe; F_SETPIPE_SZ)
//!   `bytes` bytes        what lies in it
//! ```
//!
//! They are as large as what lies in all pipes, so they are never in memory.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, ErrorKind, Read, Seek, Write};
use std::path::Path;

use prost::Message as _;

use super::strict::is_ambiguous;
use super::{HEAD_MAGIC, ImageError, push_bytes, replace_by, u32_at};
use crate::beneath::{Links, open_regular};

const OF_PIPES: (&str, u32) = ("pipes-data.img", 0x5645_3709);
const OF_FIFOS: (&str, u32) = ("fifo-data.img", 0x5933_3054);
/// Longer than any entry: it has three numbers.
const ENTRY_LIMIT: u32 = 64;

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct PipeDataEntry {
    #[prost(uint32, required, tag = "1")]
    pipe_id: u32,
    #[prost(uint32, required, tag = "2")]
    bytes: u32,
    #[prost(uint32, optional, tag = "3")]
    size: Option<u32>,
}

/// The size of the largest pipe in the images of `dir`, in bytes; 0 if none has one of its own.
///
/// # Errors
/// An image that cannot be read, or is none.
pub fn largest_pipe(dir: &Path) -> Result<u32, ImageError> {
    let mut largest = 0;
    for (name, magic) in [OF_PIPES, OF_FIFOS] {
        let path = dir.join(name);
        let Some(mut image) = PipeImage::open(dir, &path, magic)? else {
            continue;
        };
        while let Some((entry, _)) = image.next()? {
            image.skip(entry.bytes)?;
            largest = largest.max(entry.size.unwrap_or_default());
        }
    }
    Ok(largest)
}

/// Takes what lies in these FIFOs out of the images of `dir`: the numbers of their inodes, the lower 32 bits, are what
/// CRIU knows them by. A FIFO of which the images say nothing is opened, and nothing is put into it.
///
/// # Errors
/// The image cannot be read, is none, or cannot be replaced.
pub fn remove_fifos(dir: &Path, fifos: &BTreeSet<u32>) -> Result<(), ImageError> {
    let (name, magic) = OF_FIFOS;
    let path = dir.join(name);
    let Some(mut image) = PipeImage::open(dir, &path, magic)? else {
        return Ok(());
    };
    let io = |act, source| ImageError::Io {
        act,
        path: path.clone(),
        source,
    };
    replace_by(&path, |new| {
        let mut kept = BufWriter::new(new);
        let write = |kept: &mut BufWriter<_>, bytes: &[u8]| {
            let written = kept.write_all(bytes);
            written.map_err(|error| io("write", error))
        };
        for word in [HEAD_MAGIC, magic] {
            write(&mut kept, &word.to_le_bytes())?;
        }
        while let Some((entry, head)) = image.next()? {
            if fifos.contains(&entry.pipe_id) {
                image.skip(entry.bytes)?;
                continue;
            }
            write(&mut kept, &head)?;
            let mut bytes = (&mut image.file).take(entry.bytes.into());
            let copied = io::copy(&mut bytes, &mut kept).map_err(|error| io("write", error))?;
            if copied < entry.bytes.into() {
                return Err(image.cut_off());
            }
        }
        kept.flush().map_err(|error| io("write", error))
    })
}

struct PipeImage<'a> {
    path: &'a Path,
    length: u64,
    file: BufReader<File>,
}

impl<'a> PipeImage<'a> {
    /// The image at `path`, in `dir`, behind its head; none where there is none.
    fn open(dir: &Path, path: &'a Path, magic: u32) -> Result<Option<Self>, ImageError> {
        let io = |act, source| ImageError::Io {
            act,
            path: path.to_path_buf(),
            source,
        };
        let name = path.file_name().unwrap_or_default();
        let file = match open_regular(dir, Path::new(name), Links::Refused) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            file => file.map_err(|error| io("open", error))?,
        };
        let length = file.metadata().map_err(|error| io("read", error))?.len();
        let mut image = PipeImage {
            path,
            length,
            file: BufReader::new(file),
        };
        if image.words::<2>()? != [HEAD_MAGIC, magic] {
            let path = path.to_path_buf();
            return Err(ImageError::Magic { path });
        }
        Ok(Some(image))
    }

    /// The next entry, as it is and as it is written; what lies in the pipe follows.
    fn next(&mut self) -> Result<Option<(PipeDataEntry, Vec<u8>)>, ImageError> {
        if self.position()? == self.length {
            return Ok(None);
        }
        let [length] = self.words::<1>()?;
        let path = self.path.to_path_buf();
        if length > ENTRY_LIMIT {
            return Err(ImageError::TooLarge { path });
        }
        let mut message = vec![0; length as usize];
        self.fill(&mut message)?;
        if is_ambiguous(&message, &[]) {
            return Err(ImageError::Ambiguous { path });
        }
        let entry = PipeDataEntry::decode(&*message)
            .map_err(|source| ImageError::Decode { path, source })?;
        let mut written = Vec::new();
        push_bytes(&mut written, &message);
        Ok(Some((entry, written)))
    }

    fn skip(&mut self, bytes: u32) -> Result<(), ImageError> {
        let seek = self.file.seek_relative(bytes.into());
        seek.map_err(|error| self.io(error))?;
        match self.position()? > self.length {
            true => Err(self.cut_off()),
            false => Ok(()),
        }
    }

    fn words<const N: usize>(&mut self) -> Result<[u32; N], ImageError> {
        let mut bytes = vec![0; N * 4];
        self.fill(&mut bytes)?;
        Ok(std::array::from_fn(|at| {
            u32_at(&bytes, at * 4).unwrap_or_default()
        }))
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), ImageError> {
        let read = self.file.read_exact(bytes);
        read.map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => self.cut_off(),
            _ => self.io(error),
        })
    }

    fn position(&mut self) -> Result<u64, ImageError> {
        self.file.stream_position().map_err(|error| self.io(error))
    }

    fn cut_off(&self) -> ImageError {
        let path = self.path.to_path_buf();
        ImageError::CutOff { path }
    }

    fn io(&self, source: io::Error) -> ImageError {
        ImageError::Io {
            act: "read",
            path: self.path.to_path_buf(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::push_entry;
    use super::*;

    fn image(magic: u32, entries: &[(u32, u32, Option<u32>)]) -> Vec<u8> {
        let mut bytes = [HEAD_MAGIC, magic].map(u32::to_le_bytes).concat();
        for (pipe_id, len, size) in entries {
            let entry = PipeDataEntry {
                pipe_id: *pipe_id,
                bytes: *len,
                size: *size,
            };
            push_entry(&mut bytes, &entry);
            bytes.extend(vec![0xff; *len as usize]);
        }
        bytes
    }

    #[test]
    fn the_largest_of_both_images_counts() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(largest_pipe(dir.path()).unwrap(), 0);
        let ((pipes, magic), (fifos, of_fifos)) = (OF_PIPES, OF_FIFOS);
        let write = |name, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
        let entries = [(1, 70_000, Some(1 << 17)), (2, 3, None)];
        write(pipes, &image(magic, &entries));
        assert_eq!(largest_pipe(dir.path()).unwrap(), 1 << 17);
        let whole = image(of_fifos, &[(1, 5, None), (2, 0, Some(1 << 30))]);
        write(fifos, &whole);
        assert_eq!(largest_pipe(dir.path()).unwrap(), 1 << 30);
        for (bytes, why) in [
            (&whole[..whole.len() - 1], "is cut off"),
            (&whole[..16], "is cut off"),
            (&image(magic, &[])[..], "is not a CRIU image"),
        ] {
            write(fifos, bytes);
            let error = largest_pipe(dir.path()).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_fifo_is_taken_out_and_the_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let (name, magic) = OF_FIFOS;
        let path = dir.path().join(name);
        let remove = |ids: &[u32]| remove_fifos(dir.path(), &ids.iter().copied().collect());
        remove(&[7]).unwrap();
        assert!(path.symlink_metadata().is_err());
        let [first, second, third] = [(7, 70_000, Some(1 << 17)), (8, 9, None), (9, 0, None)];
        std::fs::write(&path, image(magic, &[first, second, third])).unwrap();
        for (ids, left) in [
            (&[6][..], &[first, second, third][..]),
            (&[7, 9], &[second]),
            (&[8], &[]),
        ] {
            remove(ids).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), image(magic, left));
        }
        let whole = image(magic, &[first, second]);
        let cut = &whole[..whole.len() - 1];
        std::fs::write(&path, cut).unwrap();
        for ids in [[7], [8]] {
            assert!(remove(&ids).unwrap_err().to_string().contains("is cut off"));
        }
        assert_eq!(std::fs::read(&path).unwrap(), cut);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
