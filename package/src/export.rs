//! A checkpoint as a package in the format of transship.
//!
//! ```text
//! [age] [zstd] tar:
//!   transship.json             the manifest, first: a reader checks it before it takes anything else
//!   transship.json.minisig     its signature, when there is one
//!   <container>/<path> ...     every file of the manifest, in its order
//! ```

use std::io::Write;
use std::path::Path;

use transship_checkpoint::beneath::{Links, read_regular};
use transship_checkpoint::manifest::MANIFEST_FILE;
use transship_checkpoint::store::Checkpoint;
use transship_path_error::During as _;

use crate::compression::Sink;
use crate::encryption::Recipients;
use crate::error::PackageError;
use crate::signature::{SIGNATURE_FILE, SIGNATURE_LIMIT, Signer};
use crate::tar_members::TarMembers;

/// How a package is written.
#[derive(Debug, Default)]
pub struct ExportOptions {
    /// The level of zstd; none: nothing is compressed.
    pub level: Option<i32>,
    /// Those who can read it; nobody: it is not encrypted.
    pub recipients: Recipients,
    /// Who signs it; nobody: a signature that the checkpoint has stays.
    pub signer: Option<Signer>,
}

/// Writes a package to `out`, and gives that back. Every file is compared with the manifest on the way;
/// `progress` gets the bytes.
///
/// # Errors
/// A file is damaged, or `out` cannot be written: what was written is no package then.
pub fn export<W: Write>(
    checkpoint: &Checkpoint,
    options: &ExportOptions,
    out: W,
    progress: &mut dyn FnMut(u64),
) -> Result<W, PackageError> {
    let manifest = &checkpoint.manifest;
    let json = read_manifest(checkpoint)?;
    let signature = match &options.signer {
        Some(signer) => Some(signer.sign(&json)?),
        None => signature_of(&checkpoint.dir)?,
    };
    let sink = Sink::new(out, options.level, &options.recipients)?;
    let mut members = TarMembers::new(sink, manifest.created, progress);
    members.bytes(MANIFEST_FILE, &json)?;
    if let Some(signature) = signature {
        members.bytes(SIGNATURE_FILE, signature.as_bytes())?;
    }
    for (name, files) in manifest.directories() {
        let dir = checkpoint.dir.join(name);
        for file in files {
            members.file(&format!("{name}/{}", file.path), &dir, file)?;
        }
    }
    members.finish()?.finish()
}

/// The manifest as it lies there: a signature is of these bytes.
pub(crate) fn read_manifest(checkpoint: &Checkpoint) -> Result<Vec<u8>, PackageError> {
    let limit = transship_checkpoint::manifest::MANIFEST_LIMIT;
    let name = Path::new(MANIFEST_FILE);
    let json = read_regular(&checkpoint.dir, name, Links::Refused, limit);
    Ok(json.during("read", checkpoint.dir.join(name))?)
}

/// The signature beside the manifest in `dir`, when there is one.
///
/// # Errors
/// It cannot be read.
pub fn signature_of(dir: &Path) -> Result<Option<String>, PackageError> {
    let path = dir.join(SIGNATURE_FILE);
    let read = read_regular(
        dir,
        Path::new(SIGNATURE_FILE),
        Links::Refused,
        SIGNATURE_LIMIT,
    );
    match read {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        read => {
            let bytes = read.during("read", &path)?;
            Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
        }
    }
}
