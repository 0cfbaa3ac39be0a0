//! SHA-256: of bytes in memory, of what goes by, and of what another thread hashes meanwhile.
//!
//! ```text
//!  bytes ──────────────────────> sha256, sha256_hex, oci_digest
//!  a reader or a writer ───────> through: Hashed ──> the same bytes, and in the end their size and digest
//!                                           │
//!  pieces of a file ───────────> beside: HashedBeside ──> the same; of many bytes a thread takes it
//! ```
//!
//! ring's implementation: on processors without SHA instructions it is twice as fast as that of the crate `sha2`, and a
//! digest is what a package waits for there (docs/dependencies.md).

mod beside;
mod through;

pub use beside::{HashedBeside, PIECE, Piece, Pieces, Through};
pub use through::Hashed;

use data_encoding::HEXLOWER;
use ring::digest::{Context, SHA256};

/// Bytes of a digest.
pub const SHA256_BYTES: usize = 32;

/// A digest in the making.
#[derive(Clone)]
pub struct Sha256(Context);

impl Sha256 {
    /// Of nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self(Context::new(&SHA256))
    }

    /// Goes on with these bytes.
    pub fn update(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.update(bytes.as_ref());
    }

    /// The digest.
    #[must_use]
    pub fn finish(self) -> [u8; SHA256_BYTES] {
        let mut bytes = [0; SHA256_BYTES];
        bytes.copy_from_slice(self.0.finish().as_ref());
        bytes
    }

    /// The digest, lower-case hexadecimal.
    #[must_use]
    pub fn finish_hex(self) -> String {
        hex(&self.finish())
    }
}

impl Default for Sha256 {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Sha256 {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Sha256")
    }
}

/// The digest of these bytes.
#[must_use]
pub fn sha256(bytes: impl AsRef<[u8]>) -> [u8; SHA256_BYTES] {
    let mut hasher = Sha256::new();
    hasher.update(bytes);
    hasher.finish()
}

/// The digest of these bytes, lower-case hexadecimal.
#[must_use]
pub fn sha256_hex(bytes: impl AsRef<[u8]>) -> String {
    hex(&sha256(bytes))
}

/// The digest of these bytes as the OCI image specification spells it: `sha256:<hex>`.
#[must_use]
pub fn oci_digest(bytes: impl AsRef<[u8]>) -> String {
    format!("sha256:{}", sha256_hex(bytes))
}

/// Lower-case hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    HEXLOWER.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of FIPS 180-2, appendix B.
    #[test]
    fn digests_are_those_of_the_standard() {
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256_hex("abc"), abc);
        assert_eq!(oci_digest("abc"), format!("sha256:{abc}"));
        let mut hasher = Sha256::new();
        hasher.update("a");
        hasher.update("bc");
        assert_eq!(hasher.finish_hex(), abc);
        let million = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0";
        assert_eq!(sha256_hex("a".repeat(1_000_000)), million);
    }
}
