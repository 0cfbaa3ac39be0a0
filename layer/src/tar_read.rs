//! Reads tar entries from a source that is not trusted.
//!
//! The `tar` crate's `Archive` is not used: it gathers names and PAX headers of any size in memory
//! and knows no PAX sparse entries. What is read: ustar, PAX (`x`; `g` is skipped, as containerd does), GNU long
//! names (`L`, `K`), the sparse formats of sparse.rs. tar_header.rs draws a header, pax.rs what an extended one
//! holds.
//!
//! ```text
//! GNU type 'S':  386 4 x (offset[12] length[12])  482 more?  483 real size[12]
//!                then blocks of 21 x (offset[12] length[12])  504 more?
//! ```
//!
//! Where two readers could take the same bytes for different archives, this one follows Go's, by
//! which containerd reads, and takes none that Go refuses: types without data have none whatever their size
//! field says, the last of equal records wins, an archive ends at two zero blocks or at the end of the stream,
//! also where that ends in the padding of a file or behind an extended header. A global header (`g`) ends what
//! extended headers before it have said.

use std::io::{BufRead, BufReader, ErrorKind, Read};

use crate::import_error::ImportError;
use crate::inode_attributes::Timestamp;
use crate::layer_format::LiteralNames;
use crate::pax::{MAX_PAX_BYTES, parse_integer};
use crate::pax_overrides::{PaxOverrides, SparseMap, check_records};
use crate::sparse::{MAX_READ_SEGMENTS, Segment, is_valid_map};
use crate::tar_header::{BLOCK, HeaderFormat, TarHeader, parse_number, until_nul};
use crate::xattrs::Xattr;

/// Bytes asked of the source at once.
const BUFFER_BYTES: usize = 1 << 20;
/// Longest GNU long name; Linux has no limit for a path walked in steps, Go's reader has this one.
const MAX_LONG_NAME: usize = 1 << 20;
/// What Linux keeps of the numbers of a device.
const MAJOR_BITS: u32 = 12;
const MINOR_BITS: u32 = 20;
const NEGATIVE_SIZE: &str = "a size is negative";
const TOO_MUCH_BEHIND: &str = "much more follows behind the end of the archive";

/// The types of entry that a layer may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum TarType {
    #[default]
    Regular,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
}

/// One entry, its buffers kept from entry to entry.
#[derive(Debug, Default)]
pub(crate) struct TarEntry {
    /// Name as it is in the tar: any bytes but NUL, perhaps absolute, perhaps with `..`.
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) tar_type: TarType,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Size of the file with its holes.
    pub(crate) size: u64,
    pub(crate) mtime: Timestamp,
    pub(crate) atime: Option<Timestamp>,
    pub(crate) device: (u64, u64),
    pub(crate) xattrs: Vec<Xattr>,
    /// Where the data goes, for a sparse entry.
    pub(crate) segments: Option<Vec<Segment>>,
    /// Which components of `path` are names, whatever they look like (layer_format.rs).
    pub(crate) literal_names: Option<LiteralNames>,
    /// Its data is what the importer has by this number (contents.rs).
    pub(crate) content: Option<u64>,
}

/// What the headers before an entry's own say of it.
#[derive(Debug, Default)]
struct Overrides {
    records: PaxOverrides,
    long_path: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

#[derive(Debug)]
pub(crate) struct TarReader<R> {
    input: BufReader<R>,
    offset: u64,
    /// Data of the current entry that was not asked for yet, and the padding behind it.
    data_left: u64,
    padding: u64,
    body: Vec<u8>,
}

impl<R: Read> TarReader<R> {
    pub(crate) fn new(source: R) -> Self {
        TarReader {
            input: BufReader::with_capacity(BUFFER_BYTES, source),
            offset: 0,
            data_left: 0,
            padding: 0,
            body: Vec::new(),
        }
    }

    /// Bytes of tar read so far.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes of the current entry's data that are still to come.
    pub(crate) fn data_left(&self) -> u64 {
        self.data_left
    }

    fn malformed(&self, reason: &'static str) -> ImportError {
        ImportError::Malformed {
            offset: self.offset,
            reason,
        }
    }

