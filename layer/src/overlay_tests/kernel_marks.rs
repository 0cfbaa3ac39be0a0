//! Each of overlay's marks by itself, made by the kernel where it can be made to.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, SFlag, mkdirat, mknod};

use super::have_root;
use super::mounted_overlay::OverlayDirs;
use super::tree_state::{differences, read_tree};
use crate::tar_read::{TarEntry, TarReader};
use crate::xattrs::{XattrHolder, set_xattr};
use crate::{
    ExportError, ExportOptions, ExportStats, ImportOptions, LayerFormat, OverlayStack,
    OverlayXattrs, export_upperdir, export_upperdir_to_file, import_into_upperdir, remove_tree,
    upperdir_usage,
};

fn export(dirs: &OverlayDirs) -> Result<(Vec<u8>, ExportStats), ExportError> {
    export_with(&dirs.stack(), &ExportOptions::default())
}

fn export_with(
    stack: &OverlayStack,
    options: &ExportOptions,
) -> Result<(Vec<u8>, ExportStats), ExportError> {
    let mut tar = Vec::new();
    let stats = export_upperdir(stack, &mut tar, options)?;
    Ok((tar, stats))
}

pub(super) fn paths(tar: &[u8]) -> Vec<String> {
    let mut reader = TarReader::new(tar);
    let mut entry = TarEntry::default();
    let mut paths = Vec::new();
    while reader.next_entry(&mut entry).unwrap() {
        paths.push(String::from_utf8_lossy(&entry.path).into_owned());
    }
    paths
}

pub(super) fn set(path: &Path, name: &str, value: &[u8]) {
    let file = File::open(path).unwrap();
    set_xattr(XattrHolder::Open(file.as_fd()), name.as_bytes(), value).unwrap();
}

#[test]
fn root_marks_become_the_names_of_the_oci_layer() {
    if !have_root() {
        return;
    }
    let dirs = OverlayDirs::in_memory();
    let lower = &dirs.lowerdirs[0];
    fs::create_dir_all(lower.join("dir/sub")).unwrap();
    fs::write(lower.join("file"), "1").unwrap();
    fs::write(lower.join("socket"), "1").unwrap();
    let mounted = dirs.mount();
    fs::remove_file(dirs.merged.join("file")).unwrap();
    fs::remove_dir_all(dirs.merged.join("dir")).unwrap();
    fs::create_dir(dirs.merged.join("dir")).unwrap();
    fs::create_dir(dirs.merged.join("new")).unwrap();
    fs::remove_file(dirs.merged.join("socket")).unwrap();
    mknod(
        &dirs.merged.join("socket"),
        SFlag::S_IFSOCK,
        Mode::S_IRWXU,
        0,
    )
    .unwrap();
    mknod(
        &dirs.merged.join("other"),
        SFlag::S_IFSOCK,
        Mode::S_IRWXU,
        0,
    )
    .unwrap();
    drop(mounted);
    // As the kernel marks new directories when index or metacopy is on.
    set(&dirs.upperdir.join("new"), "trusted.overlay.opaque", b"y");
    let (tar, stats) = export(&dirs).unwrap();
    let expected = [
        "./",
        "dir/",
        "dir/.wh..wh..opq",
        ".wh.file",
        "new/",
        ".wh.socket",
    ];
    assert_eq!(paths(&tar), expected);
    assert_eq!(
        (stats.whiteouts, stats.opaque_directories, stats.sockets),
        (2, 1, 2)
    );
    assert_eq!(stats.entries, expected.len() as u64);
    // Nobody to ask: every mark is written.
    let (tar, _) = export_with(
        &OverlayStack::new(&dirs.upperdir, []),
        &ExportOptions::default(),
    )
    .unwrap();
    assert!(paths(&tar).contains(&"new/.wh..wh..opq".to_owned()));
    assert!(paths(&tar).contains(&".wh.other".to_owned()));
}

#[test]
fn root_opaque_root_is_ignored_as_the_kernel_does() {
    if !have_root() {
        return;
    }
    let dirs = OverlayDirs::in_memory();
    fs::write(dirs.lowerdirs[0].join("file"), "1").unwrap();
    set(&dirs.upperdir, "trusted.overlay.opaque", b"y");
    let mounted = dirs.mount();
    assert!(fs::read(dirs.merged.join("file")).is_ok());
    drop(mounted);
    assert_eq!(paths(&export(&dirs).unwrap().0), ["./"]);
}

