//! Entries as tar: the same in the header fields of each format, in each spelling of numbers, in the records
//! and long names before a header, as sparse entries.
//!
//! Fields as layer/src/tar_header.rs draws them.

use std::io::Write as _;

use proptest::prelude::*;

use super::faults::Fault;
use super::stacks::{Entry, Kind};

const BLOCK: usize = 512;

/// Which header an entry has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Format {
    V7,
    #[default]
    Ustar,
    Star,
    Gnu,
    /// As Go before 1.8 wrote it: with a prefix where GNU has times.
    GnuWithPrefix,
}

/// How numbers stand in header fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Numbers {
    /// `0000644` and NUL.
    #[default]
    Octal,
    /// `0000644` and a blank.
    OctalBlank,
    /// `   644`, a blank and NUL.
    Blanks,
    /// `00000644`.
    Filled,
    /// NUL, NUL, `644`, NULs.
    NulFirst,
    /// As GNU tar writes what is too large.
    Base256,
}

/// Where a name stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum NameIn {
    /// Where it fits.
    #[default]
    Header,
    Gnu,
    Pax,
}

/// How a regular file is said to be sparse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sparse {
    Pax00,
    Pax01,
    Pax10,
}

/// How an entry is written.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Style {
    format: Format,
    numbers: Numbers,
    name_in: NameIn,
    sparse: Option<Sparse>,
    /// Takes precedence over `sparse`; containerd does not take it.
    pub(super) is_sparse_of_gnu: bool,
    /// Owner, time and size in records, and other ones in the header.
    numbers_in_records: bool,
    /// Records that nobody needs, and some twice.
    has_noise: bool,
    /// A type from before POSIX, or another spelling of it.
    old_type: bool,
    /// A size where there is no data.
    has_wrong_size: bool,
}

impl Style {
    pub(super) fn any() -> impl Strategy<Value = Self> {
        use prop::sample::select;
        let few = || prop::bool::weighted(0.1);
        (
            select(vec![
                Format::Ustar,
                Format::Ustar,
                Format::V7,
                Format::Star,
                Format::Gnu,
                Format::GnuWithPrefix,
            ]),
            select(vec![
                Numbers::Octal,
                Numbers::OctalBlank,
                Numbers::Blanks,
                Numbers::Filled,
                Numbers::NulFirst,
                Numbers::Base256,
            ]),
            select(vec![
                NameIn::Header,
                NameIn::Header,
                NameIn::Gnu,
                NameIn::Pax,
            ]),
            prop::option::weighted(
                0.2,
                select(vec![Sparse::Pax00, Sparse::Pax01, Sparse::Pax10]),
            ),
            (few(), any::<bool>(), any::<bool>(), any::<bool>(), few()),
        )
            .prop_map(
                |(
                    format,
                    numbers,
                    name_in,
                    sparse,
                    (is_sparse_of_gnu, in_records, noise, old, wrong),
                )| Self {
                    format,
                    numbers,
                    name_in,
                    sparse,
                    is_sparse_of_gnu,
                    numbers_in_records: in_records,
                    has_noise: noise,
                    old_type: old,
                    has_wrong_size: wrong,
                },
            )
    }
}

impl Style {
    /// One that a fault shows in.
    pub(super) fn with(self, fault: Fault) -> Self {
        Self {
            format: match (fault, self.format) {
                (Fault::StarTime(..), _) => Format::Star,
                (_, Format::V7) => Format::Ustar,
                (_, format) => format,
            },
            sparse: None,
            is_sparse_of_gnu: false,
            ..self
        }
    }
}

/// Appends an entry. Returns how many bytes fill its last block.
pub(super) fn write(tar: &mut Vec<u8>, entry: &Entry) -> usize {
    Writing::of(entry).write(tar)
}

/// Appends an extended header that no entry follows.
pub(super) fn write_dangling(tar: &mut Vec<u8>) {
    extended_header(
        tar,
        b'x',
        &records(&[("comment".to_owned(), b"of nothing".to_vec())]),
    );
}

