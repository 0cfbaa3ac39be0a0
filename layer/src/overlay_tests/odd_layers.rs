//! Layers that few tools write and that containerd takes, and how their entries are applied.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use super::have_root;
use super::hostile_layers::{TarBytes, tar};
use super::mounted_overlay::OverlayDirs;
use super::tree_state::read_tree;
use crate::xattrs::{XattrHolder, XattrReader};
use crate::{ImportOptions, ImportStats, LayerFormat, import_into_upperdir};

fn image_options() -> ImportOptions {
    ImportOptions {
        format: LayerFormat::Image,
        ..ImportOptions::default()
    }
}

/// Imports an image's layer over `a/old`, `b/old` and the symlink `way` out of the layer. Returns what the
/// merged tree shows.
fn shown(layer: TarBytes) -> (Vec<String>, ImportStats, OverlayDirs) {
    let dirs = OverlayDirs::in_memory();
    let lower = &dirs.lowerdirs[0];
    for name in ["a", "b"] {
        fs::create_dir(lower.join(name)).unwrap();
        fs::write(lower.join(name).join("old"), "").unwrap();
    }
    fs::create_dir(dirs.base.path().join("outside")).unwrap();
    fs::write(dirs.base.path().join("outside/secret"), "").unwrap();
    symlink("../outside", lower.join("way")).unwrap();
    let stats = import_into_upperdir(&layer.end()[..], &dirs.stack(), &image_options()).unwrap();
    let mounted = dirs.mount();
    // It panics on a name that is listed and cannot be opened.
    let names: Vec<_> = read_tree(&dirs.merged)
        .into_keys()
        .map(|path| path.to_str().unwrap().to_owned())
        .filter(|path| !path.is_empty())
        .collect();
    drop(mounted);
    let outside = fs::read_dir(dirs.base.path().join("outside")).unwrap();
    assert_eq!(outside.count(), 1);
    (names, stats, dirs)
}

