//! How a package is read, whoever has written it.

use crate::encryption::Identities;
use crate::signature::TrustedKeys;

/// What limits a package: the bytes that its reader takes.
pub const OF_MAX_SIZE: &str = "--max-size, or what quota-gigabytes in node.toml leaves";

/// How a package is read.
#[derive(Debug)]
pub struct ImportOptions {
    /// What the checkpoint is called; none: as it was.
    pub name: Option<String>,
    /// What it is called when it had no name: archives of other engines have none.
    pub name_without: String,
    /// The keys for one that is encrypted.
    pub identities: Identities,
    /// Whose signature it needs; nobody's: none.
    pub trusted: TrustedKeys,
    /// Bytes that are taken at most.
    pub max_bytes: u64,
    /// This machine, as in `uname -m`.
    pub architecture: String,
}
