//! The names of one directory, sorted, in one piece of memory.
//!
//! Read with `getdents64` on the descriptor that the walk holds anyway; nix's `Dir` would take the
//! descriptor away and allocate for each name.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, RawDir};

use crate::inode_attributes::InodeType;

/// Room for one `getdents64` call: some 1 000 names.
const READ_BYTES: usize = 32 * 1024;

#[derive(Debug, Default)]
struct ListedName {
    start: usize,
    /// NAME_MAX is 255.
    len: usize,
    inode_type: Option<InodeType>,
}

/// Names of a directory, ordered by their bytes.
#[derive(Debug, Default)]
pub(crate) struct DirectoryListing {
    names: Vec<u8>,
    entries: Vec<ListedName>,
}

impl DirectoryListing {
    /// Reads the directory; what was listed before is forgotten.
    pub(crate) fn read(&mut self, directory: BorrowedFd<'_>) -> io::Result<()> {
        self.read_piece(directory, 0, usize::MAX).map(drop)
    }

    /// Reads the names from the place `begins` up to `ends`, which is where a piece has ended before; none: to the end.
    pub(crate) fn read_until(
        &mut self,
        directory: BorrowedFd<'_>,
        begins: u64,
        ends: Option<u64>,
    ) -> io::Result<()> {
        self.read_while(directory, begins, |_, after| Some(after) == ends)
            .map(drop)
    }

    /// Reads at most `most` names, from the place `begins` of the directory (0: its beginning), and gives where those after
    /// them begin; none at the end.
    pub(crate) fn read_piece(
        &mut self,
        directory: BorrowedFd<'_>,
        begins: u64,
        most: usize,
    ) -> io::Result<Option<u64>> {
        self.read_while(directory, begins, |count, _| count == most)
    }

    /// Reads names until one is the last, by how many there are and where the next one is; gives that place.
    fn read_while(
        &mut self,
        directory: BorrowedFd<'_>,
        begins: u64,
        is_last: impl Fn(usize, u64) -> bool,
    ) -> io::Result<Option<u64>> {
        self.names.clear();
        self.entries.clear();
        rustix::fs::seek(directory, rustix::fs::SeekFrom::Start(begins))?;
        let mut buffer: Vec<u8> = Vec::with_capacity(READ_BYTES);
        let mut stream = RawDir::new(directory, buffer.spare_capacity_mut());
        let mut after = None;
        while let Some(entry) = stream.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            let start = self.names.len();
            self.names.extend_from_slice(name);
            let inode_type = inode_type(entry.file_type());
            self.entries.push(ListedName {
                start,
                len: name.len(),
                inode_type,
            });
            let next = entry.next_entry_cookie();
            if is_last(self.entries.len(), next) {
                after = Some(next);
                break;
            }
        }
        let names = &self.names;
        self.entries
            .sort_unstable_by_key(|entry| &names[entry.start..entry.start + entry.len]);
        Ok(after)
    }

    /// Name and type by position; the type is None where the file system does not tell it.
    pub(crate) fn get(&self, position: usize) -> Option<(&[u8], Option<InodeType>)> {
        let entry = self.entries.get(position)?;
        Some((
            &self.names[entry.start..entry.start + entry.len],
            entry.inode_type,
        ))
    }

    pub(crate) fn has(&self, name: &[u8]) -> bool {
        let name_of = |entry: &ListedName| &self.names[entry.start..entry.start + entry.len];
        self.entries
            .binary_search_by(|entry| name_of(entry).cmp(name))
            .is_ok()
    }

    /// The successive names from `position` on that are no directories, at most `most`.
    pub(crate) fn files_from(&self, position: usize, most: usize) -> Range<usize> {
        let rest = self.entries.iter().skip(position).take(most);
        let files = rest.take_while(|entry| entry.inode_type != Some(InodeType::Directory));
        position..position + files.count()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&[u8], Option<InodeType>)> {
        (0..self.entries.len()).filter_map(|position| self.get(position))
    }
}

fn inode_type(file_type: FileType) -> Option<InodeType> {
    Some(match file_type {
        FileType::RegularFile => InodeType::Regular,
        FileType::Directory => InodeType::Directory,
        FileType::Symlink => InodeType::Symlink,
        FileType::CharacterDevice => InodeType::CharDevice,
        FileType::BlockDevice => InodeType::BlockDevice,
        FileType::Fifo => InodeType::Fifo,
        FileType::Socket => InodeType::Socket,
        FileType::Unknown => return None,
    })
}