    /// Reads the next entry's header into `entry`, skipping what is left of the one before. False
    /// at the end of the archive.
    pub(crate) fn next_entry(&mut self, entry: &mut TarEntry) -> Result<bool, ImportError> {
        let mut overrides = Overrides::default();
        loop {
            let mut block = [0; BLOCK];
            if !self.skip_data()? || !self.read_block(&mut block)? {
                return Ok(false);
            }
            if block == [0; BLOCK] {
                if self.read_block(&mut block)? && block != [0; BLOCK] {
                    return Err(self.malformed("a single zero block is no end of an archive"));
                }
                return Ok(false);
            }
            let header = TarHeader::read(&block).map_err(|reason| self.malformed(reason))?;
            if header.size < 0 && !header.is_without_data() {
                return Err(self.malformed(NEGATIVE_SIZE));
            }
            match header.type_flag() {
                b'x' => {
                    // As for Go the last one counts alone, so what they say takes no more memory than one.
                    drop(std::mem::take(&mut overrides.records));
                    overrides.records = self.read_records(&header, PaxOverrides::read)?;
                }
                b'g' => {
                    self.read_records(&header, check_records)?;
                    overrides = Overrides::default();
                }
                b'L' => overrides.long_path = self.read_long_name(&header)?,
                b'K' => overrides.long_link = self.read_long_name(&header)?,
                _ => {
                    self.fill_entry(entry, &header, overrides)?;
                    return Ok(true);
                }
            }
        }
    }

    fn fill_entry(
        &mut self,
        entry: &mut TarEntry,
        header: &TarHeader<'_>,
        overrides: Overrides,
    ) -> Result<(), ImportError> {
        let mut records = overrides.records;
        if let Some(reason) = records.fault {
            return Err(self.malformed(reason));
        }
        entry.path.clear();
        match overrides.long_path.or_else(|| records.path.take()) {
            Some(path) => entry.path.extend_from_slice(&path),
            None => {
                if !header.prefix.is_empty() {
                    entry.path.extend_from_slice(header.prefix);
                    entry.path.push(b'/');
                }
                entry.path.extend_from_slice(header.name());
            }
        }
        entry.link.clear();
        match overrides.long_link.or_else(|| records.link.take()) {
            Some(link) => entry.link.extend_from_slice(&link),
            None => entry.link.extend_from_slice(header.link()),
        }
        entry.tar_type = match header.type_flag() {
            // Before POSIX a directory was a file whose name ends in a slash.
            0 if entry.path.ends_with(b"/") => TarType::Directory,
            0 | b'0' | b'7' | b'S' => TarType::Regular,
            b'1' => TarType::HardLink,
            b'2' => TarType::Symlink,
            b'3' => TarType::CharDevice,
            b'4' => TarType::BlockDevice,
            b'5' => TarType::Directory,
            b'6' => TarType::Fifo,
            _ => {
                return Err(ImportError::refused(
                    &entry.path,
                    "its type is none that a layer has",
                ));
            }
        };
        entry.mode = u32::try_from(header.mode & 0o7777).unwrap_or(0);
        entry.uid = self.owner(records.uid.unwrap_or(header.uid))?;
        entry.gid = self.owner(records.gid.unwrap_or(header.gid))?;
        entry.mtime = records.mtime.unwrap_or(Timestamp {
            secs: header.mtime,
            nanos: 0,
        });
        let atime = header.atime.map(|secs| Timestamp { secs, nanos: 0 });
        entry.atime = records.atime.or(atime);
        entry.literal_names = records.literal_names.take();
        entry.content = records.content.take();
        std::mem::swap(&mut entry.xattrs, &mut records.xattrs);
        entry.device = (0, 0);
        if matches!(entry.tar_type, TarType::CharDevice | TarType::BlockDevice) {
            let (major, minor) = header.device;
            entry.device = (
                self.device_number(major, MAJOR_BITS)?,
                self.device_number(minor, MINOR_BITS)?,
            );
        }
        entry.segments = None;
        entry.size = 0;
        if entry.tar_type == TarType::Regular {
            entry.size = self.begin_data(records.size.unwrap_or(header.size))?;
            self.read_sparse_map(entry, header, records)?;
        } else if records.sparse.is_some() {
            return Err(self.malformed("what is no file cannot be sparse"));
        }
        Ok(())
    }

