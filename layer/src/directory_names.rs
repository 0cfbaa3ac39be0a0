//! The names of a directory one after the other, in pieces: what it takes does not grow with their number.
//!
//! ```text
//!  getdents64 ──> a piece of 1024 names, sorted ──> next ──> next ... ──> the next piece: from where this one has ended,
//!                                                                         or from the beginning, when all that were given
//!                                                                         are gone
//! ```
//!
//! A container can give one file some millions of names, which cost no inode, and nest directories of them. So a directory
//! that is left for one below it can forget its piece, and reads it again afterwards.

use std::io;
use std::os::fd::BorrowedFd;

use crate::directory_listing::DirectoryListing;
use crate::inode_attributes::InodeType;

/// Names of one piece, at most.
const PIECE: usize = 1024;
/// How many directories above the innermost one may keep their pieces, of some 280 KB at most.
pub(crate) const KEPT_PIECES: usize = 32;

/// What happens to the names that were given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Given {
    /// They stay.
    Stay,
    /// They are removed before the next one is asked for.
    AreRemoved,
}

/// A place among the names of one directory.
#[derive(Debug)]
pub(crate) struct DirectoryNames {
    given: Given,
    piece: DirectoryListing,
    /// Where in the directory the piece begins, and where the one after it does.
    begins: u64,
    after: Option<u64>,
    next: usize,
    /// The name that was given last.
    current: Vec<u8>,
    is_forgotten: bool,
}

impl DirectoryNames {
    /// Before the first name.
    pub(crate) fn begin(directory: BorrowedFd<'_>, given: Given) -> io::Result<Self> {
        let mut piece = DirectoryListing::default();
        let after = piece.read_piece(directory, 0, PIECE)?;
        Ok(Self {
            given,
            piece,
            begins: 0,
            after,
            next: 0,
            current: Vec::new(),
            is_forgotten: false,
        })
    }

    /// The next name and its type, which is none where the file system does not tell it.
    pub(crate) fn next(
        &mut self,
        directory: BorrowedFd<'_>,
    ) -> io::Result<Option<(&[u8], Option<InodeType>)>> {
        if self.is_forgotten {
            self.read_again(directory)?;
        }
        if self.piece.get(self.next).is_none() {
            let begins = match self.given {
                Given::Stay => self.after,
                // A piece without a name is the end.
                Given::AreRemoved => (self.next > 0).then_some(0),
            };
            let Some(begins) = begins else {
                return Ok(None);
            };
            self.after = self.piece.read_piece(directory, begins, PIECE)?;
            (self.begins, self.next) = (begins, 0);
            // Names that were removed meanwhile may have been all of a piece.
            if self.piece.get(0).is_none() {
                return match self.given {
                    Given::Stay if self.after.is_some() => self.next(directory),
                    _ => Ok(None),
                };
            }
        }
        let Some((name, inode_type)) = self.piece.get(self.next) else {
            return Ok(None);
        };
        self.next += 1;
        self.current.clear();
        self.current.extend_from_slice(name);
        Ok(Some((&self.current, inode_type)))
    }

    /// The name that was given last.
    pub(crate) fn current(&self) -> &[u8] {
        &self.current
    }

    /// Gives the memory of the piece back; it is read again when it is needed.
    pub(crate) fn forget(&mut self) {
        self.piece = DirectoryListing::default();
        self.is_forgotten = true;
    }

    fn read_again(&mut self, directory: BorrowedFd<'_>) -> io::Result<()> {
        self.is_forgotten = false;
        if self.given == Given::AreRemoved {
            self.after = self.piece.read_piece(directory, 0, PIECE)?;
            (self.begins, self.next) = (0, 0);
            return Ok(());
        }
        // As many names as may have gone from it are not in it any more, and those behind it are of the next piece.
        self.piece.read_until(directory, self.begins, self.after)?;
        let names = self.piece.iter();
        self.next = names
            .take_while(|(name, _)| *name <= self.current.as_slice())
            .count();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs::File;
    use std::os::fd::AsFd as _;

    use nix::unistd::{UnlinkatFlags, unlinkat};

    use super::*;

    const MANY: usize = 3 * PIECE + 7;

    fn full() -> (tempfile::TempDir, File) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("0"), "").unwrap();
        for name in 1..MANY {
            let name = dir.path().join(name.to_string());
            std::fs::hard_link(dir.path().join("0"), name).unwrap();
        }
        let open = File::open(dir.path()).unwrap();
        (dir, open)
    }

    #[test]
    fn each_name_is_given_once_whatever_is_forgotten() {
        let (_dir, open) = full();
        for forgets in [false, true] {
            let mut names = DirectoryNames::begin(open.as_fd(), Given::Stay).unwrap();
            let mut seen = BTreeSet::new();
            while let Some((name, _)) = names.next(open.as_fd()).unwrap() {
                assert!(seen.insert(name.to_vec()));
                if forgets && seen.len().is_multiple_of(100) {
                    names.forget();
                }
            }
            assert_eq!(seen.len(), MANY);
            assert!(names.piece.iter().count() <= PIECE);
        }
    }

    #[test]
    fn some_may_go_where_the_others_stay() {
        let (_dir, open) = full();
        let mut names = DirectoryNames::begin(open.as_fd(), Given::Stay).unwrap();
        let mut seen = BTreeSet::new();
        while let Some((name, _)) = names.next(open.as_fd()).unwrap() {
            assert!(seen.insert(name.to_vec()));
            if seen.len() % 3 == 0 {
                unlinkat(&open, name, UnlinkatFlags::NoRemoveDir).unwrap();
            }
            if seen.len().is_multiple_of(100) {
                names.forget();
            }
        }
        assert_eq!(seen.len(), MANY);
    }

    #[test]
    fn what_is_removed_is_not_given_again_and_nothing_is_left() {
        let (dir, open) = full();
        let mut names = DirectoryNames::begin(open.as_fd(), Given::AreRemoved).unwrap();
        let mut removed = 0;
        while let Some((name, _)) = names.next(open.as_fd()).unwrap() {
            unlinkat(&open, name, UnlinkatFlags::NoRemoveDir).unwrap();
            removed += 1;
            if removed % 100 == 0 {
                names.forget();
            }
        }
        assert_eq!(removed, MANY);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
