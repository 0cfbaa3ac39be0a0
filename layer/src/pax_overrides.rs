//! What a PAX extended header says of the entry that follows, as Go's archive/tar reads it.
//!
//! Of equal keys the last one counts, and no other one is looked at; an empty value leaves what the header
//! says. A value that is none counts against the layer only if an entry follows.
//!
//! The keys are those of pax.rs and sparse.rs.

use crate::contents::CONTENT_KEY;
use crate::inode_attributes::Timestamp;
use crate::layer_format::{LiteralNames, NAMES_KEY};
use crate::pax::{XATTR_PREFIX, decode_xattr_name, parse_integer, parse_time, records};
use crate::sparse::Segment;
use crate::xattrs::{XATTR_MAX, Xattr};

const MALFORMED: &str = "an extended header is malformed";
const NO_MAP: &str = "a sparse map is none";
/// The number of no content, which a checkpoint is refused for; in an image the record means nothing.
const NO_CONTENT: u64 = u64::MAX;

#[derive(Debug, Default)]
pub(crate) struct PaxOverrides {
    pub(crate) path: Option<Vec<u8>>,
    pub(crate) link: Option<Vec<u8>>,
    pub(crate) size: Option<i64>,
    pub(crate) uid: Option<i64>,
    pub(crate) gid: Option<i64>,
    pub(crate) mtime: Option<Timestamp>,
    pub(crate) atime: Option<Timestamp>,
    pub(crate) xattrs: Vec<Xattr>,
    pub(crate) sparse: Option<SparseRecords>,
    pub(crate) literal_names: Option<LiteralNames>,
    pub(crate) content: Option<u64>,
    /// What no entry can have.
    pub(crate) fault: Option<&'static str>,
}

/// The entry is sparse.
#[derive(Debug)]
pub(crate) struct SparseRecords {
    pub(crate) name: Option<Vec<u8>>,
    /// With the holes; negative sizes are left to the one who checks the map.
    pub(crate) size: Option<i64>,
    pub(crate) map: SparseMap,
}

#[derive(Debug)]
pub(crate) enum SparseMap {
    /// Format 1.0.
    BeforeData,
    Told(Vec<Segment>),
}

/// Whether the body of a header that says something of all entries, or of none, consists of records.
pub(crate) fn check_records(body: &[u8]) -> Result<(), &'static str> {
    PaxOverrides::split(body).map(|_| ())
}

type Record<'b> = (&'b [u8], &'b [u8]);

impl PaxOverrides {
    /// Reads the body of a header; an error where it does not consist of records.
    pub(crate) fn read(body: &[u8]) -> Result<Self, &'static str> {
        let (mut records, pieces) = Self::split(body)?;
        records.sort_by_key(|(key, _)| *key);
        let mut overrides = Self::default();
        overrides.fault = overrides.take_all(&records, &pieces).err();
        Ok(overrides)
    }

    /// The records, and apart from them the numbers of a map of format 0.0: there alone equal keys count all.
    fn split(body: &[u8]) -> Result<(Vec<Record<'_>>, Vec<&[u8]>), &'static str> {
        let (mut all, mut pieces) = (Vec::new(), Vec::new());
        for record in records(body) {
            let (key, value) = record.ok_or(MALFORMED)?;
            if !matches!(key, b"GNU.sparse.offset" | b"GNU.sparse.numbytes") {
                all.push((key, value));
                continue;
            }
            // The two keys take turns.
            let is_offset = key == b"GNU.sparse.offset";
            if pieces.len().is_multiple_of(2) != is_offset || value.contains(&b',') {
                return Err(NO_MAP);
            }
            pieces.push(value);
        }
        Ok((all, pieces))
    }

    fn take_all(&mut self, sorted: &[Record<'_>], pieces: &[&[u8]]) -> Result<(), &'static str> {
        let mut sparse = SparseFields::default();
        for (at, (key, value)) in sorted.iter().enumerate() {
            let is_last = sorted.get(at + 1).is_none_or(|(next, _)| next != key);
            if !is_last {
                continue;
            }
            if let Some(encoded) = key.strip_prefix(XATTR_PREFIX) {
                if encoded.is_empty() || value.len() > XATTR_MAX {
                    return Err("an extended attribute is impossible");
                }
                self.xattrs.push(Xattr {
                    name: decode_xattr_name(encoded),
                    value: value.to_vec(),
                });
            } else if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                sparse.note(key, value);
            } else if !value.is_empty() {
                self.take(key, value)?;
            }
        }
        self.sparse = sparse.read(pieces)?;
        Ok(())
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        let number = || parse_integer(value).ok_or("a number in an extended header is none");
        let time = || parse_time(value).ok_or("a time in an extended header is none");
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(number()?),
            b"uid" => self.uid = Some(number()?),
            b"gid" => self.gid = Some(number()?),
            b"mtime" => self.mtime = Some(time()?),
            b"atime" => self.atime = Some(time()?),
            b"ctime" => {
                time()?;
            }
            CONTENT_KEY => {
                let content = parse_integer(value).and_then(|number| u64::try_from(number).ok());
                self.content = Some(content.unwrap_or(NO_CONTENT));
            }
            NAMES_KEY => self.literal_names = LiteralNames::parse(value),
            _ => {}
        }
        Ok(())
    }
}

