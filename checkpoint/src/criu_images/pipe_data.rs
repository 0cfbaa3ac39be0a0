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

use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read, Seek};
use std::path::Path;

use prost::Message as _;

use super::strict::is_ambiguous;
use super::{HEAD_MAGIC, ImageError, u32_at};
use crate::beneath::{Links, open_regular};

const IMAGES: [(&str, u32); 2] = [
    ("pipes-data.img", 0x5645_3709),
    ("fifo-data.img", 0x5933_3054),
];
/// Longer than any entry: it has three numbers.
const ENTRY_LIMIT: u32 = 64;

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct PipeDataEntry {
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
    for (name, magic) in IMAGES {
        let path = dir.join(name);
        let io = |act, source| ImageError::Io {
            act,
            path: path.clone(),
            source,
        };
        let file = match open_regular(dir, Path::new(name), Links::Refused) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            file => file.map_err(|error| io("open", error))?,
        };
        let length = file.metadata().map_err(|error| io("read", error))?.len();
        let mut image = PipeImage {
            path: &path,
            length,
            file: BufReader::new(file),
        };
        if image.words::<2>()? != [HEAD_MAGIC, magic] {
            return Err(ImageError::Magic { path });
        }
        while let Some(entry) = image.next()? {
            largest = largest.max(entry.size.unwrap_or_default());
        }
    }
    Ok(largest)
}

struct PipeImage<'a> {
    path: &'a Path,
    length: u64,
    file: BufReader<File>,
}

impl PipeImage<'_> {
    fn next(&mut self) -> Result<Option<PipeDataEntry>, ImageError> {
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
        let seek = self.file.seek_relative(entry.bytes.into());
        seek.map_err(|error| self.io(error))?;
        if self.position()? > self.length {
            return Err(self.cut_off());
        }
        Ok(Some(entry))
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

    fn image(magic: u32, entries: &[(u32, Option<u32>)]) -> Vec<u8> {
        let mut bytes = [HEAD_MAGIC, magic].map(u32::to_le_bytes).concat();
        for (len, size) in entries {
            let entry = PipeDataEntry {
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
        let [(pipes, magic), (fifos, of_fifos)] = IMAGES;
        let write = |name, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
        write(pipes, &image(magic, &[(70_000, Some(1 << 17)), (3, None)]));
        assert_eq!(largest_pipe(dir.path()).unwrap(), 1 << 17);
        let whole = image(of_fifos, &[(5, None), (0, Some(1 << 30))]);
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
}