/// What is known of an entry before its header is written.
struct Writing<'e> {
    entry: &'e Entry,
    name: Vec<u8>,
    prefix: Vec<u8>,
    link: Vec<u8>,
    records: Vec<(String, Vec<u8>)>,
    data: Vec<u8>,
    /// What the size field says, if it is not the data's length.
    size: Option<u64>,
    type_flag: u8,
}

impl<'e> Writing<'e> {
    fn of(entry: &'e Entry) -> Self {
        let path = match entry.kind {
            Kind::Whiteout => match entry.path.rsplit_once('/') {
                Some((parent, name)) => format!("{parent}/.wh.{name}"),
                None => format!(".wh.{}", entry.path),
            },
            Kind::Opaque => format!("{}/.wh..wh..opq", entry.path),
            Kind::Global => "pax_global_header".to_owned(),
            _ => entry.path.clone(),
        };
        let type_flag = match entry.kind {
            Kind::File(_) | Kind::Whiteout | Kind::Opaque => b'0',
            Kind::HardLink(_) => b'1',
            Kind::Symlink(_) => b'2',
            Kind::CharDevice(..) => b'3',
            Kind::BlockDevice(..) => b'4',
            Kind::Directory => b'5',
            Kind::Fifo => b'6',
            Kind::Global => b'g',
        };
        let slash = match entry.kind {
            Kind::Directory => "/",
            _ => "",
        };
        let link = match &entry.kind {
            Kind::HardLink(target) | Kind::Symlink(target) => target.clone().into_bytes(),
            _ => Vec::new(),
        };
        Self {
            entry,
            name: format!("{}{path}{slash}", entry.prefix).into_bytes(),
            prefix: Vec::new(),
            link,
            records: Vec::new(),
            data: match entry.kind {
                Kind::File(len) => content(&entry.path, len),
                _ => Vec::new(),
            },
            size: None,
            type_flag,
        }
    }

    fn write(mut self, tar: &mut Vec<u8>) -> usize {
        let style = &self.entry.style;
        if self.entry.kind == Kind::Global {
            self.data = records(&[("comment".to_owned(), b"of nobody".to_vec())]);
            return self.header(tar);
        }
        if let Some(Fault::GlobalBody(body)) = self.entry.fault {
            extended_header(tar, b'g', body);
        }
        self.choose_type();
        self.place_name(tar);
        let xattrs = self.entry.xattrs.iter();
        let xattrs = xattrs.map(|(name, value)| (format!("SCHILY.xattr.{name}"), value.clone()));
        self.records.extend(xattrs);
        let (secs, nanos) = self.entry.mtime;
        if style.numbers_in_records || nanos != 0 || style.format == Format::V7 {
            let (uid, gid) = self.entry.owner;
            let fraction = format!("{nanos:09}");
            let sign = if style.has_noise { "+" } else { "" };
            self.records.extend([
                ("uid".to_owned(), format!("{sign}{uid}").into_bytes()),
                ("gid".to_owned(), gid.to_string().into_bytes()),
                (
                    "mtime".to_owned(),
                    format!("{sign}{secs}.{}", fraction.trim_end_matches('0')).into_bytes(),
                ),
            ]);
        }
        if style.has_noise {
            self.records.push(("path".to_owned(), self.records_path()));
            for (key, value) in [
                ("mtime", "1"),
                ("comment", "a comment\nof two lines"),
                ("atime", "1000000000.123456789012"),
                ("ctime", "-1"),
                ("hdrcharset", "ISO-IR 10646 2000 UTF-8"),
                ("LIBARCHIVE.creationtime", "5"),
                ("uname", "nobody"),
                ("size", ""),
            ] {
                self.records.insert(0, (key.to_owned(), value.into()));
            }
        }
        self.describe_data();
        let fault = self.entry.fault;
        self.records
            .extend(fault.into_iter().flat_map(Fault::records));
        let mut body = records(&self.records);
        if let Some(Fault::Body(bytes)) = fault {
            body.extend(bytes);
        }
        if !body.is_empty() {
            extended_header(tar, b'x', &body);
        }
        self.header(tar)
    }

