//! Checkpoints into blobs.

use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use transship_checkpoint::beneath::{Links, open_regular};
use transship_checkpoint::store::Checkpoint;
use transship_digest::Hashed;
use transship_path_error::During as _;
use zstd::bulk::Compressor;
use zstd::zstd_safe::compress_bound;

use super::annotations::annotations_of;
use super::blobs::Blobs;
use super::chunks::{ChunkSize, Chunks};
use super::digests::digest_of;
use super::document::{Descriptor, MANIFEST, Manifest};
use super::transfers::{lock, threads};
use crate::error::PackageError;
use crate::export::{read_manifest, signature_of};
use crate::signature::Signer;
use crate::tar_members::TarMembers;

pub(super) const ARTIFACT: &str = "application/vnd.transship.checkpoint.v1";
pub(super) const CONFIG: &str = "application/vnd.transship.checkpoint.config.v1+json";
pub(super) const SIGNATURE: &str = "application/vnd.transship.checkpoint.signature.v1";
pub(super) const FILES: &str = "application/vnd.transship.checkpoint.files.v1.tar+zstd";
pub(super) const CHUNK: &str = "application/vnd.transship.checkpoint.chunk.v1+zstd";
pub(super) const PATH: &str = "dev.transship.path";
pub(super) const OFFSET: &str = "dev.transship.offset";
pub(super) const LENGTH: &str = "dev.transship.length";

/// Files below this go into blobs of several.
pub(super) const SMALL: u64 = 256 << 10;
/// Largest manifest of an artifact, in bytes: what registries take.
pub(super) const ARTIFACT_LIMIT: u64 = 4 << 20;
/// Largest blob of small files, and largest chunk, in bytes, compressed and not.
pub(super) const FILES_LIMIT: u64 = 256 << 20;
pub(super) const CHUNK_LIMIT: u64 = 8 << 20;
/// Most bytes of files of one blob of them.
const FILES_BLOB: u64 = 8 << 20;
/// Bytes of a tar beside those of a file: its header, and what fills its last block.
const HEADER: u64 = 1024;
/// More threads than these, each with a chunk of its own, take memory and little time.
const MOST_THREADS: usize = 4;
/// Chunks that wait for a thread, or are read.
const WAITING: usize = 2;

/// How a checkpoint is put among blobs.
#[derive(Debug)]
pub struct StoreOptions {
    /// The level of zstd.
    pub level: i32,
    /// Who signs it; nobody: a signature that the checkpoint has stays.
    pub signer: Option<Signer>,
}

/// What became of a checkpoint among blobs.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Stored {
    /// Digest of what the tag names there.
    pub digest: String,
    /// Blobs that it consists of.
    pub blobs: usize,
    /// Bytes of them all.
    pub bytes: u64,
    /// Those that were not there before.
    pub new_blobs: usize,
    /// Bytes of these.
    pub new_bytes: u64,
    /// Bytes of those that the registry has taken from another of its repositories.
    pub mounted_bytes: u64,
}

/// Puts a checkpoint among `blobs` under the tag `tag`, alone. What is there already is left alone, so that a second
/// attempt goes on where the first one ended. `progress` gets the bytes.
///
/// # Errors
/// A file is damaged, or a blob cannot be put there.
pub fn store(
    checkpoint: &Checkpoint,
    options: &StoreOptions,
    blobs: &dyn Blobs,
    tag: &str,
    progress: &mut dyn FnMut(u64),
) -> Result<Stored, PackageError> {
    let figures = Figures::default();
    let manifest = Manifest {
        annotations: annotations_of(&checkpoint.manifest, &[]),
        ..store_blobs(checkpoint, options, blobs, &figures, progress)?
    };
    let json = to_bytes(&manifest)?;
    blobs.put_manifest(MANIFEST, &json, Some(tag))?;
    Ok(Stored {
        digest: digest_of(&json),
        ..figures.stored()
    })
}

/// Puts all blobs of a checkpoint there, and gives the manifest of them, still without annotations.
pub(super) fn store_blobs(
    checkpoint: &Checkpoint,
    options: &StoreOptions,
    blobs: &dyn Blobs,
    figures: &Figures,
    progress: &mut dyn FnMut(u64),
) -> Result<Manifest, PackageError> {
    let level = options.level;
    let size = ChunkSize::of(checkpoint.manifest.size());
    check_manifest_length(checkpoint, size)?;
    let json = read_manifest(checkpoint)?;
    let config = put(blobs, CONFIG, &json, figures)?;
    let mut layers = Vec::new();
    let signature = match &options.signer {
        Some(signer) => Some(signer.sign(&json)?),
        None => signature_of(&checkpoint.dir)?,
    };
    if let Some(signature) = signature {
        layers.push(put(blobs, SIGNATURE, signature.as_bytes(), figures)?);
    }
    layers.extend(store_small(checkpoint, level, blobs, figures, progress)?);
    layers.extend(store_large(
        checkpoint, level, blobs, size, figures, progress,
    )?);
    Ok(Manifest {
        artifact_type: Some(ARTIFACT.to_owned()),
        config,
        layers,
        ..Manifest::default()
    })
}

