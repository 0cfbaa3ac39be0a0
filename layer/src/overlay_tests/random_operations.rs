//! Random file system operations: each kind of system call that changes a tree, on names that are
//! there or beside them. What the kernel refuses is refused; the tests compare what came of it.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, FallocateFlags, RenameFlags, fallocate, renameat2};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchownat};
use proptest::prelude::*;

use crate::xattrs::{XattrHolder, remove_xattr, set_xattr};

/// One operation; the numbers choose among what there is when it is done.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Operation {
    kind: u8,
    subject: u16,
    other: u16,
    value: u32,
}

const KINDS: u8 = 29;

pub(crate) fn operations(most: usize) -> impl Strategy<Value = Vec<Operation>> {
    let operation = (0..KINDS, any::<u16>(), any::<u16>(), any::<u32>()).prop_map(
        |(kind, subject, other, value)| Operation {
            kind,
            subject,
            other,
            value,
        },
    );
    proptest::collection::vec(operation, 0..most)
}

fn names() -> [Vec<u8>; 10] {
    [
        b"a".to_vec(),
        b"b".to_vec(),
        b"cc".to_vec(),
        b"a.wh.".to_vec(),
        "\u{e9}\u{4e16}".as_bytes().to_vec(),
        b"\xff\xfe\n=%".to_vec(),
        b" -rf *".to_vec(),
        b"..x".to_vec(),
        vec![b'n'; 255],
        b"GNUSparseFile.0".to_vec(),
    ]
}

fn existing(root: &Path) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let mut all = vec![root.to_path_buf()];
    let mut directories = Vec::new();
    let mut next = 0;
    while next < all.len() {
        if fs::symlink_metadata(&all[next]).is_ok_and(|metadata| metadata.is_dir()) {
            directories.push(all[next].clone());
            let mut names: Vec<_> = fs::read_dir(&all[next])
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .collect();
            names.sort();
            all.extend(names);
        }
        next += 1;
    }
    (all, directories)
}

/// Runs the operations in the tree below `root`. Returns how many of them did something.
pub(crate) fn run(root: &Path, operations: &[Operation]) -> usize {
    operations
        .iter()
        .filter(|operation| run_one(root, **operation).is_ok())
        .count()
}

fn run_one(root: &Path, operation: Operation) -> std::io::Result<()> {
    let (all, directories) = existing(root);
    let Operation {
        kind,
        subject,
        other,
        value,
    } = operation;
    let names = names();
    let any = |number: u16| all[usize::from(number) % all.len()].clone();
    // Never the root itself, when there is anything else.
    let path = if all.len() > 1 {
        &all[1 + usize::from(subject) % (all.len() - 1)]
    } else {
        root
    };
    let directory = &directories[usize::from(other) % directories.len()];
    let name = std::ffi::OsStr::from_bytes(&names[value as usize % names.len()]);
    // Half of the names made are new ones, half fall on what is there.
    let target = if value & 0x8000 == 0 {
        directory.join(name)
    } else {
        path.to_path_buf()
    };
    if path == root && matches!(kind, 5..=12 | 24..=27) {
        return Err(std::io::Error::other("not the root"));
    }
    match kind {
        0 | 1 => open_file(
            &target,
            OpenOptions::new().write(true).create(true).truncate(true),
        )?
        .write_all(&content(value)),
        2 => open_file(path, OpenOptions::new().append(true))?.write_all(&content(value)),
        3 => open_file(path, OpenOptions::new().write(true))?
            .write_all_at(&content(value), u64::from(value % 7) * 40_000),
        4 => {
            open_file(path, OpenOptions::new().write(true))?.set_len(u64::from(value % 5) * 30_000)
        }
        5 => fs::remove_file(path),
        6 => fs::remove_dir(path),
        7 => remove_all(path, root),
        8 | 9 => fs::rename(path, &target),
        10 => Ok(renameat2(
            AT_FDCWD,
            path,
            AT_FDCWD,
            &any(other),
            RenameFlags::RENAME_EXCHANGE,
        )?),
        11 | 12 => fs::hard_link(path, &target),
        13 => symlink(
            std::ffi::OsStr::from_bytes(&names[usize::from(subject) % 8]),
            &target,
        ),
        14 => special(&target, SFlag::S_IFIFO, 0),
        15 => special(&target, SFlag::S_IFCHR, 1 + u64::from(value % 300)),
        16 => special(&target, SFlag::S_IFBLK, u64::from(value % 300)),
        17 if value % 4 == 0 => special(&target, SFlag::S_IFSOCK, 0),
        17 | 18 => fs::create_dir(&target),
        19 => {
            let path = any(subject);
            if fs::symlink_metadata(&path)?.is_symlink() {
                return Ok(());
            }
            fs::set_permissions(path, fs::Permissions::from_mode(value & 0o7777))
        }
        20 => {
            let (uid, gid) = (value % 3_000_000, value / 1000 % 3_000_000);
            let flags = nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW;
            let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
            Ok(fchownat(AT_FDCWD, &any(subject), uid, gid, flags)?)
        }
        21 => {
            let time = TimeSpec::new(
                i64::from(value) - 1_000_000_000,
                i64::from(value % 1_000_000_000),
            );
            let flags = UtimensatFlags::NoFollowSymlink;
            Ok(utimensat(AT_FDCWD, &any(subject), &time, &time, flags)?)
        }
        22 | 23 => change_xattr(&any(subject), value),
        24 => {
            // Deleted and made anew: opaque where a lower layer has one.
            remove_all(path, root)?;
            fs::create_dir(path)
        }
        25 => {
            remove_all(path, root)?;
            File::create(path)?.write_all(&content(value))
        }
        26 => {
            remove_all(path, root)?;
            fs::create_dir(path)?;
            File::create(path.join(name))?.write_all(&content(value))
        }
        27 => {
            let file = open_file(path, OpenOptions::new().write(true))?;
            let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            Ok(fallocate(file, mode, i64::from(value % 3) * 4096, 8192)?)
        }
        _ => {
            let file = open_file(
                &target,
                OpenOptions::new().write(true).create(true).truncate(false),
            )?;
            Ok(fallocate(
                file,
                FallocateFlags::empty(),
                0,
                1 + i64::from(value % 100_000),
            )?)
        }
    }
}

