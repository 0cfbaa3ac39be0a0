//! Layers that attack, layers in unusual order, and damaged ones.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use proptest::prelude::*;
use tar::{EntryType, Header};

use super::have_root;
use super::mounted_overlay::OverlayDirs;
use super::tree_state::read_tree;
use crate::pax::push_record;
use crate::xattrs::{XattrHolder, XattrReader, set_xattr};
use crate::{
    Compression, ImportError, ImportOptions, ImportStats, LayerFormat, OverlayStack, OverlayXattrs,
    import_into_upperdir,
};

/// Builds tars that no honest program would.
pub(super) struct TarBytes {
    bytes: Vec<u8>,
    mode: u32,
}

impl TarBytes {
    /// Mode of the entries that follow.
    pub(super) fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    pub(super) fn raw(
        mut self,
        path: &[u8],
        entry_type: u8,
        link: &[u8],
        size: u64,
        data: &[u8],
    ) -> Self {
        let mut header = Header::new_ustar();
        let old = header.as_old_mut();
        old.name[..path.len()].copy_from_slice(path);
        old.linkname[..link.len()].copy_from_slice(link);
        header.set_entry_type(EntryType::new(entry_type));
        header.set_mode(self.mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000);
        header.set_size(size);
        header.set_cksum();
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    pub(super) fn file(self, path: &str, data: &str) -> Self {
        self.raw(
            path.as_bytes(),
            b'0',
            b"",
            data.len() as u64,
            data.as_bytes(),
        )
    }

    pub(super) fn dir(self, path: &str) -> Self {
        self.raw(path.as_bytes(), b'5', b"", 0, b"")
    }

    pub(super) fn link(self, entry_type: u8, path: &str, link: &str) -> Self {
        self.raw(path.as_bytes(), entry_type, link.as_bytes(), 0, b"")
    }

    pub(super) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut body = Vec::new();
        for (key, value) in records {
            push_record(&mut body, key.as_bytes(), value);
        }
        self.raw(b"pax", b'x', b"", body.len() as u64, &body)
    }

    pub(super) fn end(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 1024, 0);
        self.bytes
    }
}

pub(super) fn tar() -> TarBytes {
    TarBytes {
        bytes: Vec::new(),
        mode: 0o644,
    }
}

fn import(tar: &[u8], dirs: &OverlayDirs) -> Result<ImportStats, ImportError> {
    import_into_upperdir(tar, &dirs.stack(), &ImportOptions::default())
}

/// Fills what lies beside the upperdir, imports, and checks that it is as it was.
fn import_watched(tar: &[u8]) -> (Result<ImportStats, ImportError>, OverlayDirs) {
    let dirs = OverlayDirs::in_memory();
    let outside = dirs.base.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "secret").unwrap();
    fs::write(dirs.lowerdirs[0].join("lower"), "lower").unwrap();
    symlink("../outside", dirs.lowerdirs[0].join("way")).unwrap();
    let before = (read_tree(&outside), read_tree(&dirs.lowerdirs[0]));
    let result = import(tar, &dirs);
    assert!(
        (read_tree(&outside), read_tree(&dirs.lowerdirs[0])) == before,
        "{result:?}"
    );
    (result, dirs)
}