#[test]
fn root_xattr_whiteouts_are_whiteouts() {
    if !have_root() {
        return;
    }
    let dirs = OverlayDirs::in_memory();
    fs::create_dir(dirs.lowerdirs[0].join("dir")).unwrap();
    fs::write(dirs.lowerdirs[0].join("dir/x"), "1").unwrap();
    fs::create_dir(dirs.upperdir.join("dir")).unwrap();
    fs::write(dirs.upperdir.join("dir/x"), "").unwrap();
    set(&dirs.upperdir.join("dir"), "trusted.overlay.opaque", b"x");
    set(
        &dirs.upperdir.join("dir/x"),
        "trusted.overlay.whiteout",
        b"y",
    );
    let mounted = dirs.mount();
    let kernel_knows = fs::metadata(dirs.merged.join("dir/x")).is_err();
    drop(mounted);
    if !kernel_knows {
        eprintln!("skipped: xattr whiteouts came with Linux 6.7");
        return;
    }
    assert_eq!(
        paths(&export(&dirs).unwrap().0),
        ["./", "dir/", "dir/.wh.x"]
    );
}

#[test]
fn root_renames_and_metacopies_need_the_lower_layers() {
    if !have_root() {
        return;
    }
    for rename in [true, false] {
        let mut dirs = OverlayDirs::in_memory();
        fs::create_dir(dirs.lowerdirs[0].join("dir")).unwrap();
        fs::write(dirs.lowerdirs[0].join("dir/x"), "content").unwrap();
        dirs.mount_options.push_str(",redirect_dir=on,metacopy=on");
        let mounted = dirs.mount();
        if rename {
            fs::rename(dirs.merged.join("dir"), dirs.merged.join("moved")).unwrap();
        } else {
            let permissions = fs::Permissions::from_mode(0o4711);
            fs::set_permissions(dirs.merged.join("dir/x"), permissions).unwrap();
        }
        drop(mounted);
        let refused = export_with(
            &OverlayStack::new(&dirs.upperdir, []),
            &ExportOptions::default(),
        );
        assert!(
            matches!(refused, Err(ExportError::Inexact { .. })),
            "{refused:?}"
        );
        let (tar, stats) = export(&dirs).unwrap();
        if rename {
            assert_eq!(paths(&tar), ["./", ".wh.dir", "moved/", "moved/x"]);
        } else {
            assert_eq!(paths(&tar), ["./", "dir/", "dir/x"]);
            assert_eq!(stats.metacopy_files, 1);
        }
    }
}

#[test]
fn root_indexed_hard_links_are_refused() {
    if !have_root() {
        return;
    }
    let mut dirs = OverlayDirs::in_memory();
    fs::write(dirs.lowerdirs[0].join("a"), "1").unwrap();
    fs::hard_link(dirs.lowerdirs[0].join("a"), dirs.lowerdirs[0].join("b")).unwrap();
    dirs.mount_options = "index=on".to_owned();
    let mounted = dirs.mount();
    fs::write(dirs.merged.join("a"), "2").unwrap();
    assert_eq!(fs::read(dirs.merged.join("b")).unwrap(), b"2");
    drop(mounted);
    let refused = export(&dirs);
    assert!(
        matches!(refused, Err(ExportError::Inexact { .. })),
        "{refused:?}"
    );
}

#[test]
fn root_broken_lower_links_are_noted() {
    if !have_root() {
        return;
    }
    let dirs = OverlayDirs::on_disk();
    fs::write(dirs.lowerdirs[0].join("a"), "1").unwrap();
    fs::hard_link(dirs.lowerdirs[0].join("a"), dirs.lowerdirs[0].join("b")).unwrap();
    let mounted = dirs.mount();
    fs::write(dirs.merged.join("a"), "2").unwrap();
    drop(mounted);
    let (_, stats) = export(&dirs).unwrap();
    assert_eq!(stats.broken_lower_links, 1);
    assert_eq!(stats.noted_paths, [PathBuf::from("a")]);
}

