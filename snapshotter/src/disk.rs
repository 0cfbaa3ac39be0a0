//! The directories of snapshots: made, described, taken away, deleted.
//!
//! ```text
//! <root>/lock                   flock: one daemon per root
//! <root>/metadata.sqlite*       see metadata.rs
//! <root>/metadata.reserve       see reserve.rs
//! <root>/snapshots/new-<id>/    being made: not a snapshot yet
//! <root>/snapshots/<id>/fs      what the snapshot adds (the upperdir, later a lowerdir)
//! <root>/snapshots/<id>/work    scratch space of overlayfs, only for snapshots made by Prepare
//! <root>/snapshots/gone-<id>/   being deleted: no snapshot any more
//! ```
//!
//! `snapshots/<id>` carries a copy of its record as an extended attribute (record.rs).

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;

use prost::Message;
use rustix::fs::XattrFlags;

use transship_path_error::During as _;

use crate::error::{Result, one_line};
use crate::mounts::SnapshotPaths;
use crate::record::Record;

/// Attribute for a daemon with CAP_SYS_ADMIN in the initial user namespace: containers cannot see it.
const TRUSTED: &str = "trusted.transship.snapshot";
/// Attribute for a daemon in a user namespace, where `trusted.*` is not allowed.
const USER: &str = "user.transship.snapshot";

/// What a name in `snapshots/` stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// A complete snapshot directory.
    Snapshot(u64),
    /// A directory that was being made when the daemon died.
    New(u64),
    /// A directory whose deletion was not finished.
    Gone(u64),
    /// Nothing that this daemon makes.
    Foreign,
}

impl Entry {
    /// Reads a directory name.
    #[must_use]
    pub fn parse(name: &str) -> Self {
        // Only the spelling that the daemon itself writes: no sign, no leading zero.
        let id = |text: &str| text.parse().ok().filter(|id: &u64| id.to_string() == text);
        let parsed = match name.split_once('-') {
            Some(("new", rest)) => id(rest).map(Self::New),
            Some(("gone", rest)) => id(rest).map(Self::Gone),
            Some(_) => None,
            None => id(name).map(Self::Snapshot),
        };
        parsed.unwrap_or(Self::Foreign)
    }
}

/// Creates `path` and missing parents with mode 0700.
///
/// # Errors
/// I/O errors.
pub fn create_private_dir(path: &Path) -> Result<()> {
    Ok(DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .during("create directory", path)?)
}

/// Lists `snapshots/`.
///
/// # Errors
/// I/O errors.
pub fn list(paths: &SnapshotPaths) -> Result<Vec<(String, Entry)>> {
    let dir = paths.snapshots();
    let mut entries = Vec::new();
    for entry in fs::read_dir(dir).during("read directory", dir)? {
        let name = entry.during("read directory", dir)?.file_name();
        let name = name.to_string_lossy();
        entries.push((name.to_string(), Entry::parse(&name)));
    }
    Ok(entries)
}

/// Makes `snapshots/new-<id>` with `fs` (0755, owned by `owner`) and, for a writable snapshot, `work`
/// (0711: overlayfs refuses nothing less, and containers must not list it).
///
/// The modes are exact only under umask 0, which `main` sets.
///
/// # Errors
/// I/O errors; what was made is removed again.
pub fn create_new(paths: &SnapshotPaths, id: u64, writable: bool, owner: (u32, u32)) -> Result<()> {
    let dir = paths.new_dir(id);
    let fill = || {
        let fs = dir.join("fs");
        mkdir(&fs, 0o755)?;
        if writable {
            create_work(&dir)?;
        }
        if owner != (0, 0) {
            std::os::unix::fs::lchown(&fs, Some(owner.0), Some(owner.1)).during("chown", &fs)?;
        }
        Ok(())
    };
    mkdir(&dir, 0o700)?;
    fill().inspect_err(|_| discard_new(paths, id))
}

/// Makes the workdir in the directory of a snapshot.
///
/// # Errors
/// I/O errors.
pub fn create_work(dir: &Path) -> Result<()> {
    mkdir(&dir.join("work"), 0o711)
}

