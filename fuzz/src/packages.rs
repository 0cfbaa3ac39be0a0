//! What comes as a file or from a registry: packages, archives of other engines, artifacts.

use std::fs;
use std::path::PathBuf;

use transship_checkpoint::store::{Checkpoint, Store};
use transship_package::PackageError;
use transship_package::encryption::Identities;
use transship_package::import::{ImportOptions, Imported, import};
use transship_package::layer_changes::Digests;
use transship_package::look::look;
use transship_package::oci::{Blobs, Descriptor, Offered};
use transship_package::signature::TrustedKeys;

use crate::scratch::Scratch;

/// Between the parts of an artifact's bytes.
const SEPARATOR: &[u8] = b"\n--\n";

fn options() -> ImportOptions {
    ImportOptions {
        name: None,
        name_without: "archive".into(),
        identities: Identities::default(),
        trusted: TrustedKeys::default(),
        max_bytes: 1 << 20,
        architecture: "x86_64".into(),
    }
}

/// A package of ours, or the archive that another engine wrote.
pub(crate) fn package(data: &[u8]) {
    let _looked = look(data, &Identities::default(), Digests::LeftOut);
    in_store(|store| {
        let imported = import(data, store, &options(), &mut |_| {})?;
        match imported {
            Imported::Checkpoint(checkpoint) => Ok(checkpoint),
            Imported::Foreign(foreign) => {
                let digest = format!("sha256:{:064}", 1);
                foreign.commit(&digest, &digest)
            }
        }
    });
}

/// The artifact of a registry, in which each blob is what its descriptor says: what a sender wrote, who knows the digests
/// of it.
///
/// ```text
/// manifest or index, separator, blob 0, separator, blob 1, ...
/// ```
///
/// Blob `n` is that of the digest whose last two digits are `n`; it is plain where the media type says zstd.
pub(crate) fn artifact(data: &[u8]) {
    let blobs = Parts::of(data);
    let identities = Identities::default();
    let Ok(offered) = Offered::read(&blobs, "tag", &identities, Some(&options())) else {
        return;
    };
    let _looked = offered.look(&blobs, &identities, Digests::LeftOut);
    in_store(|store| offered.restore(&blobs, store, &options(), &mut |_| {}));
}

/// Makes a checkpoint in a new store. One that was made is as its manifest says; of another nothing is left.
fn in_store(make: impl FnOnce(&Store) -> Result<Checkpoint, PackageError>) {
    let scratch = Scratch::new();
    let store = Store::at(scratch.dir());
    let made = make(&store);
    scratch.check();
    match made {
        Ok(checkpoint) => {
            checkpoint.verify().expect("it has just been compared");
            let listed = store.open(&checkpoint.manifest.name);
            let listed = listed.expect("it is in the store");
            assert_eq!(listed.manifest, checkpoint.manifest);
        }
        Err(_) => {
            let left: Vec<PathBuf> = { fs::read_dir(scratch.dir()).expect("it is ours") }
                .filter_map(|entry| Some(entry.ok()?.path()))
                .collect();
            assert!(left.is_empty(), "left behind: {left:?}");
        }
    }
}

/// The documents and blobs of one input.
struct Parts<'d>(Vec<&'d [u8]>);

impl<'d> Parts<'d> {
    fn of(data: &'d [u8]) -> Self {
        let mut parts = Vec::new();
        let mut rest = data;
        while let Some(at) = rest
            .windows(SEPARATOR.len())
            .position(|window| window == SEPARATOR)
        {
            parts.push(&rest[..at]);
            rest = &rest[at + SEPARATOR.len()..];
        }
        parts.push(rest);
        Self(parts)
    }

    /// The part behind the first one that a digest names.
    fn blob(&self, digest: &str) -> Result<&'d [u8], PackageError> {
        let last = digest.get(digest.len().saturating_sub(2)..);
        let number: Option<usize> = last.and_then(|digits| digits.parse().ok());
        let found = number.and_then(|it| self.0.get(it + 1));
        found.copied().ok_or_else(|| missing(digest))
    }
}

impl Blobs for Parts<'_> {
    fn has(&self, digest: &str, _size: u64) -> Result<bool, PackageError> {
        Ok(self.blob(digest).is_ok())
    }

    fn put(&self, digest: &str, _bytes: &[u8]) -> Result<(), PackageError> {
        Err(missing(digest))
    }

    fn get(&self, descriptor: &Descriptor, limit: u64) -> Result<Vec<u8>, PackageError> {
        let blob = self.blob(&descriptor.digest)?;
        let bytes = match descriptor.media_type.ends_with("+zstd") {
            true => in_zstd(blob),
            false => blob.to_vec(),
        };
        match bytes.len() as u64 > limit {
            true => Err(missing(&descriptor.digest)),
            false => Ok(bytes),
        }
    }

    fn manifest(&self, reference: &str, limit: u64) -> Result<Vec<u8>, PackageError> {
        let document = match reference {
            "tag" => self.0[0],
            digest => self.blob(digest)?,
        };
        match document.len() as u64 > limit {
            true => Err(missing(reference)),
            false => Ok(document.to_vec()),
        }
    }

    fn put_manifest(
        &self,
        _media_type: &str,
        _bytes: &[u8],
        tag: Option<&str>,
    ) -> Result<(), PackageError> {
        Err(missing(tag.unwrap_or_default()))
    }
}

fn missing(what: &str) -> PackageError {
    PackageError::Missing {
        member: what.to_owned(),
    }
}

/// A frame of one raw block, as RFC 8878 has it: a compressor has nothing to say about what a reader does.
///
/// ```text
/// magic 28 b5 2f fd, descriptor a0 (one segment, length in 4 bytes), length (u32 LE),
/// block header (u24 LE: last 1, type 0, length << 3), bytes
/// ```
fn in_zstd(bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).expect("inputs are short");
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0xa0];
    frame.extend(length.to_le_bytes());
    frame.extend(&(1 | length << 3).to_le_bytes()[..3]);
    frame.extend(bytes);
    frame
}
