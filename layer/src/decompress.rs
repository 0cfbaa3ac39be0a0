//! Layers come plain, gzipped or as zstd; the first bytes tell which.
//!
//! ```text
//! 1f 8b              gzip (RFC 1952), one or more members
//! 28 b5 2f fd        zstd frame (RFC 8878)
//! 5x 2a 4d 18        zstd skippable frame, x any digit; what `zstd:chunked` and pzstd begin with
//! anything else      a plain tar
//! ```

use std::io::{self, BufRead, Chain, Cursor, Read};

use flate2::bufread::MultiGzDecoder;

use crate::large_windows::{
    HEADER_BYTES, LargeWindowTurn, LargeWindows, SMALL_WINDOW_LOG, has_small_window,
};

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip, media type suffix `+gzip`.
    Gzip,
    /// zstd, media type suffix `+zstd`.
    Zstd,
}

/// Longest of the signatures.
const SIGNATURE_BYTES: usize = 4;

/// Largest zstd window that is accepted, as a power of two: 128 MiB, zstd's own default and the most
/// that `zstd -22 --ultra` uses. The window is memory that the layer decides about.
const MAX_WINDOW_LOG: u32 = 27;

type Sniffed<R> = Chain<Cursor<Vec<u8>>, R>;

/// A reader of the uncompressed bytes; see [`decompress`].
pub struct Decompressed<R: BufRead> {
    decoder: Decoder<R>,
}

enum Decoder<R: BufRead> {
    None(Sniffed<R>),
    Gzip(Box<MultiGzDecoder<Sniffed<R>>>),
    Zstd(Box<zstd::stream::read::Decoder<'static, Sniffed<R>>>),
}

impl<R: BufRead> std::fmt::Debug for Decompressed<R> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Decompressed")
            .field("compression", &self.compression())
            .finish()
    }
}

impl<R: BufRead> Decompressed<R> {
    /// What the bytes were found to be compressed with.
    pub fn compression(&self) -> Compression {
        match &self.decoder {
            Decoder::None(_) => Compression::None,
            Decoder::Gzip(_) => Compression::Gzip,
            Decoder::Zstd(_) => Compression::Zstd,
        }
    }
}

impl<R: BufRead> Read for Decompressed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.decoder {
            Decoder::None(reader) => reader.read(buffer),
            Decoder::Gzip(reader) => reader.read(buffer).map_err(name_foreign_header),
            Decoder::Zstd(reader) => reader.read(buffer).map_err(name_large_window),
        }
    }
}

/// Tells a header that another reader may take from damage: RFC 1952 wants flags without a meaning refused, and Go does
/// not look at them.
fn name_foreign_header(error: io::Error) -> io::Error {
    // flate2 tells it by its words alone.
    if error.to_string() == "invalid gzip header" {
        io::Error::new(
            io::ErrorKind::Unsupported,
            "a gzip header has fields that are not known",
        )
    } else {
        error
    }
}

/// Tells a window that is too large from damage.
fn name_large_window(error: io::Error) -> io::Error {
    // `ZSTD_error_frameParameter_windowTooLarge` of zstd_errors.h, a stable number; functions return it
    // negative.
    let too_large = zstd::zstd_safe::get_error_name(16_usize.wrapping_neg());
    if error.to_string() == too_large {
        io::Error::new(
            io::ErrorKind::Unsupported,
            "its zstd window is larger than 128 MiB, or than 8 MiB and not that of its first frame",
        )
    } else {
        error
    }
}

/// Reads the first bytes to see how the rest is compressed, and decompresses it as it is read.
///
/// # Errors
/// When the first bytes cannot be read, or zstd cannot be set up. Damaged data is an error of the
/// `read` that comes to it.
pub fn decompress<R: BufRead>(reader: R) -> io::Result<Decompressed<R>> {
    let (start, reader) = begin(reader, SIGNATURE_BYTES)?;
    decompress_within(start, reader, MAX_WINDOW_LOG)
}

/// As [`decompress`], of several layers at once: one with a large window waits for its turn, which is to be kept as long as it
/// is read. A window that becomes large behind the first frame is one that is too large.
///
/// # Errors
/// As [`decompress`]; or it was given up meanwhile.
pub fn decompress_in_turn<'w, R: BufRead>(
    reader: R,
    windows: &'w LargeWindows,
    is_given_up: &dyn Fn() -> bool,
) -> io::Result<(Decompressed<R>, Option<LargeWindowTurn<'w>>)> {
    let (mut start, mut reader) = begin(reader, SIGNATURE_BYTES)?;
    if compression_of(&start) == Compression::Zstd {
        let rest = HEADER_BYTES - SIGNATURE_BYTES;
        (&mut reader).take(rest as u64).read_to_end(&mut start)?;
    }
    if compression_of(&start) != Compression::Zstd || has_small_window(&start) {
        return Ok((decompress_within(start, reader, SMALL_WINDOW_LOG)?, None));
    }
    let turn = windows.take(is_given_up)?;
    Ok((
        decompress_within(start, reader, MAX_WINDOW_LOG)?,
        Some(turn),
    ))
}

/// The first bytes, and what comes behind them.
fn begin<R: BufRead>(mut reader: R, bytes: usize) -> io::Result<(Vec<u8>, R)> {
    let mut start = Vec::with_capacity(bytes);
    (&mut reader).take(bytes as u64).read_to_end(&mut start)?;
    Ok((start, reader))
}

