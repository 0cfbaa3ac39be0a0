//! `files.img`: all that the tasks have open, an entry each.
//!
//! ```text
//! file_entry   1 type (1: REG, 3: INETSK, ...)  2 id  one of 3 reg, 4 isk, ...: the entry of that type
//! ```

use std::path::Path;

use super::strict::{edit_submessage, is_ambiguous, submessage};
use super::{Image, ImageError, Kind, push_bytes};

/// Its name.
pub(super) const NAME: &str = "files.img";

/// Entries of one type.
pub(super) struct OfKind {
    /// The type's number.
    pub(super) kind: u32,
    /// The field that such an entry is in.
    pub(super) entry: u64,
    /// Fields of it that may be there more than once.
    pub(super) repeated: &'static [u64],
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct FileEntry {
    #[prost(uint32, required, tag = "1")]
    kind: u32,
}

/// Changes the entries of a type for which `change` gives new ones, in the images of `dir`.
///
/// # Errors
/// The image cannot be read or replaced; those of `change`.
pub(super) fn edit<E: From<ImageError>>(
    dir: &Path,
    of: &OfKind,
    mut change: impl FnMut(&[u8]) -> Result<Option<Vec<u8>>, E>,
) -> Result<(), E> {
    let path = dir.join(NAME);
    if std::fs::symlink_metadata(&path).is_err() {
        return Ok(());
    }
    let image = Image::read(&path, Kind::Files)?;
    let (mut entries, mut body, mut changed) = (image.entries(), Vec::new(), false);
    while let Some(message) = entries.next_bytes()? {
        let kind = image.decode::<FileEntry>(message)?.kind;
        let new = match submessage(message, of.entry).filter(|_| kind == of.kind) {
            Some(entry) => {
                if is_ambiguous(message, &[]) || is_ambiguous(entry, of.repeated) {
                    return Err(image.ambiguous().into());
                }
                change(entry)?
            }
            None => None,
        };
        match new {
            Some(new) => {
                push_bytes(
                    &mut body,
                    &edit_submessage(message, of.entry, |_| new.clone()),
                );
                changed = true;
            }
            None => push_bytes(&mut body, message),
        }
    }
    if changed {
        image.with_body(body).replace(&path)?;
    }
    Ok(())
}
