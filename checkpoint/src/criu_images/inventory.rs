//! `inventory.img`: in which namespaces CRIU itself was when it dumped. A
//! task with a namespace of CRIU's is restored into CRIU's, which is the node's.
//!
//! ```text
//!   u32 LE   magic; this image has no common head
//!   entry    1 img_version   3 root_ids   11 network_lock_method
//! ```
//!
//! A restore locks networks the way that the dump did, whatever its own options say.

use std::path::Path;

use super::strict::{fields, is_ambiguous, submessage};
use super::threads::{NamespaceIds, TaskKobjIdsEntry};
use super::{Image, ImageError, Kind, push_bytes};

#[derive(Clone, PartialEq, prost::Message)]
struct InventoryEntry {
    #[prost(message, optional, tag = "3")]
    root_ids: Option<TaskKobjIdsEntry>,
}

/// What is said of the whole dump.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    /// The namespaces of CRIU.
    pub criu_namespaces: NamespaceIds,
}

/// How CRIU locks networks (`enum NETWORK_LOCK_METHOD` of `criu/include/cr_options.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetworkLock {
    /// By the programs of iptables.
    Iptables,
    /// By a library.
    Nftables,
}

/// Number of the field `network_lock_method`.
const LOCK: u8 = 11;

impl NetworkLock {
    /// As `criu --network-lock` calls it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Iptables => "iptables",
            Self::Nftables => "nftables",
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::Iptables => 0,
            Self::Nftables => 1,
        }
    }
}

/// Has a restore from the images in `dir` lock networks so.
///
/// # Errors
/// The image is missing or damaged, or cannot be written.
pub fn set_network_lock(dir: &Path, lock: NetworkLock) -> Result<(), ImageError> {
    let path = dir.join("inventory.img");
    let image = Image::read(&path, Kind::Inventory)?;
    let mut entries = image.entries();
    let message = entries.next_bytes()?.ok_or_else(|| entries.cut_off())?;
    let all = fields(message).ok_or_else(|| image.ambiguous())?;
    let mut edited = Vec::with_capacity(message.len() + 2);
    for field in all
        .into_iter()
        .filter(|field| field.number != u64::from(LOCK))
    {
        edited.extend_from_slice(&message[field.whole]);
    }
    // A varint of one byte.
    edited.extend([LOCK << 3, lock.number()]);
    let mut body = Vec::new();
    push_bytes(&mut body, &edited);
    body.extend_from_slice(&image.body()[entries.position()..]);
    image.with_body(body).replace(&path)
}

/// Reads it.
///
/// # Errors
/// It is missing or damaged.
pub fn read(dir: &Path) -> Result<Inventory, ImageError> {
    let image = Image::read(&dir.join("inventory.img"), Kind::Inventory)?;
    let mut entries = image.entries();
    let message = entries.next_bytes()?.ok_or_else(|| entries.cut_off())?;
    let root_ids = submessage(message, 3).unwrap_or_default();
    if is_ambiguous(message, &[]) || is_ambiguous(root_ids, &[]) {
        return Err(image.ambiguous());
    }
    let entry: InventoryEntry = image.decode(message)?;
    Ok(Inventory {
        criu_namespaces: entry
            .root_ids
            .map(TaskKobjIdsEntry::namespaces)
            .unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_lock_is_set_and_nothing_else_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("inventory.img");
        // img_version, a field that nobody here knows, and with a lock or without one.
        for lock in [&[][..], &[11 << 3, 0], &[11 << 3, 1]] {
            let message = [&[1 << 3, 1][..], lock, &[9 << 3, 5]].concat();
            let mut body = Vec::new();
            push_bytes(&mut body, &message);
            Image::new(&path, Kind::Inventory, body)
                .replace(&path)
                .unwrap();
            set_network_lock(dir.path(), NetworkLock::Nftables).unwrap();
            let image = Image::read(&path, Kind::Inventory).unwrap();
            let edited = image.entries().next_bytes().unwrap().unwrap().to_vec();
            assert_eq!(edited, [1 << 3, 1, 9 << 3, 5, 11 << 3, 1]);
            read(dir.path()).unwrap();
        }
        fs::write(&path, "").unwrap();
        assert!(set_network_lock(dir.path(), NetworkLock::Iptables).is_err());
    }
}
