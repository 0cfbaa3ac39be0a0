//! Lower layers that another tool has mounted with `redirect_dir`, `metacopy` or whiteouts by attribute, and
//! attributes of the other kind of mount: the layer is right, or left to a differ that looks at the mount.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use super::have_root;
use super::kernel_marks::{paths, set};
use super::mounted_overlay::OverlayDirs;
use super::tree_state::{TreeState, differences, read_tree};
use crate::{
    ExportError, ExportOptions, ImportOptions, LayerFormat, LowerError, OverlayXattrs,
    export_upperdir, import_into_upperdir,
};

/// Whether the export, or the import of what it wrote, is left to another differ; else the tree is the same.
#[derive(Debug, PartialEq, Eq)]
enum Done {
    Right,
    ExportLeft,
    ImportLeft,
}

/// Exports the upperdir as a layer of an image, and imports that in its place.
fn pass_on(dirs: &mut OverlayDirs, namespace: OverlayXattrs, format: LayerFormat) -> Done {
    let before = shown(dirs);
    let stack = dirs.stack().with_overlay_xattrs(namespace);
    let options = ExportOptions {
        format,
        ..ExportOptions::default()
    };
    let mut tar = Vec::new();
    match export_upperdir(&stack, &mut tar, &options) {
        Ok(_) => {}
        Err(ExportError::Inexact { .. } | ExportError::Lower(LowerError::Redirected { .. })) => {
            return Done::ExportLeft;
        }
        Err(error) => panic!("{error:?}"),
    }
    dirs.new_upper();
    let stack = dirs.stack().with_overlay_xattrs(namespace);
    let options = ImportOptions {
        format,
        ..ImportOptions::default()
    };
    match import_into_upperdir(&tar[..], &stack, &options) {
        Ok(_) => {}
        Err(error) if error.is_beyond_this_reader() => return Done::ImportLeft,
        Err(error) => panic!("{error:?}"),
    }
    let after = shown(dirs);
    assert!(
        differences(&before, &after).is_empty(),
        "{:?}\n{:?}",
        paths(&tar),
        differences(&before, &after)
    );
    Done::Right
}

fn shown(dirs: &OverlayDirs) -> TreeState {
    let mounted = dirs.mount();
    let mut tree = read_tree(&dirs.merged);
    drop(mounted);
    // What an image says of its root is not taken.
    tree.remove(Path::new(""));
    tree
}

/// A change of the tree at a path.
type Change = fn(&Path);

fn nothing(_: &Path) {}

fn chmod(path: &Path) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o4711)).unwrap();
}

