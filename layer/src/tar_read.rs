//! Reads tar entries from a source that is not trusted.
//!
//! The `tar` crate's `Archive` is not used: it gathers names and PAX headers of any size in memory
//! and knows no PAX sparse entries. Its `Header` is. What is read: ustar, PAX (`x`; `g` is skipped,
//! as Go and containerd do), GNU long names (`L`, `K`), the sparse formats of sparse.rs.
//!
//! ```text
//!   0 name[100]  100 mode[8]  108 uid[8]  116 gid[8]  124 size[12]  136 mtime[12]  148 checksum[8]
//! 156 type       157 linkname[100]        257 magic "ustar\0" + "00" (ustar), "ustar  \0" (GNU)
//! 329 major[8]   337 minor[8]             345 prefix[155]   (ustar: path = prefix "/" name)
//! GNU type 'S':  386 4 x (offset[12] length[12])  482 more?  483 real size[12]
//!                then blocks of 21 x (offset[12] length[12])  504 more?
//! ```
//!
//! A number is octal text between NULs and spaces, or, when the first byte has its high bit set, big-endian
//! base 256.
//! Where two readers could take the same bytes for different archives, this one follows Go's, by
//! which containerd reads: types without data have none whatever their size field says, the last of
//! equal records wins, an archive ends at two zero blocks or at the end of the stream, also where that
//! ends in the padding of a file or behind an extended header. A global header (`g`) ends what extended
//! headers before it have said.

use std::io::{BufRead, BufReader, ErrorKind, Read};

use tar::Header;

use crate::import_error::ImportError;
use crate::inode_attributes::Timestamp;
use crate::layer_format::{LiteralNames, NAMES_KEY};
use crate::pax::{
    MAX_PAX_BYTES, XATTR_PREFIX, decode_xattr_name, parse_decimal, parse_time, records,
};
use crate::sparse::{MAX_READ_SEGMENTS, Segment, is_valid_map};
use crate::xattrs::{XATTR_MAX, Xattr};

/// Bytes asked of the source at once.
const BUFFER_BYTES: usize = 1 << 20;
/// Longest GNU long name; Linux has no limit for a path walked in steps, Go's reader has this one.
const MAX_LONG_NAME: u64 = 1 << 20;
const BLOCK: usize = 512;

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
}

