//! Writes tar entries: ustar headers, with a PAX extended header wherever ustar cannot say it.
//!
//! ```text
//! [ 'x' header | PAX records (pax.rs) padded to 512 ]   when something does not fit
//! [ header: name mode uid gid size mtime checksum type linkname "ustar" "00" major minor prefix ]
//! [ data padded to 512 ]                                regular files; sparse ones: sparse.rs
//! ...
//! [ 1024 zero bytes ]
//! ```
//!
//! User and group names stay empty: numbers are what a file has. The bytes depend on nothing but
//! the entries: records come in one fixed order and the extended header's own name is a constant.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use tar::{EntryType, Header};

use crate::export_error::ExportError;
use crate::inode_attributes::Timestamp;
use crate::path_bytes::{split_last, to_path_buf};
use crate::pax::{MAX_PAX_BYTES, format_time, push_record, push_xattr};
use crate::sparse::{Segment, encode_map};
use crate::xattrs::Xattr;

/// Bytes gathered before the writer is called, and the largest piece read from a file. Files are
/// read straight into it. splice, sendfile and the like are left alone on purpose: a pipe or socket
/// filled by them keeps pointing to the file's pages, so a container that runs on after the export
/// would change what a slow reader has not yet read.
const BUFFER_BYTES: usize = 1 << 20;

/// What the header of one entry says.
#[derive(Debug)]
pub(crate) struct EntryHead<'a> {
    pub(crate) path: &'a [u8],
    pub(crate) entry_type: EntryType,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Size of the file, holes included; 0 for all but regular files.
    pub(crate) size: u64,
    pub(crate) mtime: Timestamp,
    pub(crate) atime: Option<Timestamp>,
    /// Target of a symlink or hard link.
    pub(crate) link: &'a [u8],
    pub(crate) device: (u64, u64),
    pub(crate) xattrs: &'a [Xattr],
    /// Where the data is, when the entry is to be sparse.
    pub(crate) segments: Option<&'a [Segment]>,
}

/// Largest values of the header's octal fields of 8 and 12 bytes.
const MAX_OCTAL_7: u64 = 0o7_777_777;
const MAX_OCTAL_11: u64 = 0o77_777_777_777;

pub(crate) struct TarWriter<W> {
    out: W,
    buffer: Box<[u8]>,
    filled: usize,
    flushed: u64,
    records: Vec<u8>,
}

impl<W: Write> TarWriter<W> {
    pub(crate) fn new(out: W) -> Self {
        TarWriter {
            out,
            buffer: vec![0; BUFFER_BYTES].into_boxed_slice(),
            filled: 0,
            flushed: 0,
            records: Vec::new(),
        }
    }

    /// Bytes of tar so far.
    pub(crate) fn written(&self) -> u64 {
        self.flushed + self.filled as u64
    }

    /// Writes header and, for a sparse entry, its map. The data follows through `write_segment`,
    /// then `pad`.
    pub(crate) fn write_head(&mut self, head: &EntryHead<'_>) -> Result<(), ExportError> {
        let mut header = Header::new_ustar();
        let map = head
            .segments
            .map(|segments| encode_map(segments, head.size));
        let archived = match (&map, head.segments) {
            (Some(map), Some(segments)) => {
                map.len() as u64 + segments.iter().map(|segment| segment.len).sum::<u64>()
            }
            _ => head.size,
        };
        self.fill_records(head, archived);
        if self.records.len() > MAX_PAX_BYTES {
            return Err(ExportError::HeaderTooLarge {
                path: to_path_buf(head.path),
                bytes: self.records.len(),
                limit: MAX_PAX_BYTES,
            });
        }
        if !self.records.is_empty() {
            self.write_extended_header()?;
        }

        let sparse_name;
        let name = if map.is_some() {
            let (parent, base) = split_last(head.path);
            sparse_name = [parent, b"/GNUSparseFile.0/", base].concat();
            sparse_name.strip_prefix(b"/").unwrap_or(&sparse_name)
        } else {
            head.path
        };
        header.set_entry_type(head.entry_type);
        put_truncated(&mut header.as_old_mut().name, name);
        put_truncated(&mut header.as_old_mut().linkname, head.link);
        header.set_mode(head.mode);
        header.set_uid(if fits_7(head.uid.into()) {
            head.uid.into()
        } else {
            0
        });
        header.set_gid(if fits_7(head.gid.into()) {
            head.gid.into()
        } else {
            0
        });
        header.set_size(if archived <= MAX_OCTAL_11 {
            archived
        } else {
            0
        });
        header.set_mtime(octal_time(head.mtime).unwrap_or(0));
        if let Some(ustar) = header.as_ustar_mut() {
            put_octal_7(&mut ustar.dev_major, head.device.0);
            put_octal_7(&mut ustar.dev_minor, head.device.1);
        }
        header.set_cksum();
        self.write_bytes(header.as_bytes())?;
        if let Some(map) = map {
            self.write_bytes(&map)?;
        }
        Ok(())
    }

