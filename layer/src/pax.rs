//! The records of a PAX extended header (POSIX.1-2001, pax Interchange Format), written and read.
//!
//! ```text
//! "<len> <key>=<value>\n" ...     len is decimal and counts the whole record, itself included
//!
//! path linkpath        name and link target, any bytes but NUL
//! size uid gid         decimal, where the header's octal field is too small
//! mtime (atime: read)  decimal seconds with a fraction, may be negative
//! hdrcharset           BINARY: names here are bytes, not UTF-8
//! GNU.sparse.*         see sparse.rs
//! TRANSSHIP.names      see layer_format.rs
//! SCHILY.xattr.<name>  extended attribute, raw value; what GNU tar, libarchive, Go and containerd use
//! ```
//!
//! The key ends at the first `=`, so GNU tar writes `=` in an attribute's name as `%3D` and `%` as
//! `%25`. Go (and with it containerd) writes and reads names as they are and cannot have a `=`. We
//! encode only where a plain name would be misread, so that both agree on every usual name.

use crate::inode_attributes::Timestamp;

/// Prefix of the records that carry extended attributes.
pub(crate) const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// Largest PAX header that is written or read. Go's archive/tar, which containerd, Docker, podman
/// and umoci read layers with, refuses more than this (`maxSpecialFileSize`).
pub(crate) const MAX_PAX_BYTES: usize = 1 << 20;

/// A number as decimal digits, on the stack: every entry has some.
pub(crate) struct Decimal {
    digits: [u8; 20],
    start: usize,
}

impl Decimal {
    pub(crate) fn new(mut number: u64) -> Self {
        let mut decimal = Decimal {
            digits: [b'0'; 20],
            start: 20,
        };
        loop {
            decimal.start -= 1;
            decimal.digits[decimal.start] = b'0' + (number % 10).to_le_bytes()[0];
            number /= 10;
            if number == 0 {
                return decimal;
            }
        }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.digits[self.start..]
    }
}

/// Appends one record.
pub(crate) fn push_record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let digits_of = |len: usize| Decimal::new(len as u64).as_bytes().len();
    let mut len = rest + digits_of(rest);
    if digits_of(len) != digits_of(rest) {
        len = rest + digits_of(len);
    }
    records.extend_from_slice(Decimal::new(len as u64).as_bytes());
    records.push(b' ');
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

/// Appends an extended attribute.
pub(crate) fn push_xattr(records: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    let mut key = XATTR_PREFIX.to_vec();
    let ambiguous = name.contains(&b'=')
        || name
            .windows(3)
            .any(|window| window == b"%3D" || window == b"%25");
    for byte in name {
        match byte {
            b'=' if ambiguous => key.extend_from_slice(b"%3D"),
            b'%' if ambiguous => key.extend_from_slice(b"%25"),
            byte => key.push(*byte),
        }
    }
    push_record(records, &key, value);
}

/// Name of an extended attribute from the part of the key behind the prefix.
pub(crate) fn decode_xattr_name(encoded: &[u8]) -> Vec<u8> {
    let mut name = Vec::with_capacity(encoded.len());
    let mut rest = encoded;
    while let Some((&byte, tail)) = rest.split_first() {
        if rest.starts_with(b"%3D") {
            name.push(b'=');
            rest = &rest[3..];
        } else if rest.starts_with(b"%25") {
            name.push(b'%');
            rest = &rest[3..];
        } else {
            name.push(byte);
            rest = tail;
        }
    }
    name
}

/// A time as decimal seconds: `-1.5` is one and a half seconds before 1970.
pub(crate) fn format_time(time: Timestamp) -> TimeText {
    let (is_negative, whole, nanos) = if time.secs < 0 && time.nanos > 0 {
        (
            true,
            (time.secs + 1).unsigned_abs(),
            1_000_000_000 - time.nanos,
        )
    } else {
        (time.secs < 0, time.secs.unsigned_abs(), time.nanos)
    };
    let mut text = TimeText {
        bytes: [0; 31],
        len: 0,
    };
    if is_negative {
        text.push(b"-");
    }
    text.push(Decimal::new(whole).as_bytes());
    if nanos > 0 {
        // A leading one keeps the zeros behind the point.
        let fraction = Decimal::new(1_000_000_000 + u64::from(nanos));
        let digits = &fraction.as_bytes()[1..];
        let len = digits
            .iter()
            .rposition(|digit| *digit != b'0')
            .map_or(0, |last| last + 1);
        text.push(b".");
        text.push(&digits[..len]);
    }
    text
}

/// A decimal time, on the stack.
pub(crate) struct TimeText {
    bytes: [u8; 31],
    len: usize,
}

impl TimeText {
    fn push(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// Reads a decimal time; digits beyond nanoseconds are cut off. None when it is none.
pub(crate) fn parse_time(text: &[u8]) -> Option<Timestamp> {
    let (negative, text) = match text {
        [b'-', rest @ ..] => (true, rest),
        // As Go reads it.
        [b'+', rest @ ..] => (false, rest),
        _ => (false, text),
    };
    let (whole, fraction) = match text.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&text[..dot], &text[dot + 1..]),
        None => (text, &text[..0]),
    };
    let whole = parse_decimal(whole)?;
    let secs = match negative {
        false => 0_i64.checked_add_unsigned(whole)?,
        true => 0_i64.checked_sub_unsigned(whole)?,
    };
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let mut nanos = 0u32;
    for position in 0..9 {
        nanos = nanos * 10 + u32::from(fraction.get(position).map_or(0, |digit| digit - b'0'));
    }
    if !negative || nanos == 0 {
        return Some(Timestamp { secs, nanos });
    }
    Some(match secs.checked_sub(1) {
        Some(secs) => Timestamp {
            secs,
            nanos: 1_000_000_000 - nanos,
        },
        // No time is earlier, and Go takes the record.
        None => Timestamp { secs, nanos: 0 },
    })
}

