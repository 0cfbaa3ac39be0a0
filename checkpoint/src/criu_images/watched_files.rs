//! `files.img`: the files that inotify and fanotify watch, as far as CRIU knows their paths.
//!
//! ```text
//! file_entry            1 type: 8 (INOTIFY)   13 ify: inotify_file_entry
//!                               12 (FANOTIFY) 14 ffy: fanotify_file_entry (files_image)
//! inotify_file_entry    5 wd (repeated): inotify_wd_entry        7 f_handle
//! fanotify_file_entry   6 mark (repeated): fanotify_mark_entry   7 ie: fanotify_inode_mark_entry  2 f_handle
//! fh_entry              3 handle (repeated)  4 path, absolute in the container
//! ```
//!
//! CRIU watches what is at the path, where it has one; a handle is of the file that was watched.

use std::path::Path;

use super::ImageError;
use super::files_image::{self, OfKind};
use super::strict::{edit_submessage, edit_submessages, submessage};

/// The submessages that lead to the handles of a kind.
struct Watches {
    of: OfKind,
    way: &'static [u64],
}

const WATCHES: [Watches; 2] = [
    Watches {
        of: OfKind {
            kind: 8,
            entry: 13,
            repeated: &[5],
        },
        way: &[5, 7],
    },
    Watches {
        of: OfKind {
            kind: 12,
            entry: 14,
            repeated: &[6],
        },
        way: &[6, 7, 2],
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
    for watches in &WATCHES {
        files_image::edit(dir, &watches.of, |entry| -> Result<_, E> {
            let edited = rename(entry, watches.way, &mut find)?;
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
    use super::super::strict::set_varints;
    use super::super::{Image, Kind, push_bytes};
    use super::*;

    fn within(number: u64, inner: &[u8]) -> Vec<u8> {
        edit_submessage(&[], number, |_| inner.to_vec())
    }

    #[test]
    fn each_path_is_asked_about() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("files.img");
        let handle = |path: Option<&str>| {
            let handle = set_varints(&[], 3, &[1, 2, 3]);
            let path = path.map(|path| within(PATH, path.as_bytes()));
            [handle, path.unwrap_or_default()].concat()
        };
        let inotify = |paths: &[Option<&str>]| {
            let watches = paths.iter().map(|path| {
                let watch = [set_varints(&[], 6, &[1]), within(7, &handle(*path))].concat();
                within(5, &watch)
            });
            let entry = watches.collect::<Vec<_>>().concat();
            [set_varints(&[], 1, &[8]), within(13, &entry)].concat()
        };
        let fanotify = |path: &str| {
            let mark = within(7, &within(2, &handle(Some(path))));
            [set_varints(&[], 1, &[12]), within(14, &within(6, &mark))].concat()
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
