//! A blob read from containerd's content store where it lies.
//!
//! Read over the socket, a layer costs containerd as much processor time as it costs the differ to
//! make all files of it. The content plugin (`io.containerd.content.v1`, id `content`) says by the
//! introspection service where its root is, and the layout below is that of an OCI image layout:
//!
//! ```text
//! <root>/blobs/<algorithm>/<hex>        never changed once it is there; unlinked by the collector
//! ```
//!
//! Whether the namespace has the blob is asked of containerd as always. When there is no such file (a
//! content store of another kind, another mount namespace) the socket remains.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::chunks::CHUNK_BYTES;

/// Opens a blob of the store at `root`. None when there is none of that size.
pub(super) fn open_blob(root: &Path, digest: &str, size: u64) -> Option<File> {
    let path = blob_path(root, digest)?;
    let mut options = File::options();
    options.read(true);
    options.custom_flags(nix::fcntl::OFlag::O_NOFOLLOW.bits());
    let file = options.open(path).ok()?;
    let metadata = file.metadata().ok()?;
    (metadata.is_file() && metadata.len() == size).then_some(file)
}

/// A digest is `<algorithm>:<hex>`, and part of a path only when it is nothing else.
fn blob_path(root: &Path, digest: &str) -> Option<PathBuf> {
    let (algorithm, hex) = digest.split_once(':')?;
    let is_plain = |part: &str| {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        !part.is_empty() && part.bytes().all(plain)
    };
    (is_plain(algorithm) && is_plain(hex)).then(|| root.join("blobs").join(algorithm).join(hex))
}

/// An open blob, until it is told to stop.
#[derive(Debug)]
pub(super) struct BlobFile {
    file: BufReader<File>,
    stop: Stop,
}

/// The order to stop, for all threads that work on a layer.
#[derive(Debug, Clone, Default)]
pub(super) struct Stop(Arc<AtomicBool>);

impl Stop {
    pub(super) fn now(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_ordered(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// # Errors
    /// It was ordered.
    pub(super) fn check(&self) -> io::Result<()> {
        match self.is_ordered() {
            true => Err(io::Error::other("given up")),
            false => Ok(()),
        }
    }
}

impl BlobFile {
    pub(super) fn new(file: File, stop: Stop) -> Self {
        Self {
            file: BufReader::with_capacity(CHUNK_BYTES, file),
            stop,
        }
    }
}

impl Read for BlobFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stop.check()?;
        self.file.read(buffer)
    }
}

impl BufRead for BlobFile {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.stop.check()?;
        self.file.fill_buf()
    }

    fn consume(&mut self, len: usize) {
        self.file.consume(len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_never_leads_elsewhere() {
        let root = Path::new("/store");
        let path = Some(PathBuf::from("/store/blobs/sha256/00ff"));
        assert_eq!(blob_path(root, "sha256:00ff"), path);
        for digest in [
            "",
            "sha256",
            "sha256:",
            ":00",
            "sha256:../../x",
            "..:ff",
            "a/b:ff",
            "sha256:a:b",
        ] {
            assert_eq!(blob_path(root, digest), None, "{digest}");
        }
    }

    #[test]
    fn only_the_whole_blob_is_opened_and_can_be_stopped() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("blobs/sha256");
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("aa"), b"content").unwrap();
        std::os::unix::fs::symlink("aa", dir.join("bb")).unwrap();
        for (digest, size) in [("sha256:aa", 6), ("sha256:bb", 7), ("sha256:cc", 7)] {
            assert!(open_blob(root.path(), digest, size).is_none(), "{digest}");
        }
        let stop = Stop::default();
        let file = open_blob(root.path(), "sha256:aa", 7).unwrap();
        let mut blob = BlobFile::new(file, stop.clone());
        let mut read = [0; 3];
        blob.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"con");
        stop.now();
        assert!(blob.read_to_end(&mut Vec::new()).is_err());
    }
}
