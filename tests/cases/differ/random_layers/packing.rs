//! From entries to a blob: ends of archives, compressions, and damage.

use std::io::Write as _;

use proptest::prelude::*;

use super::headers;
use super::stacks::Entry;
use crate::differ::PLAIN;

const BLOCK: usize = 512;
const DOCKER: &str = "application/vnd.docker.image.rootfs.diff.tar";

/// What follows the last entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum End {
    #[default]
    TwoBlocks,
    /// Zeros up to 10 240 bytes, as GNU tar has it.
    Record,
    OneBlock,
    Nothing,
    /// Not even the rest of the last block.
    Unfilled,
    /// An extended header, of nothing.
    Header,
    /// Two blocks, and then what is no tar.
    Garbage,
}

/// How a tar is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Compressed {
    #[default]
    No,
    Gzip,
    GzipStored,
    /// Several members, one of them empty.
    GzipMembers,
    /// With a name, a comment and more in its header.
    GzipFields,
    Zstd,
    ZstdFrames,
    /// Skippable frames before, between and behind.
    ZstdSkippable,
    ZstdChecked,
    /// A window of 64 MiB.
    ZstdLong,
}

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Packing {
    end: End,
    compressed: Compressed,
    has_docker_type: bool,
    /// The media type names another compression.
    has_other_type: bool,
}

impl Packing {
    pub(super) fn any() -> impl Strategy<Value = Self> {
        use prop::sample::select;
        let ends = vec![
            End::TwoBlocks,
            End::TwoBlocks,
            End::Record,
            End::OneBlock,
            End::Nothing,
            End::Unfilled,
            End::Header,
            End::Garbage,
        ];
        let compressions = vec![
            Compressed::No,
            Compressed::No,
            Compressed::Gzip,
            Compressed::GzipStored,
            Compressed::GzipMembers,
            Compressed::GzipFields,
            Compressed::Zstd,
            Compressed::ZstdFrames,
            Compressed::ZstdSkippable,
            Compressed::ZstdChecked,
            Compressed::ZstdLong,
        ];
        let other = prop::bool::weighted(0.1);
        (select(ends), select(compressions), any::<bool>(), other).prop_map(
            |(end, compressed, has_docker_type, has_other_type)| Self {
                end,
                compressed,
                has_docker_type,
                has_other_type,
            },
        )
    }

    pub(super) fn tar(&self, entries: &[Entry]) -> Vec<u8> {
        let mut tar = Vec::new();
        let mut padding = 0;
        for entry in entries {
            padding = headers::write(&mut tar, entry);
        }
        match self.end {
            End::TwoBlocks => tar.extend([0; 2 * BLOCK]),
            End::Record => tar.resize((tar.len() + 2 * BLOCK).next_multiple_of(20 * BLOCK), 0),
            End::OneBlock => tar.extend([0; BLOCK]),
            End::Nothing => {}
            End::Unfilled => tar.truncate(tar.len() - padding),
            End::Header => headers::write_dangling(&mut tar),
            End::Garbage => {
                tar.extend([0; 2 * BLOCK]);
                tar.extend(b"what is no tar".repeat(100));
            }
        }
        tar
    }

    pub(super) fn compress(&self, tar: &[u8]) -> anyhow::Result<Vec<u8>> {
        let (first, rest) = tar.split_at(tar.len() / 3);
        let zstd = |data: &[u8]| zstd::encode_all(data, 1);
        // Of any length; containerd's decoder reads over it.
        let skippable = [&[0x5e, 0x2a, 0x4d, 0x18, 5, 0, 0, 0][..], b"other"].concat();
        let blob = match self.compressed {
            Compressed::No => tar.to_vec(),
            Compressed::Gzip => gzip(tar, 6)?,
            Compressed::GzipStored => gzip(tar, 0)?,
            Compressed::GzipMembers => [gzip(first, 1)?, gzip(b"", 1)?, gzip(rest, 9)?].concat(),
            Compressed::GzipFields => {
                let fields = flate2::GzBuilder::new()
                    .filename("layer.tar")
                    .comment("a comment")
                    .extra(*b"xx\x03\x00abc")
                    .mtime(7);
                let mut encoder = fields.write(Vec::new(), flate2::Compression::new(4));
                encoder.write_all(tar)?;
                encoder.finish()?
            }
            Compressed::Zstd => zstd(tar)?,
            Compressed::ZstdFrames => [zstd(first)?, zstd(b"")?, zstd(rest)?].concat(),
            Compressed::ZstdSkippable => [
                &skippable[..],
                &zstd(first)?,
                &skippable,
                &zstd(rest)?,
                &skippable,
            ]
            .concat(),
            Compressed::ZstdChecked | Compressed::ZstdLong => {
                let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 3)?;
                encoder.include_checksum(true)?;
                if self.compressed == Compressed::ZstdLong {
                    encoder.window_log(26)?;
                    encoder.long_distance_matching(true)?;
                }
                encoder.write_all(tar)?;
                encoder.finish()?
            }
        };
        Ok(blob)
    }

    pub(super) fn media_type(&self) -> String {
        let compression = match self.compressed {
            // containerd does not look into what is said to be plain.
            Compressed::No if self.has_other_type => "gzip",
            Compressed::No => "",
            Compressed::Gzip
            | Compressed::GzipStored
            | Compressed::GzipMembers
            | Compressed::GzipFields => match self.has_other_type {
                true => "zstd",
                false => "gzip",
            },
            _ if self.has_other_type => "gzip",
            _ => "zstd",
        };
        match (self.has_docker_type, compression) {
            (false, "") => PLAIN.to_owned(),
            (true, "") => DOCKER.to_owned(),
            (false, compression) => format!("{PLAIN}+{compression}"),
            (true, compression) => format!("{DOCKER}.{compression}"),
        }
    }
}

fn gzip(data: &[u8], level: u32) -> anyhow::Result<Vec<u8>> {
    let level = flate2::Compression::new(level);
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), level);
    encoder.write_all(data)?;
    Ok(encoder.finish()?)
}

/// What happens to a blob on its way.
#[derive(Debug, Clone)]
pub(super) enum Damage {
    /// It ends early.
    Cut(prop::sample::Index),
    /// Some bits of a byte are others.
    Flipped(prop::sample::Index, u8),
    Zeros(u16),
    Garbage(Vec<u8>),
    /// It comes a second time.
    Twice,
}

impl Damage {
    pub(super) fn any() -> impl Strategy<Value = Self> {
        use prop::sample::Index;
        prop_oneof![
            any::<Index>().prop_map(Self::Cut),
            (any::<Index>(), 1..=255u8).prop_map(|(at, bits)| Self::Flipped(at, bits)),
            (1..2000u16).prop_map(Self::Zeros),
            prop::collection::vec(any::<u8>(), 1..40).prop_map(Self::Garbage),
            Just(Self::Twice),
        ]
    }

    pub(super) fn done_to(&self, mut blob: Vec<u8>) -> Vec<u8> {
        match self {
            Self::Cut(at) => blob.truncate(at.index(blob.len())),
            Self::Flipped(at, bits) => {
                let at = at.index(blob.len());
                blob[at] ^= bits;
            }
            Self::Zeros(count) => blob.resize(blob.len() + usize::from(*count), 0),
            Self::Garbage(bytes) => blob.extend(bytes),
            Self::Twice => blob.extend_from_within(..),
        }
        blob
    }
}