fn mkdir(path: &Path, mode: u32) -> Result<()> {
    let made = DirBuilder::new().mode(mode).create(path);
    Ok(made.during("create directory", path)?)
}

/// Removes a half made `snapshots/new-<id>`; what resists goes at the next start.
pub fn discard_new(paths: &SnapshotPaths, id: u64) {
    let dir = paths.new_dir(id);
    if let Err(error) = delete_tree(&dir) {
        tracing::warn!(
            error = one_line(&error),
            "a half made snapshot is left for the next start"
        );
    }
}

/// Uid and gid of the snapshot's `fs`.
///
/// # Errors
/// I/O errors.
pub fn owner(paths: &SnapshotPaths, id: u64) -> Result<(u32, u32)> {
    let fs = paths.fs(id);
    let metadata = fs::symlink_metadata(&fs).during("stat", &fs)?;
    Ok((metadata.uid(), metadata.gid()))
}

/// `new-<id>` becomes `<id>`.
///
/// # Errors
/// I/O errors.
pub fn publish(paths: &SnapshotPaths, id: u64) -> Result<()> {
    let dir = paths.new_dir(id);
    Ok(fs::rename(&dir, paths.dir(id)).during("rename", dir)?)
}

/// `dir`, which is that of the snapshot `id` or was to become it, becomes `gone-<id>`. A directory that
/// is already gone is fine.
///
/// # Errors
/// I/O errors.
pub fn retire(paths: &SnapshotPaths, id: u64, dir: &Path) -> Result<()> {
    match fs::rename(dir, paths.gone_dir(id)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => Ok(other.during("rename", dir)?),
    }
}

/// Deletes a tree. A tree that is already gone is fine.
///
/// # Errors
/// I/O errors: the first one that stops the deletion.
pub fn delete_tree(dir: &Path) -> Result<()> {
    Ok(transship_layer::remove_tree(dir).during("delete", dir)?)
}

/// Writes the copy of the record onto its directory; labels that do not fit are left out.
///
/// # Errors
/// I/O errors, such as a file system without extended attributes.
pub fn write_copy(dir: &Path, key: &str, record: &Record) -> Result<()> {
    let mut copy = Record {
        key: key.to_owned(),
        ..record.clone()
    };
    let outcome = set_attribute(dir, &copy.encode_to_vec());
    let outcome = match outcome {
        Err(
            rustix::io::Errno::NOSPC
            | rustix::io::Errno::DQUOT
            | rustix::io::Errno::TOOBIG
            | rustix::io::Errno::RANGE,
        ) if !copy.labels.is_empty() => {
            copy.labels.clear();
            set_attribute(dir, &copy.encode_to_vec())
        }
        outcome => outcome,
    };
    Ok(outcome.during("describe", dir)?)
}

fn set_attribute(dir: &Path, value: &[u8]) -> rustix::io::Result<()> {
    match rustix::fs::lsetxattr(dir, TRUSTED, value, XattrFlags::empty()) {
        Err(rustix::io::Errno::PERM) => {
            rustix::fs::lsetxattr(dir, USER, value, XattrFlags::empty())
        }
        outcome => outcome,
    }
}

/// Reads the copy of the record from its directory; `None` without one or with a damaged one.
///
/// # Errors
/// I/O errors.
pub fn read_copy(dir: &Path) -> Result<Option<Record>> {
    let mut value = vec![0; 1 << 16];
    for name in [TRUSTED, USER] {
        match rustix::fs::lgetxattr(dir, name, &mut value[..]) {
            Ok(length) => return Ok(Record::decode(&value[..length]).ok()),
            Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => {}
            Err(error) => return Ok(Err(error).during("read the description of", dir)?),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_snapshot_directories() {
        for (name, entry) in [
            ("1", Entry::Snapshot(1)),
            ("new-7", Entry::New(7)),
            ("gone-8", Entry::Gone(8)),
            ("01", Entry::Foreign),
            ("+1", Entry::Foreign),
            ("new-", Entry::Foreign),
            ("new-x", Entry::Foreign),
            ("lost+found", Entry::Foreign),
            ("1-2", Entry::Foreign),
            ("99999999999999999999999", Entry::Foreign),
        ] {
            assert_eq!(Entry::parse(name), entry, "{name}");
        }
    }
}
