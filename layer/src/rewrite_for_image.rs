//! A checkpoint's layer as an image's: what every reader of registries takes (layer_format.rs has the differences).
//!
//! ```text
//!  rootfs-diff.tar ── entry ──> as it is, but: holes are zeros, no attributes `trusted.*`, no entry of `/`
//!                        ├────> left out: a name that reads as a marker, or a marker for such a name
//!                        └────> hard link to a file that was left out: the file itself, under this name
//! ```
//!
//! What is left out is listed. The bytes depend on the tar alone, so that they can be made again: first for their
//! digest, then for whoever wants them.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use tar::EntryType;

use crate::export::WHITEOUT_PREFIX;
use crate::export_error::ExportError;
use crate::import_error::ImportError;
use crate::layer_format::LiteralNames;
use crate::path_bytes::{clean_path, components, push_component, split_last, to_path_buf};
use crate::sparse::Segment;
use crate::tar_read::{TarEntry, TarReader, TarType};
use crate::tar_write::{EntryHead, TarWriter};

/// Entries of [`Rewritten::left_out`] at most; all are counted.
const MOST_LISTED: usize = 1000;
/// Files that are left out and remembered in case that a link to them comes. A link to one beyond them is left out, too.
const MOST_REMEMBERED: usize = 1 << 16;
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// What a layer of an image cannot say.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum NotInImages {
    /// A file of this name: there it would be a deletion.
    Name,
    /// The deletion of a file of such a name.
    Deletion,
    /// An extended attribute; bytes of its name that are no UTF-8 are replaced.
    Attribute(String),
}

/// One thing that was left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// The file, below the root of the layer.
    pub path: PathBuf,
    /// What of it.
    pub what: NotInImages,
}

/// What was written, and what was not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rewritten {
    /// Entries of the tar.
    pub entries: u64,
    /// Bytes of it.
    pub bytes: u64,
    /// What was left out, the first thousand.
    pub left_out: Vec<LeftOut>,
    /// How much was left out.
    pub left_out_count: u64,
}

/// A layer that cannot be rewritten. What was written so far is none.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RewriteError {
    /// The checkpoint's layer cannot be read.
    #[error(transparent)]
    Read(#[from] ImportError),
    /// The image's layer cannot be written.
    #[error(transparent)]
    Write(#[from] ExportError),
}

/// Writes the plain tar `layer` of a checkpoint as that of an image. The position of `layer` is neither used nor changed.
///
/// # Errors
/// The tar is damaged or cannot be read, or `out` cannot be written.
pub fn rewrite_for_image<W: Write>(layer: &File, out: W) -> Result<Rewritten, RewriteError> {
    let mut rewrite = Rewrite {
        layer,
        tar: TarWriter::new(out),
        absent: HashMap::new(),
        done: Rewritten::default(),
    };
    let mut reader = TarReader::new(FromStart { layer, position: 0 });
    let mut entry = TarEntry::default();
    while reader.next_entry(&mut entry)? {
        rewrite.entry(&mut entry, &mut reader)?;
    }
    rewrite.done.bytes = rewrite.tar.finish()?;
    Ok(rewrite.done)
}

/// Reads a file from its start, whatever its position is.
struct FromStart<'f> {
    layer: &'f File,
    position: u64,
}

impl Read for FromStart<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.layer.read_at(buffer, self.position)?;
        self.position += read as u64;
        Ok(read)
    }
}

/// A file without a name of its own in the image.
enum Absent {
    /// What it is, and where in the checkpoint's layer its data begins.
    Waiting { inode: Inode, data: u64 },
    /// The name under which it has been written after all.
    Called(Vec<u8>),
}

struct Inode {
    tar_type: TarType,
    link: Vec<u8>,
    device: (u64, u64),
    size: u64,
    segments: Option<Vec<Segment>>,
}

struct Rewrite<'f, W> {
    layer: &'f File,
    tar: TarWriter<W>,
    /// Files that were left out, by their names.
    absent: HashMap<Vec<u8>, Absent>,
    done: Rewritten,
}

