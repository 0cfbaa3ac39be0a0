//! Checkpoints into blobs, and out of them.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Read as _;
use std::num::NonZero;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};

use transship_checkpoint::beneath::{Links, open_regular};
use transship_checkpoint::manifest::{self, MANIFEST_LIMIT};
use transship_checkpoint::store::{Checkpoint, Durability, Store};
use transship_layer::Archive;
use transship_path_error::During as _;

use super::blobs::Blobs;
use super::chunks::Chunks;
use super::document::{Descriptor, MANIFEST, Manifest};
use crate::error::PackageError;
use crate::export::{read_manifest, signature_of};
use crate::import::{Head, ImportOptions, NewFile, check_room};
use crate::signature::{SIGNATURE_FILE, SIGNATURE_LIMIT};
use crate::tar_members::TarMembers;

const ARTIFACT: &str = "application/vnd.transship.checkpoint.v1";
const CONFIG: &str = "application/vnd.transship.checkpoint.config.v1+json";
const SIGNATURE: &str = "application/vnd.transship.checkpoint.signature.v1";
const FILES: &str = "application/vnd.transship.checkpoint.files.v1.tar+zstd";
const CHUNK: &str = "application/vnd.transship.checkpoint.chunk.v1+zstd";
const PATH: &str = "dev.transship.path";
const OFFSET: &str = "dev.transship.offset";
const LENGTH: &str = "dev.transship.length";

/// Files below this go into one blob.
const SMALL: u64 = 256 << 10;
/// Largest manifest of an artifact, in bytes: what registries take.
const ARTIFACT_LIMIT: u64 = 4 << 20;
/// Largest blob of small files, and largest chunk, in bytes, compressed and not.
const FILES_LIMIT: u64 = 256 << 20;
const CHUNK_LIMIT: u64 = 8 << 20;
/// Chunks that wait for a thread.
const WAITING: usize = 4;
/// Transfers at once.
const MOST_THREADS: usize = 8;

/// What became of a checkpoint among blobs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Stored {
    /// Blobs that it consists of.
    pub blobs: usize,
    /// Bytes of them all.
    pub bytes: u64,
    /// Those that were not there before.
    pub new_blobs: usize,
    /// Bytes of these.
    pub new_bytes: u64,
}

/// Puts a checkpoint among `blobs` under the tag `tag`. What is there already is left alone, so that a second
/// attempt goes on where the first one ended. `progress` gets the bytes.
///
/// # Errors
/// A file is damaged, or a blob cannot be put there.
pub fn store(
    checkpoint: &Checkpoint,
    level: i32,
    blobs: &dyn Blobs,
    tag: &str,
    progress: &mut dyn FnMut(u64),
) -> Result<Stored, PackageError> {
    let total = checkpoint.manifest.size();
    let json = read_manifest(checkpoint)?;
    let figures = Figures::default();
    let config = put(blobs, CONFIG, &json, &figures)?;
    let mut layers = Vec::new();
    if let Some(signature) = signature_of(&checkpoint.dir)? {
        layers.push(put(blobs, SIGNATURE, signature.as_bytes(), &figures)?);
    }
    let small = small_files(checkpoint, level, progress)?;
    layers.push(put(blobs, FILES, &small, &figures)?);
    layers.extend(store_large(
        checkpoint, level, blobs, total, &figures, progress,
    )?);
    let manifest = Manifest {
        artifact_type: Some(ARTIFACT.to_owned()),
        config,
        layers,
        ..Manifest::default()
    };
    let manifest_json = manifest.to_json();
    if manifest_json.len() as u64 > ARTIFACT_LIMIT {
        return Err(PackageError::TooLarge {
            bytes: manifest_json.len() as u64,
            limit: ARTIFACT_LIMIT,
            of: "the manifest of an artifact",
        });
    }
    blobs.put_manifest(MANIFEST, &manifest_json, Some(tag))?;
    Ok(figures.stored())
}

