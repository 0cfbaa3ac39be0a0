//! What is computed of a file while it goes by.

use transship_digest::Sha256;
use twox_hash::XxHash3_128;

use super::Check;

/// A digest in the making.
pub(super) enum Running {
    Sha256(Box<Sha256>),
    Xxh3(Box<XxHash3_128>),
}

/// A digest.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Done {
    /// For the manifest; empty where that has none.
    pub(super) sha256: String,
    /// For the end of the file.
    pub(super) xxh3: Option<String>,
}

impl Running {
    pub(super) fn of(check: Check) -> Self {
        match check {
            Check::Sha256 => Self::Sha256(Box::default()),
            Check::Xxh3 => Self::Xxh3(Box::default()),
        }
    }

    pub(super) fn update(&mut self, data: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(data),
            Self::Xxh3(hasher) => hasher.write(data),
        }
    }

    pub(super) fn finish(self) -> Done {
        match self {
            Self::Sha256(hasher) => Done {
                sha256: hasher.finish_hex(),
                xxh3: None,
            },
            Self::Xxh3(hasher) => Done {
                sha256: String::new(),
                xxh3: Some(format!("{:032x}", hasher.finish_128())),
            },
        }
    }
}