#[test]
fn root_entries_are_resolved_inside_of_the_layer() {
    if !have_root() {
        return;
    }
    let link = |name: &str, target: &str| tar().link(b'2', name, target);
    let table: Vec<(&str, TarBytes, &[&str])> = vec![
        (
            "relative link",
            tar()
                .dir("usr/lib")
                .link(b'2', "lib", "usr/lib")
                .file("lib/x", ""),
            &["lib", "usr", "usr/lib", "usr/lib/x"],
        ),
        (
            "absolute link",
            tar().dir("srv").link(b'2', "opt", "/srv").file("opt/x", ""),
            &["opt", "srv", "srv/x"],
        ),
        (
            "link above the root",
            link("c", "../../srv").file("c/x", ""),
            &["c", "srv", "srv/x"],
        ),
        (
            "link in a directory",
            tar().dir("d").link(b'2', "d/l", "../e").file("d/l/x", ""),
            &["d", "d/l", "e", "e/x"],
        ),
        (
            "dangling link",
            link("c", "no/where").dir("c/d"),
            &["c", "no", "no/where", "no/where/d"],
        ),
        (
            "two links",
            link("c", "d").link(b'2', "d", "e").file("c/f/x", ""),
            &["c", "d", "e", "e/f", "e/f/x"],
        ),
        (
            "hard link through a link",
            tar()
                .file("usr/x", "")
                .link(b'2', "c", "/usr")
                .link(b'1', "y", "c/x"),
            &["c", "usr", "usr/x", "y"],
        ),
        (
            "hard link with ..",
            tar().file("x", "").dir("d").link(b'1', "d/l", "d/../x"),
            &["d", "d/l", "x"],
        ),
        (
            "opaque marker through a link",
            link("c", "b").file("c/.wh..wh..opq", "").file("c/x", ""),
            &["b", "b/x", "c"],
        ),
        ("..", tar().dir("d").file("d/../x", ""), &["d", "x"]),
        (".. above the root", tar().file("../../x", ""), &["x"]),
        ("lower link", tar().file("way/x", ""), &["way", "way/x"]),
        (
            "root twice",
            tar()
                .raw(b"/", b'2', b"/etc", 0, b"")
                .raw(b"", b'0', b"", 0, b"")
                .file("x", ""),
            &["x"],
        ),
        (
            "below a deleted name",
            tar().file(".wh.c/x", "").file("x", ""),
            &["x"],
        ),
        // umoci, for a directory that becomes a link. The lower b/old is not meant.
        (
            "link, then whiteout",
            tar()
                .file(".wh.a", "")
                .link(b'2', "a", "b")
                .file("a/.wh.old", ""),
            &["a", "b/old"],
        ),
        (
            "whiteout, then link",
            tar().file("a/.wh.old", "").link(b'2', "a", "b"),
            &["a", "b/old"],
        ),
        (
            "deletion, file, directory",
            tar()
                .file(".wh.a", "")
                .file("a", "")
                .dir("a")
                .file("a/x", ""),
            &["a", "a/x"],
        ),
        (
            "file, deletion, directory",
            tar().file("a", "").file(".wh.a", "").dir("a"),
            &["a"],
        ),
        (
            "deletion, directory, file, directory",
            tar().file(".wh.a", "").dir("a").file("a", "").dir("a"),
            &["a"],
        ),
        (
            "file, directory",
            tar().file("a", "").dir("a"),
            &["a", "a/old"],
        ),
        (
            "file, then deletions below it",
            tar()
                .file("a", "")
                .file("a/.wh.old", "")
                .file("a/.wh..wh..opq", ""),
            &["a"],
        ),
        (
            "hard link up from where a link leads",
            tar()
                .file("usr/x", "")
                .link(b'2', "c", "/usr/lib")
                .link(b'1', "y", "c/../x"),
            &["c", "usr", "usr/x", "y"],
        ),
        (
            "device 0:0",
            tar()
                .raw(b"a", b'3', b"", 0, b"")
                .raw(b"none", b'3', b"", 0, b""),
            &["b/old"],
        ),
        (
            "file, then device 0:0",
            tar().file("b/old", "1").raw(b"b/old", b'3', b"", 0, b""),
            &["a/old"],
        ),
    ];
    for (what, layer, expected) in table {
        let (names, _, _dirs) = shown(layer);
        let mut expected: Vec<_> = expected.iter().map(ToString::to_string).collect();
        let is_replaced = |name: &str| expected.iter().any(|it| it == name);
        let lower = match what {
            "link, then whiteout" | "whiteout, then link" => vec!["b", "way"],
            "file, then deletions below it"
            | "deletion, file, directory"
            | "file, deletion, directory"
            | "deletion, directory, file, directory" => vec!["b", "b/old", "way"],
            "device 0:0" => vec!["b", "way"],
            "file, then device 0:0" => vec!["a", "b", "way"],
            "opaque marker through a link" => vec!["a", "a/old", "way"],
            _ => vec!["a", "a/old", "b", "b/old", "way"],
        };
        let lower: Vec<_> = lower
            .into_iter()
            .filter(|name| !is_replaced(name))
            .map(str::to_owned)
            .collect();
        expected.extend(lower);
        expected.sort();
        let mut names = names;
        names.sort();
        assert_eq!(names, expected, "{what}");
    }
}

#[test]
fn root_what_leads_nowhere_is_refused() {
    if !have_root() {
        return;
    }
    for (what, layer) in [
        (
            "links in a circle",
            tar()
                .link(b'2', "a", "b")
                .link(b'2', "b", "a")
                .file("a/x", ""),
        ),
        (
            "hard link in a circle",
            tar().link(b'2', "a", "a").link(b'1', "x", "a/y"),
        ),
        (
            "below a file",
            tar().file("a", "").link(b'2', "l", "a").file("l/x", ""),
        ),
        (
            "hard link below a file",
            tar().file("a", "").link(b'1', "x", "a/y"),
        ),
    ] {
        let dirs = OverlayDirs::in_memory();
        let result = import_into_upperdir(&layer.end()[..], &dirs.stack(), &image_options());
        let error = result.expect_err(what);
        assert!(error.is_beyond_this_reader(), "{what}: {error:?}");
    }
}

#[test]
fn root_a_deletion_below_links_deletes_and_makes_nothing() {
    if !have_root() {
        return;
    }
    let circle = tar().link(b'2', "a", "b").link(b'2', "b", "a");
    let (names, stats, _) = shown(circle.file("a/.wh.old", "").file("b/.wh..wh..opq", ""));
    assert_eq!(names, ["a", "b", "way"]);
    assert_eq!(stats.skipped_entries, 2);
    // Nor is anything made on the way to where the link leads.
    let nowhere = tar().link(b'2', "a", "new/dir").file("a/.wh.old", "");
    let (names, _, _) = shown(nowhere);
    assert_eq!(names, ["a", "b", "b/old", "way"]);
}

