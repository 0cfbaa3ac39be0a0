//! What the kernel tells of a mounted overlay, read and mounted again.

use std::fs;

use nix::mount::{MsFlags, mount};

use super::have_root;
use super::mounted_overlay::OverlayDirs;
use super::tree_state::{differences, read_tree};
use crate::{
    ExportOptions, ImportOptions, MountedOverlay, OverlayXattrs, export_upperdir,
    import_into_upperdir,
};

#[test]
fn root_a_mount_is_found_filled_and_made_again_as_it_was() {
    if !have_root() {
        return;
    }
    for (options, overlay_xattrs) in [
        ("index=off", OverlayXattrs::Trusted),
        ("userxattr", OverlayXattrs::User),
    ] {
        let mut dirs = OverlayDirs::in_memory();
        options.clone_into(&mut dirs.mount_options);
        fs::create_dir(dirs.lowerdirs[0].join("dir")).unwrap();
        fs::write(dirs.lowerdirs[0].join("dir/image"), "").unwrap();
        // A directory that replaces the image's is opaque: that is where the marks matter.
        let mounted = dirs.mount();
        fs::remove_dir_all(dirs.merged.join("dir")).unwrap();
        fs::create_dir(dirs.merged.join("dir")).unwrap();
        fs::write(dirs.merged.join("dir/own"), "").unwrap();
        let before = read_tree(&dirs.merged);
        let overlay = told(&dirs);
        assert_eq!(overlay.stack.top, dirs.upperdir);
        assert_eq!(overlay.stack.lowerdirs, dirs.lowerdirs);
        assert_eq!(overlay.stack.overlay_xattrs, overlay_xattrs);
        drop(mounted);
        let mut tar = Vec::new();
        export_upperdir(&overlay.stack, &mut tar, &ExportOptions::default()).unwrap();
        // Another node, with the same image.
        dirs.new_upper();
        let mounted = dirs.mount();
        let overlay = told(&dirs);
        drop(mounted);
        import_into_upperdir(&tar[..], &overlay.stack, &ImportOptions::default()).unwrap();
        let data = Some(overlay.data.as_str());
        mount(
            Some("overlay"),
            &dirs.merged,
            Some("overlay"),
            MsFlags::empty(),
            data,
        )
        .unwrap();
        let after = read_tree(&dirs.merged);
        nix::mount::umount(&dirs.merged).unwrap();
        assert!(
            differences(&before, &after).is_empty(),
            "{options}: {:?}",
            differences(&before, &after)
        );
    }
}

fn told(dirs: &OverlayDirs) -> MountedOverlay {
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap();
    MountedOverlay::on(&dirs.merged, &mountinfo).unwrap()
}