impl<W: Write> Rewrite<'_, W> {
    fn entry(
        &mut self,
        entry: &mut TarEntry,
        reader: &mut TarReader<FromStart<'_>>,
    ) -> Result<(), RewriteError> {
        let path = clean_path(&entry.path);
        if path.is_empty() {
            return Ok(());
        }
        if entry.literal_names.is_some() {
            self.leave_out(&path, entry, reader.offset());
            return Ok(());
        }
        self.drop_trusted(&path, entry);
        if entry.tar_type != TarType::HardLink {
            self.write_head(entry)?;
            return self.write_data(entry, reader);
        }
        let target = clean_path(&entry.link);
        let is_there = match self.absent.get(&target) {
            Some(Absent::Called(name)) => {
                entry.link.clone_from(name);
                true
            }
            Some(Absent::Waiting { .. }) => return self.write_after_all(entry, path, &target),
            // Only what was beyond the limit has such a name and is not known.
            None => !components(&target).any(|it| it.starts_with(WHITEOUT_PREFIX)),
        };
        match is_there {
            true => self.write_head(entry),
            false => {
                self.note(&path, NotInImages::Name);
                Ok(())
            }
        }
    }

    /// The first of the other names of a file that was left out: the link's entry has all of its attributes.
    fn write_after_all(
        &mut self,
        entry: &mut TarEntry,
        path: Vec<u8>,
        target: &[u8],
    ) -> Result<(), RewriteError> {
        let called = Absent::Called(path);
        let Some(Absent::Waiting { inode, data }) = self.absent.insert(target.to_vec(), called)
        else {
            return Ok(());
        };
        entry.tar_type = inode.tar_type;
        entry.link = inode.link;
        entry.device = inode.device;
        entry.size = inode.size;
        self.write_head(entry)?;
        let mut from = data;
        let mut end = 0;
        for segment in pieces(inode.segments.as_deref(), inode.size) {
            self.write_zeros(segment.offset - end)?;
            if !self
                .tar
                .write_segment(self.layer, &entry.path, from, segment.len)?
            {
                return Err(ExportError::changed(&entry.path).into());
            }
            from += segment.len;
            end = segment.offset + segment.len;
        }
        self.write_zeros(inode.size - end)?;
        Ok(self.tar.pad()?)
    }

    fn leave_out(&mut self, path: &[u8], entry: &TarEntry, data: u64) {
        let (parent, name) = split_last(path);
        if entry.literal_names == Some(LiteralNames::Parents) {
            let deleted = name.strip_prefix(WHITEOUT_PREFIX).unwrap_or(name);
            let mut path = parent.to_vec();
            push_component(&mut path, deleted);
            return self.note(&path, NotInImages::Deletion);
        }
        self.note(path, NotInImages::Name);
        let may_be_linked = !matches!(entry.tar_type, TarType::Directory | TarType::HardLink);
        if may_be_linked && self.absent.len() < MOST_REMEMBERED {
            let inode = Inode {
                tar_type: entry.tar_type,
                link: entry.link.clone(),
                device: entry.device,
                size: entry.size,
                segments: entry.segments.clone(),
            };
            let waiting = Absent::Waiting { inode, data };
            self.absent.insert(path.to_vec(), waiting);
        }
    }

    fn drop_trusted(&mut self, path: &[u8], entry: &mut TarEntry) {
        let is_trusted = |name: &[u8]| name.starts_with(b"trusted.");
        for xattr in entry.xattrs.iter().filter(|it| is_trusted(&it.name)) {
            let name = String::from_utf8_lossy(&xattr.name).into_owned();
            self.note(path, NotInImages::Attribute(name));
        }
        entry.xattrs.retain(|it| !is_trusted(&it.name));
    }

    fn note(&mut self, path: &[u8], what: NotInImages) {
        self.done.left_out_count += 1;
        if self.done.left_out.len() < MOST_LISTED {
            let path = to_path_buf(path);
            self.done.left_out.push(LeftOut { path, what });
        }
    }

    fn write_head(&mut self, entry: &TarEntry) -> Result<(), RewriteError> {
        self.done.entries += 1;
        self.tar.write_head(&EntryHead {
            path: &entry.path,
            entry_type: entry_type(entry.tar_type),
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            size: entry.size,
            mtime: entry.mtime,
            link: &entry.link,
            device: entry.device,
            xattrs: &entry.xattrs,
            segments: None,
            literal_names: None,
            content: None,
        })?;
        Ok(())
    }

    fn write_data(
        &mut self,
        entry: &TarEntry,
        reader: &mut TarReader<FromStart<'_>>,
    ) -> Result<(), RewriteError> {
        let mut end = 0;
        for segment in pieces(entry.segments.as_deref(), entry.size) {
            self.write_zeros(segment.offset - end)?;
            let mut left = segment.len;
            while left > 0 {
                let piece = reader.data(left)?;
                let len = piece.len();
                self.tar.write_bytes(piece)?;
                reader.consume(len);
                left -= len as u64;
            }
            end = segment.offset + segment.len;
        }
        self.write_zeros(entry.size - end)?;
        Ok(self.tar.pad()?)
    }

    fn write_zeros(&mut self, mut len: u64) -> Result<(), ExportError> {
        while len > 0 {
            let some = usize::try_from(len).unwrap_or(usize::MAX).min(ZEROS.len());
            self.tar.write_bytes(&ZEROS[..some])?;
            len -= some as u64;
        }
        Ok(())
    }
}

