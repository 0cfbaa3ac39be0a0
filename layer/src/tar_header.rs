//! One header block of a tar, as Go's archive/tar reads it, and so containerd: each number in it must be one,
//! also those that nobody asks for.
//!
//! ```text
//!   0 name[100]  100 mode[8]  108 uid[8]  116 gid[8]  124 size[12]  136 mtime[12]  148 checksum[8]
//! 156 type       157 linkname[100]        257 magic[6] version[2]
//! 329 major[8]   337 minor[8]             345 prefix[155]   (path = prefix "/" name)
//!
//! "ustar\0", any version   POSIX
//!   and "tar\0" at 508     star: 345 prefix[131]  476 atime[12]  488 ctime[12]
//! "ustar " and " \0"       GNU: no prefix, 345 atime[12]  357 ctime[12]; type 'S' as in tar_read.rs
//! all else                 the seventh edition's: nothing behind linkname
//! ```
//!
//! A number is octal text between NULs and spaces, or, when the first byte has its high bit set, big-endian
//! base 256.

/// Size of a header, and what data is padded to.
pub(crate) const BLOCK: usize = 512;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeaderFormat {
    V7,
    Ustar,
    Star,
    Gnu,
}

impl HeaderFormat {
    fn of(block: &[u8; BLOCK]) -> Self {
        match &block[257..263] {
            b"ustar\0" if block[508..512] == *b"tar\0" => Self::Star,
            b"ustar\0" => Self::Ustar,
            b"ustar " if block[263..265] == *b" \0" => Self::Gnu,
            _ => Self::V7,
        }
    }
}

#[derive(Debug)]
pub(crate) struct TarHeader<'b> {
    pub(crate) block: &'b [u8; BLOCK],
    pub(crate) format: HeaderFormat,
    /// The part of the path in front of the name.
    pub(crate) prefix: &'b [u8],
    pub(crate) mode: i64,
    pub(crate) uid: i64,
    pub(crate) gid: i64,
    pub(crate) size: i64,
    pub(crate) mtime: i64,
    /// Where the format has one.
    pub(crate) atime: Option<i64>,
    /// Major and minor number; zeros where the format has none.
    pub(crate) device: (i64, i64),
}

impl<'b> TarHeader<'b> {
    /// Reads a block; an error says what is wrong with it.
    pub(crate) fn read(block: &'b [u8; BLOCK]) -> Result<Self, &'static str> {
        if !has_right_sum(block) {
            return Err("a header has a wrong checksum, or this is no tar");
        }
        let number = |at: usize, len: usize| {
            parse_number(&block[at..at + len]).ok_or("a number in a header is none")
        };
        let format = HeaderFormat::of(block);
        let mut header = Self {
            block,
            format,
            prefix: &[],
            mode: number(100, 8)?,
            uid: number(108, 8)?,
            gid: number(116, 8)?,
            size: number(124, 12)?,
            mtime: number(136, 12)?,
            atime: None,
            device: (0, 0),
        };
        if format != HeaderFormat::V7 {
            header.device = (number(329, 8)?, number(337, 8)?);
        }
        match format {
            HeaderFormat::V7 => {}
            HeaderFormat::Ustar => header.prefix = until_nul(&block[345..500]),
            HeaderFormat::Star => {
                header.prefix = until_nul(&block[345..476]);
                header.atime = Some(number(476, 12)?);
                number(488, 12)?;
            }
            HeaderFormat::Gnu if has_gnu_times(block) => {
                header.atime = parse_number(&block[345..357]).filter(|_| block[345] != 0);
            }
            HeaderFormat::Gnu => header.prefix = prefix_in_gnu_times(block),
        }
        Ok(header)
    }

    pub(crate) fn type_flag(&self) -> u8 {
        self.block[156]
    }

    /// Whether its type has no data, whatever the size field says.
    pub(crate) fn is_without_data(&self) -> bool {
        matches!(self.type_flag(), b'1'..=b'6')
    }

    pub(crate) fn name(&self) -> &'b [u8] {
        until_nul(&self.block[..100])
    }

    pub(crate) fn link(&self) -> &'b [u8] {
        until_nul(&self.block[157..257])
    }
}

/// Whether the times of a GNU header are some, or left out.
fn has_gnu_times(block: &[u8; BLOCK]) -> bool {
    let is_time = |field: &[u8]| field[0] == 0 || parse_number(field).is_some();
    is_time(&block[345..357]) && is_time(&block[357..369])
}

/// Go before 1.8 (Docker's layers until 2017) wrote a prefix into GNU headers, where their times are. Go reads
/// it when those are no times.
fn prefix_in_gnu_times(block: &[u8; BLOCK]) -> &[u8] {
    let prefix = until_nul(&block[345..500]);
    match prefix.is_ascii() {
        true => prefix,
        false => &[],
    }
}

fn has_right_sum(block: &[u8; BLOCK]) -> bool {
    let outside = block[..148].iter().chain(&block[156..]);
    // Some old tars summed signed bytes.
    let (mut unsigned, mut signed) = (8 * 32, 8 * 32);
    for byte in outside {
        unsigned += i64::from(*byte);
        signed += i64::from(byte.cast_signed());
    }
    parse_octal(&block[148..156]).is_some_and(|told| told == unsigned || told == signed)
}

pub(crate) fn until_nul(field: &[u8]) -> &[u8] {
    let len = field
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(field.len());
    &field[..len]
}

/// Reads a field of at most 12 bytes.
pub(crate) fn parse_number(field: &[u8]) -> Option<i64> {
    let (first, rest) = field.split_first()?;
    if first & 0x80 == 0 {
        return parse_octal(field);
    }
    // Two's complement over all bits but the marker.
    let negative = first & 0x40 != 0;
    let start = i128::from(first & 0x3f) - if negative { 0x40 } else { 0 };
    let mut number = start;
    for byte in rest {
        number = number.checked_mul(256)? + i128::from(*byte);
    }
    i64::try_from(number).ok()
}

fn parse_octal(field: &[u8]) -> Option<i64> {
    let is_filling = |byte: &u8| matches!(byte, 0 | b' ');
    let Some(start) = field.iter().position(|byte| !is_filling(byte)) else {
        return Some(0);
    };
    let end = field.iter().rposition(|byte| !is_filling(byte))? + 1;
    // 12 digits are 36 bits.
    let mut digits = until_nul(&field[start..end]).iter();
    digits.try_fold(0, |number: i64, byte| match byte {
        b'0'..=b'7' => Some(number << 3 | i64::from(byte - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_that_go_reads() {
        for (field, number) in [
            (&b"0000017\0"[..], Some(15)),
            (b"    17 \0", Some(15)),
            (b"\0\0 17 \0 ", Some(15)),
            (b"17\0 99\0\0", Some(15)),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"\x80\0\0\0\0\0\x01\0", Some(256)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2)),
            (b"17 \0\x0017\0", None),
            (b"0000018\0", None),
            (b"1 7\0\0\0\0\0", None),
            (b"17\n\0\0\0\0\0", None),
            (b"-17\0\0\0\0\0", None),
            (b"+17\0\0\0\0\0", None),
            (b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
        ] {
            assert_eq!(parse_number(field), number, "{field:?}");
        }
    }
}
