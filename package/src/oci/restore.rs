//! Checkpoints out of blobs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use transship_checkpoint::manifest::{self, MANIFEST_LIMIT, ROOTFS_DIFF_FILE};
use transship_checkpoint::store::{Checkpoint, Durability, Store};
use transship_digest::{Hashed, sha256_hex};
use transship_layer::Archive;
use transship_path_error::During as _;

use super::artifact::{
    ARTIFACT, ARTIFACT_LIMIT, CHUNK, CHUNK_LIMIT, CONFIG, FILES, FILES_LIMIT, LENGTH, OFFSET, PATH,
    SIGNATURE, SMALL,
};
use super::blobs::Blobs;
use super::digests::{check_digest, digest_of};
use super::document::{Descriptor, Index, MANIFEST, Manifest};
use super::partial::Partial;
use super::sealed::{self, FetchedPackage, SEALED};
use super::transfers::in_threads;
use crate::contents::Contents;
use crate::encryption::Identities;
use crate::error::PackageError;
use crate::import::{Head, ImportOptions};
use crate::layer_changes::Digests;
use crate::new_file::{NewFile, check_room};
use crate::signature::{SIGNATURE_FILE, SIGNATURE_LIMIT, TrustedKeys};

/// Entries of an index that are looked at.
const MOST_ENTRIES: usize = 64;

/// A checkpoint among blobs: all that can be checked before anything is written has been checked.
#[derive(Debug)]
pub struct Offered {
    digest: String,
    artifact: Manifest,
    head: Head,
    /// Whether it is a package in pieces.
    is_sealed: bool,
}

impl Offered {
    /// That of the tag or digest `tag`, which names its artifact, or an index with it; `identities` open one that
    /// is encrypted; who only looks into it has no `options`.
    ///
    /// # Errors
    /// It is none, damaged, too large, of another machine or not signed; or an index has several.
    pub fn read(
        blobs: &dyn Blobs,
        tag: &str,
        identities: &Identities,
        options: Option<&ImportOptions>,
    ) -> Result<Self, PackageError> {
        let (digest, artifact) = find_artifact(blobs, tag)?;
        let is_sealed = artifact.artifact_type.as_deref() == Some(SEALED);
        let trusted = options.map(|it| &it.trusted);
        let head = match is_sealed {
            true => sealed::read_head(blobs, &artifact, identities, trusted)?,
            false => read_head(blobs, &artifact, trusted)?,
        };
        if let Some(options) = options {
            head.check(options)?;
        }
        Ok(Self {
            digest,
            artifact,
            head,
            is_sealed,
        })
    }

