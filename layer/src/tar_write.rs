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
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::copy_file_range;
use tar::{EntryType, Header};

use crate::contents::CONTENT_KEY;
use crate::export_error::ExportError;
use crate::inode_attributes::Timestamp;
use crate::layer_format::{LiteralNames, NAMES_KEY};
use crate::path_bytes::{split_last, to_path_buf};
use crate::pax::{Decimal, MAX_PAX_BYTES, format_time, push_record, push_xattr};
use crate::sparse::{Segment, encode_map};
use crate::xattrs::Xattr;

/// Bytes gathered before the writer is called, and the largest piece read from a file: what a pipe
/// holds, so that a write into an empty one does not wait and its reader works while the next piece is
/// gathered. 256 KiB made a large file into a pipe a third slower.
///
/// Files are read straight into it. splice, sendfile and the like are left alone on purpose: a pipe or
/// socket filled by them keeps pointing to the file's pages, so a container that runs on after the
/// export would change what a slow reader has not yet read.
const BUFFER_BYTES: usize = 64 * 1024;

/// From this size on data is left to the kernel to copy, where the tar goes to a file.
const KERNEL_COPY_BYTES: u64 = 1 << 20;

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
    /// Target of a symlink or hard link.
    pub(crate) link: &'a [u8],
    pub(crate) device: (u64, u64),
    pub(crate) xattrs: &'a [Xattr],
    /// Where the data is, when the entry is to be sparse.
    pub(crate) segments: Option<&'a [Segment]>,
    /// Which components of `path` are names, though they look like markers.
    pub(crate) literal_names: Option<LiteralNames>,
    /// Which content the importer has of it (contents.rs).
    pub(crate) content: Option<u64>,
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
    /// The regular file that `out` writes to, as long as the kernel copies into it.
    copy_target: Option<OwnedFd>,
}

impl<W: Write> TarWriter<W> {
    pub(crate) fn new(out: W) -> Self {
        TarWriter {
            out,
            buffer: vec![0; BUFFER_BYTES].into_boxed_slice(),
            filled: 0,
            flushed: 0,
            records: Vec::new(),
            copy_target: None,
        }
    }

