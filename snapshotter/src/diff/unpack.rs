//! Applies a layer: decompression, hash and the creation of files, each on a thread of its own.
//!
//! ```text
//! blob ──> decompress ──> SHA-256 (diff id) ──> import
//! ```

use std::io::{self, BufRead, Read};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use transship_layer::{
    ImportError, ImportOptions, ImportStats, LargeWindows, LayerFormat, OverlayStack,
    decompress_in_turn, import_into_upperdir,
};

use super::blob_file::Stop;
use super::chunks::{CHUNK_BYTES, ChunkReader, Measured, QUEUED_CHUNKS, gone, measure};

/// What bounds the work on a layer.
#[derive(Debug, Clone)]
pub(super) struct Bounds {
    /// Turns for large windows, which all layers share.
    pub(super) windows: Arc<LargeWindows>,
    /// Ends it.
    pub(super) stop: Stop,
}

/// A layer that has been applied.
#[derive(Debug)]
pub(super) struct Unpacked {
    /// The uncompressed tar, to the end of the stream.
    pub(super) tar: Measured,
    /// What the import made.
    pub(super) stats: ImportStats,
}

/// Reads `blob`, compressed or not, to its end and fills the target with it.
///
/// # Errors
/// See [`ImportError`]; a blob that cannot be read or decompressed is [`ImportError::Read`]. The
/// target is then half filled.
pub(super) fn unpack_layer(
    blob: impl BufRead + Send,
    target: &OverlayStack,
    bounds: &Bounds,
) -> Result<Unpacked, ImportError> {
    let options = ImportOptions {
        format: LayerFormat::Image,
        // As containerd does: images are made on file systems that know more than this one.
        skip_unsupported_xattrs: true,
        // containerd sets no limit either; the disk is one.
        max_bytes: u64::MAX,
        contents: None,
    };
    thread::scope(|scope| {
        let (plain, plain_chunks) = sync_channel(QUEUED_CHUNKS);
        let (hashed, hashed_chunks) = sync_channel(QUEUED_CHUNKS);
        scope.spawn(move || {
            if let Err(error) = decompress_into(&plain, blob, bounds) {
                drop(plain.send(Err(error)));
            }
        });
        let measured = scope.spawn(move || hash_on_the_way(&plain_chunks, &hashed));
        let reader = ChunkReader::new(hashed_chunks);
        let stats = import_into_upperdir(reader, target, &options)?;
        let tar = measured
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
            .map_err(|source| ImportError::Read { source })?;
        Ok(Unpacked { tar, stats })
    })
}

fn decompress_into(
    plain: &SyncSender<io::Result<Vec<u8>>>,
    blob: impl BufRead,
    bounds: &Bounds,
) -> io::Result<()> {
    let (mut reader, _turn) =
        decompress_in_turn(blob, &bounds.windows, &|| bounds.stop.is_ordered())?;
    loop {
        // A few bytes of a blob may be gigabytes of a layer.
        bounds.stop.check()?;
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        (&mut reader)
            .take(CHUNK_BYTES as u64)
            .read_to_end(&mut chunk)?;
        if chunk.is_empty() {
            return Ok(());
        }
        plain.send(Ok(chunk)).map_err(gone)?;
    }
}