#[test]
fn root_attacks_are_refused_with_a_reason() {
    if !have_root() {
        return;
    }
    let long = "x".repeat(300);
    let table: Vec<(&str, Vec<u8>)> = vec![
        ("no name", tar().pax(&[("path", b"")]).file("", "").end()),
        (
            "NUL in a name",
            tar().pax(&[("path", b"a\0b")]).file("x", "").end(),
        ),
        (
            "name too long",
            tar().pax(&[("path", long.as_bytes())]).file("x", "").end(),
        ),
        (
            "link through a symlink",
            tar()
                .link(b'2', "a", "../outside")
                .link(b'1', "b", "a/secret")
                .end(),
        ),
        (
            "link outside",
            tar().link(b'1', "b", "../outside/secret").end(),
        ),
        (
            "link to the host",
            tar().link(b'1', "b", "/etc/passwd").end(),
        ),
        (
            "link to a directory",
            tar().dir("d").link(b'1', "b", "d").end(),
        ),
        ("link to nothing", tar().link(b'1', "b", "nothing").end()),
        (
            "link to itself",
            tar().file("b", "").link(b'1', "b", "b").end(),
        ),
        (
            "link to a deleted name",
            tar().file(".wh.lower", "").link(b'1', "b", "lower").end(),
        ),
        (
            "link below a lower symlink",
            tar().link(b'1', "b", "way/secret").end(),
        ),
        ("deletion of .", tar().dir("a").file("a/.wh..", "").end()),
        ("deletion of ..", tar().dir("a").file("a/.wh...", "").end()),
        ("deletion of nothing", tar().file(".wh.", "").end()),
        ("below a file", tar().file("a", "").file("a/b", "").end()),
        ("root is a file", tar().raw(b"./", b'0', b"", 0, b"").end()),
        ("unknown type", tar().raw(b"w", b'V', b"", 0, b"").end()),
        (
            "owner -1",
            tar().pax(&[("uid", b"4294967295")]).file("x", "").end(),
        ),
        (
            "owner too large",
            tar().pax(&[("gid", b"99999999999")]).file("x", "").end(),
        ),
        (
            "size too large",
            tar()
                .pax(&[("size", b"18446744073709551615")])
                .file("x", "")
                .end(),
        ),
        (
            "size lies",
            tar().raw(b"x", b'0', b"", 1 << 33, b"short").end(),
        ),
        (
            "PAX too large",
            tar().raw(b"p", b'x', b"", 1 << 40, b"").end(),
        ),
        (
            "PAX malformed",
            tar()
                .raw(b"p", b'x', b"", 9, b"12 a=b\n!!")
                .file("x", "")
                .end(),
        ),
        (
            "long name too large",
            tar().raw(b"p", b'L', b"", 1 << 40, b"").end(),
        ),
        (
            "xattr too large",
            tar()
                .pax(&[("SCHILY.xattr.user.a", &[0; 70_000])])
                .file("x", "")
                .end(),
        ),
        (
            "xattr without a name",
            tar().pax(&[("SCHILY.xattr.", b"1")]).file("x", "").end(),
        ),
        (
            "xattr of no namespace",
            tar()
                .pax(&[("SCHILY.xattr.none", b"1")])
                .file("x", "")
                .end(),
        ),
        ("sparse too many", sparse_tar(b"99999999\n", "100")),
        ("sparse overlapping", sparse_tar(b"2\n0\n4\n2\n4\n", "100")),
        ("sparse beyond its size", sparse_tar(b"1\n98\n8\n", "100")),
        (
            "sparse overflow",
            sparse_tar(b"1\n18446744073709551615\n8\n", "100"),
        ),
        ("sparse of letters", sparse_tar(b"x\n", "100")),
        ("sparse without end", sparse_tar(&[b'1'; 512], "100")),
        (
            "sparse beyond all files",
            sparse_tar(b"1\n0\n8\n", "18446744073709551615"),
        ),
        (
            "one zero block",
            tar().file("a", "").raw(&[], 0, &[], 0, &[0; 512]).bytes,
        ),
        ("no tar", b"#!/bin/sh\n".repeat(100)),
        (
            "cut off in a header",
            tar().file("a", "").bytes[..300].to_vec(),
        ),
        (
            "cut off in the data",
            tar().file("a", &"x".repeat(1000)).bytes[..900].to_vec(),
        ),
    ];
    for (what, bytes) in table {
        let (result, _dirs) = import_watched(&bytes);
        let error = result.expect_err(what);
        let told = error.to_string();
        assert!(!told.is_empty());
        match what {
            "name too long" => assert!(matches!(error, ImportError::Io { .. }), "{told}"),
            "xattr of no namespace" => assert!(matches!(error, ImportError::Xattr { .. })),
            _ => assert!(
                matches!(
                    error,
                    ImportError::Refused { .. } | ImportError::Malformed { .. }
                ),
                "{what}: {error:?}"
            ),
        }
    }
}

#[test]
fn root_many_extended_headers_take_the_room_of_one() {
    if !have_root() {
        return;
    }
    // Go, by which containerd reads, takes the last one.
    let mut bytes = tar();
    for number in 0..100 {
        bytes = bytes.pax(&[(&format!("SCHILY.xattr.user.x{number}"), b"1")]);
    }
    let (result, dirs) = import_watched(&bytes.file("f", "").end());
    result.unwrap();
    let mut names = Vec::new();
    let file = File::open(dirs.upperdir.join("f")).unwrap();
    XattrReader::new()
        .for_each(
            XattrHolder::Open(file.as_fd()),
            |_| false,
            |name, _| {
                names.push(name.to_vec());
            },
        )
        .unwrap();
    assert_eq!(names, [b"user.x99".to_vec()]);
}