#[test]
fn root_rootless_overlays_say_how_they_are_mounted() {
    if !have_root() {
        return;
    }
    let mut dirs = OverlayDirs::on_disk();
    fs::create_dir(dirs.lowerdirs[0].join("dir")).unwrap();
    fs::write(dirs.lowerdirs[0].join("dir/x"), "1").unwrap();
    dirs.mount_options.push_str(",userxattr");
    let mounted = dirs.mount();
    fs::remove_dir_all(dirs.merged.join("dir")).unwrap();
    fs::create_dir(dirs.merged.join("dir")).unwrap();
    let before = read_tree(&dirs.merged);
    drop(mounted);
    let stack = dirs.stack().with_overlay_xattrs(OverlayXattrs::User);
    let (tar, _) = export_with(&stack, &ExportOptions::default()).unwrap();
    assert_eq!(paths(&tar), ["./", "dir/", "dir/.wh..wh..opq"]);
    dirs.new_upper();
    let stack = dirs.stack().with_overlay_xattrs(OverlayXattrs::User);
    import_into_upperdir(&tar[..], &stack, &ImportOptions::default()).unwrap();
    let mounted = dirs.mount();
    let after = read_tree(&dirs.merged);
    drop(mounted);
    assert!(
        differences(&before, &after).is_empty(),
        "{:?}",
        differences(&before, &after)
    );
}

#[test]
fn root_private_attributes_stay_and_are_counted() {
    if !have_root() {
        return;
    }
    let dirs = OverlayDirs::on_disk();
    fs::write(dirs.lowerdirs[0].join("file"), "1").unwrap();
    let mounted = dirs.mount();
    fs::create_dir(dirs.merged.join("nested")).unwrap();
    // Since Linux 6.7 overlay keeps this for the program, as trusted.overlay.overlay.opaque.
    set(&dirs.merged.join("nested"), "trusted.overlay.opaque", b"y");
    set(
        &dirs.upperdir.join("nested"),
        "trusted.overlay.unknown",
        b"y",
    );
    set(&dirs.merged.join("file"), "user.kept", b"1");
    drop(mounted);
    // What `chattr +i` through the mount leaves.
    set(
        &dirs.upperdir.join("file"),
        "trusted.overlay.protattr",
        b"i",
    );
    let (tar, stats) = export(&dirs).unwrap();
    assert_eq!((stats.lost_xattrs, stats.lost_inode_flags), (1, 1));
    let has = |tar: &[u8], text: &[u8]| tar.windows(text.len()).any(|window| window == text);
    assert!(!has(&tar, b"overlay.protattr") && !has(&tar, b"overlay.unknown"));
    assert!(has(&tar, b"trusted.overlay.overlay.opaque=y") && has(&tar, b"user.kept=1"));
    let image = ExportOptions {
        format: LayerFormat::Image,
        ..ExportOptions::default()
    };
    let (tar, stats) = export_with(&dirs.stack(), &image).unwrap();
    assert_eq!((stats.lost_xattrs, stats.lost_inode_flags), (2, 1));
    assert!(!has(&tar, b"trusted.") && has(&tar, b"user.kept=1"));
}

#[test]
fn root_names_like_markers_come_along_in_checkpoints_only() {
    if !have_root() {
        return;
    }
    let mut dirs = OverlayDirs::in_memory();
    fs::create_dir_all(dirs.lowerdirs[0].join(".wh.low")).unwrap();
    fs::write(dirs.lowerdirs[0].join(".wh.low/file"), "").unwrap();
    fs::write(dirs.lowerdirs[0].join(".wh.gone"), "").unwrap();
    fs::write(dirs.lowerdirs[0].join("gone"), "").unwrap();
    let mounted = dirs.mount();
    fs::create_dir_all(dirs.merged.join("dir/.wh.d")).unwrap();
    fs::write(dirs.merged.join("dir/.wh.x"), "1").unwrap();
    fs::write(dirs.merged.join("dir/.wh..wh..opq"), "2").unwrap();
    fs::hard_link(dirs.merged.join("dir/.wh.x"), dirs.merged.join("link")).unwrap();
    fs::remove_file(dirs.merged.join(".wh.low/file")).unwrap();
    fs::remove_file(dirs.merged.join(".wh.gone")).unwrap();
    fs::remove_file(dirs.merged.join("gone")).unwrap();
    let before = read_tree(&dirs.merged);
    drop(mounted);
    let image = ExportOptions {
        format: LayerFormat::Image,
        ..ExportOptions::default()
    };
    let refused = export_with(&dirs.stack(), &image);
    assert!(
        matches!(refused, Err(ExportError::ReservedName { .. })),
        "{refused:?}"
    );
    let (tar, _) = export(&dirs).unwrap();
    dirs.new_upper();
    import_into_upperdir(&tar[..], &dirs.stack(), &ImportOptions::default()).unwrap();
    let mounted = dirs.mount();
    let after = read_tree(&dirs.merged);
    drop(mounted);
    assert!(
        differences(&before, &after).is_empty(),
        "{:?}",
        differences(&before, &after)
    );
}

