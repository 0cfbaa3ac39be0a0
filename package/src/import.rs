//! A package read into a directory of checkpoints, or looked into.
//!
//! ```text
//!  package ──> manifest: version, names, digests, architecture, size, signature
//!          ──> members, each as the manifest says, in its order ──> draft ──> the checkpoint, whole
//! ```
//!
//! Nothing of a package is used before it has been compared with what the manifest says, and nothing is
//! left of one that is not whole.

use std::fs::File;
use std::io::{Read, Write};

use transship_checkpoint::manifest::{self, MANIFEST_FILE, MANIFEST_LIMIT, Manifest};
use transship_checkpoint::store::{Checkpoint, Draft, Durability, Store};
use transship_digest::HashedBeside;
use transship_layer::Member;
use transship_path_error::During as _;

use crate::error::PackageError;
use crate::foreign::{self, ForeignCheckpoint};
pub use crate::import_options::{ImportOptions, OF_MAX_SIZE};
use crate::new_file::{NewFile, check_room};
pub use crate::new_file::{OF_ROOM, room};
use crate::open_package::OpenPackage;
use crate::signature::{SIGNATURE_FILE, SIGNATURE_LIMIT, TrustedKeys};

/// What came out of a package.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one at a time")]
pub enum Imported {
    /// A checkpoint.
    Checkpoint(Checkpoint),
    /// The archive of another engine: it needs to be told which layers lie below its files.
    Foreign(Box<ForeignCheckpoint>),
}

/// Reads a package of transship, or the archive of another engine, into `store`. `progress` gets the bytes.
///
/// # Errors
/// It is none, damaged, too large, of another machine or not signed: nothing of it is left then.
pub fn import(
    input: impl Read,
    store: &Store,
    options: &ImportOptions,
    progress: &mut dyn FnMut(u64),
) -> Result<Imported, PackageError> {
    let mut package = OpenPackage::new(input, &options.identities)?;
    let Some((path, member)) = package.next()? else {
        return Err(PackageError::Unknown {
            reason: "it is empty".to_owned(),
        });
    };
    if path == MANIFEST_FILE {
        let own = import_own(package, &member, store, options, progress)?;
        return Ok(Imported::Checkpoint(own));
    }
    if !foreign::is_foreign(&path) {
        return Err(PackageError::Unknown {
            reason: format!("it begins with {path:?}"),
        });
    }
    let name = options.name.as_ref().unwrap_or(&options.name_without);
    let foreign = foreign::read(package, (path, member), store, name, options, progress)?;
    Ok(Imported::Foreign(Box::new(foreign)))
}

fn import_own(
    mut package: OpenPackage<'_>,
    first: &Member,
    store: &Store,
    options: &ImportOptions,
    progress: &mut dyn FnMut(u64),
) -> Result<Checkpoint, PackageError> {
    let head = Head::read(&mut package, first, Some(&options.trusted))?;
    head.check(options)?;
    let (manifest, json) = head.named(options.name.as_deref())?;
    let draft = store.draft(&manifest.name)?;
    check_room(draft.dir(), manifest.size())?;
    let mut next = head.after;
    for (dir, files) in manifest.directories() {
        for file in files {
            let path = format!("{dir}/{}", file.path);
            let member = expect(next.take(), &path, file)?;
            take_file(&mut package, &draft, &path, &member, file, progress)?;
            next = package.next()?;
        }
    }
    if let Some((path, _)) = next {
        return Err(PackageError::Member {
            member: path,
            reason: "the manifest does not know it, or it is there twice".to_owned(),
        });
    }
    if let Some(signature) = head.signature {
        let path = draft.dir().join(SIGNATURE_FILE);
        File::create_new(&path)
            .and_then(|mut file| file.write_all(signature.as_bytes()))
            .during("write", &path)?;
    }
    Ok(draft.commit_as(manifest, &json, Durability::Synced)?)
}

/// What a package begins with.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) manifest: Manifest,
    /// The manifest's bytes, which a signature is of.
    pub(crate) json: Vec<u8>,
    pub(crate) signature: Option<String>,
    /// The member behind it.
    pub(crate) after: Option<(String, Member)>,
}