    /// Gathers what the ustar header of this entry cannot say.
    fn fill_records(&mut self, head: &EntryHead<'_>, archived: u64) {
        let records = &mut self.records;
        records.clear();
        let is_binary = |bytes: &[u8]| std::str::from_utf8(bytes).is_err();
        if is_binary(head.path) || is_binary(head.link) {
            push_record(records, b"hdrcharset", b"BINARY");
        }
        if head.segments.is_some() {
            push_record(records, b"GNU.sparse.major", b"1");
            push_record(records, b"GNU.sparse.minor", b"0");
            push_record(records, b"GNU.sparse.name", head.path);
            push_record(
                records,
                b"GNU.sparse.realsize",
                head.size.to_string().as_bytes(),
            );
        } else if head.path.len() > 100 || !head.path.is_ascii() {
            push_record(records, b"path", head.path);
        }
        if head.link.len() > 100 || !head.link.is_ascii() {
            push_record(records, b"linkpath", head.link);
        }
        if archived > MAX_OCTAL_11 {
            push_record(records, b"size", archived.to_string().as_bytes());
        }
        if !fits_7(head.uid.into()) {
            push_record(records, b"uid", head.uid.to_string().as_bytes());
        }
        if !fits_7(head.gid.into()) {
            push_record(records, b"gid", head.gid.to_string().as_bytes());
        }
        if octal_time(head.mtime).is_none() {
            push_record(records, b"mtime", format_time(head.mtime).as_bytes());
        }
        if let Some(atime) = head.atime {
            push_record(records, b"atime", format_time(atime).as_bytes());
        }
        for xattr in head.xattrs {
            push_xattr(records, &xattr.name, &xattr.value);
        }
    }

    fn write_extended_header(&mut self) -> Result<(), ExportError> {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::XHeader);
        put_truncated(&mut header.as_old_mut().name, b"PaxHeaders.0/x");
        header.set_mode(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(self.records.len() as u64);
        header.set_cksum();
        self.write_bytes(header.as_bytes())?;
        let records = std::mem::take(&mut self.records);
        self.write_bytes(&records)?;
        self.records = records;
        self.pad()
    }

    /// Writes `len` bytes of `file` from `offset`. Returns false when the file ends before that.
    pub(crate) fn write_segment(
        &mut self,
        file: &File,
        path: &[u8],
        offset: u64,
        len: u64,
    ) -> Result<bool, ExportError> {
        let mut position = offset;
        let end = offset + len;
        while position < end {
            if self.filled == self.buffer.len() {
                self.flush_buffer()?;
            }
            let wanted = usize::try_from(end - position).unwrap_or(usize::MAX);
            let room = &mut self.buffer[self.filled..];
            let room_len = room.len().min(wanted);
            let got = match file.read_at(&mut room[..room_len], position) {
                Ok(0) => return Ok(false),
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(ExportError::io("read", path, error)),
            };
            self.filled += got;
            position += got as u64;
        }
        Ok(true)
    }

    fn write_bytes(&mut self, mut bytes: &[u8]) -> Result<(), ExportError> {
        while !bytes.is_empty() {
            if self.filled == self.buffer.len() {
                self.flush_buffer()?;
            }
            let len = bytes.len().min(self.buffer.len() - self.filled);
            self.buffer[self.filled..self.filled + len].copy_from_slice(&bytes[..len]);
            self.filled += len;
            bytes = &bytes[len..];
        }
        Ok(())
    }

    /// Fills up to the next block of 512 bytes.
    pub(crate) fn pad(&mut self) -> Result<(), ExportError> {
        let odd = usize::try_from(self.written() % 512).expect("less than 512");
        if odd > 0 {
            self.write_bytes(&[0; 512][odd..])
        } else {
            Ok(())
        }
    }

    fn flush_buffer(&mut self) -> Result<(), ExportError> {
        self.out
            .write_all(&self.buffer[..self.filled])
            .map_err(|source| ExportError::Write { source })?;
        self.flushed += self.filled as u64;
        self.filled = 0;
        Ok(())
    }

    /// Ends the archive and flushes the writer. Returns the size of the tar.
    pub(crate) fn finish(mut self) -> Result<u64, ExportError> {
        self.write_bytes(&[0; 1024])?;
        self.flush_buffer()?;
        self.out
            .flush()
            .map_err(|source| ExportError::Write { source })?;
        Ok(self.flushed)
    }
}

fn fits_7(number: u64) -> bool {
    number <= MAX_OCTAL_7
}

/// The time as the header's field can say it: whole seconds, not before 1970 nor after 2242.
fn octal_time(time: Timestamp) -> Option<u64> {
    let secs = u64::try_from(time.secs).ok()?;
    (time.nanos == 0 && secs <= MAX_OCTAL_11).then_some(secs)
}

fn put_truncated(field: &mut [u8; 100], bytes: &[u8]) {
    let len = bytes.len().min(field.len());
    field[..len].copy_from_slice(&bytes[..len]);
}

/// Linux has 12 bits of major and 20 bits of minor number: both always fit.
fn put_octal_7(field: &mut [u8; 8], number: u64) {
    field[..7].copy_from_slice(format!("{number:07o}").as_bytes());
}