/// Reads decimal digits, perhaps behind a sign, as Go does.
pub(crate) fn parse_integer(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Reads decimal digits and nothing else.
fn parse_decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Splits the body of a PAX header into (key, value); an item is None where the body is malformed for Go,
/// after which the iteration ends.
pub(crate) fn records(body: &[u8]) -> impl Iterator<Item = Option<(&[u8], &[u8])>> {
    let mut rest = body;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let record = split_record(rest);
        rest = match record {
            Some((_, _, tail)) => tail,
            None => &[],
        };
        Some(record.map(|(key, value, _)| (key, value)))
    })
}

fn split_record(body: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = body.iter().take(20).position(|byte| *byte == b' ')?;
    let len = usize::try_from(parse_integer(&body[..space])?).ok()?;
    if len <= space + 2 || len > body.len() {
        return None;
    }
    let record = body[space + 1..len].strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    let (key, value) = (&record[..equals], &record[equals + 1..]);
    let without_nul = match key {
        b"path" | b"linkpath" | b"uname" | b"gname" => value,
        key => key,
    };
    if key.is_empty() || without_nul.contains(&0) {
        return None;
    }
    Some((key, value, &body[len..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn record_length_counts_itself_across_a_digit_boundary() {
        for value_len in 0..1200 {
            let mut body = Vec::new();
            push_record(&mut body, b"k", &vec![b'v'; value_len]);
            let space = body.iter().position(|byte| *byte == b' ').unwrap();
            let told: usize = std::str::from_utf8(&body[..space])
                .unwrap()
                .parse()
                .unwrap();
            assert_eq!(told, body.len());
        }
    }

    #[test]
    fn times_are_decimal_also_before_1970() {
        let table = [
            (0, 0, "0"),
            (1, 0, "1"),
            (1, 500_000_000, "1.5"),
            (0, 1, "0.000000001"),
            (-1, 0, "-1"),
            (-1, 999_999_999, "-0.000000001"),
            (-2, 500_000_000, "-1.5"),
            (i64::MAX, 999_999_999, "9223372036854775807.999999999"),
        ];
        for (secs, nanos, text) in table {
            let time = Timestamp { secs, nanos };
            assert_eq!(format_time(time).as_bytes(), text.as_bytes());
            assert_eq!(parse_time(text.as_bytes()), Some(time), "{text}");
        }
        assert_eq!(parse_time(b"+1"), parse_time(b"1"));
        let first = Timestamp {
            secs: i64::MIN,
            nanos: 0,
        };
        for text in ["-9223372036854775808", "-9223372036854775808.5"] {
            assert_eq!(parse_time(text.as_bytes()), Some(first), "{text}");
        }
        for wrong in [
            "",
            "-",
            "+-1",
            "1.x",
            "1e3",
            " 1",
            "9223372036854775808",
            "-9223372036854775809",
            "99999999999999999999",
        ] {
            assert_eq!(parse_time(wrong.as_bytes()), None, "{wrong}");
        }
        assert_eq!(parse_time(b"1.5000000009"), parse_time(b"1.5"));
    }

    #[test]
    fn malformed_bodies_are_told_apart() {
        for wrong in [
            &b"x"[..],
            b"5 a=b",
            b"6 a=b\n!",
            b"99 a=b\n",
            b"4 a\n",
            b"0 a=b\n",
            b"6 a.b\n",
            b"6 =ab\n",
            b"99999999999999999999999 a=b\n",
            b"-6 a=b\n",
            b"9 path=\0\n",
            b"10 gname=\0\n",
            b"6 \0=b\n",
        ] {
            assert!(records(wrong).any(|record| record.is_none()), "{wrong:?}");
        }
        assert_eq!(records(b"6 a=b\n5 c=\n").count(), 2);
        assert!(records(b"+7 a=b\n6 b=\0\n").all(|record| record.is_some()));
    }

    proptest! {
        #[test]
        fn records_read_back(pairs in proptest::collection::vec(
            (proptest::collection::vec(1..=255u8, 1..40), proptest::collection::vec(any::<u8>(), 0..300)), 0..8)) {
            let mut body = Vec::new();
            for (name, value) in &pairs {
                push_xattr(&mut body, name, value);
            }
            let read: Vec<_> = records(&body)
                .map(|record| {
                    let (key, value) = record.unwrap();
                    (decode_xattr_name(key.strip_prefix(XATTR_PREFIX).unwrap()), value.to_vec())
                })
                .collect();
            prop_assert_eq!(read, pairs);
        }

        #[test]
        fn times_read_back(secs in i64::MIN + 2..i64::MAX, nanos in 0u32..1_000_000_000) {
            let time = Timestamp { secs, nanos };
            prop_assert_eq!(parse_time(format_time(time).as_bytes()), Some(time));
        }

        #[test]
        fn any_bytes_end(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(records(&body).count() <= body.len());
        }
    }
}