#[test]
fn root_default_acls_of_nested_directories_are_bounded() {
    if !have_root() {
        return;
    }
    let mut bytes = tar();
    let mut path = String::new();
    for _ in 0..20 {
        path.push_str("d/");
        bytes = bytes
            .pax(&[("SCHILY.xattr.system.posix_acl_default", &[0; 65_536])])
            .dir(&path);
    }
    let (result, _dirs) = import_watched(&bytes.end());
    assert!(
        matches!(result, Err(ImportError::Refused { .. })),
        "{result:?}"
    );
}

fn sparse_tar(map: &[u8], size: &str) -> Vec<u8> {
    let mut data = map.to_vec();
    data.resize(data.len().next_multiple_of(512), 0);
    data.extend_from_slice(b"12345678");
    tar()
        .pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"real"),
            ("GNU.sparse.realsize", size.as_bytes()),
        ])
        .raw(b"GNUSparseFile.0/real", b'0', b"", data.len() as u64, &data)
        .end()
}

#[test]
fn root_harmless_oddities_are_taken() {
    if !have_root() {
        return;
    }
    let absolute = tar()
        .file("/abs", "1")
        .dir("./d//")
        .file("././d/./f", "2")
        .end();
    let (result, dirs) = import_watched(&absolute);
    result.unwrap();
    assert_eq!(fs::read(dirs.upperdir.join("abs")).unwrap(), b"1");
    assert_eq!(fs::read(dirs.upperdir.join("d/f")).unwrap(), b"2");

    // A directory in the place of an earlier symlink is a directory of the layer's own.
    let replaced = tar()
        .link(b'2', "a", "../outside")
        .dir("a")
        .file("a/x", "1")
        .end();
    let (result, dirs) = import_watched(&replaced);
    result.unwrap();
    assert!(
        fs::symlink_metadata(dirs.upperdir.join("a"))
            .unwrap()
            .is_dir()
    );

    // A file written over a hard link is a file of its own.
    let over = tar()
        .file("a", "old")
        .link(b'1', "b", "a")
        .file("b", "new")
        .end();
    let (result, dirs) = import_watched(&over);
    result.unwrap();
    assert_eq!(fs::read(dirs.upperdir.join("a")).unwrap(), b"old");
    assert_eq!(fs::read(dirs.upperdir.join("b")).unwrap(), b"new");

    // A tree replaced by a file, an empty archive, aufs' own names, overlay's own attributes.
    let tree = tar()
        .dir("t")
        .dir("t/u")
        .file("t/u/v", "")
        .file("t", "flat")
        .end();
    let (result, dirs) = import_watched(&tree);
    result.unwrap();
    assert_eq!(fs::read(dirs.upperdir.join("t")).unwrap(), b"flat");
    assert_eq!(import_watched(b"").0.unwrap().entries, 0);
    let aufs = tar()
        .dir(".wh..wh.plnk")
        .file(".wh..wh.plnk/1.2", "")
        .file("x", "")
        .end();
    let stats = import_watched(&aufs).0.unwrap();
    assert_eq!((stats.skipped_entries, stats.needless_whiteouts), (1, 1));
    let marked = tar()
        .pax(&[
            ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ])
        .dir("d")
        .end();
    let (result, dirs) = import_watched(&marked);
    assert_eq!(result.unwrap().dropped_xattrs, 2);
    let mut names = Vec::new();
    let directory = File::open(dirs.upperdir.join("d")).unwrap();
    XattrReader::new()
        .for_each(
            XattrHolder::Open(directory.as_fd()),
            |_| false,
            |name, _| {
                names.push(name.to_vec());
            },
        )
        .unwrap();
    assert!(names.is_empty(), "{names:?}");
}

#[test]
fn root_limits_hold() {
    if !have_root() {
        return;
    }
    let bytes = tar().file("a", "1").file("b", &"2".repeat(5000)).end();
    let dirs = OverlayDirs::in_memory();
    let small = ImportOptions {
        max_bytes: 4000,
        ..ImportOptions::default()
    };
    let refused = import_into_upperdir(&bytes[..], &OverlayStack::new(&dirs.upperdir, []), &small);
    assert!(
        matches!(refused, Err(ImportError::TooLarge { limit: 4000, .. })),
        "{refused:?}"
    );
    assert!(!dirs.upperdir.join("b").try_exists().unwrap());
}

