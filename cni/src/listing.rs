//! What is in a directory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use transship_path_error::During as _;

use crate::CniError;

/// What is in a directory, in its order; nothing in one that is not there.
pub(crate) fn list(dir: &Path) -> Result<Vec<PathBuf>, CniError> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.during("list", dir)?,
    };
    let paths: io::Result<Vec<_>> = entries.map(|entry| Ok(entry?.path())).collect();
    let mut files = paths.during("list", dir)?;
    files.sort();
    Ok(files)
}