/// The records whose keys begin with `GNU.sparse.`; what is not there is empty.
#[derive(Debug, Default)]
struct SparseFields<'b> {
    major: &'b [u8],
    minor: &'b [u8],
    name: &'b [u8],
    size: &'b [u8],
    real_size: &'b [u8],
    count: &'b [u8],
    map: &'b [u8],
}

impl<'b> SparseFields<'b> {
    fn note(&mut self, key: &[u8], value: &'b [u8]) {
        match key {
            b"major" => self.major = value,
            b"minor" => self.minor = value,
            b"name" => self.name = value,
            b"size" => self.size = value,
            b"realsize" => self.real_size = value,
            b"numblocks" => self.count = value,
            b"map" => self.map = value,
            _ => {}
        }
    }

    fn read(&self, pieces: &[&[u8]]) -> Result<Option<SparseRecords>, &'static str> {
        let is_before_data = match (self.major, self.minor) {
            (b"0", b"0" | b"1") => false,
            (b"1", b"0") => true,
            (b"", b"") if !pieces.is_empty() || !self.map.is_empty() => false,
            _ => return Ok(None),
        };
        let size = [self.size, self.real_size];
        let size = size.into_iter().find(|size| !size.is_empty());
        let size = size.map(|size| parse_integer(size).ok_or("a size is none"));
        Ok(Some(SparseRecords {
            name: (!self.name.is_empty()).then(|| self.name.to_vec()),
            size: size.transpose()?,
            map: if is_before_data {
                SparseMap::BeforeData
            } else {
                SparseMap::Told(self.told_map(pieces).ok_or(NO_MAP)?)
            },
        }))
    }

    fn told_map(&self, pieces: &[&[u8]]) -> Option<Vec<Segment>> {
        let number = |text: &[u8]| u64::try_from(parse_integer(text)?).ok();
        let numbers = if pieces.is_empty() && !self.map.is_empty() {
            let numbers = self.map.split(|byte| *byte == b',').map(number);
            numbers.collect::<Option<Vec<_>>>()?
        } else {
            pieces.iter().copied().map(number).collect::<Option<_>>()?
        };
        let (pairs, rest) = numbers.as_chunks::<2>();
        if !rest.is_empty() || number(self.count)? != pairs.len() as u64 {
            return None;
        }
        let segments = pairs.iter().map(|[offset, len]| Segment {
            offset: *offset,
            len: *len,
        });
        Some(segments.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pax::push_record;

    fn read(records: &[(&str, &str)]) -> Result<PaxOverrides, &'static str> {
        let mut body = Vec::new();
        for (key, value) in records {
            push_record(&mut body, key.as_bytes(), value.as_bytes());
        }
        PaxOverrides::read(&body)
    }

    #[test]
    fn of_equal_keys_the_last_one_is_looked_at() {
        let overrides = read(&[("uid", "x"), ("uid", "+7"), ("path", "a"), ("path", "")]).unwrap();
        assert_eq!((overrides.uid, overrides.path), (Some(7), None));
        assert_eq!(overrides.fault, None);
        assert!(read(&[("uid", "7"), ("uid", "x")]).unwrap().fault.is_some());
    }

    #[test]
    fn a_sparse_map_is_whole_or_the_entry_is_not_sparse() {
        let pieces = [("offset", "0"), ("numbytes", "5")];
        let with = |more: &[(&str, &str)]| {
            let all = pieces.iter().chain(more);
            let all: Vec<_> = all
                .map(|(key, value)| (format!("GNU.sparse.{key}"), *value))
                .collect();
            let all: Vec<_> = all.iter().map(|(key, value)| (&**key, *value)).collect();
            read(&all)
        };
        let map = |overrides: PaxOverrides| overrides.sparse.map(|sparse| sparse.map);
        let told = with(&[("numblocks", "1")]).unwrap();
        assert_eq!(told.fault, None);
        let Some(SparseMap::Told(segments)) = map(told) else {
            panic!("not sparse");
        };
        assert_eq!(segments, [Segment { offset: 0, len: 5 }]);
        // A version that nobody knows: the data as it is.
        let unknown = with(&[("major", "7"), ("minor", "0")]).unwrap();
        assert!(unknown.fault.is_none() && unknown.sparse.is_none());
        for wrong in [
            &[][..],
            &[("numblocks", "2")],
            &[("numblocks", "1"), ("size", "x")],
        ] {
            assert!(with(wrong).unwrap().fault.is_some(), "{wrong:?}");
        }
        assert!(with(&[("numbytes", "1")]).is_err());
        assert!(with(&[("offset", "1,2")]).is_err());
    }
}
