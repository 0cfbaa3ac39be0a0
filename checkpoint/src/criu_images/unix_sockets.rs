//! `files.img`: the names that unix sockets are bound to.
//!
//! ```text
//! file_entry     16 usk: unix_sk_entry
//! unix_sk_entry  2 inode  11 name, as in sun_path, perhaps with NULs at its end  15 deleted
//! ```
//!
//! The name is the one of `bind`. Who has renamed the file since then, or has linked another name to it and removed the
//! first, as supervisord does, would find the socket under the name of `bind` again, or nowhere.

use std::path::Path;

use prost::Message as _;

use super::ImageError;
use super::files_image::{self, OfKind};
use super::strict::{edit_submessage, set_varints, submessage};

const UNIX: OfKind = OfKind {
    kind: 5,
    entry: 16,
    repeated: &[],
};
const NAME: u64 = 11;
const DELETED: u64 = 15;
/// Length of `sun_path`, with a NUL at the end.
const LONGEST: usize = 108;

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct Inode {
    #[prost(uint32, required, tag = "2")]
    inode: u32,
}

/// Asks `find` about each socket that is bound to an absolute path, by its inode and that path, and writes the path that
/// it answers into the images of `dir`. A socket that it says nothing of is as it was, and so is one whose new path is
/// too long for an address.
///
/// # Errors
/// The image cannot be read or replaced.
pub fn rename(
    dir: &Path,
    mut find: impl FnMut(u32, &[u8]) -> Option<Vec<u8>>,
) -> Result<(), ImageError> {
    files_image::edit(dir, &UNIX, |socket| {
        let name = submessage(socket, NAME).unwrap_or_default();
        let end = name.iter().rposition(|byte| *byte != 0);
        let path = &name[..end.map_or(0, |at| at + 1)];
        if !path.starts_with(b"/") {
            return Ok(None);
        }
        let Ok(Inode { inode }) = Inode::decode(socket) else {
            return Ok(None);
        };
        let nuls = name.len() - path.len();
        let found = find(inode, path).filter(|new| new.len() < LONGEST);
        Ok(found.map(|mut new| {
            new.resize(new.len() + nuls, 0);
            set_varints(&edit_submessage(socket, NAME, |_| new), DELETED, &[])
        }))
    })
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
        #[prost(message, optional, tag = "16")]
        usk: Option<Usk>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    struct Usk {
        #[prost(uint32, required, tag = "1")]
        id: u32,
        #[prost(uint32, required, tag = "2")]
        ino: u32,
        #[prost(bytes = "vec", required, tag = "11")]
        name: Vec<u8>,
        #[prost(bool, optional, tag = "15")]
        deleted: Option<bool>,
    }

    fn write(dir: &Path, sockets: &[(u32, &[u8], bool)]) {
        let mut body = Vec::new();
        for (ino, name, deleted) in sockets {
            let usk = Usk {
                id: *ino,
                ino: *ino,
                name: name.to_vec(),
                deleted: deleted.then_some(true),
            };
            let entry = Whole {
                kind: 5,
                id: *ino,
                usk: Some(usk),
            };
            super::super::push_entry(&mut body, &entry);
        }
        let path = dir.join("files.img");
        Image::new(&path, Kind::Files, body).replace(&path).unwrap();
    }

    fn read(dir: &Path) -> Vec<(u32, Vec<u8>, bool)> {
        let image = Image::read(&dir.join("files.img"), Kind::Files).unwrap();
        let mut entries = image.entries();
        let mut found = Vec::new();
        while let Some(Whole { usk: Some(usk), .. }) = entries.next::<Whole>().unwrap() {
            found.push((usk.ino, usk.name, usk.deleted.unwrap_or_default()));
        }
        found
    }

    #[test]
    fn a_socket_gets_the_name_that_it_is_found_under() {
        let dir = tempfile::tempdir().unwrap();
        let before: [(u32, &[u8], bool); 5] = [
            (1, b"/run/a.new\0", false),
            (2, b"/run/b.1", true),
            (3, b"\0abstract", false),
            (4, b"/run/as-it-was\0", false),
            (5, b"", false),
        ];
        write(dir.path(), &before);
        let mut asked = Vec::new();
        rename(dir.path(), |inode, path| {
            asked.push((inode, path.to_vec()));
            match inode {
                1 => Some(b"/run/a".to_vec()),
                2 => Some(b"/run/b".to_vec()),
                _ => None,
            }
        })
        .unwrap();
        let paths = [&b"/run/a.new"[..], b"/run/b.1", b"/run/as-it-was"].map(<[u8]>::to_vec);
        assert_eq!(
            asked,
            { [1, 2, 4] }.into_iter().zip(paths).collect::<Vec<_>>()
        );
        let after: [(u32, &[u8], bool); 5] = [
            (1, b"/run/a\0", false),
            (2, b"/run/b", false),
            before[2],
            before[3],
            before[4],
        ];
        let after = after.map(|(inode, name, deleted)| (inode, name.to_vec(), deleted));
        assert_eq!(read(dir.path()), after);
    }

    #[test]
    fn a_name_that_is_no_address_is_not_taken() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &[(1, b"/a", false)]);
        rename(dir.path(), |_, _| Some(vec![b'/'; LONGEST])).unwrap();
        assert_eq!(read(dir.path()), [(1, b"/a".to_vec(), false)]);
    }
}