    /// The `path` record that is there, or an empty one, which says nothing.
    fn records_path(&self) -> Vec<u8> {
        let found = self.records.iter().rfind(|(key, _)| key == "path");
        found.map(|(_, value)| value.clone()).unwrap_or_default()
    }

    fn choose_type(&mut self) {
        let style = &self.entry.style;
        match self.entry.kind {
            Kind::File(_) if style.old_type => self.type_flag = 0,
            Kind::Directory if style.old_type => self.type_flag = 0,
            _ => {}
        }
    }

    /// Puts the names where they fit, or where the style wants them.
    fn place_name(&mut self, tar: &mut Vec<u8>) {
        let style = &self.entry.style;
        let fits = |name: &[u8]| name.len() <= 100;
        match style.name_in {
            NameIn::Header if fits(&self.name) => {}
            NameIn::Header if self.split_name() => {}
            NameIn::Gnu => {
                let name = [&self.name[..], b"\0"].concat();
                extended_header(tar, b'L', &name);
                self.name = b"another".to_vec();
            }
            NameIn::Header | NameIn::Pax => {
                self.records
                    .push(("path".to_owned(), std::mem::take(&mut self.name)));
                self.name = b"other".to_vec();
            }
        }
        if !fits(&self.link) || style.name_in == NameIn::Pax && !self.link.is_empty() {
            self.records
                .push(("linkpath".to_owned(), std::mem::take(&mut self.link)));
        } else if style.name_in == NameIn::Gnu && !self.link.is_empty() {
            extended_header(tar, b'K', &[&self.link[..], b"\0"].concat());
            self.link = b"elsewhere".to_vec();
        }
    }

    /// Splits a name at a slash, as ustar does.
    fn split_name(&mut self) -> bool {
        let room = match self.entry.style.format {
            Format::V7 | Format::Gnu => return false,
            // Its fields lie where others have a prefix.
            _ if self.entry.style.is_sparse_of_gnu => return false,
            Format::Star => 131,
            // Go takes it for a prefix when it is none of GNU's times.
            Format::GnuWithPrefix
                if !self.name.is_ascii() || !self.name[0].is_ascii_alphabetic() =>
            {
                return false;
            }
            Format::Ustar | Format::GnuWithPrefix => 155,
        };
        let slashes = (0..self.name.len().saturating_sub(1)).filter(|at| self.name[*at] == b'/');
        let mut fitting =
            slashes.filter(|at| *at > 0 && *at <= room && self.name.len() - at - 1 <= 100);
        let Some(at) = fitting.next() else {
            return false;
        };
        self.prefix = self.name[..at].to_vec();
        self.name.drain(..=at);
        true
    }