/// Opens for writing without waiting for the other end of a FIFO, and no device at all.
fn open_file(path: &Path, options: &mut OpenOptions) -> std::io::Result<File> {
    if let Ok(metadata) = fs::metadata(path)
        && !metadata.is_file()
    {
        return Err(std::io::Error::other("no regular file"));
    }
    options.open(path)
}

fn content(value: u32) -> Vec<u8> {
    let len = match value % 5 {
        0 => 0,
        1 => 1,
        2 => 512,
        3 => 5000,
        _ => value as usize % 70_000,
    };
    value.to_le_bytes().into_iter().cycle().take(len).collect()
}

fn remove_all(path: &Path, root: &Path) -> std::io::Result<()> {
    if path == root {
        return Err(std::io::Error::other("not the root"));
    }
    if fs::symlink_metadata(path)?.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    }
}

fn special(path: &Path, kind: SFlag, minor: u64) -> std::io::Result<()> {
    Ok(mknod(
        path,
        kind,
        Mode::from_bits_truncate(0o640),
        makedev(5, minor),
    )?)
}

/// An access ACL with a named user, and its mask as the given permissions.
fn acl(mask: u8) -> Vec<u8> {
    let mut acl = vec![2, 0, 0, 0];
    for (tag, permissions, id) in [
        (1u16, 6u16, u32::MAX),
        (2, 7, 1000),
        (4, 5, u32::MAX),
        (16, u16::from(mask & 7), u32::MAX),
        (32, 4, u32::MAX),
    ] {
        acl.extend_from_slice(&tag.to_le_bytes());
        acl.extend_from_slice(&permissions.to_le_bytes());
        acl.extend_from_slice(&id.to_le_bytes());
    }
    acl
}

fn change_xattr(path: &Path, value: u32) -> std::io::Result<()> {
    let capability = [&[1, 0, 0, 2][..], &value.to_le_bytes(), &[0; 12]].concat();
    let mask = value.to_le_bytes()[2];
    let choices: [(&[u8], Vec<u8>); 9] = [
        (b"user.empty", Vec::new()),
        (b"user.bytes", b"\0\n=\xff 12 a=b\n\0".to_vec()),
        (
            b"user.odd=%3D%25%name\xff",
            content(value).into_iter().take(900).collect(),
        ),
        (b"trusted.origin", value.to_le_bytes().to_vec()),
        (b"security.capability", capability),
        (b"system.posix_acl_access", acl(mask)),
        (b"system.posix_acl_default", acl(mask)),
        (b"security.other", vec![0; 300]),
        (b"user.large", vec![7; 3000]),
    ];
    let (name, content) = &choices[value as usize % choices.len()];
    if value & 0x100 == 0 {
        let directory = File::open(path.parent().unwrap_or(path))?;
        let file = path.file_name().unwrap_or_default().as_bytes();
        return set_xattr(
            XattrHolder::Named {
                directory: directory.as_fd(),
                name: file,
            },
            name,
            content,
        );
    }
    let metadata = fs::symlink_metadata(path)?;
    if metadata.is_file() || metadata.is_dir() {
        remove_xattr(File::open(path)?.as_fd(), name)?;
    }
    Ok(())
}
