//! Small JSON files that are on the disk, whole, when their writer goes on, and the locks of who works on them.
//!
//! ```text
//! <locks>/<name>   locked ([`crate::locks`]): somebody works on the record of this name
//! <path>~          being written, synced; then renamed to <path>, and the directory is synced, as when it is removed
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Context as _, Error, Result};
use crate::locks::{self, Lock, make_private};

/// What the name of a record ends with that is being written; no id of containerd ends so.
pub(crate) const UNFINISHED: &str = "~";
/// Longest record, in bytes.
const LIMIT: u64 = 4 << 20;

/// Locks the record `name`; the directories are made first. None when somebody has it.
///
/// # Errors
/// A system call failed.
pub(crate) fn lock(records: &Path, locks: &Path, name: &str) -> Result<Option<Lock>> {
    make_private(records)?;
    locks::lock(locks, name)
}

/// Writes `record`, in the place of what `path` had.
///
/// # Errors
/// It is longer than one that can be read, or a system call failed; the file is as it was.
pub(crate) fn write<T: Serialize>(path: &Path, record: &T) -> Result<()> {
    let failed = || format!("cannot write {}", path.display());
    let json = serde_json::to_vec(record).with_context(failed)?;
    if json.len() as u64 > LIMIT {
        let message = format!(
            "a record has {LIMIT} bytes at most, and this would have {}",
            json.len()
        );
        return Err(Error::failed(message)).with_context(failed);
    }
    let mut new = path.as_os_str().to_owned();
    new.push(UNFINISHED);
    let written = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(nix::libc::O_NOFOLLOW)
            .open(&new)?;
        file.write_all(&json)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        sync_directory_of(path)
    };
    written().with_context(failed)
}

/// Removes a record, if there is one: after a power cut it is not there again.
///
/// # Errors
/// A system call failed.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let removed = match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        removed => removed,
    };
    let synced = removed.and_then(|()| sync_directory_of(path));
    synced.with_context(|| format!("cannot remove {}", path.display()))
}

fn sync_directory_of(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}

/// All that is in a directory of records; nothing, where there is none.
///
/// # Errors
/// A system call failed.
pub(crate) fn list(records: &Path) -> Result<Vec<PathBuf>> {
    let paths = match fs::read_dir(records) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => Err(error),
        Ok(mut entries) => entries.try_fold(Vec::new(), |mut paths, entry| {
            paths.push(entry?.path());
            Ok(paths)
        }),
    };
    paths.with_context(|| format!("cannot list {}", records.display()))
}

/// Removes what writers have left that were killed at it.
///
/// # Errors
/// A system call failed.
pub(crate) fn remove_unfinished(records: &Path, locks: &Path) -> Result<()> {
    for path in list(records)? {
        let file_name = path.file_name().unwrap_or_default();
        let name = file_name
            .to_str()
            .and_then(|it| it.strip_suffix(UNFINISHED));
        // Whoever has the lock writes.
        let lock = name.map(|name| lock(records, locks, name)).transpose()?;
        if lock.flatten().is_none() {
            continue;
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                let failed = format!("cannot remove {}", path.display());
                return Err(error).context(failed);
            }
            _ => {}
        }
    }
    Ok(())
}

/// Reads the record in `path`, if there is one.
///
/// # Errors
/// It cannot be read, or is none.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let failed = || format!("cannot read {}", path.display());
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.with_context(failed)?,
    };
    let mut json = Vec::new();
    file.take(LIMIT)
        .read_to_end(&mut json)
        .with_context(failed)?;
    serde_json::from_slice(&json).map(Some).with_context(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("default:a");
        let long = "x".repeat(100 << 10);
        write(&path, &long).unwrap();
        assert_eq!(read(&path).unwrap(), Some(long.clone()));
        assert!(write(&path, &"x".repeat(5 << 20)).is_err());
        assert_eq!(read(&path).unwrap(), Some(long));
    }

    #[test]
    fn what_a_killed_writer_has_left_goes() {
        let dir = tempfile::tempdir().unwrap();
        let (records, locks) = (dir.path().join("records"), dir.path().join("locks"));
        remove_unfinished(&records, &locks).unwrap();
        let written = lock(&records, &locks, "default:b").unwrap();
        for name in ["default:a", "default:a~", "default:b~"] {
            fs::write(records.join(name), "{}").unwrap();
        }
        remove_unfinished(&records, &locks).unwrap();
        let left = |name: &str| records.join(name).try_exists().unwrap();
        assert!(left("default:a") && !left("default:a~"));
        assert!(left("default:b~"), "somebody is at it");
        drop(written);
    }
}