    /// The name that it has.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.head.manifest.name
    }

    /// The SHA-256 of the manifest of the checkpoint, in hexadecimal digits.
    #[must_use]
    pub fn manifest_digest(&self) -> String {
        sha256_hex(&self.head.json)
    }

    /// Bytes that come, before they are compressed.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        if self.is_sealed {
            return self.head.manifest.size();
        }
        let chunks = self.layers(CHUNK).map(|(_, it)| length(it));
        chunks.fold(self.small_bytes(), u64::saturating_add)
    }

    fn layers(&self, media_type: &'static str) -> impl Iterator<Item = (usize, &Descriptor)> {
        let layers = self.artifact.layers.iter().enumerate();
        layers.filter(move |(_, it)| it.media_type == media_type)
    }

    /// The blobs of small files; there is one at least.
    fn small_files(&self) -> Result<Vec<(usize, &Descriptor)>, PackageError> {
        let files: Vec<_> = self.layers(FILES).collect();
        match files.is_empty() {
            true => Err(PackageError::Missing {
                member: "the blob of its small files".to_owned(),
            }),
            false => Ok(files),
        }
    }

    fn small_bytes(&self) -> u64 {
        let all = { self.head.manifest.directories() }.flat_map(|(_, files)| files);
        let small = all.filter(|file| file.size < SMALL);
        small.map(|file| file.size).fold(0, u64::saturating_add)
    }

    /// Makes a checkpoint in `store` of it. What has come is kept when the blobs cannot be had for now
    /// ([`PackageError::is_passing`]): the next attempt goes on with it. `progress` gets the bytes.
    ///
    /// # Errors
    /// It is damaged, or cannot be had: nothing of it is left then, but for what came before where the disk has no room
    /// for the rest.
    pub fn restore(
        &self,
        blobs: &dyn Blobs,
        store: &Store,
        options: &ImportOptions,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Checkpoint, PackageError> {
        if self.is_sealed {
            let artifact = (self.digest.as_str(), &self.artifact);
            let artifact = (artifact, self.head.manifest.size());
            return sealed::restore(blobs, artifact, store, options, progress);
        }
        let (manifest, json) = self.head.named(options.name.as_deref())?;
        store.check_free(&manifest.name)?;
        let partial = Partial::open(store, &self.digest)?;
        if let Err(error) = self.fill(blobs, &manifest, &partial, progress) {
            partial.keep_after(&error);
            return Err(error);
        }
        if let Some(signature) = &self.head.signature {
            let path = partial.dir().join(SIGNATURE_FILE);
            fs::write(&path, signature).during("write", &path)?;
        }
        let whole = Checkpoint {
            dir: partial.dir().to_path_buf(),
            manifest,
            sealed: None,
        };
        whole.verify()?;
        let draft = partial.into_draft(store, &whole.manifest.name)?;
        Ok(draft.commit_as(whole.manifest, &json, Durability::Synced)?)
    }

    /// Fetches the package of one that is encrypted, `max_bytes` at most. What has come is kept when the blobs cannot be
    /// had for now ([`PackageError::is_passing`]): the next attempt goes on with it. `progress` gets the bytes.
    ///
    /// # Errors
    /// It is too large, or cannot be had.
    pub fn fetch_package(
        &self,
        blobs: &dyn Blobs,
        store: &Store,
        max_bytes: u64,
        progress: &mut dyn FnMut(u64),
    ) -> Result<FetchedPackage, PackageError> {
        let artifact = (self.digest.as_str(), &self.artifact);
        sealed::fetch(blobs, artifact, store, (max_bytes, 0), progress)
    }

    /// Bytes of that package.
    #[must_use]
    pub fn package_bytes(&self) -> u64 {
        let pieces = self.artifact.layers.iter().map(|it| it.size);
        pieces.fold(0, u64::saturating_add)
    }

    /// Whether it is encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.is_sealed
    }

    /// Whether it has a signature, of whomever.
    #[must_use]
    pub fn is_signed(&self) -> bool {
        self.head.signature.is_some()
    }

    /// Looks into it. Pages of memory and the content of volumes stay where they are; everything else is compared
    /// with its digest.
    ///
    /// # Errors
    /// It is damaged, or cannot be had.
    pub fn look(
        &self,
        blobs: &dyn Blobs,
        identities: &Identities,
        digests: Digests,
    ) -> Result<Contents, PackageError> {
        if self.is_sealed {
            return sealed::look_into(blobs, &self.artifact, identities, digests);
        }
        let temp = tempfile::tempdir().during("make a directory in", std::env::temp_dir())?;
        let manifest = &self.head.manifest;
        let mut kept = Vec::new();
        for (name, files) in manifest.directories() {
            let looked = files
                .iter()
                .filter(|file| file.size < SMALL || is_looked_at(&file.path));
            kept.extend(looked.map(|file| (format!("{name}/{}", file.path), file)));
        }
        let bytes = kept.iter().map(|(_, file)| file.size);
        check_room(temp.path(), bytes.fold(0, u64::saturating_add))?;
        let mut small = SmallFiles::new(manifest, temp.path());
        for (_, files) in self.small_files()? {
            small.restore(blobs, files, &mut |_| {})?;
        }
        small.check_all_there()?;
        let targets = open_targets(manifest, temp.path())?;
        let wanted: BTreeSet<_> = kept.iter().map(|(path, _)| path.as_str()).collect();
        for (_, chunk) in self.layers(CHUNK) {
            let path = chunk.annotation(PATH).unwrap_or_default();
            if wanted.contains(path) {
                take_chunk(blobs, chunk, &targets)?;
            }
        }
        for (path, file) in kept {
            let full = temp.path().join(&path);
            if digest_of_file(&full).during("read", &full)? != file.sha256 {
                return Err(PackageError::Differs {
                    member: path,
                    reason: "its digest differs from the manifest's",
                });
            }
        }
        let looked = Checkpoint {
            dir: temp.path().to_path_buf(),
            manifest: manifest.clone(),
            sealed: None,
        };
        Contents::of(&looked, digests)
    }

    /// Fetches what is missing.
    fn fill(
        &self,
        blobs: &dyn Blobs,
        manifest: &manifest::Manifest,
        partial: &Partial,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), PackageError> {
        let there = self.layers(CHUNK).filter(|(it, _)| partial.is_done(*it));
        let there = { there.map(|(_, it)| length(it)) }.fold(0, u64::saturating_add);
        check_room(partial.dir(), manifest.size().saturating_sub(there))?;
        progress(there);
        let mut small = SmallFiles::new(manifest, partial.dir());
        let mut told = 0;
        for (layer, files) in self.small_files()? {
            if !partial.is_done(layer) {
                small.restore(blobs, files, &mut |bytes| {
                    told += bytes;
                    progress(bytes);
                })?;
                partial.set_done(layer)?;
            }
        }
        small.check_all_there()?;
        progress(self.small_bytes().saturating_sub(told));
        let missing = self.layers(CHUNK).filter(|(it, _)| !partial.is_done(*it));
        restore_large(
            blobs,
            &missing.collect::<Vec<_>>(),
            manifest,
            partial,
            progress,
        )
    }
}

