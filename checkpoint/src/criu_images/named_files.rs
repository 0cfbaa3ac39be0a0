//! What CRIU looks for by a name in the container: files and directories, sockets, and the names that files without
//! one get for a moment.
//!
//! ```text
//! files.img         file_entry            1 type  3 reg  16 usk
//!                   reg_file_entry        1 id  2 flags  6 name, absolute  7 mnt_id
//!                   unix_sk_entry         1 id  6 uflags  11 name, abstract where it begins with a zero  14 name_dir
//! remap-fpath.img   remap_file_path_entry 1 orig_id  2 remap_id  3 remap_type: 0 linked, 1 ghost, 2 of a process
//! ```
//!
//! A ghost is made beside the name that the file had, and a linked file is removed by the name that it got at the dump.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use super::ghost_files::{self, Ghost};
use super::regular_files::IDENTITY;
use super::strict::{is_ambiguous, submessage};
use super::{Image, ImageError, Kind};

const REG: u64 = 3;
const UNIX: u64 = 16;
const REG_KIND: u32 = 1;
const UNIX_KIND: u32 = 5;
/// `USK_EXTERN`
const EXTERNAL: u32 = 1;
/// What `remap_id` has where there is no `remap_type`.
const OLD_GHOST: u32 = 1 << 31;

/// A file, a directory or a socket.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NamedFile {
    /// Its number.
    pub id: u32,
    /// Its path in the container.
    pub path: PathBuf,
    /// The number of the mount that it is in, as far as that is known.
    pub mount: Option<u32>,
    /// Flags of `open(2)`.
    pub flags: u32,
    /// Whether it is a socket.
    pub is_socket: bool,
    /// Whether it is a socket that is not made: another program has it (`USK_EXTERN`).
    pub is_external: bool,
}

/// A file that had no name of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Remap {
    /// The number of the file.
    pub file: u32,
    /// The number of the file by whose name it is found, and which is removed then.
    pub linked: Option<u32>,
    /// What it is made of, if it is made again.
    pub ghost: Option<Ghost>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct FileEntry {
    #[prost(uint32, required, tag = "1")]
    kind: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RegEntry {
    #[prost(uint32, required, tag = "1")]
    id: u32,
    #[prost(uint32, required, tag = "2")]
    flags: u32,
    #[prost(bytes = "vec", required, tag = "6")]
    name: Vec<u8>,
    #[prost(sint32, optional, tag = "7")]
    mnt_id: Option<i32>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct UnixEntry {
    #[prost(uint32, required, tag = "1")]
    id: u32,
    #[prost(uint32, optional, tag = "6")]
    uflags: Option<u32>,
    #[prost(bytes = "vec", required, tag = "11")]
    name: Vec<u8>,
    #[prost(bytes = "vec", optional, tag = "14")]
    name_dir: Option<Vec<u8>>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct RemapEntry {
    #[prost(uint32, required, tag = "1")]
    orig_id: u32,
    #[prost(uint32, required, tag = "2")]
    remap_id: u32,
    #[prost(uint32, optional, tag = "3")]
    remap_type: Option<u32>,
}

/// All of them.
///
/// # Errors
/// An image that cannot be read or says a thing twice.
pub fn named_files(dir: &Path) -> Result<Vec<NamedFile>, ImageError> {
    let image = Image::read(&dir.join("files.img"), Kind::Files)?;
    let mut entries = image.entries();
    let mut found = Vec::new();
    while let Some(message) = entries.next_bytes()? {
        let kind = image.decode::<FileEntry>(message)?.kind;
        let (number, repeated) = match kind {
            REG_KIND => (REG, &IDENTITY[..]),
            UNIX_KIND => (UNIX, &[][..]),
            _ => continue,
        };
        let part = submessage(message, number).unwrap_or_default();
        if is_ambiguous(message, &[]) || is_ambiguous(part, repeated) {
            return Err(image.ambiguous());
        }
        if kind == REG_KIND {
            let entry: RegEntry = image.decode(part)?;
            found.push(NamedFile {
                id: entry.id,
                path: OsString::from_vec(entry.name).into(),
                mount: entry.mnt_id.and_then(|id| u32::try_from(id).ok()),
                flags: entry.flags,
                ..NamedFile::default()
            });
            continue;
        }
        let entry: UnixEntry = image.decode(part)?;
        let name = entry.name.strip_suffix(b"\0").unwrap_or(&entry.name);
        if name.is_empty() || name.starts_with(b"\0") {
            continue;
        }
        found.push(NamedFile {
            id: entry.id,
            // A relative name without a directory is one in the root.
            path: Path::new(OsStr::from_bytes(entry.name_dir.as_deref().unwrap_or(b"/")))
                .join(OsStr::from_bytes(name)),
            is_socket: true,
            is_external: entry.uflags.unwrap_or_default() & EXTERNAL != 0,
            ..NamedFile::default()
        });
    }
    Ok(found)
}

/// Those without a name; none when the dump has no such image.
///
/// # Errors
/// An image that cannot be read or says a thing twice.
pub fn remaps(dir: &Path) -> Result<Vec<Remap>, ImageError> {
    let path = dir.join("remap-fpath.img");
    if std::fs::symlink_metadata(&path).is_err() {
        return Ok(Vec::new());
    }
    let image = Image::read(&path, Kind::Remaps)?;
    let mut entries = image.entries();
    let mut found = Vec::new();
    while let Some(message) = entries.next_bytes()? {
        if is_ambiguous(message, &[]) {
            return Err(image.ambiguous());
        }
        let entry: RemapEntry = image.decode(message)?;
        let (linked, ghost) = match entry.remap_type {
            None if entry.remap_id & OLD_GHOST != 0 => (None, Some(entry.remap_id & !OLD_GHOST)),
            None | Some(0) => (Some(entry.remap_id), None),
            Some(1) => (None, Some(entry.remap_id)),
            // The process is all that is made again.
            Some(2) => continue,
            Some(_) => return Err(image.ambiguous()),
        };
        found.push(Remap {
            file: entry.orig_id,
            linked,
            ghost: { ghost.map(|id| ghost_files::ghost(dir, id)) }.transpose()?,
        });
    }
    Ok(found)
}