#[test]
fn root_renamed_lower_directories_are_right_or_left_alone() {
    if !have_root() {
        return;
    }
    let move_srv: Change = |root| fs::rename(root.join("srv"), root.join("moved")).unwrap();
    let table: [(&str, Change, Change); 11] = [
        ("beside it", move_srv, |root| {
            fs::write(root.join("new"), "").unwrap();
        }),
        ("a new file in it", move_srv, |root| {
            fs::write(root.join("moved/d/new"), "").unwrap();
        }),
        ("a deletion in it", move_srv, |root| {
            fs::remove_file(root.join("moved/d/x")).unwrap();
        }),
        ("a directory in it that was made anew", move_srv, |root| {
            fs::remove_dir_all(root.join("moved/d")).unwrap();
            fs::create_dir(root.join("moved/d")).unwrap();
        }),
        ("it is renamed again", move_srv, |root| {
            fs::rename(root.join("moved"), root.join("again")).unwrap();
        }),
        ("a directory in it is renamed", move_srv, |root| {
            fs::rename(root.join("moved/d"), root.join("out")).unwrap();
        }),
        ("it is deleted", move_srv, |root| {
            fs::remove_dir_all(root.join("moved")).unwrap();
        }),
        ("its old name comes back", move_srv, |root| {
            fs::create_dir_all(root.join("srv/d")).unwrap();
            fs::write(root.join("srv/d/y"), "other").unwrap();
        }),
        ("a file in it has other attributes", move_srv, |root| {
            chmod(&root.join("moved/d/x"));
        }),
        (
            "a file with attributes alone gets others",
            |root| chmod(&root.join("srv/d/x")),
            |root| chown(root.join("srv/d/x"), Some(7), Some(8)).unwrap(),
        ),
        (
            "a renamed file with attributes alone gets others",
            |root| {
                chmod(&root.join("srv/d/x"));
                fs::rename(root.join("srv/d/x"), root.join("x")).unwrap();
            },
            |root| chown(root.join("x"), Some(7), Some(8)).unwrap(),
        ),
    ];
    let mut right = Vec::new();
    for (what, below, above) in table {
        let mut dirs = OverlayDirs::on_disk();
        let lower = &dirs.lowerdirs[0];
        fs::create_dir_all(lower.join("srv/d")).unwrap();
        fs::write(lower.join("srv/d/x"), "content").unwrap();
        fs::write(lower.join("srv/y"), "2").unwrap();
        dirs.mount_options.push_str(",redirect_dir=on,metacopy=on");
        let mounted = dirs.mount();
        below(&dirs.merged);
        drop(mounted);
        dirs.commit();
        let mounted = dirs.mount();
        above(&dirs.merged);
        drop(mounted);
        if pass_on(&mut dirs, OverlayXattrs::Trusted, LayerFormat::Image) == Done::Right {
            right.push(what);
        }
    }
    // Which marks the upperdir gets, depends on the kernel.
    let always = ["beside it", "it is deleted", "its old name comes back"];
    assert!(always.iter().all(|what| right.contains(what)), "{right:?}");
}

#[test]
fn root_a_layer_for_renamed_directories_is_left_to_who_sees_the_mount() {
    if !have_root() {
        return;
    }
    // The layer names what is in the directory and not the directory: its attributes are those of another
    // place.
    let mut dirs = OverlayDirs::on_disk();
    fs::create_dir_all(dirs.lowerdirs[0].join("srv/d")).unwrap();
    dirs.mount_options.push_str(",redirect_dir=on");
    let mounted = dirs.mount();
    fs::rename(dirs.merged.join("srv"), dirs.merged.join("moved")).unwrap();
    drop(mounted);
    dirs.commit();
    let mut layer = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(0);
    layer
        .append_data(&mut header, "moved/d/new", &b""[..])
        .unwrap();
    let layer = layer.into_inner().unwrap();
    let options = ImportOptions {
        format: LayerFormat::Image,
        ..ImportOptions::default()
    };
    let error = import_into_upperdir(&layer[..], &dirs.stack(), &options).unwrap_err();
    assert!(error.is_beyond_this_reader(), "{error:?}");
}

#[test]
fn root_a_redirect_leads_nowhere_else_than_the_kernel_goes() {
    if !have_root() {
        return;
    }
    for redirect in [
        "/../outside",
        "..",
        ".",
        "/srv/./d",
        "srv/d",
        "/nowhere",
        "",
    ] {
        let dirs = OverlayDirs::on_disk();
        fs::create_dir_all(dirs.lowerdirs[0].join("srv/d")).unwrap();
        fs::create_dir(dirs.base.path().join("outside")).unwrap();
        fs::write(dirs.base.path().join("outside/secret"), "1").unwrap();
        fs::create_dir(dirs.upperdir.join("moved")).unwrap();
        set(
            &dirs.upperdir.join("moved"),
            "trusted.overlay.redirect",
            redirect.as_bytes(),
        );
        let exported = export_upperdir(&dirs.stack(), &mut Vec::new(), &ExportOptions::default());
        assert!(
            matches!(exported, Err(ExportError::Inexact { .. })),
            "{redirect}: {exported:?}"
        );
    }
}

