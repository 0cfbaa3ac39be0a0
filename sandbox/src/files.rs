//! Files that are whole or not there, and directories for root alone.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use nix::mount::{MntFlags, umount2};
use transship_path_error::During as _;

use crate::error::SandboxError;

pub(crate) fn make_dir(dir: &Path) -> Result<(), SandboxError> {
    Ok(DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .during("create", dir)?)
}

/// Unmounts whatever is mounted there, with all that is mounted in it. One that is being used goes with its last user;
/// what cannot be unmounted stays.
pub fn unmount_all(dir: &Path) {
    while umount2(dir, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_ok() {}
}

pub(crate) fn remove_tree(dir: &Path) -> Result<(), SandboxError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Ok(Err(error).during("remove", dir)?)
        }
        _ => Ok(()),
    }
}

pub(crate) fn remove_file(path: &Path) -> Result<(), SandboxError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Ok(Err(error).during("remove", path)?)
        }
        _ => Ok(()),
    }
}

/// Writes a file of which whoever reads it reads all, or the one before.
///
/// # Errors
/// A system call failed; the file is as it was.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), SandboxError> {
    let new = path.with_extension(format!("new{}", std::process::id()));
    let write = || {
        let mut file = File::create(&new)?;
        file.write_all(bytes)?;
        fs::rename(&new, path)
    };
    Ok(write()
        .inspect_err(|_| drop(fs::remove_file(&new)))
        .during("write", path)?)
}

/// [`replace`], beyond a power cut.
pub(crate) fn replace_durably(path: &Path, bytes: &[u8]) -> Result<(), SandboxError> {
    let new = path.with_extension(format!("new{}", std::process::id()));
    let write = || {
        let mut file = File::create(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        // The name as well.
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
    };
    Ok(write()
        .inspect_err(|_| drop(fs::remove_file(&new)))
        .during("write", path)?)
}