/// A manifest as it is written, unless registries take none so long.
pub(super) fn to_bytes(manifest: &Manifest) -> Result<Vec<u8>, PackageError> {
    let json = manifest.to_json();
    check_length(json.len() as u64)?;
    Ok(json)
}

fn check_length(bytes: u64) -> Result<(), PackageError> {
    match bytes > ARTIFACT_LIMIT {
        true => Err(PackageError::TooLarge {
            bytes,
            limit: ARTIFACT_LIMIT,
            of: "the manifest of an artifact, in which checkpoints of some 100 GB have room",
        }),
        false => Ok(()),
    }
}

/// Refuses a checkpoint whose manifest will be too long, before anything of it is put anywhere.
fn check_manifest_length(checkpoint: &Checkpoint, size: ChunkSize) -> Result<(), PackageError> {
    let mut length = 0;
    for (name, files) in checkpoint.manifest.directories() {
        for file in files.iter().filter(|file| file.size >= SMALL) {
            let full = checkpoint.dir.join(name).join(&file.path);
            let there = full.symlink_metadata().during("look at", &full)?;
            // Holes have no chunk.
            let bytes = file.size.min(there.blocks().saturating_mul(512));
            length += least_length(&format!("{name}/{}", file.path), bytes, size);
        }
    }
    check_length(length)
}

/// The fewest bytes that a manifest has for so many of a file.
fn least_length(path: &str, bytes: u64, size: ChunkSize) -> u64 {
    let chunk = describe(Descriptor::new(CHUNK, b""), path, 0, size.longest());
    let length = serde_json::to_string(&chunk).map_or(0, |json| json.len() as u64);
    bytes.div_ceil(size.longest() as u64) * length
}

/// What has been put there so far.
#[derive(Default)]
pub(super) struct Figures {
    blobs: AtomicUsize,
    bytes: AtomicU64,
    new_blobs: AtomicUsize,
    new_bytes: AtomicU64,
    mounted_bytes: AtomicU64,
}

impl Figures {
    pub(super) fn count(&self, size: u64, came: Came) {
        let add = |blobs: &AtomicUsize, bytes: &AtomicU64| {
            blobs.fetch_add(1, Ordering::Relaxed);
            bytes.fetch_add(size, Ordering::Relaxed);
        };
        add(&self.blobs, &self.bytes);
        match came {
            Came::Sent => add(&self.new_blobs, &self.new_bytes),
            Came::Mounted => {
                self.mounted_bytes.fetch_add(size, Ordering::Relaxed);
            }
            Came::WasThere => {}
        }
    }

    pub(super) fn stored(&self) -> Stored {
        Stored {
            blobs: self.blobs.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            new_blobs: self.new_blobs.load(Ordering::Relaxed),
            new_bytes: self.new_bytes.load(Ordering::Relaxed),
            mounted_bytes: self.mounted_bytes.load(Ordering::Relaxed),
            ..Stored::default()
        }
    }
}

/// How a blob has come to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Came {
    WasThere,
    /// The registry has taken it from another of its repositories.
    Mounted,
    Sent,
}

pub(super) fn put(
    blobs: &dyn Blobs,
    media_type: &str,
    bytes: &[u8],
    figures: &Figures,
) -> Result<Descriptor, PackageError> {
    let descriptor = Descriptor::new(media_type, bytes);
    let came = match blobs.has(&descriptor.digest, descriptor.size)? {
        true => Came::WasThere,
        false => {
            blobs.put(&descriptor.digest, bytes)?;
            Came::Sent
        }
    };
    figures.count(descriptor.size, came);
    Ok(descriptor)
}

