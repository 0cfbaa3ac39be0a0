//! Images whose memory is given back while it is put into the copy, so that a node need not have both at once.
//!
//! ```text
//! <checkpoint>/<container>/
//!   checkpoint/          the images; holes where pieces have been put in
//!   memory-given-back    empty: nothing can be restored from them any more
//! ```

use std::fs::File;
use std::path::Path;

use transship_path_error::During as _;

use crate::error::SandboxError;

const MARK: &str = "memory-given-back";

/// Says so of the images in this directory, before the first piece is given back.
///
/// # Errors
/// It has been said before, or a system call failed.
pub fn set_given_back(images: &Path) -> Result<(), SandboxError> {
    let mark = images.with_file_name(MARK);
    Ok(File::create_new(&mark).during("make", &mark).map(drop)?)
}

/// Whether it has been said.
#[must_use]
pub fn is_given_back(images: &Path) -> bool {
    let mark = images.with_file_name(MARK).symlink_metadata();
    mark.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_is_given_back_once() {
        let container = tempfile::tempdir().unwrap();
        let images = container.path().join("checkpoint");
        assert!(!is_given_back(&images));
        set_given_back(&images).unwrap();
        assert!(is_given_back(&images));
        assert!(set_given_back(&images).is_err());
    }
}
