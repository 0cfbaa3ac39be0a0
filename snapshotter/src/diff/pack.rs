//! Exports a layer through hash and compressor, each on a thread of its own.
//!
//! ```text
//! export ──> SHA-256 (diff id) ──────────────────────────────> sink      plain
//! export ──> SHA-256 (diff id) ──> compressors ──> SHA-256 ──> sink      gzip, zstd
//! ```
//!
//! Between two threads a few chunks wait, so memory does not depend on the layer.

use std::io;
use std::sync::mpsc::sync_channel;
use std::thread;

use transship_layer::{
    Compression, ExportError, ExportOptions, ExportStats, LayerFormat, export_upperdir,
};

use super::chunks::{ChunkWriter, Measured, QUEUED_CHUNKS, gone, measure};
use super::compress::compress_blocks;
use super::plan::LayerSource;

/// A layer that has passed the sink.
#[derive(Debug)]
pub(super) struct Packed {
    /// The uncompressed tar.
    pub(super) tar: Measured,
    /// What the sink got.
    pub(super) blob: Measured,
    /// What the export wrote.
    pub(super) stats: ExportStats,
}

/// Why a layer was not packed.
#[derive(Debug, thiserror::Error)]
pub(super) enum PackError {
    /// The upperdir could not be exported.
    #[error("cannot export the layer")]
    Export(#[source] ExportError),
    /// A compressor failed, or the sink did.
    #[error("cannot compress the layer")]
    Compress(#[source] io::Error),
}

/// Exports `source` and hands the blob, piece by piece, to `sink`.
///
/// # Errors
/// See [`PackError`]; what the sink got is then no layer.
pub(super) fn pack_layer(
    source: &LayerSource,
    compression: Compression,
    source_date_epoch: Option<u64>,
    sink: impl FnMut(Vec<u8>) -> io::Result<()> + Send,
) -> Result<Packed, PackError> {
    let options = ExportOptions {
        source_date_epoch,
        format: LayerFormat::Image,
        known: None,
        beside_criu: false,
        // Whoever asks need not have paused the container.
        in_use: true,
    };
    thread::scope(|scope| {
        let (tar, tar_chunks) = sync_channel(QUEUED_CHUNKS);
        let hashed = if compression == Compression::None {
            scope.spawn(move || {
                let blob = measure(tar_chunks, sink)?;
                Ok((blob.clone(), blob))
            })
        } else {
            let (hashed, hashed_chunks) = sync_channel(QUEUED_CHUNKS);
            let (blocks, block_chunks) = sync_channel(QUEUED_CHUNKS);
            let compressor =
                scope.spawn(move || compress_blocks(compression, hashed_chunks, &blocks));
            let blob = scope.spawn(move || measure(block_chunks, sink));
            scope.spawn(move || {
                let tar = measure(tar_chunks, |chunk| hashed.send(chunk).map_err(gone));
                drop(hashed);
                let compressed = joined(compressor);
                // The last in the row is the first to know why.
                let blob = joined(blob)?;
                compressed?;
                Ok((tar?, blob))
            })
        };
        let mut out = ChunkWriter::new(tar);
        let exported = export_upperdir(&source.stack, &mut out, &options);
        let exported = match exported {
            // All of the export has been handed on only when the rest of the last chunk is.
            Ok(stats) => out.finish().map(|()| stats).map_err(PackError::Compress),
            Err(error) => {
                // The threads behind it wait for more as long as it is there.
                drop(out);
                Err(PackError::Export(error))
            }
        };
        let measured = joined(hashed).map_err(PackError::Compress);
        match (exported, measured) {
            (Ok(stats), Ok((tar, blob))) => Ok(Packed { tar, blob, stats }),
            // It could not write because the others had failed before.
            (Err(PackError::Export(ExportError::Write { .. })), Err(error))
            | (Ok(_) | Err(PackError::Compress(_)), Err(error)) => Err(error),
            (Err(error), _) => Err(error),
        }
    })
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, io::Result<T>>) -> io::Result<T> {
    thread
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Read;
    use std::path::Path;

    use std::sync::Arc;

    use transship_layer::{LargeWindows, OverlayStack};

    use super::super::blob_file::Stop;
    use super::super::unpack::{Bounds, unpack_layer};

    fn source(dir: &Path) -> LayerSource {
        LayerSource {
            stack: OverlayStack::new(dir, []),
            must_be_empty: None,
        }
    }

    fn pack(dir: &Path, compression: Compression) -> (Vec<u8>, Packed) {
        let mut blob = Vec::new();
        let packed = pack_layer(&source(dir), compression, None, |chunk| {
            blob.extend(chunk);
            Ok(())
        });
        (blob, packed.unwrap())
    }

    #[test]
    fn what_is_packed_is_unpacked_under_the_same_diff_id() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        for n in 0..50 {
            fs::write(dir.path().join(format!("sub/{n}")), vec![n; 100_000]).unwrap();
        }
        let (tar, plain) = pack(dir.path(), Compression::None);
        assert_eq!(plain.tar, plain.blob);
        assert_eq!(plain.tar.size, tar.len() as u64);
        assert_eq!(plain.stats.bytes, plain.tar.size);
        for compression in [Compression::Gzip, Compression::Zstd] {
            let (blob, packed) = pack(dir.path(), compression);
            assert_eq!(packed.tar, plain.tar);
            assert_eq!(packed.blob, measure([blob.clone()], |_| Ok(())).unwrap());
            let mut read = Vec::new();
            transship_layer::decompress(&blob[..])
                .unwrap()
                .read_to_end(&mut read)
                .unwrap();
            assert!(read == tar);
            let target = tempfile::tempdir().unwrap();
            let bounds = Bounds {
                windows: Arc::new(LargeWindows::new(1)),
                stop: Stop::default(),
            };
            let stack = OverlayStack::new(target.path(), []);
            let unpacked = unpack_layer(&blob[..], &stack, &bounds).unwrap();
            assert_eq!(unpacked.tar, plain.tar);
            assert_eq!(
                fs::read(target.path().join("sub/49")).unwrap(),
                vec![49; 100_000]
            );
        }
    }

    #[test]
    fn a_sink_that_fails_ends_the_export_with_its_reason() {
        let dir = tempfile::tempdir().unwrap();
        for n in 0..40 {
            fs::write(dir.path().join(format!("{n}")), vec![n; 1 << 20]).unwrap();
        }
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            let error = pack_layer(&source(dir.path()), compression, None, |_| {
                Err(io::ErrorKind::StorageFull.into())
            })
            .unwrap_err();
            let PackError::Compress(error) = error else {
                panic!("{error}");
            };
            assert_eq!(error.kind(), io::ErrorKind::StorageFull, "{compression:?}");
        }
    }

    #[test]
    fn a_missing_directory_is_an_export_error() {
        let missing = Path::new("/nonexistent/upperdir");
        let error = pack_layer(&source(missing), Compression::Gzip, None, |_| Ok(()));
        assert!(matches!(error, Err(PackError::Export(_))));
    }
}
