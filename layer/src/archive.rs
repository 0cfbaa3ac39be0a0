//! An archive member by member, for those who look into one: what is in a package, what a layer changes.
//!
//! The reader is that of layers, with its bounds: no name, no record and no map takes more memory than a
//! layer's may, whatever a header claims.

use std::io::{self, Read};

use crate::import_error::ImportError;
use crate::layer_format::LiteralNames;
use crate::path_bytes::{clean_path, push_component, split_last};
use crate::tar_read::{TarEntry, TarReader, TarType};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Bytes that may follow the end: no writer fills up blocks of more.
const PADDING: u64 = 1 << 20;

/// What a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemberKind {
    /// A regular file.
    File,
    /// A regular file with holes: its data is only what lies between them.
    SparseFile,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// Another name of an earlier member.
    HardLink,
    /// A device, or a FIFO.
    Special,
}

/// The head of a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name as it stands there: any bytes but NUL, perhaps absolute, perhaps with `..`.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: MemberKind,
    /// Bytes of the file, holes included.
    pub size: u64,
    /// Mode bits without the type.
    pub mode: u32,
    /// Where a link leads.
    pub link: Vec<u8>,
    literal: Option<LiteralNames>,
}

/// What a member of a layer does to the file of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerChange {
    /// It is new, or another one.
    Put,
    /// It is gone.
    Deleted,
    /// It is a directory in which nothing of the layers below shows.
    Opaque,
}

impl Member {
    /// The path without `.`, `..` and slashes that say nothing.
    #[must_use]
    pub fn clean_path(&self) -> Vec<u8> {
        clean_path(&self.path)
    }

    /// Takes the member for one of a layer: which file it changes, and how.
    #[must_use]
    pub fn layer_change(&self) -> (Vec<u8>, LayerChange) {
        let path = self.clean_path();
        let (parent, name) = split_last(&path);
        if self.literal == Some(LiteralNames::All) || !name.starts_with(WHITEOUT) {
            return (path, LayerChange::Put);
        }
        if name == OPAQUE {
            return (parent.to_vec(), LayerChange::Opaque);
        }
        let mut gone = parent.to_vec();
        push_component(&mut gone, &name[WHITEOUT.len()..]);
        (gone, LayerChange::Deleted)
    }
}

/// A tar archive that is not trusted. [`Read`] gives the data of the current member.
#[derive(Debug)]
pub struct Archive<R> {
    reader: TarReader<R>,
    entry: TarEntry,
}

impl<R: Read> Archive<R> {
    /// Reads the plain tar `source`.
    pub fn new(source: R) -> Self {
        Self {
            reader: TarReader::new(source),
            entry: TarEntry::default(),
        }
    }

    /// The next member; what is left of the data of the one before is skipped. None at the end.
    ///
    /// # Errors
    /// The archive is damaged, cut off, or has a member of a type that no file has.
    pub fn next_member(&mut self) -> Result<Option<Member>, ImportError> {
        if !self.reader.next_entry(&mut self.entry)? {
            return Ok(None);
        }
        let entry = &self.entry;
        Ok(Some(Member {
            path: entry.path.clone(),
            kind: match entry.tar_type {
                TarType::Regular if entry.segments.is_some() => MemberKind::SparseFile,
                TarType::Regular => MemberKind::File,
                TarType::Directory => MemberKind::Directory,
                TarType::Symlink => MemberKind::Symlink,
                TarType::HardLink => MemberKind::HardLink,
                TarType::CharDevice | TarType::BlockDevice | TarType::Fifo => MemberKind::Special,
            },
            size: entry.size,
            mode: entry.mode,
            link: entry.link.clone(),
            literal: entry.literal_names,
        }))
    }

    /// Reads on to the end of the source: what encrypts or compresses it tells damage only there.
    ///
    /// # Errors
    /// The source cannot be read to its end, or more follows than any tar's blocks: a few bytes of zstd can be many.
    pub fn finish(&mut self) -> Result<(), ImportError> {
        self.reader.drain(PADDING)
    }