    /// Lets the kernel copy large files into `target`, which must be what the writer writes to.
    pub(crate) fn with_copy_target(mut self, target: OwnedFd) -> Self {
        self.copy_target = Some(target);
        self
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
        let fields = header.as_old_mut();
        put_truncated(&mut fields.name, name);
        put_truncated(&mut fields.linkname, head.link);
        put_octal(&mut fields.mode, head.mode.into());
        put_octal(
            &mut fields.uid,
            if fits_7(head.uid.into()) {
                head.uid.into()
            } else {
                0
            },
        );
        put_octal(
            &mut fields.gid,
            if fits_7(head.gid.into()) {
                head.gid.into()
            } else {
                0
            },
        );
        put_octal(
            &mut fields.size,
            if archived <= MAX_OCTAL_11 {
                archived
            } else {
                0
            },
        );
        put_octal(&mut fields.mtime, octal_time(head.mtime).unwrap_or(0));
        header.set_entry_type(head.entry_type);
        if let Some(ustar) = header.as_ustar_mut() {
            put_octal(&mut ustar.dev_major, head.device.0);
            put_octal(&mut ustar.dev_minor, head.device.1);
        }
        put_checksum(&mut header);
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
                Decimal::new(head.size).as_bytes(),
            );
        } else if head.path.len() > 100 || !head.path.is_ascii() {
            push_record(records, b"path", head.path);
        }
        if head.link.len() > 100 || !head.link.is_ascii() {
            push_record(records, b"linkpath", head.link);
        }
        if archived > MAX_OCTAL_11 {
            push_record(records, b"size", Decimal::new(archived).as_bytes());
        }
        if !fits_7(head.uid.into()) {
            push_record(records, b"uid", Decimal::new(head.uid.into()).as_bytes());
        }
        if !fits_7(head.gid.into()) {
            push_record(records, b"gid", Decimal::new(head.gid.into()).as_bytes());
        }
        if head.mtime.nanos != 0 || octal_time(head.mtime).is_none() {
            push_record(records, b"mtime", format_time(head.mtime).as_bytes());
        }
        if let Some(literal) = head.literal_names {
            push_record(records, NAMES_KEY, literal.value());
        }
        if let Some(content) = head.content {
            push_record(records, CONTENT_KEY, Decimal::new(content).as_bytes());
        }
        for xattr in head.xattrs {
            push_xattr(records, &xattr.name, &xattr.value);
        }
    }

    fn write_extended_header(&mut self) -> Result<(), ExportError> {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::XHeader);
        let fields = header.as_old_mut();
        put_truncated(&mut fields.name, b"PaxHeaders.0/x");
        put_octal(&mut fields.mode, 0);
        put_octal(&mut fields.uid, 0);
        put_octal(&mut fields.gid, 0);
        put_octal(&mut fields.mtime, 0);
        put_octal(&mut fields.size, self.records.len() as u64);
        put_checksum(&mut header);
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
        if len >= KERNEL_COPY_BYTES && self.copy_target.is_some() {
            self.flush_buffer()?;
            position += self.copy_in_kernel(file, offset, len);
        }
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

    /// Copies with `copy_file_range`, which, unlike splice, leaves no reference to the source's pages.
    /// Returns how far it came. Where it cannot go on, for whatever reason, reading and writing does,
    /// or finds out what is wrong and on which side.
    fn copy_in_kernel(&mut self, file: &File, offset: u64, len: u64) -> u64 {
        let Some(target) = &self.copy_target else {
            return 0;
        };
        let (Ok(mut position), mut copied) = (i64::try_from(offset), 0) else {
            return 0;
        };
        while copied < len {
            let wanted = usize::try_from(len - copied)
                .unwrap_or(usize::MAX)
                .min(1 << 30);
            match copy_file_range(file, Some(&mut position), target, None, wanted) {
                Ok(0) => break,
                Ok(step) => copied += step as u64,
                Err(Errno::EINTR) => {}
                Err(_) => {
                    // Another file system (before Linux 5.19), O_APPEND, a full disk.
                    self.copy_target = None;
                    break;
                }
            }
        }
        self.flushed += copied;
        copied
    }

    /// Adds bytes to the entry: header, records, or data that is in memory.
    pub(crate) fn write_bytes(&mut self, mut bytes: &[u8]) -> Result<(), ExportError> {
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

/// The seconds as the header's field can say them: not before 1970 nor after 2242. What is finer stands in a
/// record, but busybox and Perl read this one only.
fn octal_time(time: Timestamp) -> Option<u64> {
    let secs = u64::try_from(time.secs).ok()?;
    (secs <= MAX_OCTAL_11).then_some(secs)
}

fn put_truncated(field: &mut [u8; 100], bytes: &[u8]) {
    let len = bytes.len().min(field.len());
    field[..len].copy_from_slice(&bytes[..len]);
}

/// Writes octal digits and a NUL. The caller has seen to it that the number fits; Linux has 12 bits
/// of major and 20 bits of minor number, which always do.
fn put_octal(field: &mut [u8], mut number: u64) {
    let Some((end, digits)) = field.split_last_mut() else {
        return;
    };
    *end = 0;
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (number & 7).to_le_bytes()[0];
        number >>= 3;
    }
}

/// The sum of all bytes with the field itself taken as spaces, as six digits, NUL, space.
fn put_checksum(header: &mut Header) {
    header.as_old_mut().cksum = [b' '; 8];
    let sum: u32 = header.as_bytes().iter().map(|byte| u32::from(*byte)).sum();
    put_octal(&mut header.as_old_mut().cksum[..7], sum.into());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tar_read::{TarEntry, TarReader};

    #[test]
    fn numbers_beyond_the_header_s_fields_are_read_back() {
        for (size, uid) in [
            (MAX_OCTAL_11, 0o7_777_777),
            (MAX_OCTAL_11 + 1, 0o10_000_000),
            (1 << 40, u32::MAX - 1),
        ] {
            let mut out = Vec::new();
            let mut tar = TarWriter::new(&mut out);
            tar.write_head(&EntryHead {
                path: b"large",
                entry_type: EntryType::Regular,
                mode: 0o644,
                uid,
                gid: uid,
                size,
                mtime: Timestamp::default(),
                link: b"",
                device: (0, 0),
                xattrs: &[],
                segments: None,
                literal_names: None,
                content: None,
            })
            .unwrap();
            tar.flush_buffer().unwrap();
            let mut archive = tar::Archive::new(&out[..]);
            let entry = archive.entries().unwrap().next().unwrap().unwrap();
            assert_eq!(entry.size(), size);
            let mut reader = TarReader::new(&out[..]);
            let mut read = TarEntry::default();
            assert!(reader.next_entry(&mut read).unwrap());
            assert_eq!((read.size, read.uid, read.gid), (size, uid, uid));
        }
    }
}