/// An error goes on to the reader, which is the one who can tell.
fn hash_on_the_way(
    plain: &Receiver<io::Result<Vec<u8>>>,
    hashed: &SyncSender<io::Result<Vec<u8>>>,
) -> io::Result<Measured> {
    let mut failure = None;
    let until_error = plain
        .iter()
        .map_while(|chunk| chunk.map_err(|error| failure = Some(error)).ok());
    let measured = measure(until_error, |chunk| hashed.send(Ok(chunk)).map_err(gone))?;
    match failure {
        None => Ok(measured),
        Some(error) => {
            hashed.send(Err(error)).map_err(gone)?;
            Err(io::ErrorKind::BrokenPipe.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufReader, Write};
    use std::path::Path;

    fn bounds() -> Bounds {
        Bounds {
            windows: Arc::new(LargeWindows::new(1)),
            stop: Stop::default(),
        }
    }

    /// A layer of a few kilobytes that would be a terabyte of zeros is not read to its end by who was told to stop.
    #[test]
    fn what_is_given_up_ends_between_two_reads_of_the_blob() {
        struct Endless;
        impl Read for Endless {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                buffer.fill(0);
                Ok(buffer.len())
            }
        }
        let bounds = bounds();
        let stop = bounds.stop.clone();
        let start = tar(0);
        let plain = BufReader::new(start[..1024].chain(Endless));
        let stopping = thread::spawn(move || {
            thread::sleep(std::time::Duration::from_millis(50));
            stop.now();
        });
        let dir = tempfile::tempdir().unwrap();
        let error = unpack_layer(plain, &target(dir.path()), &bounds).unwrap_err();
        stopping.join().unwrap();
        assert!(error.to_string().contains("cannot read"), "{error}");
    }

    fn target(dir: &Path) -> OverlayStack {
        OverlayStack::new(dir, [])
    }

    /// One file and the end of the tar, and after that `padding` zeros.
    fn tar(padding: usize) -> Vec<u8> {
        let mut header = [0_u8; 512];
        header[..4].copy_from_slice(b"file");
        header[100..108].copy_from_slice(b"0000644\0");
        for (field, text) in [(108, "0000000\0"), (116, "0000000\0")] {
            header[field..field + 8].copy_from_slice(text.as_bytes());
        }
        header[124..136].copy_from_slice(b"00000000003\0");
        header[136..148].copy_from_slice(b"00000000000\0");
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[148..156].copy_from_slice(b"        ");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let mut tar = header.to_vec();
        tar.extend(b"abc");
        tar.resize(1024 + 1024 + padding, 0);
        tar
    }

    #[test]
    fn the_digest_is_that_of_the_whole_stream() {
        // GNU tar pads to 10 KiB; containerd's differ does not, and the diff id is over all of it.
        for padding in [0, 8192, 3 * CHUNK_BYTES] {
            let dir = tempfile::tempdir().unwrap();
            let tar = tar(padding);
            let mut gzip =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            gzip.write_all(&tar).unwrap();
            let gzip = gzip.finish().unwrap();
            let unpacked = unpack_layer(&gzip[..], &target(dir.path()), &bounds()).unwrap();
            assert_eq!(unpacked.tar, measure([tar], |_| Ok(())).unwrap());
            assert_eq!(std::fs::read(dir.path().join("file")).unwrap(), b"abc");
        }
    }

    /// Fails after the start, as a connection does.
    struct Broken(usize);

    impl Read for Broken {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.0 == 0 {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            let len = buffer.len().min(self.0);
            buffer[..len].copy_from_slice(&tar(0)[..len]);
            self.0 -= len;
            Ok(len)
        }
    }

    #[test]
    fn a_blob_that_breaks_off_is_told_with_its_reason() {
        for good in [0, 512] {
            let dir = tempfile::tempdir().unwrap();
            let blob = BufReader::with_capacity(512, Broken(good));
            let error = unpack_layer(blob, &target(dir.path()), &bounds()).unwrap_err();
            let ImportError::Read { source } = error else {
                panic!("{error:?}");
            };
            assert_eq!(source.kind(), io::ErrorKind::ConnectionReset);
        }
    }

    #[test]
    fn damage_ends_all_threads() {
        let dir = tempfile::tempdir().unwrap();
        let mut damaged = tar(100 * CHUNK_BYTES);
        damaged[0] = b'x';
        let error = unpack_layer(&damaged[..], &target(dir.path()), &bounds()).unwrap_err();
        assert!(matches!(error, ImportError::Malformed { .. }), "{error:?}");
    }
}
