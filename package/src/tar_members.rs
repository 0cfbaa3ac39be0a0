//! Members of a package's tar, as they are written.

use std::io::{self, Read, Write};
use std::path::Path;

use tar::{EntryType, Header};
use transship_checkpoint::beneath::{Links, open_regular};
use transship_checkpoint::manifest;
use transship_digest::{HashedBeside, Piece, Pieces};
use transship_path_error::During as _;

use crate::counted::Counted;
use crate::error::PackageError;

/// Writes a tar, member by member.
pub(crate) struct TarMembers<'a, W: Write> {
    builder: tar::Builder<W>,
    time: u64,
    progress: &'a mut dyn FnMut(u64),
}

impl<'a, W: Write> TarMembers<'a, W> {
    /// `time`, in seconds since 1970, is that of all members; `progress` gets the bytes of files.
    pub(crate) fn new(out: W, time: u64, progress: &'a mut dyn FnMut(u64)) -> Self {
        Self {
            builder: tar::Builder::new(out),
            time,
            progress,
        }
    }

    fn header(&self, entry_type: EntryType, size: u64, mode: u32) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(entry_type);
        header.set_size(size);
        header.set_mode(mode);
        header.set_mtime(self.time);
        header.set_uid(0);
        header.set_gid(0);
        header
    }

    /// A directory.
    pub(crate) fn directory(&mut self, path: &str) -> Result<(), PackageError> {
        let mut header = self.header(EntryType::Directory, 0, 0o700);
        let written = self
            .builder
            .append_data(&mut header, format!("{path}/"), io::empty());
        written.map_err(PackageError::writing)
    }

    /// A file whose content is in memory.
    pub(crate) fn bytes(&mut self, path: &str, bytes: &[u8]) -> Result<(), PackageError> {
        let mut header = self.header(EntryType::Regular, bytes.len() as u64, 0o600);
        let written = self.builder.append_data(&mut header, path, bytes);
        written.map_err(PackageError::writing)
    }

    /// A file of JSON, as Go's engines write theirs.
    pub(crate) fn json(
        &mut self,
        path: &str,
        value: &serde_json::Value,
    ) -> Result<(), PackageError> {
        self.bytes(path, format!("{value:#}").as_bytes())
    }

    /// The file of a checkpoint whose directory is `dir`; it must be what the manifest says.
    pub(crate) fn file(
        &mut self,
        path: &str,
        dir: &Path,
        file: &manifest::File,
    ) -> Result<(), PackageError> {
        let full = dir.join(&file.path);
        let source = open_regular(dir, Path::new(&file.path), Links::Refused);
        let source = source.during("open", &full)?;
        let mut header = self.header(EntryType::Regular, file.size, 0o600);
        let mut source = InPieces {
            source: Counted {
                inner: source.take(file.size),
                progress: &mut *self.progress,
            },
            hasher: HashedBeside::new(),
            pieces: Pieces::default(),
            piece: Piece::default(),
            at: 0,
        };
        self.builder
            .append_data(&mut header, path, &mut source)
            .map_err(PackageError::writing)?;
        let found = source.hasher.finish();
        if (found.size, &found.sha256) != (file.size, &file.sha256) {
            return Err(PackageError::Differs {
                member: full.display().to_string(),
                reason: "its digest differs from the manifest's",
            });
        }
        Ok(())
    }

    /// Writes the end, and gives back where it went.
    pub(crate) fn finish(self) -> Result<W, PackageError> {
        self.builder.into_inner().map_err(PackageError::writing)
    }
}

/// Reads in larger pieces than those that are asked for, and takes their digest.
struct InPieces<R> {
    source: R,
    hasher: HashedBeside,
    pieces: Pieces,
    /// The last piece, and what of it was given.
    piece: Piece,
    at: usize,
}

impl<R: Read> Read for InPieces<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.piece.len() {
            let Some(piece) = self.pieces.next(|piece| self.source.read(piece))? else {
                return Ok(0);
            };
            self.hasher.update_shared(&piece);
            (self.piece, self.at) = (piece, 0);
        }
        let rest = &self.piece[self.at..];
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        self.at += length;
        Ok(length)
    }
}