#[test]
fn root_an_image_does_not_say_what_the_root_is_like() {
    if !have_root() {
        return;
    }
    let root = || {
        tar()
            .mode(0o1700)
            .pax(&[
                ("uid", b"1000"),
                ("mtime", b"1000"),
                ("SCHILY.xattr.user.a", b"1"),
            ])
            .dir("./")
            .mode(0o644)
            .file("x", "")
    };
    let (_, _, dirs) = shown(root());
    let made = fs::metadata(&dirs.upperdir).unwrap();
    assert_eq!((made.uid(), made.permissions().mode() & 0o7777), (0, 0o755));
    assert_ne!(made.mtime(), 1000);
    // A checkpoint does: it was the container's.
    let dirs = OverlayDirs::in_memory();
    import_into_upperdir(&root().end()[..], &dirs.stack(), &ImportOptions::default()).unwrap();
    let made = fs::metadata(&dirs.upperdir).unwrap();
    assert_eq!(
        (made.uid(), made.permissions().mode() & 0o7777),
        (1000, 0o1700)
    );
    assert_eq!(made.mtime(), 1000);
}

#[test]
fn root_trusted_attributes_come_from_checkpoints_only() {
    if !have_root() {
        return;
    }
    let layer = || {
        tar()
            .pax(&[
                ("SCHILY.xattr.trusted.lov", b"1"),
                ("SCHILY.xattr.user.overlay.opaque", b"y"),
            ])
            .file("x", "")
    };
    let names = |dirs: &OverlayDirs| {
        let file = fs::File::open(dirs.upperdir.join("x")).unwrap();
        let mut names = Vec::new();
        let holder = XattrHolder::Open(std::os::fd::AsFd::as_fd(&file));
        let mut take = |name: &[u8]| names.push(String::from_utf8(name.to_vec()).unwrap());
        XattrReader::new()
            .for_each(holder, |_| false, |name, _| take(name))
            .unwrap();
        names.sort();
        names
    };
    let dirs = OverlayDirs::on_disk();
    let stats = import_into_upperdir(&layer().end()[..], &dirs.stack(), &image_options()).unwrap();
    assert_eq!(stats.dropped_xattrs, 1);
    // Where the marks are `trusted.`, it is an attribute like any other.
    assert_eq!(names(&dirs), ["user.overlay.opaque"]);
    let dirs = OverlayDirs::on_disk();
    import_into_upperdir(&layer().end()[..], &dirs.stack(), &ImportOptions::default()).unwrap();
    assert_eq!(names(&dirs), ["trusted.lov", "user.overlay.opaque"]);
}

#[test]
fn root_an_attribute_that_its_kind_of_file_cannot_have_is_left_out() {
    if !have_root() {
        return;
    }
    let attribute = || tar().pax(&[("SCHILY.xattr.user.a", b"1")]);
    let unknown = || tar().pax(&[("SCHILY.xattr.nobody.a", b"1")]);
    for layer in [
        attribute().link(b'2', "x", "a"),
        attribute().raw(b"x", b'6', b"", 0, b""),
        unknown().file("x", ""),
    ] {
        let layer = layer.end();
        let mut options = image_options();
        let import = |options: &ImportOptions| {
            let dirs = OverlayDirs::on_disk();
            import_into_upperdir(&layer[..], &dirs.stack(), options)
        };
        assert!(import(&options).is_err());
        options.skip_unsupported_xattrs = true;
        assert_eq!(import(&options).unwrap().unsupported_xattrs, 1);
    }
}

#[test]
fn root_directories_that_nobody_names_have_the_time_of_their_making() {
    if !have_root() {
        return;
    }
    let (_, _, dirs) = shown(tar().file("new/x", ""));
    assert!(fs::metadata(dirs.upperdir.join("new")).unwrap().mtime() > 1_000_000);
}

/// containerd and Docker give a file the owner, mode and times of each further name's entry, too.
#[test]
fn root_directories_that_nobody_names_have_the_group_of_a_setgid_directory() {
    if !have_root() {
        return;
    }
    let group = tar().mode(0o2775).pax(&[("gid", b"50")]).dir("group/");
    let (_, _, dirs) = shown(group.mode(0o644).file("group/new/x", ""));
    let new = fs::metadata(dirs.upperdir.join("group/new")).unwrap();
    assert_eq!((new.uid(), new.gid(), new.mode() & 0o7777), (0, 50, 0o755));
    let x = fs::metadata(dirs.upperdir.join("group/new/x")).unwrap();
    assert_eq!(x.gid(), 0);
}

