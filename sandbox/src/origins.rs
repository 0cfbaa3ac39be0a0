//! Where the checkpoints of this node come from: what a node that asks for signatures restores without one.
//!
//! ```text
//! /var/lib/transship/origins/<SHA-256 of transship.json>
//!   here \t DIR          this node has taken it, or it came with a migration that was under way
//!   signed KEY \t DIR    KEY has signed it, and this node has compared each file with it
//! ```
//!
//! What a checkpoint says of its source is its maker's word, so the record is beside the store and not in it. It is of
//! the manifest, which has the digest of every file, and goes when there is no checkpoint in DIR any more. Of what this
//! node takes it is on the disk before the checkpoint has its place: a power cut leaves a record too many, and not one too few.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use transship_checkpoint::beneath::{Links, read_regular};
use transship_checkpoint::manifest::{MANIFEST_FILE, MANIFEST_LIMIT};
use transship_checkpoint::sealed::SEALED_FILE;
use transship_checkpoint::store::has_draft;
use transship_path_error::During as _;

use crate::error::SandboxError;
use crate::files::{make_dir, remove_file, replace_durably};

/// Where the records are.
pub const DEFAULT_ORIGINS_DIR: &str = "/var/lib/transship/origins";
const HERE: &str = "here";
const SIGNED: &str = "signed ";

/// Where a checkpoint comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// This node has taken it, or taken it over from one that ran.
    Here,
    /// It came from elsewhere, signed by this key.
    Signed(String),
}

/// The manifest of the checkpoint in `dir`, and its SHA-256 in hexadecimal digits.
///
/// # Errors
/// It cannot be read.
pub fn manifest_of(dir: &Path) -> Result<(Vec<u8>, String), SandboxError> {
    let json = read_regular(
        dir,
        Path::new(MANIFEST_FILE),
        Links::Refused,
        MANIFEST_LIMIT,
    );
    let json = json.during("read", dir.join(MANIFEST_FILE))?;
    let digest = transship_digest::sha256_hex(&json);
    Ok((json, digest))
}

/// Records where the checkpoint in `dir` comes from; `digest` is that of its manifest.
///
/// # Errors
/// A system call failed.
pub fn record(
    origins: &Path,
    digest: &str,
    origin: &Origin,
    dir: &Path,
) -> Result<(), SandboxError> {
    make_dir(origins)?;
    let origin = match origin {
        Origin::Here => HERE.to_owned(),
        Origin::Signed(key) => format!("{SIGNED}{key}"),
    };
    let record = format!("{origin}\t{}\n", dir.display());
    replace_durably(&origins.join(digest), record.as_bytes())
}

/// Whether what has a manifest with this digest needs no signature: it is of this node, or one of `keys` has signed it.
///
/// # Errors
/// The record cannot be read.
pub fn is_known(origins: &Path, digest: &str, keys: &[String]) -> Result<bool, SandboxError> {
    let Some((origin, _)) = read(&origins.join(digest))? else {
        return Ok(false);
    };
    Ok(match origin {
        Origin::Here => true,
        Origin::Signed(key) => keys.contains(&key),
    })
}

/// Forgets those of which there is no checkpoint any more.
///
/// # Errors
/// The records cannot be listed, read or removed.
pub fn forget_gone(origins: &Path) -> Result<(), SandboxError> {
    let entries = match fs::read_dir(origins) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.during("list", origins)?,
    };
    for entry in entries {
        let path = entry.during("list", origins)?.path();
        // One that is being written.
        if path.extension().is_some() {
            continue;
        }
        let stays = match read(&path)? {
            Some((_, dir)) => is_there(&dir),
            None => false,
        };
        if !stays {
            remove_file(&path)?;
        }
    }
    Ok(())
}

/// Whether there is a checkpoint in `dir`, or will be; also where that cannot be told.
fn is_there(dir: &Path) -> bool {
    let is_made = || {
        let mut files = [MANIFEST_FILE, SEALED_FILE].into_iter();
        files.any(|file| fs::symlink_metadata(dir.join(file)).is_ok())
    };
    // A store that cannot be listed for now may have it.
    let is_being_made = || has_draft(dir).unwrap_or(true);
    // A draft that is gone may have become the checkpoint.
    is_made() || is_being_made() || is_made()
}

/// What a record says; one that is damaged says nothing.
fn read(path: &Path) -> Result<Option<(Origin, PathBuf)>, SandboxError> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.during("read", path)?,
    };
    let Some((origin, dir)) = text.trim_end_matches('\n').split_once('\t') else {
        return Ok(None);
    };
    let origin = match origin.strip_prefix(SIGNED) {
        Some(key) => Origin::Signed(key.to_owned()),
        None if origin == HERE => Origin::Here,
        None => return Ok(None),
    };
    Ok(Some((origin, dir.into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_needs_no_signature() {
        let root = tempfile::tempdir().unwrap();
        let (origins, dir) = (root.path().join("origins"), root.path().join("web"));
        let keys = ["RWQ1".to_owned()];
        let known = |digest: &str| is_known(&origins, digest, &keys).unwrap();
        assert!(!known("a"));
        record(&origins, "a", &Origin::Here, &dir).unwrap();
        record(&origins, "b", &Origin::Signed("RWQ1".into()), &dir).unwrap();
        record(&origins, "c", &Origin::Signed("RWQ2".into()), &dir).unwrap();
        fs::write(origins.join("d"), "here").unwrap();
        assert!(known("a") && known("b"));
        assert!(!known("c"), "its key does not count any more");
        assert!(!known("d"), "half a record");
        assert!(!is_known(&origins, "b", &[]).unwrap());
    }

    #[test]
    fn a_record_goes_with_its_checkpoint() {
        let root = tempfile::tempdir().unwrap();
        let (origins, dir) = (root.path().join("origins"), root.path().join("web"));
        forget_gone(&origins).unwrap();
        let is_known = || {
            forget_gone(&origins).unwrap();
            is_known(&origins, "a", &[]).unwrap()
        };
        // It is made before its checkpoint has its place.
        let draft = root.path().join(".new-web.1");
        fs::create_dir(&draft).unwrap();
        fs::write(draft.join(MANIFEST_FILE), "{}").unwrap();
        record(&origins, "a", &Origin::Here, &dir).unwrap();
        assert!(is_known());
        fs::rename(&draft, &dir).unwrap();
        assert!(is_known());
        fs::remove_dir_all(&dir).unwrap();
        assert!(!is_known());
        // A power cut came before the checkpoint.
        record(&origins, "a", &Origin::Here, &dir).unwrap();
        assert!(!is_known());
        // A file is where its store was.
        fs::write(&dir, "").unwrap();
        record(&origins, "a", &Origin::Here, &dir.join("web")).unwrap();
        assert!(!is_known());
        assert_eq!(fs::read_dir(&origins).unwrap().count(), 0);
    }
}
