//! The image directory for one restore: links, so that no byte is copied and an edited image can
//! stand in the place of the original.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::{StageContext, StageError, make_dir, remove_tree};

/// Makes `to` a directory of links to the entries of `from`. A pre-dump's `parent` is a link
/// itself and keeps its meaning, since it is reached through `from`.
///
/// # Errors
/// A system call failed; `to` is gone then.
pub fn link_images(from: &Path, to: &Path) -> Result<(), StageError> {
    let from = from.canonicalize().staging("find", from)?;
    remove_tree(to)?;
    make_dir(to)?;
    let link = || {
        for entry in fs::read_dir(&from).staging("list", &from)? {
            let entry = entry.staging("list", &from)?;
            let link = to.join(entry.file_name());
            symlink(entry.path(), &link).staging("create", &link)?;
        }
        Ok(())
    };
    link().inspect_err(|_| drop(fs::remove_dir_all(to)))
}