#[test]
fn root_paths_longer_and_deeper_than_any_limit_survive() {
    if !have_root() {
        return;
    }
    let mut dirs = OverlayDirs::in_memory();
    let mounted = dirs.mount();
    // 700 levels and 70 000 bytes: beyond PATH_MAX and beyond the directories that are kept open.
    let name = [b'd'; 100];
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
    let mut current = open(&dirs.merged, flags, Mode::empty()).unwrap();
    for level in 0..700 {
        mkdirat(&current, &name[..], Mode::S_IRWXU).unwrap();
        let file = openat(
            &current,
            c"zz",
            OFlag::O_CREAT | OFlag::O_WRONLY,
            Mode::S_IRWXU,
        )
        .unwrap();
        File::from(file)
            .write_all(format!("{level}").as_bytes())
            .unwrap();
        current = openat(&current, &name[..], flags, Mode::empty()).unwrap();
    }
    drop(current);
    drop(mounted);
    let (tar, stats) = export(&dirs).unwrap();
    assert_eq!(stats.entries, 1401);
    let usage = upperdir_usage(&dirs.upperdir).unwrap();
    assert_eq!(usage.inodes, 1401);
    let original = dirs.new_upper();
    let options = ImportOptions::default();
    import_into_upperdir(&tar[..], &dirs.stack(), &options).unwrap();
    assert!(export(&dirs).unwrap().0 == tar);
    assert_eq!(upperdir_usage(&dirs.upperdir).unwrap(), usage);
    for upper in [&original, &dirs.upperdir] {
        remove_tree(upper).unwrap();
    }
    let work = dirs.base.path().join("work1/work");
    remove_tree(&work).unwrap();
}

/// A writer that changes the upperdir after a given number of bytes.
struct Meddling<F: FnMut()> {
    left: usize,
    meddle: F,
}

impl<F: FnMut()> Write for Meddling<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.left > 0 {
            self.left = self.left.saturating_sub(bytes.len());
            if self.left == 0 {
                (self.meddle)();
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The clock that file times come from stands still for a tick on kernels before 6.13. Waits until a
/// change would get another time than `file` has.
fn wait_for_the_clock(file: &Path) {
    let made = fs::metadata(file).unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    let elsewhere = tempfile::NamedTempFile::new().unwrap();
    loop {
        fs::write(elsewhere.path(), "").unwrap();
        let now = fs::metadata(elsewhere.path()).unwrap();
        if (now.ctime(), now.ctime_nsec()) > (made.ctime(), made.ctime_nsec()) {
            return;
        }
        assert!(
            std::time::Instant::now() < deadline,
            "the clock stands still"
        );
    }
}

#[test]
fn changes_during_the_export_are_errors() {
    type Meddle = fn(&Path);
    let table: [(&str, Meddle); 5] = [
        ("grown", |upper| {
            File::options()
                .append(true)
                .open(upper.join("big"))
                .unwrap()
                .write_all(b"x")
                .unwrap();
        }),
        ("shrunk", |upper| {
            File::options()
                .write(true)
                .open(upper.join("big"))
                .unwrap()
                .set_len(10)
                .unwrap();
        }),
        ("overwritten", |upper| {
            let file = File::options().write(true).open(upper.join("big")).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, b"y", 5).unwrap();
        }),
        ("name gone", |upper| {
            fs::remove_file(upper.join("later")).unwrap();
        }),
        ("name new", |upper| {
            fs::write(upper.join("aaa"), "").unwrap();
        }),
    ];
    for (what, meddle) in table {
        let upper = tempfile::tempdir().unwrap();
        fs::write(upper.path().join("big"), vec![7; 5 << 20]).unwrap();
        fs::write(upper.path().join("later"), "").unwrap();
        wait_for_the_clock(&upper.path().join("later"));
        let out = Meddling {
            left: 1 << 20,
            meddle: || meddle(upper.path()),
        };
        let result = export_upperdir(
            &OverlayStack::new(upper.path(), []),
            out,
            &ExportOptions::default(),
        );
        assert!(
            matches!(result, Err(ExportError::Changed { .. })),
            "{what}: {result:?}"
        );
    }
}

#[test]
fn a_full_disk_under_the_tar_is_an_error_of_writing() {
    let upper = tempfile::tempdir().unwrap();
    fs::write(upper.path().join("big"), vec![7; 3 << 20]).unwrap();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let result = export_upperdir(
        &OverlayStack::new(upper.path(), []),
        full,
        &ExportOptions::default(),
    );
    let Err(ExportError::Write { source }) = result else {
        panic!("{result:?}")
    };
    assert_eq!(source.kind(), io::ErrorKind::StorageFull);
}

#[test]
fn times_are_clamped_and_marks_have_none() {
    let upper = tempfile::tempdir().unwrap();
    fs::write(upper.path().join("new"), "").unwrap();
    let old = File::create(upper.path().join("old")).unwrap();
    old.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_nanos(1_500_000_000))
        .unwrap();
    let options = ExportOptions {
        source_date_epoch: Some(1000),
        ..ExportOptions::default()
    };
    let mut tar = Vec::new();
    export_upperdir(&OverlayStack::new(upper.path(), []), &mut tar, &options).unwrap();
    let mut reader = TarReader::new(&tar[..]);
    let mut entry = TarEntry::default();
    let mut times = Vec::new();
    while reader.next_entry(&mut entry).unwrap() {
        times.push((entry.path.clone(), entry.mtime.secs, entry.mtime.nanos));
    }
    assert_eq!(
        times,
        [
            (b"./".to_vec(), 1000, 0),
            (b"new".to_vec(), 1000, 0),
            (b"old".to_vec(), 1, 500_000_000)
        ]
    );
}