#[derive(Default)]
struct Figures {
    blobs: AtomicUsize,
    bytes: AtomicU64,
    new_blobs: AtomicUsize,
    new_bytes: AtomicU64,
}

impl Figures {
    fn stored(&self) -> Stored {
        Stored {
            blobs: self.blobs.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            new_blobs: self.new_blobs.load(Ordering::Relaxed),
            new_bytes: self.new_bytes.load(Ordering::Relaxed),
        }
    }
}

fn put(
    blobs: &dyn Blobs,
    media_type: &str,
    bytes: &[u8],
    figures: &Figures,
) -> Result<Descriptor, PackageError> {
    let descriptor = Descriptor::new(media_type, bytes);
    figures.blobs.fetch_add(1, Ordering::Relaxed);
    figures.bytes.fetch_add(descriptor.size, Ordering::Relaxed);
    if !blobs.has(&descriptor.digest, descriptor.size)? {
        blobs.put(&descriptor.digest, bytes)?;
        figures.new_blobs.fetch_add(1, Ordering::Relaxed);
        figures
            .new_bytes
            .fetch_add(descriptor.size, Ordering::Relaxed);
    }
    Ok(descriptor)
}

/// All small files as a compressed tar.
fn small_files(
    checkpoint: &Checkpoint,
    level: i32,
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<u8>, PackageError> {
    // No time in it: equal files make an equal blob.
    let mut members = TarMembers::new(Vec::new(), 0, progress);
    for (name, files) in checkpoint.manifest.directories() {
        let dir = checkpoint.dir.join(name);
        for file in files.iter().filter(|file| file.size < SMALL) {
            members.file(&format!("{name}/{}", file.path), &dir, file)?;
        }
    }
    let tar = members.finish()?;
    zstd::bulk::compress(&tar, level).map_err(PackageError::writing)
}

/// A chunk on its way to a thread.
struct Job {
    path: String,
    offset: u64,
    bytes: Vec<u8>,
}

/// Chunks of all large files, read by this thread, compressed and put by others; in the order of the files.
fn store_large(
    checkpoint: &Checkpoint,
    level: i32,
    blobs: &dyn Blobs,
    total: u64,
    figures: &Figures,
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<Descriptor>, PackageError> {
    let (jobs, waiting) = sync_channel::<Job>(WAITING);
    let waiting = Mutex::new(waiting);
    let (done, failed) = (Mutex::new(Vec::new()), Mutex::new(None));
    std::thread::scope(|scope| {
        for _ in 0..threads() {
            scope.spawn(|| {
                while let Some(job) = next_job(&waiting) {
                    match put_chunk(&job, level, blobs, figures) {
                        Ok(descriptor) => lock(&done).push((job.path, job.offset, descriptor)),
                        Err(error) => {
                            // The first reason is the one that counts; who reads sees it.
                            lock(&failed).get_or_insert(error);
                        }
                    }
                }
            });
        }
        let read = read_large(checkpoint, total, &jobs, &failed, progress);
        drop(jobs);
        read
    })?;
    if let Some(error) = lock(&failed).take() {
        return Err(error);
    }
    let mut done = std::mem::take(&mut *lock(&done));
    done.sort_by(|one, other| (&one.0, one.1).cmp(&(&other.0, other.1)));
    Ok(done
        .into_iter()
        .map(|(_, _, descriptor)| descriptor)
        .collect())
}

fn threads() -> usize {
    std::thread::available_parallelism()
        .map_or(1, NonZero::get)
        .clamp(2, MOST_THREADS)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn next_job<J>(waiting: &Mutex<Receiver<J>>) -> Option<J> {
    lock(waiting).recv().ok()
}

fn read_large(
    checkpoint: &Checkpoint,
    total: u64,
    jobs: &SyncSender<Job>,
    failed: &Mutex<Option<PackageError>>,
    progress: &mut dyn FnMut(u64),
) -> Result<(), PackageError> {
    for (name, files) in checkpoint.manifest.directories() {
        let dir = checkpoint.dir.join(name);
        for file in files.iter().filter(|file| file.size >= SMALL) {
            let full = dir.join(&file.path);
            let source = open_regular(&dir, Path::new(&file.path), Links::Refused);
            let source = source.during("open", &full)?.take(file.size);
            let mut hashed = Hashed::new(source);
            let mut chunks = Chunks::new(&mut hashed, total);
            let mut told = 0;
            while let Some(chunk) = chunks.next().during("read", &full)? {
                if lock(failed).is_some() {
                    return Ok(());
                }
                let reached = chunk.offset + chunk.bytes.len() as u64;
                progress(reached - told);
                told = reached;
                let job = Job {
                    path: format!("{name}/{}", file.path),
                    offset: chunk.offset,
                    bytes: chunk.bytes,
                };
                // A thread that is gone has panicked, which the scope tells.
                drop(jobs.send(job));
            }
            progress(file.size.saturating_sub(told));
            if hashed.finish() != (file.size, file.sha256.clone()) {
                return Err(PackageError::Differs {
                    member: full.display().to_string(),
                    reason: "its digest differs from the manifest's",
                });
            }
        }
    }
    Ok(())
}

fn put_chunk(
    job: &Job,
    level: i32,
    blobs: &dyn Blobs,
    figures: &Figures,
) -> Result<Descriptor, PackageError> {
    let packed = zstd::bulk::compress(&job.bytes, level).map_err(PackageError::writing)?;
    let mut descriptor = put(blobs, CHUNK, &packed, figures)?;
    let annotations = &mut descriptor.annotations;
    annotations.insert(PATH.to_owned(), job.path.clone());
    annotations.insert(OFFSET.to_owned(), job.offset.to_string());
    annotations.insert(LENGTH.to_owned(), job.bytes.len().to_string());
    Ok(descriptor)
}

/// Takes the digest of what is read.
struct Hashed<R> {
    source: R,
    hasher: sha2::Sha256,
    bytes: u64,
}

impl<R> Hashed<R> {
    fn new(source: R) -> Self {
        Self {
            source,
            hasher: sha2::Digest::new(),
            bytes: 0,
        }
    }

    fn finish(self) -> (u64, String) {
        let digest = sha2::Digest::finalize(self.hasher);
        (self.bytes, transship_checkpoint::store::hex(&digest))
    }
}

impl<R: std::io::Read> std::io::Read for &mut Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.source.read(buffer)?;
        sha2::Digest::update(&mut self.hasher, &buffer[..read]);
        self.bytes += read as u64;
        Ok(read)
    }
}

/// Makes a checkpoint in `store` of the artifact with the tag or digest `tag`.
///
/// # Errors
/// It is none, damaged, too large, of another machine or not signed: nothing of it is left then.
pub fn restore(
    blobs: &dyn Blobs,
    tag: &str,
    store: &Store,
    options: &ImportOptions,
    progress: &mut dyn FnMut(u64),
) -> Result<Checkpoint, PackageError> {
    let artifact = Manifest::parse(&blobs.get_tagged(tag, ARTIFACT_LIMIT)?)?;
    if artifact.artifact_type.as_deref() != Some(ARTIFACT) || artifact.config.media_type != CONFIG {
        return Err(PackageError::Unknown {
            reason: format!("{tag} is no checkpoint"),
        });
    }
    let json = blobs.get(&artifact.config, MANIFEST_LIMIT)?;
    let of_type = |media_type: &str| {
        artifact
            .layers
            .iter()
            .find(|it| it.media_type == media_type)
    };
    let signature = match of_type(SIGNATURE) {
        Some(descriptor) => {
            let bytes = blobs.get(descriptor, SIGNATURE_LIMIT)?;
            Some(String::from_utf8_lossy(&bytes).into_owned())
        }
        None => None,
    };
    let head = Head::of(json, signature)?;
    head.check(options)?;
    let (manifest, json) = head.named(options.name.as_deref())?;
    let draft = store.draft(&manifest.name)?;
    check_room(draft.dir(), manifest.size())?;
    let files = of_type(FILES).ok_or_else(|| PackageError::Missing {
        member: "the blob of its small files".to_owned(),
    })?;
    restore_small(blobs, files, &manifest, draft.dir(), progress)?;
    restore_large(blobs, &artifact.layers, &manifest, draft.dir(), progress)?;
    if let Some(signature) = &head.signature {
        let path = draft.dir().join(SIGNATURE_FILE);
        std::fs::write(&path, signature).during("write", &path)?;
    }
    let whole = Checkpoint {
        dir: draft.dir().to_path_buf(),
        manifest: manifest.clone(),
    };
    whole.verify()?;
    Ok(draft.commit_as(manifest, &json, Durability::Synced)?)
}

fn restore_small(
    blobs: &dyn Blobs,
    descriptor: &Descriptor,
    manifest: &manifest::Manifest,
    dir: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<(), PackageError> {
    let packed = blobs.get(descriptor, FILES_LIMIT)?;
    let tar = zstd::stream::read::Decoder::new(&packed[..]).map_err(PackageError::reading)?;
    let mut archive = Archive::new(tar.take(FILES_LIMIT));
    let mut piece = vec![0; 64 << 10];
    let mut known: BTreeMap<String, u64> = BTreeMap::new();
    for (name, files) in manifest.directories() {
        let small = files.iter().filter(|file| file.size < SMALL);
        known.extend(small.map(|file| (format!("{name}/{}", file.path), file.size)));
    }
    while let Some(member) = archive.next_member().map_err(PackageError::of_archive)? {
        let path = String::from_utf8_lossy(&member.path).into_owned();
        if known.remove(&path) != Some(member.size) {
            return Err(PackageError::Member {
                member: path.escape_debug().to_string(),
                reason: "the manifest does not know it so, or it is there twice".to_owned(),
            });
        }
        let mut file = NewFile::create(dir, &path)?;
        loop {
            match archive
                .read_piece(&mut piece)
                .map_err(PackageError::of_archive)?
            {
                0 => break,
                read => {
                    progress(read as u64);
                    file.write(&piece[..read])?;
                }
            }
        }
        file.finish()?;
    }
    match known.into_keys().next() {
        Some(member) => Err(PackageError::Missing { member }),
        None => Ok(()),
    }
}

fn restore_large(
    blobs: &dyn Blobs,
    layers: &[Descriptor],
    manifest: &manifest::Manifest,
    dir: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<(), PackageError> {
    let mut targets: BTreeMap<String, (File, u64)> = BTreeMap::new();
    for (name, files) in manifest.directories() {
        for file in files.iter().filter(|file| file.size >= SMALL) {
            let path = format!("{name}/{}", file.path);
            drop(NewFile::create(dir, &path)?);
            let full = dir.join(&path);
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
    let chunks: Vec<&Descriptor> = layers.iter().filter(|it| it.media_type == CHUNK).collect();
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let (told, tell) = sync_channel::<u64>(64);
    std::thread::scope(|scope| {
        for _ in 0..threads() {
            let tell = told.clone();
            let (next, failed, targets, chunks) = (&next, &failed, &targets, &chunks);
            scope.spawn(move || {
                while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if lock(failed).is_some() {
                        return;
                    }
                    match take_chunk(blobs, chunk, targets) {
                        Ok(bytes) => drop(tell.send(bytes)),
                        Err(error) => {
                            lock(failed).get_or_insert(error);
                        }
                    }
                }
            });
        }
        drop(told);
        tell.iter().for_each(&mut *progress);
    });
    match lock(&failed).take() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

fn take_chunk(
    blobs: &dyn Blobs,
    chunk: &Descriptor,
    targets: &BTreeMap<String, (File, u64)>,
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