    /// Finds out whether the entry is sparse, in which format, and where its data goes.
    fn read_sparse_map(
        &mut self,
        entry: &mut TarEntry,
        header: &TarHeader<'_>,
        records: PaxOverrides,
    ) -> Result<(), ImportError> {
        let segments = if header.type_flag() == b'S' {
            if header.format != HeaderFormat::Gnu {
                return Err(self.malformed("a sparse entry of GNU has no header of GNU"));
            }
            entry.size = self.unsigned(&header.block[483..495])?;
            self.read_old_gnu_map(header.block)?
        } else if let Some(sparse) = records.sparse {
            if let Some(name) = sparse.name {
                entry.path = name;
            }
            if let Some(size) = sparse.size {
                entry.size = u64::try_from(size).map_err(|_| self.malformed(NEGATIVE_SIZE))?;
            }
            match sparse.map {
                SparseMap::BeforeData => self.read_map_before_data()?,
                SparseMap::Told(segments) => segments,
            }
        } else {
            return Ok(());
        };
        if !is_valid_map(&segments, entry.size, self.data_left) {
            return Err(self.malformed("a sparse map does not fit its file"));
        }
        entry.segments = Some(segments);
        Ok(())
    }

    fn read_old_gnu_map(&mut self, block: &[u8; BLOCK]) -> Result<Vec<Segment>, ImportError> {
        let mut segments = Vec::new();
        self.take_gnu_pieces(&block[386..482], &mut segments)?;
        let mut more = block[482] != 0;
        // The extension blocks stand between header and data and are not counted in the size.
        while more {
            let mut extension = [0; BLOCK];
            if !self.read_block(&mut extension)? {
                return Err(self.malformed("it is cut off"));
            }
            self.take_gnu_pieces(&extension[..504], &mut segments)?;
            more = extension[504] != 0;
        }
        Ok(segments)
    }

    fn take_gnu_pieces(
        &self,
        fields: &[u8],
        segments: &mut Vec<Segment>,
    ) -> Result<(), ImportError> {
        for field in fields.as_chunks::<24>().0 {
            if field[0] == 0 || field[12] == 0 {
                break;
            }
            if segments.len() >= MAX_READ_SEGMENTS {
                return Err(self.malformed("a sparse map is too long"));
            }
            let (offset, len) = field.split_at(12);
            segments.push(Segment {
                offset: self.unsigned(offset)?,
                len: self.unsigned(len)?,
            });
        }
        Ok(())
    }

    /// Reads the map of format 1.0 from the front of the data.
    fn read_map_before_data(&mut self) -> Result<Vec<Segment>, ImportError> {
        let mut segments = Vec::new();
        let mut wanted: Option<u64> = None;
        let mut offset = None;
        let mut digits = Vec::with_capacity(20);
        loop {
            let mut block = [0; BLOCK];
            if self.data_left < BLOCK as u64 || !self.read_block(&mut block)? {
                return Err(self.malformed("a sparse map is cut off"));
            }
            self.data_left -= BLOCK as u64;
            for byte in block {
                if wanted == Some(segments.len() as u64) {
                    return Ok(segments);
                }
                if byte != b'\n' {
                    if digits.len() == 20 {
                        return Err(self.malformed("a sparse map is none"));
                    }
                    digits.push(byte);
                    continue;
                }
                let number = parse_integer(&digits).and_then(|number| u64::try_from(number).ok());
                let Some(number) = number else {
                    return Err(self.malformed("a sparse map is none"));
                };
                digits.clear();
                match (wanted, offset.take()) {
                    (None, _) if number > MAX_READ_SEGMENTS as u64 => {
                        return Err(self.malformed("a sparse map is too long"));
                    }
                    (None, _) => wanted = Some(number),
                    (Some(_), None) => offset = Some(number),
                    (Some(_), Some(offset)) => segments.push(Segment {
                        offset,
                        len: number,
                    }),
                }
            }
            if wanted == Some(segments.len() as u64) {
                return Ok(segments);
            }
        }
    }