    /// Skips what is left of the current member's data.
    ///
    /// # Errors
    /// The archive is cut off, or cannot be read.
    pub fn skip_data(&mut self) -> Result<(), ImportError> {
        loop {
            match self.reader.data(u64::MAX)?.len() {
                0 => return Ok(()),
                len => self.reader.consume(len),
            }
        }
    }

    /// Bytes of the archive that have been read.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.reader.offset()
    }

    /// The next piece of the current member's data, empty at its end.
    ///
    /// # Errors
    /// The archive is cut off, or cannot be read.
    pub fn read_piece(&mut self, buffer: &mut [u8]) -> Result<usize, ImportError> {
        let piece = self.reader.data(buffer.len() as u64)?;
        let len = piece.len();
        buffer[..len].copy_from_slice(piece);
        self.reader.consume(len);
        Ok(len)
    }
}

impl<R: Read> Read for Archive<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.read_piece(buffer).map_err(|error| match error {
            ImportError::Read { source } => source,
            other => io::Error::new(io::ErrorKind::InvalidData, other),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tar_of(members: &[(&str, tar::EntryType, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, entry_type, data) in members {
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(*entry_type);
            header.set_size(data.len() as u64);
            header.set_mode(0o600);
            builder.append_data(&mut header, path, *data).unwrap();
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn members_come_with_their_data() {
        use tar::EntryType::{Directory, Regular};
        let bytes = tar_of(&[
            ("checkpoint/", Directory, b""),
            ("checkpoint/a.img", Regular, b"first"),
            ("spec.dump", Regular, b"{}"),
        ]);
        let mut archive = Archive::new(bytes.as_slice());
        let dir = archive.next_member().unwrap().unwrap();
        assert_eq!(dir.kind, MemberKind::Directory);
        assert_eq!(dir.clean_path(), b"checkpoint");
        let file = archive.next_member().unwrap().unwrap();
        assert_eq!((file.size, file.kind), (5, MemberKind::File));
        let mut text = String::new();
        archive.read_to_string(&mut text).unwrap();
        assert_eq!(text, "first");
        // The data of one may be left unread.
        assert_eq!(archive.next_member().unwrap().unwrap().path, b"spec.dump");
        assert!(archive.next_member().unwrap().is_none());
        archive.finish().unwrap();
        // In the middle of the first file's data.
        let cut = &bytes[..1026];
        let mut archive = Archive::new(cut);
        let all = std::iter::from_fn(|| archive.next_member().transpose());
        assert!(all.collect::<Result<Vec<_>, _>>().is_err());
    }

    #[test]
    fn what_follows_the_end_is_no_more_than_padding() {
        let mut bytes = tar_of(&[("spec.dump", tar::EntryType::Regular, b"{}")]);
        let mut finish = |padding: usize| {
            bytes.resize(bytes.len() + padding, 0);
            let mut archive = Archive::new(bytes.as_slice());
            archive.next_member().unwrap().unwrap();
            assert!(archive.next_member().unwrap().is_none());
            archive.finish()
        };
        finish(1 << 20).unwrap();
        let error = finish(1 << 20).unwrap_err();
        assert!(error.to_string().contains("behind the end"), "{error}");
    }

    #[test]
    fn whiteouts_are_told_from_files() {
        use tar::EntryType::Regular;
        let bytes = tar_of(&[
            ("etc/.wh.passwd", Regular, b""),
            ("var/cache/.wh..wh..opq", Regular, b""),
            ("./etc/motd", Regular, b"hi"),
        ]);
        let mut archive = Archive::new(bytes.as_slice());
        let mut next = || archive.next_member().unwrap().unwrap().layer_change();
        assert_eq!(next(), (b"etc/passwd".to_vec(), LayerChange::Deleted));
        assert_eq!(next(), (b"var/cache".to_vec(), LayerChange::Opaque));
        assert_eq!(next(), (b"etc/motd".to_vec(), LayerChange::Put));
    }
}
