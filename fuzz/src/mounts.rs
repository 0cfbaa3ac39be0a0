//! How an overlay is mounted, as a snapshotter and as the kernel say it.

use std::path::{Path, PathBuf};

use transship_layer::{MountFields, MountedOverlay, OverlayStack, StackError};

/// Most mount points that are asked for.
const MOST_POINTS: usize = 16;

/// A line a mount: type, source, target and options, with tabs between them.
pub(crate) fn overlay_options(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mounts: Vec<(Vec<&str>, Vec<String>)> = { text.lines() }
        .map(|line| {
            let mut fields = line.split('\t');
            let place = fields.by_ref().take(3).collect();
            (place, fields.map(str::to_owned).collect())
        })
        .collect();
    let fields = mounts.iter().map(|(place, options)| MountFields {
        fs_type: place.first().copied().unwrap_or_default(),
        source: place.get(1).copied().unwrap_or_default(),
        target: place.get(2).copied().unwrap_or_default(),
        options,
    });
    if let Ok(stack) = OverlayStack::from_mounts(fields) {
        check(&stack);
    }
}

/// `/proc/self/mountinfo`.
pub(crate) fn mountinfo(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let points = text.lines().filter_map(|line| line.split(' ').nth(4));
    for point in points.take(MOST_POINTS).chain(["/run/b/rootfs", ""]) {
        let found = MountedOverlay::on(Path::new(point), &text);
        match found {
            Ok(mount) => {
                check(&mount.stack);
                let stays = mount.stack.is_writable || mount.flags.iter().any(|flag| flag == "ro");
                assert!(stays, "what is read-only is mounted so again");
            }
            Err(error) => assert!(!matches!(error, StackError::MountCount(_))),
        }
    }
}

/// The directories are files of the node: each is absolute.
fn check(stack: &OverlayStack) {
    let dirs = [&stack.top]
        .into_iter()
        .chain(&stack.lowerdirs)
        .chain(&stack.data_dirs);
    let relative: Vec<&PathBuf> = dirs.filter(|dir| !dir.is_absolute()).collect();
    assert!(relative.is_empty(), "{relative:?}");
}