/// Where the data of a file of `size` bytes is: `tar_read.rs` has seen to it that the pieces ascend and end inside.
fn pieces(segments: Option<&[Segment]>, size: u64) -> Vec<Segment> {
    let whole = || {
        vec![Segment {
            offset: 0,
            len: size,
        }]
    };
    segments.map_or_else(whole, <[Segment]>::to_vec)
}

fn entry_type(tar_type: TarType) -> EntryType {
    match tar_type {
        TarType::Regular => EntryType::Regular,
        TarType::HardLink => EntryType::Link,
        TarType::Symlink => EntryType::Symlink,
        TarType::CharDevice => EntryType::Char,
        TarType::BlockDevice => EntryType::Block,
        TarType::Directory => EntryType::Directory,
        TarType::Fifo => EntryType::Fifo,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::layer_format::NAMES_KEY;
    use crate::pax::{push_record, push_xattr};

    /// One entry of a checkpoint's layer: (name, type, link, data, records of PAX).
    type Made<'a> = (&'a str, EntryType, &'a str, &'a [u8], Vec<u8>);

    fn layer_of(entries: &[Made<'_>]) -> File {
        let mut builder = tar::Builder::new(tempfile::tempfile().unwrap());
        for (path, entry_type, link, data, records) in entries {
            if !records.is_empty() {
                let mut header = tar::Header::new_ustar();
                header.set_entry_type(EntryType::XHeader);
                header.set_size(records.len() as u64);
                header.set_cksum();
                builder.append(&header, &records[..]).unwrap();
            }
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(*entry_type);
            header.set_mode(0o640);
            header.set_size(data.len() as u64);
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
            header.set_cksum();
            builder.append(&header, *data).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn literal(names: LiteralNames) -> Vec<u8> {
        let mut records = Vec::new();
        push_record(&mut records, NAMES_KEY, names.value());
        records
    }

    fn rewritten(entries: &[Made<'_>]) -> (Rewritten, Vec<u8>) {
        let mut out = Vec::new();
        let done = rewrite_for_image(&layer_of(entries), &mut out).unwrap();
        assert_eq!(done.bytes, out.len() as u64);
        (done, out)
    }

    /// (type, link, data) by name, as another reader takes it.
    fn read(tar: &[u8]) -> BTreeMap<String, (EntryType, String, Vec<u8>)> {
        let mut archive = tar::Archive::new(tar);
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let name = String::from_utf8(entry.path_bytes().into_owned()).unwrap();
            let link = entry.link_name_bytes().unwrap_or_default().into_owned();
            let mut data = Vec::new();
            entry.read_to_end(&mut data).unwrap();
            let what = entry.header().entry_type();
            (name, (what, String::from_utf8(link).unwrap(), data))
        });
        entries.collect()
    }

    #[test]
    fn what_an_image_says_stays_as_it_is() {
        use EntryType::{Directory, Link, Regular, Symlink};
        let (done, out) = rewritten(&[
            ("./", Directory, "", b"", Vec::new()),
            ("a/", Directory, "", b"", Vec::new()),
            ("a/.wh..wh..opq", Regular, "", b"", Vec::new()),
            ("a/.wh.gone", Regular, "", b"", Vec::new()),
            ("a/file", Regular, "", b"content", Vec::new()),
            ("a/link", Link, "a/file", b"", Vec::new()),
            ("a/sym", Symlink, "file", b"", Vec::new()),
        ]);
        assert_eq!((done.entries, done.left_out_count), (6, 0));
        let read = read(&out);
        let names: Vec<_> = read.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "a/",
                "a/.wh..wh..opq",
                "a/.wh.gone",
                "a/file",
                "a/link",
                "a/sym"
            ]
        );
        assert_eq!(read["a/file"].2, b"content");
        assert_eq!(read["a/link"].1, "a/file");
        assert_eq!(read["a/sym"].1, "file");
    }

    #[test]
    fn holes_are_zeros() {
        let mut records = Vec::new();
        for (key, value) in [
            ("GNU.sparse.major", "1"),
            ("GNU.sparse.minor", "0"),
            ("GNU.sparse.name", "database"),
            ("GNU.sparse.realsize", "300000"),
        ] {
            push_record(&mut records, key.as_bytes(), value.as_bytes());
        }
        let mut data = b"2\n100000\n4\n300000\n0\n".to_vec();
        data.resize(512, 0);
        data.extend_from_slice(b"data");
        let (done, out) = rewritten(&[
            (
                "GNUSparseFile.0/database",
                EntryType::Regular,
                "",
                &data,
                records,
            ),
            ("behind", EntryType::Regular, "", b"it", Vec::new()),
        ]);
        assert_eq!(done.left_out_count, 0);
        let read = read(&out);
        let file = &read["database"].2;
        assert_eq!(
            (file.len(), &file[100_000..100_004]),
            (300_000, &b"data"[..])
        );
        assert!(file.iter().filter(|byte| **byte != 0).count() == 4);
        assert_eq!(read["behind"].2, b"it");
    }

    #[test]
    fn what_no_image_says_is_left_out_and_listed() {
        use EntryType::{Directory, Regular};
        let mut trusted = Vec::new();
        push_xattr(&mut trusted, b"trusted.secret", b"1");
        push_xattr(&mut trusted, b"user.kept", b"2");
        let (done, out) = rewritten(&[
            (".wh.dir/", Directory, "", b"", literal(LiteralNames::All)),
            (
                ".wh.dir/file",
                Regular,
                "",
                b"in it",
                literal(LiteralNames::All),
            ),
            (
                "a/.wh..wh.odd",
                Regular,
                "",
                b"",
                literal(LiteralNames::Parents),
            ),
            ("file", Regular, "", b"x", trusted),
        ]);
        let listed: Vec<_> = { done.left_out.iter() }
            .map(|it| (it.path.to_str().unwrap(), it.what.clone()))
            .collect();
        assert_eq!(
            listed,
            [
                (".wh.dir", NotInImages::Name),
                (".wh.dir/file", NotInImages::Name),
                ("a/.wh.odd", NotInImages::Deletion),
                ("file", NotInImages::Attribute("trusted.secret".to_owned())),
            ]
        );
        assert_eq!(read(&out).into_keys().collect::<Vec<_>>(), ["file"]);
        let text = String::from_utf8_lossy(&out);
        assert!(text.contains("user.kept") && !text.contains("trusted"));
    }

    #[test]
    fn a_link_to_what_is_left_out_becomes_the_file() {
        use EntryType::{Link, Regular, Symlink};
        let literal = || literal(LiteralNames::All);
        let (done, out) = rewritten(&[
            (".wh.a", Regular, "", b"content", literal()),
            (".wh.b", Link, ".wh.a", b"", literal()),
            (".wh.s", Symlink, "where", b"", literal()),
            ("c", Link, ".wh.a", b"", Vec::new()),
            ("d", Link, ".wh.a", b"", Vec::new()),
            ("e", Link, "./.wh.s", b"", Vec::new()),
        ]);
        assert_eq!(done.left_out_count, 3);
        let read = read(&out);
        assert_eq!(read["c"], (Regular, String::new(), b"content".to_vec()));
        assert_eq!(read["d"], (Link, "c".to_owned(), Vec::new()));
        assert_eq!(read["e"], (Symlink, "where".to_owned(), Vec::new()));
    }

    #[test]
    fn it_is_made_again_byte_for_byte() {
        let layer = layer_of(&[("a", EntryType::Regular, "", b"x", Vec::new())]);
        let make = || {
            let mut out = Vec::new();
            rewrite_for_image(&layer, &mut out).unwrap();
            out
        };
        assert_eq!(make(), make());
    }

    #[test]
    fn a_damaged_layer_is_an_error() {
        let layer = layer_of(&[("a", EntryType::Regular, "", &[7; 5000], Vec::new())]);
        layer.set_len(2000).unwrap();
        let error = rewrite_for_image(&layer, io::sink()).unwrap_err();
        assert!(error.to_string().contains("cut off"), "{error}");
    }
}
