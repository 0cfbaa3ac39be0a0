//! The directories of a snapshot, from the mounts that containerd gives for it.

use containerd_client::types::Mount;
use transship_layer::{MountFields, OverlayStack, StackError};

/// Reads the mounts of a snapshot.
///
/// # Errors
/// They are none of an overlay, or have options that are not understood.
pub(crate) fn overlay_stack(mounts: &[Mount]) -> Result<OverlayStack, StackError> {
    OverlayStack::from_mounts(mounts.iter().map(|mount| MountFields {
        fs_type: &mount.r#type,
        source: &mount.source,
        target: &mount.target,
        options: &mount.options,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use transship_layer::OverlayXattrs;

    #[test]
    fn how_a_snapshot_is_mounted_comes_along() {
        let options = ["userxattr", "upperdir=/u", "lowerdir=/b:/a"];
        let mount = Mount {
            r#type: "overlay".to_owned(),
            source: "overlay".to_owned(),
            target: String::new(),
            options: options.map(str::to_owned).to_vec(),
        };
        let stack = overlay_stack(&[mount]).unwrap();
        assert_eq!(stack.overlay_xattrs, OverlayXattrs::User);
        assert_eq!(stack.lowerdirs.len(), 2);
    }
}