/// What the merged tree shows after a layer over a lower tree of `d/{x,y}` (d: mode 2751, owner
/// 5:6, an attribute) and a hard-linked pair `one`, `two`.
fn shown(bytes: &[u8]) -> (Vec<String>, OverlayDirs, ImportStats) {
    let dirs = OverlayDirs::on_disk();
    let lower = &dirs.lowerdirs[0];
    fs::create_dir(lower.join("d")).unwrap();
    fs::write(lower.join("d/x"), "x").unwrap();
    fs::write(lower.join("d/y"), "y").unwrap();
    std::os::unix::fs::chown(lower.join("d"), Some(5), Some(6)).unwrap();
    fs::set_permissions(lower.join("d"), fs::Permissions::from_mode(0o2751)).unwrap();
    let directory = File::open(lower.join("d")).unwrap();
    set_xattr(XattrHolder::Open(directory.as_fd()), b"user.kept", b"1").unwrap();
    fs::write(lower.join("one"), "linked").unwrap();
    fs::hard_link(lower.join("one"), lower.join("two")).unwrap();
    let stats = import(bytes, &dirs).unwrap();
    let mounted = dirs.mount();
    let names: Vec<_> = read_tree(&dirs.merged)
        .into_keys()
        .map(|path| path.to_str().unwrap().to_owned())
        .filter(|path| !matches!(path.as_str(), "" | "one" | "two"))
        .collect();
    drop(mounted);
    (names, dirs, stats)
}

#[test]
fn root_order_of_entries_does_not_matter() {
    if !have_root() {
        return;
    }
    let table: [(&str, Vec<u8>, &[&str]); 14] = [
        ("nothing", tar().end(), &["d", "d/x", "d/y"]),
        ("deleted", tar().file(".wh.d", "").end(), &[]),
        (
            "deleted inside",
            tar().file("d/.wh.x", "").end(),
            &["d", "d/y"],
        ),
        (
            "deleted, then made",
            tar().file(".wh.d", "").dir("d").file("d/z", "").end(),
            &["d", "d/z"],
        ),
        (
            "made, then deleted",
            tar().dir("d").file("d/z", "").file(".wh.d", "").end(),
            &["d", "d/z"],
        ),
        (
            "deleted, then implied",
            tar().file(".wh.d", "").file("d/z", "").end(),
            &["d", "d/z"],
        ),
        (
            "deleted, then a file",
            tar().file(".wh.d", "").file("d", "").end(),
            &["d"],
        ),
        (
            "a file, then deleted",
            tar().file("d", "").file(".wh.d", "").end(),
            &["d"],
        ),
        (
            "opaque first",
            tar()
                .dir("d")
                .file("d/.wh..wh..opq", "")
                .file("d/z", "")
                .end(),
            &["d", "d/z"],
        ),
        (
            "opaque last",
            tar()
                .dir("d")
                .file("d/z", "")
                .file("d/.wh..wh..opq", "")
                .end(),
            &["d", "d/z"],
        ),
        (
            "opaque alone",
            tar().file("d/.wh..wh..opq", "").end(),
            &["d"],
        ),
        (
            "whiteout, then opaque",
            tar().file("d/.wh.x", "").file("d/.wh..wh..opq", "").end(),
            &["d"],
        ),
        (
            "opaque, then whiteout",
            tar().file("d/.wh..wh..opq", "").file("d/.wh.x", "").end(),
            &["d"],
        ),
        (
            "opaque root",
            tar().dir("d").file("z", "").file(".wh..wh..opq", "").end(),
            &["d", "z"],
        ),
    ];
    for (what, bytes, expected) in table {
        // read_tree() panics on a name that is listed and cannot be opened: a whiteout that shows.
        let (names, _dirs, _) = shown(&bytes);
        assert_eq!(names, expected, "{what}");
    }
    let (_, _, stats) = shown(&tar().file(".wh.none", "").file("d/.wh.none", "").end());
    assert_eq!((stats.needless_whiteouts, stats.whiteouts), (2, 0));
}