    /// The next piece of the entry's data that is in memory, at most `limit` bytes of it; empty at
    /// its end. It is gone with `consume`.
    pub(crate) fn data(&mut self, limit: u64) -> Result<&[u8], ImportError> {
        let left = usize::try_from(self.data_left.min(limit)).unwrap_or(usize::MAX);
        if left == 0 {
            return Ok(&[]);
        }
        let offset = self.offset;
        let buffer = loop {
            match self.input.fill_buf() {
                Ok(_) => break self.input.buffer(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(source) => return Err(ImportError::Read { source }),
            }
        };
        if buffer.is_empty() {
            return Err(ImportError::Malformed {
                offset,
                reason: "it is cut off",
            });
        }
        Ok(&buffer[..buffer.len().min(left)])
    }

    pub(crate) fn consume(&mut self, len: usize) {
        self.input.consume(len);
        self.offset += len as u64;
        self.data_left -= len as u64;
    }

    /// Reads on to the end of the stream, so that a digest taken over it is that of the whole; `most` bytes may follow.
    pub(crate) fn drain(&mut self, most: u64) -> Result<(), ImportError> {
        let end = self.offset.saturating_add(most);
        loop {
            match self.input.fill_buf() {
                Ok([]) => return Ok(()),
                Ok(_) if self.offset > end => return Err(self.malformed(TOO_MUCH_BEHIND)),
                Ok(buffer) => {
                    let len = buffer.len();
                    self.input.consume(len);
                    self.offset += len as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(source) => return Err(ImportError::Read { source }),
            }
        }
    }

    fn begin_data(&mut self, size: i64) -> Result<u64, ImportError> {
        let size = u64::try_from(size).map_err(|_| self.malformed(NEGATIVE_SIZE))?;
        self.data_left = size;
        // Of a signed number the next multiple fits an unsigned one.
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        Ok(size)
    }

    /// Skips what is left of the current entry. False when the stream ends in the padding behind it.
    fn skip_data(&mut self) -> Result<bool, ImportError> {
        while self.data_left > 0 {
            let len = self.data(u64::MAX)?.len();
            self.consume(len);
        }
        let mut padding = [0; BLOCK];
        let wanted = usize::try_from(std::mem::take(&mut self.padding)).unwrap_or(BLOCK);
        Ok(self.fill(&mut padding[..wanted])? == wanted)
    }

    /// Reads a whole block. False when the stream ended before it.
    fn read_block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool, ImportError> {
        match self.fill(block)? {
            0 => Ok(false),
            BLOCK => Ok(true),
            _ => Err(self.malformed("it is cut off")),
        }
    }

    /// Reads until the buffer is full or the stream ends; returns how many bytes that were.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, ImportError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.input.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(len) => filled += len,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(source) => return Err(ImportError::Read { source }),
            }
        }
        self.offset += filled as u64;
        Ok(filled)
    }

    /// Reads the data of a header-like entry into `self.body`.
    fn read_body(&mut self, header: &TarHeader<'_>, limit: usize) -> Result<(), ImportError> {
        if self.begin_data(header.size)? > limit as u64 {
            return Err(self.malformed("an extended header is too large"));
        }
        self.body.clear();
        let mut body = std::mem::take(&mut self.body);
        while self.data_left > 0 {
            let data = self.data(u64::MAX)?;
            body.extend_from_slice(data);
            let len = data.len();
            self.consume(len);
        }
        self.body = body;
        Ok(())
    }

    fn read_records<T>(
        &mut self,
        header: &TarHeader<'_>,
        read: fn(&[u8]) -> Result<T, &'static str>,
    ) -> Result<T, ImportError> {
        self.read_body(header, MAX_PAX_BYTES)?;
        read(&self.body).map_err(|reason| self.malformed(reason))
    }

    /// An empty one says nothing.
    fn read_long_name(&mut self, header: &TarHeader<'_>) -> Result<Option<Vec<u8>>, ImportError> {
        self.read_body(header, MAX_LONG_NAME)?;
        let name = until_nul(&self.body);
        Ok((!name.is_empty()).then(|| name.to_vec()))
    }

    fn unsigned(&self, field: &[u8]) -> Result<u64, ImportError> {
        let number = parse_number(field).and_then(|number| u64::try_from(number).ok());
        number.ok_or_else(|| self.malformed("a number in a sparse map is none"))
    }

    /// -1 as an unsigned number means "leave as it is" to chown and is no owner.
    fn owner(&self, number: i64) -> Result<u32, ImportError> {
        match u32::try_from(number) {
            Ok(owner) if owner != u32::MAX => Ok(owner),
            _ => Err(self.malformed("a user or group number is beyond 32 bits")),
        }
    }

    /// More would be cut off to another device.
    fn device_number(&self, number: i64, bits: u32) -> Result<u64, ImportError> {
        let number = u64::try_from(number).ok();
        let number = number.filter(|number| *number < 1 << bits);
        number.ok_or_else(|| self.malformed("a device number is too large"))
    }
}