/// The artifact that has this tag or digest, or that is in the index that has it, with its digest.
fn find_artifact(blobs: &dyn Blobs, tag: &str) -> Result<(String, Manifest), PackageError> {
    let document = blobs.manifest(tag, ARTIFACT_LIMIT)?;
    let entries = Index::parse(&document)?.manifests;
    if entries.is_empty() {
        let artifact = Manifest::parse(&document)?;
        return match is_checkpoint(&artifact) {
            true => Ok((digest_of(&document), artifact)),
            false => Err(no_checkpoint(tag)),
        };
    }
    // One at most is kept: their author makes each as large as he may.
    let (mut found, mut digests) = (None, BTreeSet::new());
    // skopeo 1.9 leaves out what kind of artifact an entry is when it copies an index.
    let may_be = |it: &&Descriptor| match &it.artifact_type {
        Some(kind) => [ARTIFACT, SEALED].contains(&kind.as_str()),
        None => it.platform.is_none() && it.media_type == MANIFEST,
    };
    for entry in entries.iter().filter(may_be).take(MOST_ENTRIES) {
        // Else a tag, which means something else tomorrow, or a path.
        check_digest(&entry.digest)?;
        let artifact = Manifest::parse(&blobs.manifest(&entry.digest, ARTIFACT_LIMIT)?)?;
        if is_checkpoint(&artifact) {
            digests.insert(entry.digest.clone());
            found = Some((entry.digest.clone(), artifact));
        }
    }
    match found {
        _ if digests.len() > 1 => Err(PackageError::Several {
            name: tag.to_owned(),
            digests: digests.into_iter().collect(),
        }),
        Some(found) => Ok(found),
        None => Err(no_checkpoint(tag)),
    }
}

fn is_checkpoint(artifact: &Manifest) -> bool {
    match artifact.artifact_type.as_deref() {
        Some(ARTIFACT) => artifact.config.media_type == CONFIG,
        kind => kind == Some(SEALED),
    }
}

fn no_checkpoint(tag: &str) -> PackageError {
    PackageError::Unknown {
        reason: format!("{tag} is no checkpoint"),
    }
}

fn digest_of_file(path: &Path) -> std::io::Result<String> {
    let (mut file, mut piece) = (Hashed::new(File::open(path)?), vec![0; 256 << 10]);
    while file.read(&mut piece)? > 0 {}
    Ok(file.finish().1.sha256)
}

/// Whether a large file is more than pages of memory or the content of a volume.
fn is_looked_at(path: &str) -> bool {
    let is_volume = !path.contains('/') && path.ends_with(".tar") && path != ROOTFS_DIFF_FILE;
    !is_volume && !path.starts_with("checkpoint/pages-")
}

/// Bytes of a chunk, before they are compressed.
fn length(chunk: &Descriptor) -> u64 {
    let length = chunk.annotation(LENGTH).and_then(|it| it.parse().ok());
    length.unwrap_or_default()
}

fn read_head(
    blobs: &dyn Blobs,
    artifact: &Manifest,
    trusted: Option<&TrustedKeys>,
) -> Result<Head, PackageError> {
    let json = blobs.get(&artifact.config, MANIFEST_LIMIT)?;
    let mut signatures = artifact.layers.iter();
    let signature = match signatures.find(|it| it.media_type == SIGNATURE) {
        Some(descriptor) => {
            let bytes = blobs.get(descriptor, SIGNATURE_LIMIT)?;
            Some(String::from_utf8_lossy(&bytes).into_owned())
        }
        None => None,
    };
    Head::of(json, signature, trusted)
}

/// Small files on their way into a directory, out of one blob after the other.
struct SmallFiles<'a> {
    dir: &'a Path,
    /// Those of the manifest, with their lengths.
    known: BTreeMap<String, u64>,
    came: BTreeSet<String>,
}

impl<'a> SmallFiles<'a> {
    fn new(manifest: &manifest::Manifest, dir: &'a Path) -> Self {
        let mut known = BTreeMap::new();
        for (name, files) in manifest.directories() {
            let small = files.iter().filter(|file| file.size < SMALL);
            known.extend(small.map(|file| (format!("{name}/{}", file.path), file.size)));
        }
        Self {
            dir,
            known,
            came: BTreeSet::new(),
        }
    }

