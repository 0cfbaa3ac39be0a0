//! Digests as OCI writes them.

use crate::error::PackageError;

/// The digest of bytes, with its algorithm.
pub(crate) fn digest_of(bytes: &[u8]) -> String {
    transship_digest::oci_digest(bytes)
}

/// The hexadecimal digits of a digest: nothing else becomes a part of a path or an address.
pub(crate) fn check_digest(digest: &str) -> Result<&str, PackageError> {
    let hex = digest.strip_prefix("sha256:").unwrap_or_default();
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    match hex.len() == 64 && hex.bytes().all(is_digit) {
        true => Ok(hex),
        false => Err(PackageError::Member {
            member: digest
                .chars()
                .take(80)
                .collect::<String>()
                .escape_debug()
                .to_string(),
            reason: "it is no digest of SHA-256".to_owned(),
        }),
    }
}
