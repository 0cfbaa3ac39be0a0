//! `files.img`: what is watched with inotify and fanotify.
//!
//! ```text
//! file_entry  1 type: 8      13 ify: 5 wd: inotify_wd_entry  2 i_ino  5 s_dev  7 f_handle
//!                     12     14 ffy: 6 mark: fanotify_mark_entry  6 s_dev  7 ie: 1 i_ino  2 f_handle  8 me: 2 path
//! fh_entry (f_handle)        3 handle  4 path, absolute in the container
//! ```
//!
//! CRIU watches the file that `path` names. Without one it looks for a deleted file that it has made again, by device and
//! inode, and if there is none, opens the handle as root: that is any file of a file system, in whatever part of it the
//! container has.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use super::files_image::{self, OfKind};
use super::strict::{edit_submessage, edit_submessages, parts, submessage};
use super::{Image, ImageError, Kind};

/// What is watched.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Watches {
    /// Files by their paths in the container.
    pub paths: Vec<PathBuf>,
    /// Files without: CRIU's number of the device, and the inode.
    pub inodes: Vec<(u32, u64)>,
}

impl Watches {
    fn add(&mut self, handle: FhEntry, device: u32, inode: u64) {
        match handle.path {
            Some(path) => self.paths.push(OsString::from_vec(path).into()),
            None => self.inodes.push((device, inode)),
        }
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct InotifyWdEntry {
    #[prost(uint64, required, tag = "2")]
    i_ino: u64,
    #[prost(uint32, required, tag = "5")]
    s_dev: u32,
    #[prost(message, required, tag = "7")]
    f_handle: FhEntry,
}

#[derive(Clone, PartialEq, prost::Message)]
struct FanotifyMarkEntry {
    #[prost(uint32, required, tag = "6")]
    s_dev: u32,
    #[prost(message, optional, tag = "7")]
    ie: Option<InodeMark>,
    #[prost(message, optional, tag = "8")]
    me: Option<MountMark>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct InodeMark {
    #[prost(uint64, required, tag = "1")]
    i_ino: u64,
    #[prost(message, required, tag = "2")]
    f_handle: FhEntry,
}

#[derive(Clone, PartialEq, prost::Message)]
struct MountMark {
    #[prost(bytes = "vec", optional, tag = "2")]
    path: Option<Vec<u8>>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct FhEntry {
    #[prost(bytes = "vec", optional, tag = "4")]
    path: Option<Vec<u8>>,
}

const INOTIFY: u64 = 13;
const WDS: u64 = 5;
const WD_HANDLE: u64 = 7;
const FANOTIFY: u64 = 14;
const MARKS: u64 = 6;
const INODE_MARK: u64 = 7;
const MOUNT_MARK: u64 = 8;
const MARK_HANDLE: u64 = 2;
const WORDS: u64 = 3;

/// All that is watched.
///
/// # Errors
/// The image cannot be read or says a thing twice.
pub fn watches(dir: &Path) -> Result<Watches, ImageError> {
    let image = Image::read(&dir.join("files.img"), Kind::Files)?;
    let mut entries = image.entries();
    let mut found = Watches::default();
    while let Some(message) = entries.next_bytes()? {
        for group in parts(&image, message, INOTIFY, &[])? {
            for wd in parts(&image, group, WDS, &[WDS])? {
                check_handles(&image, wd, WD_HANDLE)?;
                let wd: InotifyWdEntry = image.decode(wd)?;
                found.add(wd.f_handle, wd.s_dev, wd.i_ino);
            }
        }
        for group in parts(&image, message, FANOTIFY, &[])? {
            for mark in parts(&image, group, MARKS, &[MARKS])? {
                for inode in parts(&image, mark, INODE_MARK, &[])? {
                    check_handles(&image, inode, MARK_HANDLE)?;
                }
                parts(&image, mark, MOUNT_MARK, &[])?;
                let mark: FanotifyMarkEntry = image.decode(mark)?;
                let path = mark.me.and_then(|mount| mount.path);
                let path = path.map(|path| OsString::from_vec(path).into());
                found.paths.extend(path);
                if let Some(inode) = mark.ie {
                    found.add(inode.f_handle, mark.s_dev, inode.i_ino);
                }
            }
        }
    }
    Ok(found)
}

/// Checks that the handle of a watch says nothing twice.
fn check_handles(image: &Image, watch: &[u8], number: u64) -> Result<(), ImageError> {
    for handle in parts(image, watch, number, &[])? {
        parts(image, handle, WORDS, &[WORDS])?;
    }
    Ok(())
}

/// The submessages that lead to the handles of a kind.
struct Way {
    of: OfKind,
    through: &'static [u64],
}

const WAYS: [Way; 2] = [
    Way {
        of: OfKind {
            kind: 8,
            entry: INOTIFY,
            repeated: &[WDS],
        },
        through: &[WDS, WD_HANDLE],
    },
    Way {
        of: OfKind {
            kind: 12,
            entry: FANOTIFY,
            repeated: &[MARKS],
        },
        through: &[MARKS, INODE_MARK, MARK_HANDLE],
    },
];
const PATH: u64 = 4;

/// Asks `find` about the path of each watched file, and writes what it answers into the images of `dir`. One that it
/// says nothing of is as it was.
///
/// # Errors
/// The image cannot be read or replaced, or `find` fails.
pub fn find_watched_again<E: From<ImageError>>(
    dir: &Path,
    mut find: impl FnMut(&str) -> Result<Option<String>, E>,
) -> Result<(), E> {
    for way in &WAYS {
        files_image::edit(dir, &way.of, |entry| -> Result<_, E> {
            let edited = rename(entry, way.through, &mut find)?;
            Ok((edited != entry).then_some(edited))
        })?;
    }
    Ok(())
}

fn rename<E>(
    message: &[u8],
    way: &[u64],
    find: &mut dyn FnMut(&str) -> Result<Option<String>, E>,
) -> Result<Vec<u8>, E> {
    let Some((next, rest)) = way.split_first() else {
        let path = submessage(message, PATH).and_then(|path| std::str::from_utf8(path).ok());
        return Ok(match path.map(find).transpose()?.flatten() {
            Some(new) => edit_submessage(message, PATH, |_| new.into_bytes()),
            None => message.to_vec(),
        });
    };
    edit_submessages(message, *next, |inner| rename(inner, rest, find).map(Some))
}

#[cfg(test)]
mod tests {
    use super::super::push_bytes;
    use super::super::strict::set_varints;
    use super::*;

    fn within(number: u64, message: Vec<u8>) -> Vec<u8> {
        edit_submessage(&[], number, |_| message)
    }

    #[test]
    fn each_watch_is_for_a_path_or_an_inode() {
        let words = set_varints(&[], WORDS, &[1, 2, 3]);
        let named = [words.clone(), within(4, b"/etc/x".to_vec())].concat();
        let of_inode = |handle: &[u8]| {
            let mark = set_varints(&[], 1, &[9]);
            [mark, within(MARK_HANDLE, handle.to_vec())].concat()
        };
        let wd = |handle: &[u8]| {
            let wd = set_varints(&set_varints(&[], 2, &[9]), 5, &[7]);
            within(WDS, [wd, within(WD_HANDLE, handle.to_vec())].concat())
        };
        let mark = |kind: u64, part: Vec<u8>| {
            let mark = set_varints(&[], 6, &[7]);
            within(MARKS, [mark, within(kind, part)].concat())
        };
        let marks = [
            mark(INODE_MARK, of_inode(&words)),
            mark(MOUNT_MARK, within(2, b"/mnt".to_vec())),
        ];
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("files.img");
        let write = |entries: &[Vec<u8>]| {
            let mut body = Vec::new();
            { entries.iter() }.for_each(|entry| push_bytes(&mut body, entry));
            Image::new(&path, Kind::Files, body).replace(&path).unwrap();
        };
        write(&[
            within(INOTIFY, [wd(&named), wd(&words)].concat()),
            within(FANOTIFY, marks.concat()),
        ]);
        let found = watches(dir.path()).unwrap();
        assert_eq!(found.paths, ["/etc/x", "/mnt"].map(PathBuf::from));
        assert_eq!(found.inodes, [(7, 9), (7, 9)]);
        let twice = [named.clone(), named].concat();
        write(&[within(INOTIFY, wd(&twice))]);
        let found = watches(dir.path());
        assert!(
            matches!(found, Err(ImageError::Ambiguous { .. })),
            "{found:?}"
        );
    }

    #[test]
    fn each_path_is_asked_about() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("files.img");
        let handle = |path: Option<&str>| {
            let handle = set_varints(&[], 3, &[1, 2, 3]);
            let path = path.map(|path| within(PATH, path.as_bytes().to_vec()));
            [handle, path.unwrap_or_default()].concat()
        };
        let inotify = |paths: &[Option<&str>]| {
            let watches = paths.iter().map(|path| {
                let watch = [set_varints(&[], 6, &[1]), within(7, handle(*path))].concat();
                within(5, watch)
            });
            let entry = watches.collect::<Vec<_>>().concat();
            [set_varints(&[], 1, &[8]), within(13, entry)].concat()
        };
        let fanotify = |path: &str| {
            let mark = within(7, within(2, handle(Some(path))));
            [set_varints(&[], 1, &[12]), within(14, within(6, mark))].concat()
        };
        let write = |messages: &[Vec<u8>]| {
            let mut body = Vec::new();
            { messages.iter() }.for_each(|message| push_bytes(&mut body, message));
            Image::new(&path, Kind::Files, body).replace(&path).unwrap();
        };
        write(&[
            inotify(&[Some("/a"), None, Some("/b")]),
            fanotify("/a"),
            set_varints(&[], 1, &[1]),
        ]);
        let mut asked = Vec::new();
        find_watched_again::<ImageError>(dir.path(), |name| {
            asked.push(name.to_owned());
            Ok((name == "/a").then(|| "/a/longer".to_owned()))
        })
        .unwrap();
        assert_eq!(asked, ["/a", "/b", "/a"]);
        let found = std::fs::read(&path).unwrap();
        write(&[
            inotify(&[Some("/a/longer"), None, Some("/b")]),
            fanotify("/a/longer"),
            set_varints(&[], 1, &[1]),
        ]);
        assert_eq!(found, std::fs::read(&path).unwrap());
    }
}