    /// Sparse entries, and sizes in other places than the header.
    fn describe_data(&mut self) {
        let style = &self.entry.style;
        let Kind::File(_) = self.entry.kind else {
            if style.has_wrong_size
                && !matches!(self.entry.kind, Kind::Whiteout | Kind::Opaque)
                && self.type_flag != 0
            {
                self.size = Some(12345);
            }
            return;
        };
        let whole = self.data.len();
        let segments = segments_of(whole);
        let packed: Vec<u8> = segments
            .iter()
            .flat_map(|(at, len)| self.data[*at..at + len].to_vec())
            .collect();
        let mut record = |key: &str, value: String| {
            self.records
                .push((format!("GNU.sparse.{key}"), value.into_bytes()));
        };
        if style.is_sparse_of_gnu && !segments.is_empty() {
            self.type_flag = b'S';
            self.data = packed;
        } else if let Some(sparse) = style.sparse {
            match sparse {
                Sparse::Pax00 => {
                    record("size", whole.to_string());
                    record("numblocks", segments.len().to_string());
                    for (at, len) in &segments {
                        record("offset", at.to_string());
                        record("numbytes", len.to_string());
                    }
                    // Without pieces nothing says that it is sparse.
                    if segments.is_empty() {
                        self.records
                            .retain(|(key, _)| !key.starts_with("GNU.sparse."));
                    }
                    self.data = packed;
                }
                Sparse::Pax01 => {
                    let map = segments.iter().map(|(at, len)| format!("{at},{len}"));
                    record("major", "0".to_owned());
                    record("minor", "1".to_owned());
                    record("size", whole.to_string());
                    record("numblocks", segments.len().to_string());
                    record("map", map.collect::<Vec<_>>().join(","));
                    self.data = packed;
                }
                Sparse::Pax10 => {
                    record("major", "1".to_owned());
                    record("minor", "0".to_owned());
                    record("realsize", whole.to_string());
                    let mut map = format!("{}\n", segments.len()).into_bytes();
                    for (at, len) in &segments {
                        write!(map, "{at}\n{len}\n").expect("a Vec takes all");
                    }
                    map.resize(map.len().next_multiple_of(BLOCK), 0);
                    map.extend(packed);
                    self.data = map;
                }
            }
        } else if style.numbers_in_records {
            let size = ("size".to_owned(), self.data.len().to_string().into_bytes());
            self.records.push(size);
            self.size = Some(7);
        }
    }

    fn header(&self, tar: &mut Vec<u8>) -> usize {
        let (entry, style) = (self.entry, &self.entry.style);
        // The oldest format has no device numbers, and 0:0 is a deletion to us.
        let format = match entry.kind {
            Kind::CharDevice(..) if style.format == Format::V7 => Format::Ustar,
            _ => style.format,
        };
        let mut block = [0_u8; BLOCK];
        let put = |block: &mut [u8; BLOCK], at: usize, bytes: &[u8]| {
            block[at..at + bytes.len()].copy_from_slice(bytes);
        };
        put(&mut block, 0, &self.name);
        let in_records = self
            .records
            .iter()
            .any(|(key, value)| key == "uid" && !value.is_empty());
        let (uid, gid) = if in_records { (5, 5) } else { entry.owner };
        let mtime = if in_records { 5 } else { entry.mtime.0 };
        let size = self.size.unwrap_or(self.data.len() as u64);
        for (at, len, value) in [
            (100, 8, entry.mode.into()),
            (108, 8, uid),
            (116, 8, gid),
            (124, 12, size),
            (136, 12, mtime),
        ] {
            number(&mut block[at..at + len], value, style.numbers);
        }
        block[156] = self.type_flag;
        put(&mut block, 157, &self.link);
        match format {
            Format::V7 => {}
            Format::Ustar => put(&mut block, 257, b"ustar\x0000"),
            Format::Star => {
                put(&mut block, 257, b"ustar\x0000");
                put(&mut block, 508, b"tar\0");
                put(&mut block, 476, b"00000000007 00000000010 ");
            }
            Format::Gnu | Format::GnuWithPrefix => put(&mut block, 257, b"ustar  \0"),
        }
        if format != Format::V7 {
            put(&mut block, 265, b"somebody");
            let (major, minor) = match entry.kind {
                Kind::CharDevice(major, minor) | Kind::BlockDevice(major, minor) => (major, minor),
                _ => (0, 0),
            };
            number(&mut block[329..337], major.into(), style.numbers);
            number(&mut block[337..345], minor.into(), style.numbers);
        }
        put(&mut block, 345, &self.prefix);
        let mut extension = None;
        if self.type_flag == b'S' {
            put(&mut block, 257, b"ustar  \0");
            let Kind::File(len) = entry.kind else {
                unreachable!("only files are sparse")
            };
            let pieces: Vec<u8> = segments_of(len.into())
                .iter()
                .flat_map(|(at, len)| format!("{at:011o}\0{len:011o}\0").into_bytes())
                .collect();
            let first = pieces.len().min(96);
            block[345..].fill(0);
            put(&mut block, 386, &pieces[..first]);
            put(&mut block, 483, format!("{len:011o}\0").as_bytes());
            if pieces.len() > first {
                block[482] = 1;
                let mut more = [0; BLOCK];
                more[..pieces.len() - first].copy_from_slice(&pieces[first..]);
                extension = Some(more);
            }
        }
        if let Some(fault) = entry.fault {
            fault.write_over(&mut block);
        }
        block[148..156].fill(b' ');
        let mut sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
        if entry.fault == Some(Fault::Checksum) {
            sum += 1;
        }
        put(&mut block, 148, format!("{sum:06o}\0 ").as_bytes());
        tar.extend(block);
        tar.extend(extension.into_iter().flatten());
        tar.extend(&self.data);
        let end = tar.len();
        tar.resize(end.next_multiple_of(BLOCK), 0);
        tar.len() - end
    }
}