/// What PAX records and GNU long names say of the entry that follows.
#[derive(Debug, Default)]
struct Overrides {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    long_path: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<Timestamp>,
    atime: Option<Timestamp>,
    xattrs: Vec<Xattr>,
    sparse_version: (Option<u64>, Option<u64>),
    sparse_name: Option<Vec<u8>>,
    sparse_size: Option<u64>,
    sparse_pieces: Vec<u64>,
    has_sparse_pieces: bool,
    literal_names: Option<LiteralNames>,
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
            let header = Header::from_byte_slice(&block);
            self.check_sum(header)?;
            let size = self.number(&header.as_old().size)?;
            let size = u64::try_from(size).map_err(|_| self.malformed("a size is negative"))?;
            match block[156] {
                b'x' => {
                    self.read_body(size, MAX_PAX_BYTES as u64)?;
                    // As for Go the last one counts alone, so what they say takes no more memory than one.
                    overrides = Overrides {
                        long_path: overrides.long_path.take(),
                        long_link: overrides.long_link.take(),
                        ..Overrides::default()
                    };
                    let body = std::mem::take(&mut self.body);
                    let taken = take_records(&body, &mut overrides);
                    self.body = body;
                    taken.map_err(|reason| self.malformed(reason))?;
                }
                b'g' => {
                    self.begin_data(size)?;
                    overrides = Overrides::default();
                }
                b'L' => overrides.long_path = self.read_long_name(size)?,
                b'K' => overrides.long_link = self.read_long_name(size)?,
                _ => {
                    self.fill_entry(entry, &block, size, &mut overrides)?;
                    return Ok(true);
                }
            }
        }
    }

    fn fill_entry(
        &mut self,
        entry: &mut TarEntry,
        block: &[u8; BLOCK],
        header_size: u64,
        overrides: &mut Overrides,
    ) -> Result<(), ImportError> {
        let header = Header::from_byte_slice(block);
        let old = header.as_old();
        let (path, link) = (overrides.long_path.take(), overrides.long_link.take());
        entry.path.clear();
        match path.or_else(|| overrides.path.take()) {
            Some(path) => entry.path.extend_from_slice(&path),
            None => {
                if let Some(prefix) = prefix_of(block) {
                    entry.path.extend_from_slice(prefix);
                    entry.path.push(b'/');
                }
                entry.path.extend_from_slice(until_nul(&old.name));
            }
        }
        entry.link.clear();
        match link.or_else(|| overrides.link.take()) {
            Some(link) => entry.link.extend_from_slice(&link),
            None => entry.link.extend_from_slice(until_nul(&old.linkname)),
        }
        entry.tar_type = match block[156] {
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
        entry.mode = u32::try_from(self.number(&old.mode)? & 0o7777).unwrap_or(0);
        entry.uid = self.owner(overrides.uid, &old.uid)?;
        entry.gid = self.owner(overrides.gid, &old.gid)?;
        entry.mtime = match overrides.mtime {
            Some(mtime) => mtime,
            None => Timestamp {
                secs: self.number(&old.mtime)?,
                nanos: 0,
            },
        };
        entry.atime = overrides.atime;
        entry.literal_names = overrides.literal_names;
        std::mem::swap(&mut entry.xattrs, &mut overrides.xattrs);
        entry.device = (0, 0);
        let is_device = matches!(entry.tar_type, TarType::CharDevice | TarType::BlockDevice);
        // The oldest format has no numbers of devices.
        if is_device && block[257..262] == *b"ustar" {
            entry.device = (
                self.device_number(&block[329..337])?,
                self.device_number(&block[337..345])?,
            );
        }
        entry.segments = None;
        entry.size = 0;
        if entry.tar_type == TarType::Regular {
            let archived = overrides.size.unwrap_or(header_size);
            self.begin_data(archived)?;
            entry.size = archived;
            self.read_sparse_map(entry, block, overrides)?;
        }
        Ok(())
    }

    /// Finds out whether the entry is sparse, in which format, and where its data goes.
    fn read_sparse_map(
        &mut self,
        entry: &mut TarEntry,
        block: &[u8; BLOCK],
        overrides: &mut Overrides,
    ) -> Result<(), ImportError> {
        let segments = if block[156] == b'S' {
            entry.size = self.unsigned(&block[483..495])?;
            self.read_old_gnu_map(block)?
        } else if overrides.sparse_version == (Some(1), Some(0)) {
            self.read_map_before_data()?
        } else if overrides.has_sparse_pieces {
            let (pairs, rest) = overrides.sparse_pieces.as_chunks::<2>();
            if !rest.is_empty() {
                return Err(self.malformed("a sparse map has an odd number of values"));
            }
            pairs
                .iter()
                .map(|[offset, len]| Segment {
                    offset: *offset,
                    len: *len,
                })
                .collect()
        } else {
            return Ok(());
        };
        if let Some(name) = overrides.sparse_name.take() {
            entry.path = name;
        }
        if let Some(size) = overrides.sparse_size {
            entry.size = size;
        }
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
                let Some(number) = parse_decimal(&digits) else {
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

    /// Reads on to the end of the stream, so that a digest taken over it is that of the whole.
    pub(crate) fn drain(&mut self) -> Result<(), ImportError> {
        loop {
            match self.input.fill_buf() {
                Ok([]) => return Ok(()),
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

    fn begin_data(&mut self, size: u64) -> Result<(), ImportError> {
        // Go refuses sizes that a signed 64 bit number cannot hold together with the padding.
        if size > i64::MAX as u64 - BLOCK as u64 {
            return Err(self.malformed("a size is beyond all files"));
        }
        self.data_left = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        Ok(())
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
    fn read_body(&mut self, size: u64, limit: u64) -> Result<(), ImportError> {
        if size > limit {
            return Err(self.malformed("an extended header is too large"));
        }
        self.begin_data(size)?;
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

    /// An empty one says nothing.
    fn read_long_name(&mut self, size: u64) -> Result<Option<Vec<u8>>, ImportError> {
        self.read_body(size, MAX_LONG_NAME)?;
        let name = until_nul(&self.body);
        Ok((!name.is_empty()).then(|| name.to_vec()))
    }

    fn check_sum(&self, header: &Header) -> Result<(), ImportError> {
        let bytes = header.as_bytes();
        let told = self.number(&header.as_old().cksum)?;
        let outside = bytes[..148].iter().chain(&bytes[156..]);
        // Some old tars summed signed bytes.
        let (mut unsigned, mut signed) = (8 * 32, 8 * 32);
        for byte in outside {
            unsigned += i64::from(*byte);
            signed += i64::from(byte.cast_signed());
        }
        if told == unsigned || told == signed {
            Ok(())
        } else {
            Err(self.malformed("a header has a wrong checksum, or this is no tar"))
        }
    }

    fn number(&self, field: &[u8]) -> Result<i64, ImportError> {
        parse_number(field).ok_or_else(|| self.malformed("a number in a header is none"))
    }

    fn unsigned(&self, field: &[u8]) -> Result<u64, ImportError> {
        u64::try_from(self.number(field)?).map_err(|_| self.malformed("a size is negative"))
    }

    /// -1 as an unsigned number means "leave as it is" to chown and is no owner.
    fn owner(&self, override_: Option<u64>, field: &[u8]) -> Result<u32, ImportError> {
        let number = match override_ {
            Some(number) => number,
            None => self.unsigned(field)?,
        };
        match u32::try_from(number) {
            Ok(owner) if owner != u32::MAX => Ok(owner),
            _ => Err(self.malformed("a user or group number is beyond 32 bits")),
        }
    }

    /// Linux keeps 12 bits of major and 20 of minor number; more would be cut off to another device.
    fn device_number(&self, field: &[u8]) -> Result<u64, ImportError> {
        let number = self.unsigned(field)?;
        if number < 1 << 20 {
            Ok(number)
        } else {
            Err(self.malformed("a device number is too large"))
        }
    }
}

fn until_nul(field: &[u8]) -> &[u8] {
    let len = field
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(field.len());
    &field[..len]
}

/// The part of the name in front of `name`. star has times behind a shorter one, and GNU headers have
/// times in its place; but Go before 1.8 (Docker's layers until 2017) wrote a prefix into those, too, which
/// Go reads when no times stand there.
fn prefix_of(block: &[u8; BLOCK]) -> Option<&[u8]> {
    let prefix = match &block[257..263] {
        b"ustar\0" if block[508..512] == *b"tar\0" => until_nul(&block[345..476]),
        b"ustar\0" => until_nul(&block[345..500]),
        b"ustar " => {
            let is_time = |field: &[u8]| field[0] == 0 || parse_number(field).is_some();
            let prefix = until_nul(&block[345..500]);
            let are_times = is_time(&block[345..357]) && is_time(&block[357..369]);
            if are_times || !prefix.is_ascii() {
                &[]
            } else {
                prefix
            }
        }
        _ => &[],
    };
    (!prefix.is_empty()).then_some(prefix)
}

fn parse_number(field: &[u8]) -> Option<i64> {
    let (first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        // Two's complement over all bits but the marker.
        let negative = first & 0x40 != 0;
        let start = i128::from(first & 0x3f) - if negative { 0x40 } else { 0 };
        let mut number = start;
        for byte in rest {
            number = number.checked_mul(256)? + i128::from(*byte);
        }
        return i64::try_from(number).ok();
    }
    let is_filling = |byte: &u8| matches!(byte, 0 | b' ');
    let start = field.iter().position(|byte| !is_filling(byte));
    let text = until_nul(&field[start.unwrap_or(field.len())..]).trim_ascii_end();
    if text.is_empty() {
        return Some(0);
    }
    let text = std::str::from_utf8(text).ok()?;
    if !text.bytes().all(|byte| (b'0'..=b'7').contains(&byte)) {
        return None;
    }
    i64::from_str_radix(text, 8).ok()
}

fn take_records(body: &[u8], overrides: &mut Overrides) -> Result<(), &'static str> {
    for record in records(body) {
        let (key, value) = record.ok_or("an extended header is malformed")?;
        take_record(key, value, overrides)?;
    }
    Ok(())
}

fn take_record(key: &[u8], value: &[u8], overrides: &mut Overrides) -> Result<(), &'static str> {
    // Go reads a sign, too.
    let unsigned = value.strip_prefix(b"+").unwrap_or(value);
    let decimal = || parse_decimal(unsigned).ok_or("a number in an extended header is none");
    let time = || parse_time(value).ok_or("a time in an extended header is none");
    let name = || {
        let ok = !value.contains(&0);
        ok.then(|| value.to_vec())
            .ok_or("a name in an extended header contains NUL")
    };
    if let Some(encoded) = key.strip_prefix(XATTR_PREFIX) {
        if encoded.is_empty() || encoded.contains(&0) || value.len() > XATTR_MAX {
            return Err("an extended attribute is impossible");
        }
        let name = decode_xattr_name(encoded);
        // Of equal names the last one wins, because they are set in this order.
        overrides.xattrs.push(Xattr {
            name,
            value: value.to_vec(),
        });
        return Ok(());
    }
    if key == b"GNU.sparse.map" {
        overrides.has_sparse_pieces = true;
        for number in value
            .split(|byte| *byte == b',')
            .filter(|_| !value.is_empty())
        {
            push_piece(
                overrides,
                parse_decimal(number).ok_or("a sparse map is none")?,
            )?;
        }
        return Ok(());
    }
    // An empty value takes back an earlier record; what counts then is the header.
    if value.is_empty() {
        match key {
            b"path" => overrides.path = None,
            b"linkpath" => overrides.link = None,
            b"size" => overrides.size = None,
            b"uid" => overrides.uid = None,
            b"gid" => overrides.gid = None,
            b"mtime" => overrides.mtime = None,
            b"atime" => overrides.atime = None,
            _ => {}
        }
        return Ok(());
    }
    match key {
        b"path" => overrides.path = Some(name()?),
        b"linkpath" => overrides.link = Some(name()?),
        b"size" => overrides.size = Some(decimal()?),
        b"uid" => overrides.uid = Some(decimal()?),
        b"gid" => overrides.gid = Some(decimal()?),
        b"mtime" => overrides.mtime = Some(time()?),
        b"atime" => overrides.atime = Some(time()?),
        NAMES_KEY => overrides.literal_names = LiteralNames::parse(value),
        b"GNU.sparse.major" => overrides.sparse_version.0 = Some(decimal()?),
        b"GNU.sparse.minor" => overrides.sparse_version.1 = Some(decimal()?),
        b"GNU.sparse.name" => overrides.sparse_name = Some(name()?),
        b"GNU.sparse.size" | b"GNU.sparse.realsize" => overrides.sparse_size = Some(decimal()?),
        b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
            overrides.has_sparse_pieces = true;
            // Format 0.0: the two keys take turns.
            let is_offset = key == b"GNU.sparse.offset";
            if overrides.sparse_pieces.len().is_multiple_of(2) != is_offset {
                return Err("a sparse map is none");
            }
            push_piece(overrides, decimal()?)?;
        }
        _ => {}
    }
    Ok(())
}

fn push_piece(overrides: &mut Overrides, number: u64) -> Result<(), &'static str> {
    if overrides.sparse_pieces.len() >= 2 * MAX_READ_SEGMENTS {
        return Err("a sparse map is too long");
    }
    overrides.sparse_pieces.push(number);
    Ok(())
}