#[test]
fn root_a_further_name_gives_its_file_attributes() {
    if !have_root() {
        return;
    }
    let capability: &[u8] = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let key = "SCHILY.xattr.security.capability";
    let (_, _, dirs) = shown(
        tar()
            .pax(&[(key, capability)])
            .file("x", "data")
            .mode(0o4711)
            .pax(&[
                ("uid", b"7"),
                ("mtime", b"5.5"),
                ("SCHILY.xattr.user.a", b"1"),
                (key, capability),
            ])
            .link(b'1', "y", "x")
            .mode(0o600)
            .file("kept", "")
            // Nothing changes, so the capability stays.
            .pax(&[(key, capability)])
            .file("p", "")
            .link(b'1', "q", "p")
            .link(b'2', "s", "nowhere")
            .mode(0o123)
            .pax(&[("uid", b"8")])
            .link(b'1', "t", "s"),
    );
    let file = fs::metadata(dirs.upperdir.join("x")).unwrap();
    let is = (
        file.uid(),
        file.permissions().mode() & 0o7777,
        file.mtime(),
        file.mtime_nsec(),
    );
    assert_eq!(is, (7, 0o4711, 5, 500_000_000));
    let names = |name: &str| {
        let file = fs::File::open(dirs.upperdir.join(name)).unwrap();
        let mut names = Vec::new();
        let holder = XattrHolder::Open(std::os::fd::AsFd::as_fd(&file));
        XattrReader::new()
            .for_each(
                holder,
                |_| false,
                |name, _| names.push(String::from_utf8(name.to_vec()).unwrap()),
            )
            .unwrap();
        names.sort();
        names
    };
    assert!(
        names("x").contains(&"security.capability".to_owned()),
        "{:?}",
        names("x")
    );
    assert_eq!(names("q"), ["security.capability"]);
    let link = fs::symlink_metadata(dirs.upperdir.join("t")).unwrap();
    assert!(link.is_symlink() && link.uid() == 8 && link.nlink() == 2);
}

/// What containerd makes of entries depends on their order, and on hidden files.
#[test]
fn root_neither_order_nor_hidden_files_give_attributes() {
    if !have_root() {
        return;
    }
    let mut dirs = OverlayDirs::on_disk();
    let hidden = dirs.lowerdirs[0].join("a/sub");
    fs::create_dir_all(&hidden).unwrap();
    fs::set_permissions(&hidden, fs::Permissions::from_mode(0o700)).unwrap();
    let import = |dirs: &OverlayDirs, layer: TarBytes| {
        import_into_upperdir(&layer.end()[..], &dirs.stack(), &image_options()).unwrap();
    };
    import(&dirs, tar().file(".wh.a", "").mode(0o711).dir("a"));
    dirs.commit();
    import(
        &dirs,
        tar()
            .file("a/sub/x", "")
            .pax(&[("SCHILY.xattr.user.first", b"1")])
            .dir("d")
            .pax(&[("SCHILY.xattr.user.last", b"2")])
            .dir("d")
            .file("f", "")
            .pax(&[("mtime", b"5")])
            .dir("l")
            .link(b'2', "l", "f")
            .file("global", "")
            .raw(b"global", b'g', b"", 0, b""),
    );
    let sub = fs::metadata(dirs.upperdir.join("a/sub")).unwrap();
    assert_eq!(sub.permissions().mode() & 0o7777, 0o755);
    let directory = fs::File::open(dirs.upperdir.join("d")).unwrap();
    let mut names = Vec::new();
    let holder = XattrHolder::Open(std::os::fd::AsFd::as_fd(&directory));
    XattrReader::new()
        .for_each(holder, |_| false, |name, _| names.push(name.to_vec()))
        .unwrap();
    assert_eq!(names, [b"user.last"]);
    let file = fs::metadata(dirs.upperdir.join("f")).unwrap();
    assert_eq!(file.mtime(), 1_000_000);
    assert!(dirs.upperdir.join("global").try_exists().unwrap());
}

#[test]
fn root_the_time_of_access_is_the_later_one() {
    if !have_root() {
        return;
    }
    for (atime, shown) in [("5.5", 1_000_000), ("2000000.5", 2_000_000)] {
        let dirs = OverlayDirs::in_memory();
        let records = [("atime", atime.as_bytes())];
        let layer = tar().pax(&records).file("x", "").end();
        import_into_upperdir(&layer[..], &dirs.stack(), &image_options()).unwrap();
        let found = fs::metadata(dirs.stack().top.join("x")).unwrap();
        assert_eq!((found.mtime(), found.atime()), (1_000_000, shown));
    }
}
