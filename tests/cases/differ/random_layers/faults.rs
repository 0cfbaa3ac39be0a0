//! Headers that are none to Go's archive/tar: containerd refuses the layer, and so must we.
//!
//! Fields as layer/src/tar_header.rs draws them.

use proptest::prelude::*;

/// What is wrong with the header of one entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// The field at an offset is no number.
    Number(usize, &'static [u8]),
    /// The same where star has times.
    StarTime(usize, &'static [u8]),
    NegativeSize,
    Checksum,
    /// A record whose value is none.
    Record(&'static str, &'static [u8]),
    /// Behind the records there are none.
    Body(&'static [u8]),
    /// A global header before the entry that does not consist of records.
    GlobalBody(&'static [u8]),
    /// The map of a sparse file goes beyond its end.
    SparseMap,
}

impl Fault {
    pub(super) fn any() -> impl Strategy<Value = Self> {
        use prop::sample::select;
        let numbers: Vec<&[u8]> = vec![
            b"0000008\0",
            b"1 7\0\0\0\0\0",
            b"17 \0\x0017\0",
            b"-000017\0",
            b"0000x17\0",
            b"17\n\0\0\0\0\0",
        ];
        // mode, uid, gid, size, mtime, major, minor
        let fields = select(vec![100, 108, 116, 124, 136, 329, 337]);
        let records: Vec<(&str, &[u8])> = vec![
            ("uid", b"x"),
            ("gid", b"1.5"),
            ("size", b"1 "),
            ("mtime", b"1e9"),
            ("mtime", b"1.-5"),
            ("atime", b".5"),
            ("ctime", b"now"),
            ("path", b"a\0b"),
            ("linkpath", b"\0"),
            ("uname", b"a\0"),
            ("a\0b", b"c"),
            ("GNU.sparse.numbytes", b"1"),
            ("GNU.sparse.map", b"0,1"),
        ];
        let bodies: Vec<&[u8]> = vec![b"x", b"6 a.b\n", b"99 a=b\n", b"4 a\n", b"6 =ab\n"];
        prop_oneof![
            4 => (fields, select(numbers.clone())).prop_map(|(at, text)| Self::Number(at, text)),
            1 => (select(vec![476, 488]), select(numbers))
                .prop_map(|(at, text)| Self::StarTime(at, text)),
            1 => Just(Self::NegativeSize),
            1 => Just(Self::Checksum),
            4 => select(records).prop_map(|(key, value)| Self::Record(key, value)),
            2 => select(bodies.clone()).prop_map(Self::Body),
            1 => select(bodies).prop_map(Self::GlobalBody),
            1 => Just(Self::SparseMap),
        ]
    }

    /// Records that are to be the last ones.
    pub(super) fn records(self) -> Vec<(String, Vec<u8>)> {
        let records: &[(&str, &[u8])] = match self {
            Self::Record(key, value) => &[(key, value)],
            Self::SparseMap => &[
                ("GNU.sparse.major", b"0"),
                ("GNU.sparse.minor", b"1"),
                ("GNU.sparse.numblocks", b"1"),
                ("GNU.sparse.map", b"5,1"),
                ("GNU.sparse.size", b"3"),
            ],
            _ => &[],
        };
        let owned = records.iter();
        owned
            .map(|(key, value)| ((*key).to_owned(), value.to_vec()))
            .collect()
    }

    /// Writes over fields of a header that is not summed yet.
    pub(super) fn write_over(self, block: &mut [u8]) {
        match self {
            Self::Number(at, text) | Self::StarTime(at, text) => {
                let len = if matches!(at, 124 | 136 | 476 | 488) {
                    12
                } else {
                    8
                };
                block[at..at + len].fill(0);
                block[at..at + text.len()].copy_from_slice(text);
            }
            Self::NegativeSize => block[124..136].fill(0xff),
            _ => {}
        }
    }
}
