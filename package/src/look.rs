//! A package looked into without unpacking it: memory is read through for its digest alone.

use std::io::{self, Read};

use tempfile::TempDir;
use transship_checkpoint::manifest::{self, MANIFEST_FILE, ROOTFS_DIFF_FILE};
use transship_digest::{Hashed, Sha256};
use transship_path_error::During as _;

use crate::contents::{ContainerContents, Contents};
use crate::encryption::Identities;
use crate::error::PackageError;
use crate::import::{Head, expect};
use crate::layer_changes::{Digests, LayerChanges, layer_changes};
use crate::new_file::{NewFile, check_room};
use crate::open_package::OpenPackage;

/// What a package is, and what is in it.
#[derive(Debug)]
pub struct Looked {
    /// What is in it.
    pub contents: Contents,
    /// Whether it is encrypted.
    pub encrypted: bool,
    /// Whether it has a signature, of whomever.
    pub signed: bool,
}

/// Looks into a package in the format of transship. Everything is compared with its digest.
///
/// # Errors
/// It is none, or damaged, or encrypted for others.
pub fn look(
    input: impl Read,
    identities: &Identities,
    digests: Digests,
) -> Result<Looked, PackageError> {
    let mut package = OpenPackage::new(input, identities)?;
    let first = package.next()?.filter(|(path, _)| path == MANIFEST_FILE);
    let Some((_, member)) = first else {
        return Err(PackageError::Unknown {
            reason: format!("it does not begin with {MANIFEST_FILE}"),
        });
    };
    let head = Head::read(&mut package, &member, None)?;
    let temp = tempfile::tempdir().during("make a directory in", std::env::temp_dir())?;
    let kept = head.manifest.directories().flat_map(|(_, files)| files);
    let kept = kept
        .filter(|file| !is_large(&file.path))
        .map(|file| file.size);
    check_room(temp.path(), kept.fold(0, u64::saturating_add))?;
    let mut next = head.after;
    let mut changes = Vec::new();
    for (dir, files) in head.manifest.directories() {
        let mut of_layer = LayerChanges::default();
        for file in files {
            let path = format!("{dir}/{}", file.path);
            expect(next.take(), &path, file)?;
            let found = match file.path.as_str() {
                ROOTFS_DIFF_FILE => {
                    of_layer = read_layer(&mut package, dir, &path, file, digests)?;
                    None
                }
                other if is_large(other) => Some(read_through(&mut package)?),
                _ => Some(keep(&mut package, &temp, &path)?),
            };
            if found.is_some_and(|found| found != file.sha256) {
                return Err(differs(&path));
            }
            next = package.next()?;
        }
        changes.push(of_layer);
    }
    if let Some((path, _)) = next {
        return Err(PackageError::Member {
            member: path,
            reason: "the manifest does not know it, or it is there twice".to_owned(),
        });
    }
    let manifest = &head.manifest;
    let containers = manifest.containers.iter().zip(changes);
    let containers = containers.map(|(container, changes)| {
        let dir = temp.path().join(&container.name);
        ContainerContents::of(manifest, container, &dir, changes)
    });
    Ok(Looked {
        contents: Contents::from_parts(manifest, containers.collect::<Result<_, _>>()?),
        encrypted: package.encrypted,
        signed: head.signature.is_some(),
    })
}

/// Pages of memory and the content of volumes: nobody looks into them here.
fn is_large(path: &str) -> bool {
    path.starts_with("checkpoint/pages-")
        || path == ROOTFS_DIFF_FILE
        || !path.contains('/') && path.ends_with(".tar")
}

fn differs(path: &str) -> PackageError {
    PackageError::Differs {
        member: path.to_owned(),
        reason: "its digest differs from the manifest's",
    }
}

fn read_through(package: &mut OpenPackage<'_>) -> Result<String, PackageError> {
    let mut hasher = Sha256::new();
    package.read_pieces(&mut |piece| {
        hasher.update(piece);
        Ok(())
    })?;
    Ok(hasher.finish_hex())
}

fn keep(package: &mut OpenPackage<'_>, temp: &TempDir, path: &str) -> Result<String, PackageError> {
    let mut hasher = Sha256::new();
    let mut file = NewFile::create(temp.path(), path)?;
    package.read_pieces(&mut |piece| {
        hasher.update(piece);
        file.write(piece)
    })?;
    file.finish()?;
    Ok(hasher.finish_hex())
}

fn read_layer(
    package: &mut OpenPackage<'_>,
    container: &str,
    path: &str,
    file: &manifest::File,
    digests: Digests,
) -> Result<LayerChanges, PackageError> {
    let mut hashed = Hashed::new(package.data());
    let changes = layer_changes(&mut hashed, digests);
    io::copy(&mut hashed, &mut io::sink()).map_err(PackageError::reading)?;
    // A layer that is damaged on the way is that first of all.
    if hashed.finish().1.sha256 != file.sha256 {
        return Err(differs(path));
    }
    changes.map_err(|source| PackageError::Layer {
        container: container.to_owned(),
        source,
    })
}
