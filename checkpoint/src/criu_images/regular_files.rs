//! `files.img`: files and directories that a restore opens again by their paths.
//!
//! ```text
//! file_entry      3 reg: reg_file_entry (files_image)
//! reg_file_entry  6 name, absolute in the container  8 size  10 mode
//!                 11 build-id  12 to 14 checksum and how it was made
//! ```
//!
//! CRIU opens the file at `name` and compares what it finds with size, mode, build-id and checksum. Where the
//! file of the new container has another place, or is another one there, the entry has to say so.

use std::path::Path;

use prost::Message as _;

use super::ImageError;
use super::files_image::{self, OfKind};
use super::strict::{edit_submessage, set_varints, submessage};

/// What a file is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundFile {
    /// Its path in the container.
    pub name: String,
    /// Its length in bytes.
    pub size: u64,
    /// Its type and its rights, as in `stat`.
    pub mode: u32,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct Mode {
    #[prost(uint32, optional, tag = "10")]
    mode: Option<u32>,
}

const REGULAR: OfKind = OfKind {
    kind: 1,
    entry: 3,
    repeated: &IDENTITY,
};
const NAME: u64 = 6;
const SIZE: u64 = 8;
const MODE: u64 = 10;
/// What else tells a file from another one.
pub(super) const IDENTITY: [u64; 4] = [11, 12, 13, 14];

/// Asks `find` about each file, by its path in the container, and writes what it answers into the images of
/// `dir`. A file that it says nothing of is as it was.
///
/// # Errors
/// The image cannot be read or replaced, or `find` fails.
pub fn find_again<E: From<ImageError>>(
    dir: &Path,
    mut find: impl FnMut(&str) -> Result<Option<FoundFile>, E>,
) -> Result<(), E> {
    edit(dir, |name, file| {
        Ok(find(name)?.map(|found| found.put_into(file)))
    })
}

/// Type and rights of the file at `path` in the container, when a process has it open or for its root.
///
/// # Errors
/// The image cannot be read.
pub fn mode_of(dir: &Path, path: &str) -> Result<Option<u32>, ImageError> {
    let mut found = None;
    edit::<ImageError>(dir, |name, file| {
        if name == path {
            found = Mode::decode(file).ok().and_then(|it| it.mode);
        }
        Ok(None)
    })?;
    Ok(found)
}

/// Makes type and rights of the file at `path` those of the one that a restore will find there.
///
/// # Errors
/// The image cannot be read or replaced.
pub fn set_mode(dir: &Path, path: &str, mode: u32) -> Result<(), ImageError> {
    edit(dir, |name, file| {
        Ok((name == path).then(|| set_varints(file, MODE, &[mode.into()])))
    })
}

/// Changes the entries of files that `change`, which gets their paths, gives new ones for.
fn edit<E: From<ImageError>>(
    dir: &Path,
    mut change: impl FnMut(&str, &[u8]) -> Result<Option<Vec<u8>>, E>,
) -> Result<(), E> {
    files_image::edit(dir, &REGULAR, |file| {
        let name = submessage(file, NAME).unwrap_or_default();
        std::str::from_utf8(name).map_or(Ok(None), |name| change(name, file))
    })
}

impl FoundFile {
    fn put_into(&self, file: &[u8]) -> Vec<u8> {
        let mut file = edit_submessage(file, NAME, |_| self.name.clone().into_bytes());
        file = set_varints(&file, SIZE, &[self.size]);
        file = set_varints(&file, MODE, &[self.mode.into()]);
        for field in IDENTITY {
            file = set_varints(&file, field, &[]);
        }
        file
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Image, Kind};
    use super::*;

    #[derive(Clone, PartialEq, prost::Message)]
    struct Whole {
        #[prost(uint32, required, tag = "1")]
        kind: u32,
        #[prost(uint32, required, tag = "2")]
        id: u32,
        #[prost(message, optional, tag = "3")]
        reg: Option<Reg>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    struct Reg {
        #[prost(uint32, required, tag = "1")]
        id: u32,
        #[prost(uint64, required, tag = "3")]
        pos: u64,
        #[prost(string, required, tag = "6")]
        name: String,
        #[prost(uint64, optional, tag = "8")]
        size: Option<u64>,
        #[prost(uint32, optional, tag = "10")]
        mode: Option<u32>,
        #[prost(uint32, repeated, packed = "false", tag = "11")]
        build_id: Vec<u32>,
    }

    fn entry(kind: u32, name: &str) -> Whole {
        Whole {
            kind,
            id: 7,
            reg: Some(Reg {
                id: 7,
                pos: 3,
                name: name.into(),
                size: Some(5),
                mode: Some(0o100_644),
                build_id: vec![1, 2],
            }),
        }
    }

    #[test]
    fn a_file_has_its_new_place_and_all_others_are_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("files.img");
        let all = [
            entry(1, "/etc/cfg/..1/key"),
            entry(1, "/bin/sh"),
            entry(4, "/etc/cfg/..1/key"),
        ];
        let mut body = Vec::new();
        for entry in &all {
            super::super::push_entry(&mut body, entry);
        }
        Image::new(&path, Kind::Files, body).replace(&path).unwrap();
        find_again::<ImageError>(dir.path(), |name| {
            Ok((name == "/etc/cfg/..1/key").then(|| FoundFile {
                name: "/etc/cfg/..2/key".into(),
                size: 9,
                mode: 0o100_600,
            }))
        })
        .unwrap();
        let image = Image::read(&path, Kind::Files).unwrap();
        let mut entries = image.entries();
        let mut next = || entries.next::<Whole>().unwrap().unwrap();
        let moved = next().reg.unwrap();
        assert_eq!((moved.name.as_str(), moved.pos), ("/etc/cfg/..2/key", 3));
        assert_eq!((moved.size, moved.mode), (Some(9), Some(0o100_600)));
        assert!(moved.build_id.is_empty());
        assert_eq!([next(), next()], all[1..]);
        assert_eq!(mode_of(dir.path(), "/bin/sh").unwrap(), Some(0o100_644));
        assert_eq!(mode_of(dir.path(), "/").unwrap(), None);
        set_mode(dir.path(), "/bin/sh", 0o100_555).unwrap();
        assert_eq!(mode_of(dir.path(), "/bin/sh").unwrap(), Some(0o100_555));
    }
}
