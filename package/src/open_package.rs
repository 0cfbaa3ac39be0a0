//! A package opened: decrypted and decompressed as it is read, member by member.
//!
//! ```text
//!  bytes ──> age? ──> zstd, gzip or neither ──> tar ──> members
//! ```

use std::io::{BufRead, BufReader, Read};

use transship_digest::{PIECE, Piece, Pieces};
use transship_layer::{Archive, Member, MemberKind, decompress};

use crate::encryption::{Identities, is_encrypted};
use crate::error::PackageError;

/// Bytes asked of the source at once.
const BUFFER: usize = 1 << 20;

/// The members of a package.
pub(crate) struct OpenPackage<'a> {
    archive: Archive<Box<dyn Read + 'a>>,
    /// Whether it is encrypted.
    pub(crate) encrypted: bool,
}

impl<'a> OpenPackage<'a> {
    /// Looks at the first bytes of `input`, and reads on from there.
    pub(crate) fn new(
        input: impl Read + 'a,
        identities: &Identities,
    ) -> Result<Self, PackageError> {
        let mut input = BufReader::with_capacity(BUFFER, input);
        let encrypted = is_encrypted(&mut input).map_err(PackageError::reading)?;
        let plain: Box<dyn BufRead + 'a> = match encrypted {
            true => Box::new(BufReader::with_capacity(BUFFER, identities.decrypt(input)?)),
            false => Box::new(input),
        };
        let decompressed = decompress(plain).map_err(PackageError::reading)?;
        Ok(Self {
            archive: Archive::new(Box::new(decompressed)),
            encrypted,
        })
    }

    /// The next member that is no directory; its path without `./`. None at the end, when everything behind
    /// it has been read too, so that all of it is known to be undamaged.
    pub(crate) fn next(&mut self) -> Result<Option<(String, Member)>, PackageError> {
        loop {
            let member = self
                .archive
                .next_member()
                .map_err(PackageError::of_archive)?;
            let Some(member) = member else {
                self.archive.finish().map_err(PackageError::of_archive)?;
                return Ok(None);
            };
            if member.kind == MemberKind::Directory {
                continue;
            }
            let refused = |reason: &str| PackageError::Member {
                member: String::from_utf8_lossy(&member.path)
                    .escape_debug()
                    .to_string(),
                reason: reason.to_owned(),
            };
            let path = member.path.strip_prefix(b"./").unwrap_or(&member.path);
            let path = str::from_utf8(path).map_err(|_| refused("its name is not UTF-8"))?;
            if member.kind != MemberKind::File {
                return Err(refused(
                    "only regular files and directories belong into a package",
                ));
            }
            let is_plain = |part: &str| !matches!(part, "" | "." | "..");
            if !path.split('/').all(is_plain) || path.chars().any(char::is_control) {
                return Err(refused("its name leads elsewhere"));
            }
            return Ok(Some((path.to_owned(), member)));
        }
    }

    /// All data of the current member, which has `limit` bytes at most.
    pub(crate) fn read_all(
        &mut self,
        path: &str,
        member: &Member,
        limit: u64,
    ) -> Result<Vec<u8>, PackageError> {
        if member.size > limit {
            return Err(PackageError::Member {
                member: path.to_owned(),
                reason: format!("it claims {} bytes, and {limit} are the most", member.size),
            });
        }
        let mut bytes = Vec::new();
        self.read_pieces(&mut |piece| {
            bytes.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(bytes)
    }

    /// The data of the current member, piece by piece.
    pub(crate) fn read_pieces(
        &mut self,
        take: &mut dyn FnMut(&[u8]) -> Result<(), PackageError>,
    ) -> Result<(), PackageError> {
        let mut piece = vec![0; PIECE];
        loop {
            let read = self.archive.read_piece(&mut piece);
            match read.map_err(PackageError::of_archive)? {
                0 => return Ok(()),
                read => take(&piece[..read])?,
            }
        }
    }

    /// The data of the current member, in pieces that another thread may keep for a while.
    pub(crate) fn read_shared_pieces(
        &mut self,
        take: &mut dyn FnMut(&Piece) -> Result<(), PackageError>,
    ) -> Result<(), PackageError> {
        let mut pieces = Pieces::default();
        loop {
            let piece = pieces.next(|piece| self.archive.read_piece(piece));
            match piece.map_err(PackageError::of_archive)? {
                None => return Ok(()),
                Some(piece) => take(&piece)?,
            }
        }
    }

    /// The data of the current member as a reader.
    pub(crate) fn data(&mut self) -> &mut impl Read {
        &mut self.archive
    }
}
