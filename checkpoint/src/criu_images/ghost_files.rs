//! `ghost-file-<id>.img`, the id in hexadecimal: a file that had no name any more, and that CRIU makes again.
//!
//! ```text
//! ghost_file_entry  1 uid  2 gid  3 mode, with the type of file  4 dev  5 ino  11 target of a symbolic link
//! then the bytes of the file, or pieces of it, to the end of the image
//! ```

use std::path::Path;

use super::strict::is_ambiguous;
use super::{Image, ImageError, Kind};

/// Such a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ghost {
    /// Its number.
    pub id: u32,
    /// Whose it is.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Its type and its rights, as in `stat`.
    pub mode: u32,
    /// What tells it from other files at the dump: CRIU's number of the device, and the inode.
    pub identity: Option<(u32, u64)>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct GhostFileEntry {
    #[prost(uint32, required, tag = "1")]
    uid: u32,
    #[prost(uint32, required, tag = "2")]
    gid: u32,
    #[prost(uint32, required, tag = "3")]
    mode: u32,
    #[prost(uint32, optional, tag = "4")]
    dev: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    ino: Option<u64>,
    #[prost(bytes = "vec", optional, tag = "11")]
    symlnk_target: Option<Vec<u8>>,
}

impl Ghost {
    /// Whether CRIU takes it for what a watch without a path is for, by the device and the inode.
    #[must_use]
    pub fn is_found_by(&self, (device, inode): (u32, u64)) -> bool {
        // CRIU compares no more of an inode.
        u32::try_from(inode).is_ok() && self.identity == Some((device, inode))
    }
}

/// Reads the one with a number.
///
/// # Errors
/// It cannot be read, or says a thing twice.
pub(super) fn ghost(dir: &Path, id: u32) -> Result<Ghost, ImageError> {
    let path = dir.join(format!("{}{id:x}.img", Kind::Ghost.prefix()));
    let image = Image::read_first(&path, Kind::Ghost)?;
    let mut entries = image.entries();
    let message = entries.next_bytes()?.ok_or_else(|| entries.cut_off())?;
    if is_ambiguous(message, &[]) {
        return Err(image.ambiguous());
    }
    let entry: GhostFileEntry = image.decode(message)?;
    if { entry.symlnk_target.iter().flatten() }.any(|byte| *byte == 0) {
        return Err(ImageError::Nul { path });
    }
    Ok(Ghost {
        id,
        uid: entry.uid,
        gid: entry.gid,
        mode: entry.mode,
        identity: entry.dev.zip(entry.ino),
    })
}