/// All small files, as compressed tars.
fn store_small(
    checkpoint: &Checkpoint,
    level: i32,
    blobs: &dyn Blobs,
    figures: &Figures,
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<Descriptor>, PackageError> {
    let directories = checkpoint.manifest.directories();
    let small = directories.flat_map(|(name, files)| {
        let small = files.iter().filter(|file| file.size < SMALL);
        small.map(move |file| (name, file))
    });
    let mut small = small.peekable();
    let mut done = Vec::new();
    while done.is_empty() || small.peek().is_some() {
        let packed = zstd::stream::write::Encoder::new(Vec::new(), level);
        let packed = packed.map_err(PackageError::writing)?;
        // No time in it: equal files make an equal blob.
        let mut members = TarMembers::new(packed, 0, &mut *progress);
        let mut left = FILES_BLOB;
        while let Some((name, file)) = small.next_if(|(_, file)| file.size + HEADER <= left) {
            let dir = checkpoint.dir.join(name);
            members.file(&format!("{name}/{}", file.path), &dir, file)?;
            left -= file.size + HEADER;
        }
        let packed = members.finish()?.finish().map_err(PackageError::writing)?;
        done.push(put(blobs, FILES, &packed, figures)?);
    }
    Ok(done)
}

/// A chunk on its way to a thread.
struct Job {
    path: String,
    offset: u64,
    bytes: Vec<u8>,
}

/// Chunks of all large files, read by this thread, compressed and put by others; in the order of the files. There are no
/// more of them at once than there are buffers.
fn store_large(
    checkpoint: &Checkpoint,
    level: i32,
    blobs: &dyn Blobs,
    size: ChunkSize,
    figures: &Figures,
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<Descriptor>, PackageError> {
    let threads = threads().min(MOST_THREADS);
    let (jobs, waiting) = sync_channel::<Job>(threads + WAITING);
    let (free, buffers) = sync_channel::<Vec<u8>>(threads + WAITING);
    for _ in 0..threads + WAITING {
        free.send(Vec::with_capacity(size.longest()))
            .unwrap_or_default();
    }
    let waiting = Mutex::new(waiting);
    let (done, failed) = (Mutex::new(Vec::new()), Mutex::new(None));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let free = free.clone();
            let (waiting, done, failed) = (&waiting, &done, &failed);
            scope.spawn(move || {
                let mut packing = Packing::new(level);
                while let Some(job) = next_job(waiting) {
                    let put = match &mut packing {
                        Ok(packing) => packing.put(&job, blobs, figures),
                        Err(error) => Err(PackageError::writing(error.kind().into())),
                    };
                    match put {
                        Ok(descriptor) => lock(done).push((job.path, job.offset, descriptor)),
                        Err(error) => {
                            // The first reason is the one that counts; who reads sees it.
                            lock(failed).get_or_insert(error);
                        }
                    }
                    // Who reads may have ended.
                    free.send(job.bytes).unwrap_or_default();
                }
            });
        }
        drop(free);
        let read = read_large(checkpoint, size, (&jobs, &buffers), &failed, progress);
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

fn next_job<J>(waiting: &Mutex<Receiver<J>>) -> Option<J> {
    lock(waiting).recv().ok()
}

fn read_large(
    checkpoint: &Checkpoint,
    size: ChunkSize,
    (jobs, buffers): (&SyncSender<Job>, &Receiver<Vec<u8>>),
    failed: &Mutex<Option<PackageError>>,
    progress: &mut dyn FnMut(u64),
) -> Result<(), PackageError> {
    let mut spare = None;
    for (name, files) in checkpoint.manifest.directories() {
        let dir = checkpoint.dir.join(name);
        for file in files.iter().filter(|file| file.size >= SMALL) {
            let full = dir.join(&file.path);
            let source = open_regular(&dir, Path::new(&file.path), Links::Refused);
            let source = source.during("open", &full)?.take(file.size);
            let mut hashed = Hashed::new(source);
            let mut chunks = Chunks::new(&mut hashed, size);
            let mut told = 0;
            loop {
                // Without threads, which have panicked, there is none.
                let free = spare.take().map_or_else(|| buffers.recv(), Ok);
                let Ok(mut bytes) = free else { return Ok(()) };
                if lock(failed).is_some() {
                    return Ok(());
                }
                let Some(offset) = chunks.next(&mut bytes).during("read", &full)? else {
                    spare = Some(bytes);
                    break;
                };
                let reached = offset + bytes.len() as u64;
                progress(reached - told);
                told = reached;
                let job = Job {
                    path: format!("{name}/{}", file.path),
                    offset,
                    bytes,
                };
                // A thread that is gone has panicked, which the scope tells.
                drop(jobs.send(job));
            }
            progress(file.size.saturating_sub(told));
            let (_, found) = hashed.finish();
            if (found.size, &found.sha256) != (file.size, &file.sha256) {
                return Err(PackageError::Differs {
                    member: full.display().to_string(),
                    reason: "its digest differs from the manifest's",
                });
            }
        }
    }
    Ok(())
}

/// Compresses chunks, one after the other in the same memory.
struct Packing {
    compressor: Compressor<'static>,
    packed: Vec<u8>,
}

impl Packing {
    fn new(level: i32) -> io::Result<Self> {
        Ok(Self {
            compressor: Compressor::new(level)?,
            packed: Vec::new(),
        })
    }

    fn put(
        &mut self,
        job: &Job,
        blobs: &dyn Blobs,
        figures: &Figures,
    ) -> Result<Descriptor, PackageError> {
        self.packed.clear();
        self.packed.reserve(compress_bound(job.bytes.len()));
        let packed = self
            .compressor
            .compress_to_buffer(&job.bytes, &mut self.packed);
        packed.map_err(PackageError::writing)?;
        let descriptor = put(blobs, CHUNK, &self.packed, figures)?;
        Ok(describe(descriptor, &job.path, job.offset, job.bytes.len()))
    }
}

/// The descriptor of a chunk, with the place that it has.
fn describe(mut descriptor: Descriptor, path: &str, offset: u64, length: usize) -> Descriptor {
    let annotations = &mut descriptor.annotations;
    annotations.insert(PATH.to_owned(), path.to_owned());
    annotations.insert(OFFSET.to_owned(), offset.to_string());
    annotations.insert(LENGTH.to_owned(), length.to_string());
    descriptor
}

#[cfg(test)]
mod tests;