#[test]
fn root_implied_directories_are_like_those_below() {
    if !have_root() {
        return;
    }
    let (names, dirs, stats) = shown(&tar().file("d/z", "").file("new/z", "").end());
    assert_eq!(names, ["d", "d/x", "d/y", "d/z", "new", "new/z"]);
    assert_eq!(stats.implied_directories, 2);
    let below = fs::metadata(dirs.lowerdirs[0].join("d")).unwrap();
    let made = fs::metadata(dirs.upperdir.join("d")).unwrap();
    assert_eq!((made.uid(), made.gid(), made.mode()), (5, 6, below.mode()));
    assert_eq!(
        (made.mtime(), made.mtime_nsec()),
        (below.mtime(), below.mtime_nsec())
    );
    let directory = File::open(dirs.upperdir.join("d")).unwrap();
    let mut reader = XattrReader::new();
    let value = reader
        .value(XattrHolder::Open(directory.as_fd()), b"user.kept")
        .unwrap();
    assert_eq!(value, Some(&b"1"[..]));
    assert_eq!(
        fs::metadata(dirs.upperdir.join("new")).unwrap().mode() & 0o7777,
        0o755
    );
    // The file in a setgid directory has the owner that its entry says.
    assert_eq!(fs::metadata(dirs.upperdir.join("d/z")).unwrap().gid(), 0);
}

#[test]
fn root_hard_links_to_lower_files_copy_them_up() {
    if !have_root() {
        return;
    }
    let (_, dirs, stats) = shown(
        &tar()
            .link(b'1', "new/three", "d/x")
            .link(b'1', "four", "/one")
            .end(),
    );
    assert_eq!((stats.hard_links, stats.copied_up_files), (2, 2));
    let inode = |path: &str| fs::metadata(dirs.upperdir.join(path)).unwrap().ino();
    assert_eq!(inode("new/three"), inode("d/x"));
    assert_eq!(inode("four"), inode("one"));
    assert!(!dirs.upperdir.join("two").try_exists().unwrap());
    assert_eq!(fs::read(dirs.upperdir.join("four")).unwrap(), b"linked");
}

