//! The directories of a snapshot, from the mounts that containerd gives for it.

use containerd_client::types::Mount;
use transship_layer::{MountFields, OverlayStack, StackError};

/// Reads the mounts of a snapshot.
///
/// # Errors
/// They are none of an overlay, or have options that are not understood.
pub fn overlay_stack(mounts: &[Mount]) -> Result<OverlayStack, StackError> {
    OverlayStack::from_mounts(mounts.iter().map(|mount| MountFields {
        fs_type: &mount.r#type,
        source: &mount.source,
        target: &mount.target,
        options: &mount.options,
    }))
}