fn decompress_within<R: BufRead>(
    start: Vec<u8>,
    reader: R,
    window_log: u32,
) -> io::Result<Decompressed<R>> {
    let compression = compression_of(&start);
    let whole = Cursor::new(start).chain(reader);
    let decoder = match compression {
        Compression::None => Decoder::None(whole),
        Compression::Gzip => Decoder::Gzip(Box::new(MultiGzDecoder::new(whole))),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(whole)?;
            decoder.window_log_max(window_log)?;
            Decoder::Zstd(Box::new(decoder))
        }
    };
    Ok(Decompressed { decoder })
}

fn compression_of(start: &[u8]) -> Compression {
    match start {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
        _ => Compression::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufReader, Write};

    /// Hands out one byte at a time, as a slow pipe may.
    struct OneByte<'a>(&'a [u8]);

    impl Read for OneByte<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let len = buffer.len().min(1).min(self.0.len());
            buffer[..len].copy_from_slice(&self.0[..len]);
            self.0 = &self.0[len..];
            Ok(len)
        }
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn each_compression_is_recognised_and_undone() {
        let data: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
        let zstd = zstd::encode_all(&data[..], 1).unwrap();
        let skippable = [&[0x51, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3][..], &zstd].concat();
        let table = [
            (data.clone(), Compression::None, data.clone()),
            (gzip(&data), Compression::Gzip, data.clone()),
            (
                [gzip(&data), gzip(b"more")].concat(),
                Compression::Gzip,
                [&data[..], b"more"].concat(),
            ),
            (zstd.clone(), Compression::Zstd, data.clone()),
            (
                [&zstd[..], &zstd].concat(),
                Compression::Zstd,
                [&data[..], &data].concat(),
            ),
            (skippable, Compression::Zstd, data.clone()),
            (Vec::new(), Compression::None, Vec::new()),
            (vec![0x1f], Compression::None, vec![0x1f]),
        ];
        for (packed, compression, plain) in table {
            let mut reader = decompress(BufReader::with_capacity(3, OneByte(&packed))).unwrap();
            assert_eq!(reader.compression(), compression);
            let mut read = Vec::new();
            reader.read_to_end(&mut read).unwrap();
            assert!(read == plain);
        }
    }

    #[test]
    fn a_large_window_is_told_from_damage() {
        for (window_log, kind) in [(27, None), (28, Some(io::ErrorKind::Unsupported))] {
            let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
            encoder.window_log(window_log).unwrap();
            encoder.long_distance_matching(true).unwrap();
            // More than the window: a smaller frame is its own window.
            for _ in 0..(1 << (window_log - 20)) + 1 {
                encoder.write_all(&[7; 1 << 20]).unwrap();
            }
            let packed = encoder.finish().unwrap();
            let read = io::copy(&mut decompress(&packed[..]).unwrap(), &mut io::sink());
            assert_eq!(read.err().map(|error| error.kind()), kind, "{window_log}");
        }
    }

    fn of_window(window_log: u32) -> Vec<u8> {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(window_log).unwrap();
        // More than the window: a smaller frame is its own window.
        for _ in 0..(1 << (window_log - 20)) + 1 {
            encoder.write_all(&[7; 1 << 20]).unwrap();
        }
        encoder.finish().unwrap()
    }

    #[test]
    fn large_windows_are_read_one_after_the_other() {
        let windows = LargeWindows::new(1);
        let given_up = || true;
        let (small, large) = (of_window(23), of_window(24));
        let whole = zstd::bulk::compress(&[7; 1 << 20], 1).unwrap();
        let others = [small.clone(), whole, gzip(b"data"), b"tar".to_vec()];
        let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0][..], &large].concat();
        let behind = [&small[..], &large].concat();
        let in_turn = |packed| decompress_in_turn(packed, &windows, &given_up);
        let (mut first, turn) = in_turn(&large[..]).unwrap();
        assert!(turn.is_some());
        // Whoever needs none does not wait.
        for packed in &others {
            assert!(in_turn(packed).unwrap().1.is_none());
        }
        assert!(in_turn(&large[..]).is_err(), "there is one turn");
        assert_eq!(io::copy(&mut first, &mut io::sink()).unwrap(), 17 << 20);
        drop(turn);
        assert!(in_turn(&large[..]).unwrap().1.is_some());
        // Of what begins with something else it is not told.
        let (mut reader, turn) = in_turn(&skippable).unwrap();
        assert!(turn.is_some());
        assert_eq!(io::copy(&mut reader, &mut io::sink()).unwrap(), 17 << 20);
        drop(turn);
        let (mut reader, turn) = in_turn(&behind).unwrap();
        assert!(turn.is_none());
        let error = io::copy(&mut reader, &mut io::sink()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported, "handed on");
    }

    #[test]
    fn a_foreign_header_is_told_from_damage() {
        let mut reserved = gzip(b"data");
        reserved[3] |= 0xe0;
        let second = [gzip(b"first"), reserved.clone()].concat();
        for packed in [reserved, second] {
            let read = io::copy(&mut decompress(&packed[..]).unwrap(), &mut io::sink());
            assert_eq!(read.unwrap_err().kind(), io::ErrorKind::Unsupported);
        }
    }

    #[test]
    fn damage_is_an_error() {
        let data = vec![7; 50_000];
        for packed in [gzip(&data), zstd::encode_all(&data[..], 1).unwrap()] {
            let cut = &packed[..packed.len() - 5];
            assert!(
                decompress(cut)
                    .unwrap()
                    .read_to_end(&mut Vec::new())
                    .is_err()
            );
        }
    }
}