/// As containerd does it: rootless, an image with a device can be pulled.
#[test]
fn root_devices_are_left_out_in_a_user_namespace() {
    const INSIDE: &str = "TRANSSHIP_IN_USER_NAMESPACE";
    if std::env::var_os(INSIDE).is_some() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        fs::create_dir(&top).unwrap();
        let stack = OverlayStack::new(&top, []).with_overlay_xattrs(OverlayXattrs::User);
        let tar = tar().raw(b"disk", b'4', b"", 0, b"").file("kept", "").end();
        let of_image = ImportOptions {
            format: LayerFormat::Image,
            ..ImportOptions::default()
        };
        let stats = import_into_upperdir(tar.as_slice(), &stack, &of_image).unwrap();
        assert_eq!(stats.skipped_entries, 1);
        let names: Vec<_> = fs::read_dir(&top)
            .unwrap()
            .map(|it| it.unwrap().file_name())
            .collect();
        assert_eq!(names, ["kept"]);
    } else if have_root() {
        let test = std::thread::current().name().unwrap().to_owned();
        let status = std::process::Command::new("unshare")
            .args(["--user", "--map-root-user"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", &test])
            .env(INSIDE, "")
            .status()
            .unwrap();
        assert!(status.success());
    }
}

/// A thousand bytes of tar would copy a large file of the image a thousand times.
#[test]
fn root_a_lower_file_is_copied_up_once() {
    if !have_root() {
        return;
    }
    let dirs = OverlayDirs::on_disk();
    fs::create_dir(dirs.lowerdirs[0].join("d")).unwrap();
    fs::write(dirs.lowerdirs[0].join("d/big"), "big").unwrap();
    let mut cycle = tar().dir("d").link(b'1', "x0", "d/big");
    for link in ["x1", "x2"] {
        cycle = cycle.file("d", "").dir("d").link(b'1', link, "d/big");
    }
    let error = import(&cycle.end(), &dirs).unwrap_err();
    assert!(error.to_string().contains("a second time"), "{error}");
    // One of a checkpoint makes no more of itself than it is.
    let dirs = OverlayDirs::on_disk();
    fs::write(dirs.lowerdirs[0].join("big"), vec![1; 1 << 20]).unwrap();
    let layer = tar().link(b'1', "x", "big").end();
    let options = ImportOptions::for_checkpoint(layer.len() as u64, Compression::None);
    let error = import_into_upperdir(&layer[..], &dirs.stack(), &options).unwrap_err();
    assert!(matches!(error, ImportError::TooLarge { .. }), "{error}");
    assert!(!dirs.stack().top.join("x").try_exists().unwrap());
}

#[test]
fn root_directories_keep_times_and_default_acls_in_any_order() {
    if !have_root() {
        return;
    }
    let dirs = OverlayDirs::on_disk();
    let acl = [
        &[2u8, 0, 0, 0][..],
        &[1, 0, 7, 0, 255, 255, 255, 255],
        &[2, 0, 7, 0, 232, 3, 0, 0],
        &[4, 0, 5, 0, 255, 255, 255, 255],
        &[16, 0, 7, 0, 255, 255, 255, 255],
        &[32, 0, 0, 0, 255, 255, 255, 255],
    ]
    .concat();
    let bytes = tar()
        .pax(&[
            ("SCHILY.xattr.system.posix_acl_default", &acl),
            ("mtime", b"1000.25"),
        ])
        .dir("a")
        .file("a/one", "")
        .dir("b")
        .file("a/two", "")
        .dir("a/sub")
        .file("b/x", "")
        .file("a/sub/three", "")
        .end();
    import(&bytes, &dirs).unwrap();
    let made = fs::metadata(dirs.upperdir.join("a")).unwrap();
    assert_eq!((made.mtime(), made.mtime_nsec()), (1000, 250_000_000));
    let mut reader = XattrReader::new();
    for (path, expected) in [
        ("a", true),
        ("a/one", false),
        ("a/two", false),
        ("a/sub", false),
        ("a/sub/three", false),
    ] {
        let file = File::open(dirs.upperdir.join(path)).unwrap();
        let holder = XattrHolder::Open(file.as_fd());
        let default = reader
            .value(holder, b"system.posix_acl_default")
            .unwrap()
            .is_some();
        assert_eq!(default, expected, "{path}");
        assert_eq!(
            reader.value(holder, b"system.posix_acl_access").unwrap(),
            None,
            "{path}"
        );
    }
    assert_eq!(
        fs::metadata(dirs.upperdir.join("b")).unwrap().mtime(),
        1_000_000
    );
    assert_eq!(
        fs::metadata(dirs.upperdir.join("a/sub")).unwrap().mtime(),
        1_000_000
    );
}

fn honest_tar() -> Vec<u8> {
    let mut map = b"2\n0\n4\n50\n4\n".to_vec();
    map.resize(512, 0);
    map.extend_from_slice(b"12345678");
    tar()
        .dir("./")
        .pax(&[("mtime", b"12.5"), ("SCHILY.xattr.user.a", b"value")])
        .dir("dir")
        .file("dir/file", &"data".repeat(300))
        .link(b'1', "dir/link", "dir/file")
        .link(b'2', "symlink", "../outside/secret")
        .file("dir/.wh.gone", "")
        .file("dir/.wh..wh..opq", "")
        .pax(&[("path", &b"long/".repeat(30)), ("uid", b"3000000")])
        .dir("x")
        .pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"sparse"),
            ("GNU.sparse.realsize", b"100"),
        ])
        .raw(b"GNUSparseFile.0/sparse", b'0', b"", map.len() as u64, &map)
        .raw(b"fifo", b'6', b"", 0, b"")
        .end()
}

proptest! {
    // Any damage to a layer ends in an error or in a tree, never outside of it and never in a panic.
    #[test]
    fn root_damaged_layers_stay_inside(
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>(), any::<bool>()), 1..6),
        mend in any::<bool>(),
    ) {
        if !have_root() {
            return Ok(());
        }
        let mut bytes = honest_tar();
        for (at, byte, small) in changes {
            let at = at.index(bytes.len());
            bytes[at] = if small { b"./\0.wh-0179xLg5"[usize::from(byte % 15)] } else { byte };
            if mend {
                mend_checksum(&mut bytes, at / 512 * 512);
            }
        }
        let (_result, dirs) = import_watched(&bytes);
        prop_assert!(Path::new(&dirs.upperdir).is_dir());
    }
}

/// Makes the header at `start` valid again, so that the change gets past the checksum.
fn mend_checksum(bytes: &mut [u8], start: usize) {
    let block: [u8; 512] = bytes[start..start + 512].try_into().unwrap();
    if block[257..262] != *b"ustar" {
        return;
    }
    let mut header = Header::from_byte_slice(&block).clone();
    header.set_cksum();
    bytes[start..start + 512].copy_from_slice(header.as_bytes());
}
