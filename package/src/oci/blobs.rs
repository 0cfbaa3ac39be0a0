//! Where blobs go to and come from: a directory, a registry.

use super::document::Descriptor;
use crate::error::PackageError;

/// A place for blobs, by their digests; several threads use it at once.
pub trait Blobs: Sync {
    /// Whether it has the blob.
    ///
    /// # Errors
    /// It cannot be asked.
    fn has(&self, digest: &str, size: u64) -> Result<bool, PackageError>;

    /// Puts a blob there.
    ///
    /// # Errors
    /// It is not there then.
    fn put(&self, digest: &str, bytes: &[u8]) -> Result<(), PackageError>;

    /// A blob, which has been compared with its digest; it has `limit` bytes at most.
    ///
    /// # Errors
    /// It is not there, or not what its descriptor says.
    fn get(&self, descriptor: &Descriptor, limit: u64) -> Result<Vec<u8>, PackageError>;

    /// The manifest or index that has this tag or digest; one of a digest has been compared with it.
    ///
    /// # Errors
    /// There is none.
    fn manifest(&self, reference: &str, limit: u64) -> Result<Vec<u8>, PackageError>;

    /// Puts a manifest or index there, which names what is there; none: it has no tag, and is found by its digest.
    ///
    /// # Errors
    /// It is not there then.
    fn put_manifest(
        &self,
        media_type: &str,
        bytes: &[u8],
        tag: Option<&str>,
    ) -> Result<(), PackageError>;
}
