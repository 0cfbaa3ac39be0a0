//! A checkpoint is consumed once: which layer has consumed it.
//!
//! ```text
//! <snapshot>/
//!   fs/                   upperdir
//!   work/
//!   transship-restored    name of the checkpoint whose memory went with this layer, one line
//! ```
//!
//! A container that starts again starts cold: its files have gone on since the checkpoint, its
//! memory would not have. The mark lives beside the upperdir, because it has to last exactly as
//! long: a later container of the same id has another layer, and another layer gets the same
//! container restored again. It is not in the upperdir, so it never becomes part of an image.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{StageContext, StageError, replace};

const MARK_FILE: &str = "transship-restored";

/// Marks the layer with this upperdir.
///
/// # Errors
/// A system call failed.
pub fn mark_consumed_by(upperdir: &Path, checkpoint: &str) -> Result<(), StageError> {
    replace(&mark(upperdir), format!("{checkpoint}\n").as_bytes())
}

/// Whether the layer with this upperdir has consumed the checkpoint.
///
/// # Errors
/// A system call failed.
pub fn is_consumed_by(upperdir: &Path, checkpoint: &str) -> Result<bool, StageError> {
    let path = mark(upperdir);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(text.trim_end() == checkpoint),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).staging("read", &path),
    }
}

fn mark(upperdir: &Path) -> PathBuf {
    upperdir.with_file_name(MARK_FILE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_remembers_beside_its_files() {
        let snapshot = tempfile::tempdir().unwrap();
        let upperdir = snapshot.path().join("fs");
        fs::create_dir(&upperdir).unwrap();
        assert!(!is_consumed_by(&upperdir, "web").unwrap());
        mark_consumed_by(&upperdir, "web").unwrap();
        assert!(is_consumed_by(&upperdir, "web").unwrap());
        assert!(!is_consumed_by(&upperdir, "db").unwrap());
        assert!(fs::read_dir(&upperdir).unwrap().next().is_none());
    }
}
