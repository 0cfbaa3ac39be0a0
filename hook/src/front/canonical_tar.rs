//! A tar in the one form in which GNU tar itself writes it (`--format=gnu`, its default), and in no other.
//!
//! ```text
//! header, 512 bytes   0 name[100]  100 mode, uid, gid  124 size[12]  136 mtime  148 checksum[8]  156 type
//!                     157 link[100]  257 "ustar  \0"  265 user, group, device  345 zeros[167]
//!   type S: sparse    386 4 x (offset[12] bytes[12])  482 more  483 real size[12]
//!                     while `more`: a block of 21 x (offset[12] bytes[12]), and `more` at 504
//!   types L, K        the data is the name, or the link, of the header that follows
//! data                in whole blocks, padded with zeros
//! end                 two blocks of zeros, and zeros behind them
//! ```
//!
//! What is to be unpacked by GNU tar has to be read as GNU tar reads it. Where a header can be read in two ways (other
//! formats, numbers and names that nobody writes so, data of what has none), another reader may see other members than tar
//! makes; so nothing of that is read at all.

use std::io::Read;

const BLOCK: usize = 512;
const MAGIC: &[u8] = b"ustar  \0";
/// Longest name that a file system takes (`PATH_MAX`).
const LONGEST_NAME: u64 = 4096;

/// A member: its name as it stands there, and whether it is a link.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CanonicalMember {
    /// Begins with `./`, without empty parts, `.` or `..`; empty for the directory itself.
    pub(super) name: Vec<u8>,
    pub(super) is_link: bool,
}

/// Calls `take` for each member, and gives none if `take` does, or if anything is not in that form.
pub(super) fn read_members(
    mut tar: impl Read,
    take: &mut dyn FnMut(CanonicalMember) -> Option<()>,
) -> Option<()> {
    let (mut long_name, mut long_link) = (None, None);
    loop {
        let block = read_block(&mut tar)?;
        if block == [0; BLOCK] {
            let is_whole = long_name.is_none() && long_link.is_none();
            return (is_whole && read_block(&mut tar)? == [0; BLOCK] && is_zero_to_its_end(tar))
                .then_some(());
        }
        let header = Header::of(&block)?;
        match header.kind {
            b'L' if long_name.is_none() => long_name = Some(read_long(&mut tar, &header)?),
            b'K' if long_link.is_none() => long_link = Some(read_long(&mut tar, &header)?),
            b'0' | b'S' => {
                if header.kind == b'S' {
                    read_sparse_map(&mut tar, &block, header.size)?;
                }
                skip(
                    &mut tar,
                    header.size.checked_next_multiple_of(BLOCK as u64)?,
                )?;
                take(header.member(long_name.take())?)?;
                long_link.take();
            }
            b'1'..=b'6' if header.size == 0 => {
                take(header.member(long_name.take())?)?;
                long_link.take();
            }
            _ => return None,
        }
    }
}

struct Header {
    name: Vec<u8>,
    size: u64,
    kind: u8,
}

impl Header {
    fn of(block: &[u8; BLOCK]) -> Option<Self> {
        let kind = block[156];
        let sum: u64 = { block.iter().enumerate() }
            .map(|(at, byte)| match at {
                148..156 => u64::from(b' '),
                _ => u64::from(*byte),
            })
            .sum();
        let is_known = &block[257..265] == MAGIC
            && block[148..156] == *format!("{sum:06o}\0 ").as_bytes()
            && (kind == b'S' || block[345..] == [0; 167]);
        text(&block[157..257])?;
        is_known.then_some(Self {
            name: text(&block[..100])?.to_vec(),
            size: number(&block[124..136])?,
            kind,
        })
    }

    fn member(self, long: Option<Vec<u8>>) -> Option<CanonicalMember> {
        let name = long.unwrap_or(self.name);
        // A directory, and nothing else, ends in a slash.
        let name = match self.kind {
            b'5' => name.strip_suffix(b"/")?,
            _ => &name,
        };
        let mut parts = name.split(|byte| *byte == b'/');
        let is_plain = parts.next() == Some(b".")
            && parts.all(|part| !matches!(part, b"" | b"." | b".."))
            && (name != b"." || self.kind == b'5');
        is_plain.then(|| CanonicalMember {
            name: name.get(2..).unwrap_or_default().to_vec(),
            is_link: matches!(self.kind, b'1' | b'2'),
        })
    }
}