impl Head {
    /// Reads it; the manifest is the current member. It is parsed when one of the keys that are `trusted` has signed it.
    pub(crate) fn read(
        package: &mut OpenPackage<'_>,
        first: &Member,
        trusted: Option<&TrustedKeys>,
    ) -> Result<Self, PackageError> {
        let json = package.read_all(MANIFEST_FILE, first, MANIFEST_LIMIT)?;
        if trusted.is_none_or(TrustedKeys::is_empty) {
            // Before anything else is read.
            Manifest::parse(&json)?;
        }
        let mut after = package.next()?;
        let mut signature = None;
        if let Some((path, member)) = after.take_if(|(path, _)| path == SIGNATURE_FILE) {
            let bytes = package.read_all(&path, &member, SIGNATURE_LIMIT)?;
            signature = Some(String::from_utf8_lossy(&bytes).into_owned());
            after = package.next()?;
        }
        let head = Self::of(json, signature, trusted)?;
        Ok(Self { after, ..head })
    }

    /// That of a manifest and its signature, by one of the keys that are `trusted`. What nobody has signed is not parsed:
    /// in memory it takes many times its length.
    pub(crate) fn of(
        json: Vec<u8>,
        signature: Option<String>,
        trusted: Option<&TrustedKeys>,
    ) -> Result<Self, PackageError> {
        if let Some(trusted) = trusted {
            trusted.check(&json, signature.as_deref())?;
        }
        Ok(Self {
            manifest: Manifest::parse(&json)?,
            json,
            signature,
            after: None,
        })
    }

    /// The manifest under the name that it gets here, and its bytes.
    pub(crate) fn named(&self, name: Option<&str>) -> Result<(Manifest, Vec<u8>), PackageError> {
        let mut manifest = self.manifest.clone();
        let Some(name) = name.filter(|name| *name != manifest.name) else {
            return Ok((manifest, self.json.clone()));
        };
        if self.signature.is_some() {
            return Err(PackageError::Format {
                name: manifest.name,
                format: "another name",
                reason: "it is signed under the name that it has".to_owned(),
            });
        }
        name.clone_into(&mut manifest.name);
        let json = manifest.to_json();
        Ok((manifest, json))
    }

    /// Checks all that can be checked before anything is written.
    pub(crate) fn check(&self, options: &ImportOptions) -> Result<(), PackageError> {
        let found = &self.manifest.source.architecture;
        if *found != options.architecture {
            return Err(PackageError::Architecture {
                found: found.clone(),
                here: options.architecture.clone(),
            });
        }
        let bytes = self.manifest.size();
        if bytes > options.max_bytes {
            return Err(PackageError::TooLarge {
                bytes,
                limit: options.max_bytes,
                of: OF_MAX_SIZE,
            });
        }
        Ok(())
    }
}

/// The member must be the file that the manifest has next.
pub(crate) fn expect(
    next: Option<(String, Member)>,
    path: &str,
    file: &manifest::File,
) -> Result<Member, PackageError> {
    let Some((found, member)) = next else {
        return Err(PackageError::Missing {
            member: path.to_owned(),
        });
    };
    if found != path {
        return Err(PackageError::Member {
            member: found,
            reason: format!("{path:?} is expected there"),
        });
    }
    if member.size != file.size {
        return Err(PackageError::Differs {
            member: found,
            reason: "its length differs from the manifest's",
        });
    }
    Ok(member)
}

fn take_file(
    package: &mut OpenPackage<'_>,
    draft: &Draft,
    path: &str,
    member: &Member,
    file: &manifest::File,
    progress: &mut dyn FnMut(u64),
) -> Result<(), PackageError> {
    let mut target = NewFile::create(draft.dir(), path)?;
    let mut hasher = HashedBeside::new();
    package.read_shared_pieces(&mut |piece| {
        hasher.update_shared(piece);
        progress(piece.len() as u64);
        target.write(piece)
    })?;
    target.finish()?;
    let found = hasher.finish();
    if (found.size, &found.sha256) != (member.size, &file.sha256) {
        return Err(PackageError::Differs {
            member: path.to_owned(),
            reason: "its digest differs from the manifest's",
        });
    }
    Ok(())
}
