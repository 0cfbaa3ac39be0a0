//! The files that a container has changed, as the topmost layer of an image: a tar that every reader takes
//! (`transship_layer::rewrite_for_image`), compressed by gzip, which umoci reads as well as containerd 1.6.
//!
//! ```text
//!  rootfs-diff.tar ── rewrite ── diff id ── gzip ── digest, length      once, kept nowhere
//!                 `── rewrite ─────────── gzip ── pipe ──> registry     as often as it is asked for, the same bytes
//! ```

use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::thread::JoinHandle;

use flate2::{Compression, GzBuilder};
use transship_digest::Hashed;
use transship_layer::{RewriteError, Rewritten, rewrite_for_image};

use super::document::Descriptor;

/// Media type of it.
pub(super) const GZIP_LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// A layer that is made whenever it is read.
pub(super) struct ImageLayer {
    layer: File,
    /// Of what [`ImageLayer::open`] gives.
    pub(super) descriptor: Descriptor,
    /// Digest of the tar.
    pub(super) diff_id: String,
    pub(super) rewritten: Rewritten,
}

impl ImageLayer {
    /// Makes it of the checkpoint's layer, to know its digests.
    ///
    /// # Errors
    /// The checkpoint's layer is damaged or cannot be read.
    pub(super) fn measure(layer: File) -> Result<Self, RewriteError> {
        let mut tar = Hashed::new(gzip(Hashed::new(io::sink())));
        let rewritten = rewrite_for_image(&layer, &mut tar)?;
        let (gzip, tar) = tar.finish();
        let (_, packed) = gzip.finish().map_err(cannot_write)?.finish();
        Ok(Self {
            layer,
            descriptor: Descriptor {
                media_type: GZIP_LAYER.to_owned(),
                digest: format!("sha256:{}", packed.sha256),
                size: packed.size,
                ..Descriptor::default()
            },
            diff_id: format!("sha256:{}", tar.sha256),
            rewritten,
        })
    }

    /// Makes it once more, for a reader.
    ///
    /// # Errors
    /// A system call failed; what is wrong with the checkpoint's layer is told when it is read.
    pub(super) fn open(&self) -> io::Result<Box<dyn Read + Send>> {
        let layer = self.layer.try_clone()?;
        let (pipe, out) = io::pipe()?;
        let write = move || {
            let mut gzip = gzip(out);
            // A reader that has gone away is told nothing any more.
            rewrite_for_image(&layer, &mut gzip).map_err(io::Error::other)?;
            gzip.finish().map(drop)
        };
        Ok(Box::new(Piped {
            pipe,
            writer: Some(std::thread::spawn(write)),
        }))
    }
}

/// No name and no time in its header: equal tars make equal bytes.
fn gzip<W: Write>(out: W) -> flate2::write::GzEncoder<W> {
    GzBuilder::new().write(out, Compression::default())
}

fn cannot_write(source: io::Error) -> RewriteError {
    transship_layer::ExportError::Write { source }.into()
}

/// What a thread writes.
struct Piped {
    pipe: PipeReader,
    writer: Option<JoinHandle<io::Result<()>>>,
}

impl Read for Piped {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.pipe.read(buffer)?;
        if read == 0
            && !buffer.is_empty()
            && let Some(writer) = self.writer.take()
        {
            let panicked = |_| Err(io::Error::other("its writer has panicked"));
            writer.join().unwrap_or_else(panicked)?;
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Seek as _;

    use super::*;
    use crate::oci::digests::digest_of;
    use crate::package_tests::tar_of;

    #[test]
    fn what_is_read_is_what_was_measured() {
        let mut file = tempfile::tempfile().unwrap();
        let data = vec![7; 300_000];
        let tar = tar_of(&[("data", tar::EntryType::Regular, &data)]);
        file.write_all(&tar).unwrap();
        file.rewind().unwrap();
        let layer = ImageLayer::measure(file).unwrap();
        for _ in 0..2 {
            let mut packed = Vec::new();
            layer.open().unwrap().read_to_end(&mut packed).unwrap();
            assert_eq!(digest_of(&packed), layer.descriptor.digest);
            assert_eq!(packed.len() as u64, layer.descriptor.size);
            let mut tar = Vec::new();
            let mut unpacked = flate2::read::GzDecoder::new(&packed[..]);
            unpacked.read_to_end(&mut tar).unwrap();
            assert_eq!(digest_of(&tar), layer.diff_id);
        }
        // One that is not read to its end holds nobody up, and one that is damaged by now is told.
        drop(layer.open().unwrap());
        layer.layer.set_len(100_000).unwrap();
        let error = layer.open().unwrap().read_to_end(&mut Vec::new());
        assert!(error.unwrap_err().to_string().contains("cut off"));
    }
}