/// What is before the first NUL, behind which there is nothing else.
fn text(field: &[u8]) -> Option<&[u8]> {
    let end = { field.iter().position(|byte| *byte == 0) }.unwrap_or(field.len());
    let (text, rest) = field.split_at(end);
    rest.iter().all(|byte| *byte == 0).then_some(text)
}

/// Octal digits that fill the field but for a NUL; or, if it is too large for that, binary.
fn number(field: &[u8]) -> Option<u64> {
    if let [0x80, binary @ ..] = field {
        let (above, last) = binary.split_at(binary.len().checked_sub(8)?);
        let last: [u8; 8] = last.try_into().ok()?;
        return (above.iter().all(|byte| *byte == 0)).then_some(u64::from_be_bytes(last));
    }
    let (end, digits) = field.split_last()?;
    let is_octal = *end == 0 && digits.iter().all(|it| matches!(it, b'0'..=b'7'));
    let digits = std::str::from_utf8(digits).ok().filter(|_| is_octal)?;
    u64::from_str_radix(digits, 8).ok()
}

/// Reads what follows the header of a sparse file, whose pieces are `size` bytes: each but the last is of whole blocks, as tar
/// reads each from a block of its own.
fn read_sparse_map(tar: &mut impl Read, header: &[u8; BLOCK], size: u64) -> Option<()> {
    let is_rest_zero = header[345..386] == [0; 41] && header[495..] == [0; 17];
    let real = number(&header[483..495]).filter(|_| is_rest_zero)?;
    let mut map = SparseMap::default();
    map.add(&header[386..482])?;
    let mut more = header[482];
    while more == 1 {
        let block = read_block(tar)?;
        map.add(&block[..504])?;
        more = block[504];
        if block[505..] != [0; 7] {
            return None;
        }
    }
    (more == 0 && map.bytes == size && map.end <= real).then_some(())
}

#[derive(Default)]
struct SparseMap {
    bytes: u64,
    end: u64,
    has_ended: bool,
}

impl SparseMap {
    fn add(&mut self, pieces: &[u8]) -> Option<()> {
        for piece in pieces.chunks_exact(24) {
            if piece.iter().all(|byte| *byte == 0) {
                self.has_ended = true;
                continue;
            }
            let (offset, bytes) = (number(&piece[..12])?, number(&piece[12..])?);
            let is_after =
                !self.has_ended && offset >= self.end && self.bytes.is_multiple_of(BLOCK as u64);
            // The last one may be empty, and says how long the file is.
            self.bytes = self.bytes.checked_add(bytes)?;
            self.end = offset.checked_add(bytes)?;
            if !is_after && bytes > 0 || self.has_ended {
                return None;
            }
        }
        Some(())
    }
}

fn read_long(tar: &mut impl Read, header: &Header) -> Option<Vec<u8>> {
    let is_long = header.name == b"././@LongLink" && header.size <= LONGEST_NAME;
    let size = usize::try_from(header.size).ok().filter(|_| is_long)?;
    let mut data = vec![0; size.next_multiple_of(BLOCK)];
    tar.read_exact(&mut data).ok()?;
    let (name, rest) = data.split_at(size.checked_sub(1)?);
    let is_one = !name.contains(&0) && rest.iter().all(|byte| *byte == 0);
    is_one.then(|| name.to_vec())
}

fn read_block(tar: &mut impl Read) -> Option<[u8; BLOCK]> {
    let mut block = [0; BLOCK];
    tar.read_exact(&mut block).ok()?;
    Some(block)
}

fn skip(tar: &mut impl Read, bytes: u64) -> Option<()> {
    let skipped = std::io::copy(&mut tar.take(bytes), &mut std::io::sink());
    (skipped.ok()? == bytes).then_some(())
}

fn is_zero_to_its_end(mut tar: impl Read) -> bool {
    let mut piece = [0; BLOCK];
    loop {
        match tar.read(&mut piece) {
            Ok(0) => return true,
            Ok(read) if piece[..read].iter().all(|byte| *byte == 0) => {}
            Ok(_) => return false,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
}
