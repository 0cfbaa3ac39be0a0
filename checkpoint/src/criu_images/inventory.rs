//! `inventory.img`: in which namespaces CRIU itself was when it dumped. A
//! task with a namespace of CRIU's is restored into CRIU's, which is the node's.
//!
//! ```text
//!   u32 LE   magic; this image has no common head
//!   entry    1 img_version   3 root_ids
//! ```

use std::path::Path;

use super::strict::{is_ambiguous, submessage};
use super::threads::{NamespaceIds, TaskKobjIdsEntry};
use super::{Image, ImageError, Kind};

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