#[test]
fn root_holes_cost_nothing_and_stay() {
    if !have_root() {
        return;
    }
    let mut dirs = OverlayDirs::on_disk();
    let path = dirs.upperdir.join("disk.img");
    let file = File::create(&path).unwrap();
    file.set_len(20 << 30).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"far", 19 << 30).unwrap();
    drop(file);
    let (tar, stats) = export(&dirs).unwrap();
    assert!(tar.len() < 100_000, "{}", tar.len());
    assert_eq!(stats.sparse_files, 1);
    dirs.new_upper();
    let options = ImportOptions::default();
    import_into_upperdir(&tar[..], &OverlayStack::new(&dirs.upperdir, []), &options).unwrap();
    let made = dirs.upperdir.join("disk.img");
    let metadata = fs::metadata(&made).unwrap();
    assert_eq!(metadata.len(), 20 << 30);
    assert!(metadata.blocks() < 100, "{}", metadata.blocks());
    let mut far = [0; 3];
    let file = File::open(&made).unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut far, 19 << 30).unwrap();
    assert_eq!(&far, b"far");
    assert_eq!(made.file_name().unwrap().as_bytes(), b"disk.img");
}

#[test]
fn a_file_gets_the_same_bytes_by_kernel_copy() {
    let upper = tempfile::tempdir().unwrap();
    let big: Vec<u8> = (0..3_000_000u32).flat_map(u32::to_le_bytes).collect();
    fs::write(upper.path().join("big"), &big).unwrap();
    let holes = File::create(upper.path().join("holes")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&holes, &big, 1 << 30).unwrap();
    drop(holes);
    fs::write(upper.path().join("small"), "x").unwrap();
    let options = ExportOptions::default();
    let mut tar = Vec::new();
    export_upperdir(&OverlayStack::new(upper.path(), []), &mut tar, &options).unwrap();
    for append in [false, true] {
        let out = tempfile::NamedTempFile::new().unwrap();
        let mut file = File::options()
            .append(append)
            .write(true)
            .open(out.path())
            .unwrap();
        file.write_all(b"before").unwrap();
        let stats =
            export_upperdir_to_file(&OverlayStack::new(upper.path(), []), &file, &options).unwrap();
        assert_eq!(stats.bytes, tar.len() as u64);
        let written = fs::read(out.path()).unwrap();
        assert!(written[..6] == *b"before" && written[6..] == tar);
    }
    let full = File::options().write(true).open("/dev/full").unwrap();
    let result = export_upperdir_to_file(&OverlayStack::new(upper.path(), []), &full, &options);
    assert!(
        matches!(result, Err(ExportError::Write { .. })),
        "{result:?}"
    );
}