/// The bytes of a file; zeros where it can have holes.
fn content(path: &str, len: u16) -> Vec<u8> {
    let len = usize::from(len);
    let mut data: Vec<u8> = path.bytes().cycle().take(len).collect();
    let segments = segments_of(len);
    for (at, byte) in data.iter_mut().enumerate() {
        if !segments
            .iter()
            .any(|(start, len)| (*start..start + len).contains(&at))
        {
            *byte = 0;
        }
    }
    data
}

/// What of a file is not a hole.
fn segments_of(len: usize) -> Vec<(usize, usize)> {
    let pieces = [
        (0, 100),
        (512, 300),
        (900, 1),
        (1000, 24),
        (1100, 400),
        (1600, 50),
        (1700, 100),
        (1900, 200),
    ];
    let pieces = pieces
        .into_iter()
        .map(|(at, wanted)| (at, wanted.min(len.saturating_sub(at))));
    pieces.filter(|(_, len)| *len > 0).collect()
}

/// Writes a number, or fills the field with base 256 where it is too large for digits.
fn number(field: &mut [u8], value: u64, numbers: Numbers) {
    let room = field.len();
    let digits = format!("{value:o}");
    let text = match numbers {
        Numbers::Octal => format!("{digits:0>width$}\0", width = room - 1),
        Numbers::OctalBlank => format!("{digits:0>width$} ", width = room - 1),
        Numbers::Blanks => format!("{digits: >width$} \0", width = room - 2),
        Numbers::Filled => format!("{digits:0>room$}"),
        Numbers::NulFirst => format!("\0\0{digits}"),
        Numbers::Base256 => String::new(),
    };
    if text.is_empty() || text.len() > room {
        field.fill(0);
        field[0] = 0x80;
        field[room - 8 + 1..].copy_from_slice(&value.to_be_bytes()[1..]);
    } else {
        field[..text.len()].copy_from_slice(text.as_bytes());
    }
}

/// An entry that tells something of the next one.
fn extended_header(tar: &mut Vec<u8>, type_flag: u8, body: &[u8]) {
    let mut block = [0_u8; BLOCK];
    block[..4].copy_from_slice(b"next");
    for (at, len, value) in [
        (100, 8, 0o644),
        (108, 8, 0),
        (116, 8, 0),
        (124, 12, body.len() as u64),
        (136, 12, 0),
    ] {
        number(&mut block[at..at + len], value, Numbers::Octal);
    }
    block[156] = type_flag;
    let magic = if type_flag == b'x' {
        b"ustar\x0000"
    } else {
        b"ustar  \0"
    };
    block[257..265].copy_from_slice(magic);
    block[148..156].fill(b' ');
    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    tar.extend(block);
    tar.extend(body);
    tar.resize(tar.len().next_multiple_of(BLOCK), 0);
}

/// `<length> <key>=<value>\n`, one after another.
fn records(all: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut body = Vec::new();
    for (key, value) in all {
        let rest = key.len() + value.len() + 3;
        let len = (rest..).find(|len| len.to_string().len() + rest == *len);
        let len = len.expect("some length counts itself");
        write!(body, "{len} {key}=").expect("a Vec takes all");
        body.extend(value);
        body.push(b'\n');
    }
    body
}
