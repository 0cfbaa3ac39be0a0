//! Bytes on their way between threads: cut into chunks, hashed as they pass.

use std::io::{self, BufRead, Read, Write};
use std::sync::mpsc::{Receiver, SyncSender};

use transship_digest::Sha256;

/// Size of a chunk, but for the first ones.
pub(super) const CHUNK_BYTES: usize = 1 << 20;
/// Size of the first chunk of a layer; each that follows is twice as large, up to [`CHUNK_BYTES`]. A
/// small layer, too, is to be hashed, compressed and sent while the rest of it is still exported.
const FIRST_CHUNK_BYTES: usize = 128 << 10;
/// Chunks that wait between two threads: enough that neither waits for the other's every step.
pub(super) const QUEUED_CHUNKS: usize = 3;

/// Digest and length of all that has passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Measured {
    /// `sha256:<hex>`.
    pub(super) digest: String,
    /// In bytes.
    pub(super) size: u64,
}

/// Hashes chunks on their way to `next`.
///
/// # Errors
/// What comes in as an error, and what `next` answers.
pub(super) fn measure(
    chunks: impl IntoIterator<Item = Vec<u8>>,
    mut next: impl FnMut(Vec<u8>) -> io::Result<()>,
) -> io::Result<Measured> {
    let mut hasher = Sha256::new();
    let mut size = 0;
    for chunk in chunks {
        hasher.update(&chunk);
        size += chunk.len() as u64;
        next(chunk)?;
    }
    Ok(Measured {
        digest: format!("sha256:{}", hasher.finish_hex()),
        size,
    })
}

/// The other side of a queue is gone: it has failed, and says itself why.
pub(super) fn gone<T>(_: T) -> io::Error {
    io::ErrorKind::BrokenPipe.into()
}

/// Cuts what is written into chunks; `finish` sends the rest. Where it cuts depends on the length
/// alone: the blocks of a compressed layer are chunks, and the same layer is to give the same blocks.
#[derive(Debug)]
pub(super) struct ChunkWriter {
    chunk: Vec<u8>,
    chunk_bytes: usize,
    chunks: SyncSender<Vec<u8>>,
}

impl ChunkWriter {
    pub(super) fn new(chunks: SyncSender<Vec<u8>>) -> Self {
        Self {
            chunk: Vec::new(),
            chunk_bytes: FIRST_CHUNK_BYTES,
            chunks,
        }
    }

    pub(super) fn finish(self) -> io::Result<()> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        self.chunks.send(self.chunk).map_err(gone)
    }
}

impl Write for ChunkWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.chunk.capacity() == 0 {
            self.chunk.reserve_exact(self.chunk_bytes);
        }
        let len = bytes.len().min(self.chunk_bytes - self.chunk.len());
        self.chunk.extend_from_slice(&bytes[..len]);
        if self.chunk.len() == self.chunk_bytes {
            self.chunk_bytes = (self.chunk_bytes * 2).min(CHUNK_BYTES);
            let chunk = std::mem::take(&mut self.chunk);
            self.chunks.send(chunk).map_err(gone)?;
        }
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where a [`ChunkReader`] gets its chunks.
pub(super) trait ChunkQueue {
    /// The next chunk, None at the end.
    fn next_chunk(&mut self) -> Option<io::Result<Vec<u8>>>;
}

impl ChunkQueue for Receiver<io::Result<Vec<u8>>> {
    fn next_chunk(&mut self) -> Option<io::Result<Vec<u8>>> {
        self.recv().ok()
    }
}

impl ChunkQueue for tokio::sync::mpsc::Receiver<io::Result<Vec<u8>>> {
    fn next_chunk(&mut self) -> Option<io::Result<Vec<u8>>> {
        self.blocking_recv()
    }
}

/// Reads chunks one after the other.
#[derive(Debug)]
pub(super) struct ChunkReader<Q> {
    queue: Q,
    chunk: Vec<u8>,
    read: usize,
}

impl<Q: ChunkQueue> ChunkReader<Q> {
    pub(super) fn new(queue: Q) -> Self {
        Self {
            queue,
            chunk: Vec::new(),
            read: 0,
        }
    }
}

impl<Q: ChunkQueue> BufRead for ChunkReader<Q> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.read == self.chunk.len() {
            match self.queue.next_chunk() {
                Some(chunk) => self.chunk = chunk?,
                None => return Ok(&[]),
            }
            self.read = 0;
        }
        Ok(&self.chunk[self.read..])
    }

    fn consume(&mut self, len: usize) {
        self.read += len;
    }
}

impl<Q: ChunkQueue> Read for ChunkReader<Q> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let len = available.len().min(buffer.len());
        buffer[..len].copy_from_slice(&available[..len]);
        self.consume(len);
        Ok(len)
    }
}