    fn restore(
        &mut self,
        blobs: &dyn Blobs,
        descriptor: &Descriptor,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), PackageError> {
        let packed = blobs.get(descriptor, FILES_LIMIT)?;
        let tar = zstd::stream::read::Decoder::new(&packed[..]).map_err(PackageError::reading)?;
        let mut archive = Archive::new(tar.take(FILES_LIMIT));
        let mut piece = vec![0; 64 << 10];
        while let Some(member) = archive.next_member().map_err(PackageError::of_archive)? {
            let path = String::from_utf8_lossy(&member.path).into_owned();
            if self.known.get(&path) != Some(&member.size) || !self.came.insert(path.clone()) {
                return Err(PackageError::Member {
                    member: path.escape_debug().to_string(),
                    reason: "the manifest does not know it so, or it is there twice".to_owned(),
                });
            }
            // An attempt that was cut off may have left it.
            drop(fs::remove_file(self.dir.join(&path)));
            let mut file = NewFile::create(self.dir, &path)?;
            loop {
                match { archive.read_piece(&mut piece) }.map_err(PackageError::of_archive)? {
                    0 => break,
                    read => {
                        progress(read as u64);
                        file.write(&piece[..read])?;
                    }
                }
            }
            file.finish()?;
        }
        Ok(())
    }

    /// What has not come now has come before.
    fn check_all_there(self) -> Result<(), PackageError> {
        let is_there = |path: &String| {
            self.came.contains(path) || fs::symlink_metadata(self.dir.join(path)).is_ok()
        };
        match self.known.keys().find(|path| !is_there(path)) {
            Some(member) => Err(PackageError::Missing {
                member: member.clone(),
            }),
            None => Ok(()),
        }
    }
}

/// Large files by their path, with their length.
type Targets = BTreeMap<String, (File, u64)>;

/// Opens the large files; those that are not there are made.
fn open_targets(manifest: &manifest::Manifest, dir: &Path) -> Result<Targets, PackageError> {
    let mut targets = Targets::new();
    for (name, files) in manifest.directories() {
        for file in files.iter().filter(|file| file.size >= SMALL) {
            let path = format!("{name}/{}", file.path);
            let full = dir.join(&path);
            if fs::symlink_metadata(&full).is_err() {
                drop(NewFile::create(dir, &path)?);
            }
            let mut open = OpenOptions::new();
            let open = open
                .write(true)
                .custom_flags(nix::libc::O_NOFOLLOW)
                .open(&full);
            let target = open.during("open", &full)?;
            target.set_len(file.size).during("write", &full)?;
            targets.insert(path, (target, file.size));
        }
    }
    Ok(targets)
}

fn restore_large(
    blobs: &dyn Blobs,
    chunks: &[(usize, &Descriptor)],
    manifest: &manifest::Manifest,
    partial: &Partial,
    progress: &mut dyn FnMut(u64),
) -> Result<(), PackageError> {
    let targets = open_targets(manifest, partial.dir())?;
    in_threads(chunks, progress, |(layer, chunk), tell| {
        let bytes = take_chunk(blobs, chunk, &targets)?;
        partial.set_done(*layer)?;
        tell(bytes);
        Ok(())
    })?;
    Ok(())
}

fn take_chunk(
    blobs: &dyn Blobs,
    chunk: &Descriptor,
    targets: &Targets,
) -> Result<u64, PackageError> {
    let refused = |reason: &str| PackageError::Member {
        member: chunk.digest.escape_debug().to_string(),
        reason: reason.to_owned(),
    };
    let number = |name: &str| chunk.annotation(name)?.parse::<u64>().ok();
    let (Some(offset), Some(length)) = (number(OFFSET), number(LENGTH)) else {
        return Err(refused("it does not say where it belongs"));
    };
    let target = chunk.annotation(PATH).and_then(|path| targets.get(path));
    let (file, size) = target.ok_or_else(|| refused("it is of no large file of the manifest"))?;
    let ends_inside = offset.checked_add(length).is_some_and(|end| end <= *size);
    if length > CHUNK_LIMIT || !ends_inside {
        return Err(refused("it lies outside of its file"));
    }
    let packed = blobs.get(chunk, CHUNK_LIMIT)?;
    let capacity = usize::try_from(length).unwrap_or_default();
    let bytes = zstd::bulk::decompress(&packed, capacity).map_err(PackageError::reading)?;
    if bytes.len() as u64 != length {
        return Err(refused("its length is not the one that it names"));
    }
    file.write_all_at(&bytes, offset)
        .map_err(PackageError::writing)?;
    Ok(length)
}

#[cfg(test)]
#[path = "restore_tests.rs"]
mod tests;
