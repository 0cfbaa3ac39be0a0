//! `files.img`: terminals, each with the file by whose name CRIU opens it.
//!
//! ```text
//! file_entry       1 type (11: TTY)  19 tty
//! tty_file_entry   1 id  3 flags  6 regf_id: the reg_file_entry, which has a mode; without it that of the number `id`,
//!                  and of a terminal from outside there is none
//! ```
//!
//! CRIU gives whatever has the name the mode of that entry and the owner that `tty-info.img` says.

use std::path::Path;

use super::strict::{is_ambiguous, submessage};
use super::{Image, ImageError, Kind, files_image};

const TTY: u64 = 19;
const TTY_KIND: u32 = 11;

/// An open terminal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Terminal {
    /// Flags of `open(2)`.
    pub flags: u32,
    /// The number of the file that it is opened by, if there is one: without its own CRIU looks for one of the terminal's.
    pub file: u32,
    /// Whether the entry says so, so that there is one.
    pub is_named: bool,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct FileEntry {
    #[prost(uint32, required, tag = "1")]
    kind: u32,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct TtyEntry {
    #[prost(uint32, required, tag = "1")]
    id: u32,
    #[prost(uint32, required, tag = "3")]
    flags: u32,
    #[prost(uint32, optional, tag = "6")]
    regf_id: Option<u32>,
}

/// All of them.
///
/// # Errors
/// An image that cannot be read or says a thing twice.
pub fn terminals(dir: &Path) -> Result<Vec<Terminal>, ImageError> {
    let image = Image::read(&dir.join(files_image::NAME), Kind::Files)?;
    let mut entries = image.entries();
    let mut found = Vec::new();
    while let Some(message) = entries.next_bytes()? {
        if image.decode::<FileEntry>(message)?.kind != TTY_KIND {
            continue;
        }
        let part = submessage(message, TTY).unwrap_or_default();
        if is_ambiguous(message, &[]) || is_ambiguous(part, &[]) {
            return Err(image.ambiguous());
        }
        let entry: TtyEntry = image.decode(part)?;
        found.push(Terminal {
            flags: entry.flags,
            file: entry.regf_id.unwrap_or(entry.id),
            is_named: entry.regf_id.is_some(),
        });
    }
    Ok(found)
}