#[test]
fn root_whiteouts_by_attribute_in_lower_layers_hide() {
    if !have_root() {
        return;
    }
    let table: [(&str, Change); 4] = [
        ("nothing", nothing),
        ("the name comes back", |root| {
            fs::write(root.join("dir/gone"), "2").unwrap();
        }),
        ("and goes", |root| {
            fs::write(root.join("dir/gone"), "2").unwrap();
            fs::remove_file(root.join("dir/gone")).unwrap();
        }),
        ("another name goes", |root| {
            fs::remove_file(root.join("dir/kept")).unwrap();
        }),
    ];
    for (what, change) in table {
        let mut dirs = OverlayDirs::on_disk();
        fs::create_dir(dirs.lowerdirs[0].join("dir")).unwrap();
        fs::write(dirs.lowerdirs[0].join("dir/gone"), "1").unwrap();
        fs::write(dirs.lowerdirs[0].join("dir/kept"), "1").unwrap();
        fs::create_dir(dirs.upperdir.join("dir")).unwrap();
        fs::write(dirs.upperdir.join("dir/gone"), "").unwrap();
        set(&dirs.upperdir.join("dir"), "trusted.overlay.opaque", b"x");
        set(
            &dirs.upperdir.join("dir/gone"),
            "trusted.overlay.whiteout",
            b"",
        );
        dirs.commit();
        if shown(&dirs).contains_key(Path::new("dir/gone")) {
            eprintln!("skipped: whiteouts by attribute came with Linux 6.7");
            return;
        }
        let mounted = dirs.mount();
        change(&dirs.merged);
        drop(mounted);
        let done = pass_on(&mut dirs, OverlayXattrs::Trusted, LayerFormat::Image);
        assert_eq!(done, Done::Right, "{what}");
    }
}

#[test]
fn root_marks_of_the_other_kind_of_mount_are_attributes() {
    if !have_root() {
        return;
    }
    for (option, namespace, other) in [
        ("", OverlayXattrs::Trusted, "user.overlay"),
        (",userxattr", OverlayXattrs::User, "trusted.overlay"),
    ] {
        for format in [LayerFormat::Image, LayerFormat::Checkpoint] {
            let mut dirs = OverlayDirs::on_disk();
            fs::create_dir(dirs.lowerdirs[0].join("dir")).unwrap();
            fs::write(dirs.lowerdirs[0].join("dir/x"), "1").unwrap();
            dirs.mount_options.push_str(option);
            let mounted = dirs.mount();
            let dir = dirs.merged.join("dir");
            fs::write(dir.join("empty"), "").unwrap();
            set(&dir, &format!("{other}.opaque"), b"y");
            set(&dir, &format!("{other}.redirect"), b"/elsewhere");
            set(&dir.join("x"), &format!("{other}.metacopy"), b"");
            set(&dir.join("empty"), &format!("{other}.whiteout"), b"y");
            drop(mounted);
            if namespace == OverlayXattrs::User {
                // No reader sets them: the trees are the same without.
                assert_eq!(pass_on_without(&mut dirs, namespace, format, other), 4);
            } else {
                assert_eq!(pass_on(&mut dirs, namespace, format), Done::Right);
            }
        }
    }
}

/// As [`pass_on`], but counts the attributes with a prefix and expects the rest alone.
fn pass_on_without(
    dirs: &mut OverlayDirs,
    namespace: OverlayXattrs,
    format: LayerFormat,
    prefix: &str,
) -> u64 {
    let mut before = shown(dirs);
    for state in before.values_mut() {
        state
            .xattrs
            .retain(|name, _| !name.starts_with(prefix.as_bytes()));
    }
    let options = ExportOptions {
        format,
        ..ExportOptions::default()
    };
    let stack = dirs.stack().with_overlay_xattrs(namespace);
    let mut tar = Vec::new();
    let stats = export_upperdir(&stack, &mut tar, &options).unwrap();
    dirs.new_upper();
    let stack = dirs.stack().with_overlay_xattrs(namespace);
    let options = ImportOptions {
        format,
        ..ImportOptions::default()
    };
    import_into_upperdir(&tar[..], &stack, &options).unwrap();
    let after = shown(dirs);
    assert!(
        differences(&before, &after).is_empty(),
        "{:?}",
        differences(&before, &after)
    );
    stats.lost_xattrs
}
