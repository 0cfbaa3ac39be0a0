//! An image of many files, as the OCI archive that `ctr images import` reads.
//!
//! Nothing of it is random: two builds give the same digest.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use anyhow::{Context as _, Result};
use containerd_client::types::Descriptor;
use serde_json::json;
use transship_digest::{Hashed, oci_digest};

use crate::namespace::TAR;

/// Files in one directory.
pub(super) const FILES_PER_DIR: u32 = 100;
/// 100 000 files make 830 MB: the sizes run evenly from 4 100 to 12 500 bytes.
const SMALLEST: u32 = 4_100;
const SIZE_STEPS: u32 = 8_401;
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// An image with this number of files.
#[derive(Debug, Clone, Copy)]
pub(super) struct BigImage {
    pub(super) files: u32,
    /// Each has every so many directories.
    pub(super) layers: u32,
}

impl BigImage {
    /// Directories at the top: `d0`, `d1`, ...
    pub(super) fn dirs(self) -> u32 {
        self.files.div_ceil(FILES_PER_DIR)
    }

    /// Its name.
    pub(super) fn reference(self) -> String {
        format!("transship.test/files:{}-{}", self.files, self.layers)
    }

    /// Path of a file, from the image's root.
    pub(super) fn file(i: u32) -> String {
        format!("d{}/f{i}", i / FILES_PER_DIR)
    }

    /// Writes the archive; gives the descriptor of the lowest layer.
    pub(super) fn write_archive(self, path: &Path) -> Result<Descriptor> {
        let layers = (0..self.layers).map(|layer| {
            let mut layer_bytes = Hashed::new(io::sink());
            self.write_layer(layer, &mut layer_bytes)?;
            let (_, written) = layer_bytes.finish();
            Ok(Blob {
                media_type: TAR,
                digest: format!("sha256:{}", written.sha256),
                size: written.size,
            })
        });
        let layers: io::Result<Vec<_>> = layers.collect();
        let layers = layers.context("cannot make the layers")?;
        let writing = || format!("cannot write {}", path.display());
        let file = File::create(path).with_context(writing)?;
        let file = self.write_around(&layers, file).with_context(writing)?;
        // What is left to write back must not fall into what is measured.
        file.sync_all().with_context(writing)?;
        let lowest = layers.into_iter().next().context("there is no layer")?;
        Ok(Descriptor {
            media_type: TAR.to_owned(),
            digest: lowest.digest,
            size: i64::try_from(lowest.size).context("the layer is too large")?,
            ..Descriptor::default()
        })
    }

    fn write_around(self, layers: &[Blob], file: File) -> io::Result<File> {
        let digests: Vec<_> = layers.iter().map(|layer| &layer.digest).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {},
            "rootfs": { "type": "layers", "diff_ids": digests },
        });
        let config = config.to_string();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": Blob::of(config.as_bytes(), CONFIG).json(),
            "layers": layers.iter().map(Blob::json).collect::<Vec<_>>(),
        });
        let manifest = manifest.to_string();
        let mut described = Blob::of(manifest.as_bytes(), MANIFEST).json();
        described["annotations"] = json!({
            "io.containerd.image.name": self.reference(),
        });
        let index = json!({ "schemaVersion": 2, "manifests": [described] }).to_string();

        let mut archive = tar::Builder::new(BufWriter::with_capacity(1 << 20, file));
        append(
            &mut archive,
            "oci-layout",
            br#"{"imageLayoutVersion":"1.0.0"}"#,
        )?;
        append(&mut archive, "index.json", index.as_bytes())?;
        for (content, media_type) in [(&config, CONFIG), (&manifest, MANIFEST)] {
            let blob = Blob::of(content.as_bytes(), media_type);
            append(&mut archive, &blob.path(), content.as_bytes())?;
        }
        for (number, layer) in (0..).zip(layers) {
            let mut header = header(tar::EntryType::Regular, layer.size);
            header.set_path(layer.path())?;
            header.set_cksum();
            // Around the builder, which wants a reader: a tar is a whole number of blocks, so that no
            // padding follows it.
            archive.get_mut().write_all(header.as_bytes())?;
            self.write_layer(number, archive.get_mut())?;
        }
        let out = archive.into_inner()?;
        out.into_inner().map_err(io::IntoInnerError::into_error)
    }

    fn write_layer(self, number: u32, out: &mut impl Write) -> io::Result<()> {
        let pool = noise();
        let mut layer = tar::Builder::new(out);
        for dir in (number..self.dirs()).step_by(self.layers as usize) {
            let mut header = header(tar::EntryType::Directory, 0);
            layer.append_data(&mut header, format!("d{dir}/"), io::empty())?;
            for i in (dir * FILES_PER_DIR)..((dir + 1) * FILES_PER_DIR).min(self.files) {
                let size = (SMALLEST + i.wrapping_mul(7919) % SIZE_STEPS) as usize;
                let from = i as usize * 61 % (pool.len() - size);
                append(&mut layer, &Self::file(i), &pool[from..from + size])?;
            }
        }
        layer.finish()
    }
}

/// Bytes that do not compress.
fn noise() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut pool = Vec::with_capacity(1 << 20);
    while pool.len() < 1 << 20 {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        pool.extend(state.to_le_bytes());
    }
    pool
}

fn header(kind: tar::EntryType, size: u64) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(if kind == tar::EntryType::Directory {
        0o755
    } else {
        0o644
    });
    header.set_mtime(1_600_000_000);
    header.set_uid(0);
    header.set_gid(0);
    header
}

fn append(archive: &mut tar::Builder<impl Write>, path: &str, content: &[u8]) -> io::Result<()> {
    let mut header = header(tar::EntryType::Regular, content.len() as u64);
    archive.append_data(&mut header, path, content)
}

/// What a descriptor says of a blob.
#[derive(Debug)]
struct Blob {
    media_type: &'static str,
    digest: String,
    size: u64,
}

impl Blob {
    fn of(content: &[u8], media_type: &'static str) -> Blob {
        Blob {
            media_type,
            digest: oci_digest(content),
            size: content.len() as u64,
        }
    }

    fn path(&self) -> String {
        format!("blobs/{}", self.digest.replace(':', "/"))
    }

    fn json(&self) -> serde_json::Value {
        json!({ "mediaType": self.media_type, "digest": self.digest, "size": self.size })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn the_archive_holds_what_it_says() {
        let dir = std::env::temp_dir().join(format!("transship-bench-{}", std::process::id()));
        let image = BigImage {
            files: 150,
            layers: 1,
        };
        let layer = image.write_archive(&dir).unwrap();
        let mut archive = tar::Archive::new(File::open(&dir).unwrap());
        let mut blobs = 0;
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().to_string_lossy().into_owned();
            let Some(digest) = path.strip_prefix("blobs/sha256/").map(str::to_owned) else {
                continue;
            };
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            assert_eq!(Blob::of(&content, TAR).digest, format!("sha256:{digest}"));
            if layer.digest.ends_with(&digest) {
                assert_eq!(content.len() as i64, layer.size);
                let mut layer = tar::Archive::new(&content[..]);
                assert_eq!(layer.entries().unwrap().count(), 152);
            }
            blobs += 1;
        }
        std::fs::remove_file(&dir).unwrap();
        assert_eq!(blobs, 3);
    }
}
