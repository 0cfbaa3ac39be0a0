//! Removes a directory tree however deep it is.
//!
//! `std::fs::remove_dir_all` holds one descriptor per level, so a container that nests a few
//! thousand directories makes its upperdir impossible to delete that way; directory_stack.rs keeps few.
//!
//! What is mounted in the tree is not the tree's: it stays as it is, and the removal fails (`EXDEV`, or `EBUSY` where the
//! mounted directory is empty).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::{Mode, fstat, fstatat, futimens};
use nix::sys::time::TimeSpec;
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::directory_names::{DirectoryNames, Given, KEPT_PIECES};
use crate::directory_stack::{DIRECTORY_FLAGS, DirectoryStack, open_directory};
use crate::inode_attributes::{InodeAttributes, InodeType};

/// Removes the directory `tree` and all that is in it, following no symlink; one that does not
/// exist is no error.
///
/// # Errors
/// The first system call that fails, as the kernel said it.
pub fn remove_tree(tree: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (tree.parent(), tree.file_name()) else {
        return Err(io::Error::other("the root directory cannot be removed"));
    };
    let parent = if parent.as_os_str().is_empty() {
        Path::new(".")
    } else {
        parent
    };
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let parent = open(parent, flags, Mode::empty())?;
    match remove_name(parent.as_fd(), name.as_encoded_bytes()) {
        Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => Ok(()),
        removed => removed,
    }
}

/// Removes all that is in the directory `dir`, following no symlink below it, and leaves it empty.
///
/// # Errors
/// The first system call that fails, as the kernel said it; `dir` itself missing.
pub fn remove_contents(dir: &Path) -> io::Result<()> {
    remove_contents_but(dir, None)
}

/// The same, and leaves what has the name `kept` in `dir`.
///
/// # Errors
/// As [`remove_contents`].
pub fn remove_contents_but(dir: &Path, kept: Option<&str>) -> io::Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let directory = open(dir, flags, Mode::empty())?;
    let mut names = DirectoryNames::begin(directory.as_fd(), Given::Stay)?;
    while let Some((name, _)) = names.next(directory.as_fd())? {
        if kept.map(str::as_bytes) != Some(name) {
            remove_name(directory.as_fd(), name)?;
        }
    }
    Ok(())
}

/// Removes a name of a directory: a file, or a directory with all that is in it.
pub(crate) fn remove_name(directory: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    match unlinkat(directory, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) => return Ok(()),
        Err(Errno::EISDIR | Errno::EPERM) => {}
        Err(errno) => return Err(errno.into()),
    }
    let tree = open_own_directory(directory, name)?;
    visit(tree, None, |directory, name| {
        unlinkat(directory, name, UnlinkatFlags::NoRemoveDir)
    })?;
    Ok(unlinkat(directory, name, UnlinkatFlags::RemoveDir)?)
}

/// Removes all overlay whiteouts from a tree and leaves the rest as it is, times included. Of `left` names that may be looked at
/// it takes those that it has; when there are none left it gives up.
pub(crate) fn remove_whiteouts(directory: BorrowedFd<'_>, left: &mut u64) -> io::Result<()> {
    let tree = open_directory(directory, b".")?;
    visit(tree, Some(left), |directory, name| {
        let attributes: InodeAttributes =
            fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)?.into();
        if attributes.is_whiteout_device() {
            unlinkat(directory, name, UnlinkatFlags::NoRemoveDir)?;
        }
        Ok(())
    })
}

/// Opens a directory by its name in another one of the same mount, following no symlink. `openat2` is Linux 5.6; the device
/// alone does not tell a bind mount.
fn open_own_directory(directory: impl AsFd, name: &[u8]) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(DIRECTORY_FLAGS)
        .resolve(ResolveFlag::RESOLVE_NO_XDEV | ResolveFlag::RESOLVE_NO_SYMLINKS);
    openat2(directory, name, how)
}

/// A directory whose names are being gone through.
struct Level {
    names: DirectoryNames,
    attributes: InodeAttributes,
}

/// Calls `each` on all that is no directory, depth first. Directories below the first are removed when they are left; or,
/// with a number of names that may be looked at, kept with their times.
fn visit(
    tree: OwnedFd,
    mut kept: Option<&mut u64>,
    mut each: impl FnMut(BorrowedFd<'_>, &[u8]) -> nix::Result<()>,
) -> io::Result<()> {
    let keep_directories = kept.is_some();
    let given = match keep_directories {
        true => Given::Stay,
        false => Given::AreRemoved,
    };
    let mut stack = DirectoryStack::new();
    enter(&mut stack, tree, given)?;
    while let Some((fd, level)) = stack.innermost_mut() {
        if let Some((name, inode_type)) = level.names.next(fd.as_fd())? {
            if let Some(left) = kept.as_deref_mut() {
                *left = left.checked_sub(1).ok_or(Errno::E2BIG)?;
            }
            let is_directory = match inode_type {
                Some(inode_type) => inode_type == InodeType::Directory,
                None => {
                    let stat = fstatat(fd, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
                    InodeAttributes::from(stat).is_directory()
                }
            };
            if !is_directory {
                each(fd.as_fd(), name)?;
            } else if keep_directories || unlinkat(fd, name, UnlinkatFlags::RemoveDir).is_err() {
                // An empty one costs the single call above.
                let directory = open_own_directory(fd, name)?;
                enter(&mut stack, directory, given)?;
            }
            continue;
        }
        if keep_directories {
            let (atime, mtime) = (level.attributes.atime, level.attributes.mtime);
            futimens(
                fd,
                &TimeSpec::new(atime.secs, atime.nanos.into()),
                &TimeSpec::new(mtime.secs, mtime.nanos.into()),
            )?;
        }
        stack.leave()?;
        if let Some((fd, level)) = stack.innermost_mut()
            && !keep_directories
        {
            unlinkat(fd, level.names.current(), UnlinkatFlags::RemoveDir)?;
        }
    }
    Ok(())
}

fn enter(stack: &mut DirectoryStack<Level>, directory: OwnedFd, given: Given) -> io::Result<()> {
    let attributes = InodeAttributes::from(fstat(&directory)?);
    let names = DirectoryNames::begin(directory.as_fd(), given)?;
    if stack.depth() > KEPT_PIECES
        && let Some(outer) = stack.note_mut()
    {
        outer.names.forget();
    }
    let level = Level { names, attributes };
    stack.push(directory, attributes.identity, level);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_go_and_the_directory_stays() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        let full = dir.path().join("full");
        std::fs::create_dir_all(full.join("a/b")).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("kept"), "").unwrap();
        std::fs::write(full.join("file"), "").unwrap();
        std::os::unix::fs::symlink(&outside, full.join("link")).unwrap();
        remove_contents(&full).unwrap();
        assert_eq!(std::fs::read_dir(&full).unwrap().count(), 0);
        assert!(outside.join("kept").try_exists().unwrap());
        remove_contents(&full).unwrap();
        remove_contents(&dir.path().join("missing")).unwrap_err();
        std::fs::create_dir_all(full.join("kept/kept")).unwrap();
        std::fs::write(full.join("kept.not"), "").unwrap();
        remove_contents_but(&full, Some("kept")).unwrap();
        let left: Vec<_> = std::fs::read_dir(&full).unwrap().collect();
        assert_eq!(left.len(), 1);
        assert!(full.join("kept/kept").is_dir());
    }

    #[test]
    fn root_what_is_mounted_in_it_is_left_alone() {
        use nix::mount::{MntFlags, MsFlags, mount, umount2};
        let dir = tempfile::tempdir().unwrap();
        let (tree, elsewhere) = (dir.path().join("tree"), dir.path().join("elsewhere"));
        let none = None::<&str>;
        for (name, bound) in [("a/disk", false), ("a/bound", true), ("disk", false)] {
            let at = tree.join(name);
            std::fs::create_dir_all(&at).unwrap();
            std::fs::create_dir_all(&elsewhere).unwrap();
            match bound {
                // Of the same device.
                true => mount(Some(&elsewhere), &at, none, MsFlags::MS_BIND, none),
                false => mount(Some("none"), &at, Some("tmpfs"), MsFlags::empty(), none),
            }
            .unwrap();
            std::fs::create_dir_all(at.join("dir")).unwrap();
            std::fs::write(at.join("dir/precious"), "").unwrap();
            let removed = [remove_contents(&tree), remove_tree(&tree)];
            assert!(at.join("dir/precious").is_file(), "{name}");
            umount2(&at, MntFlags::MNT_DETACH).unwrap();
            for error in removed.map(Result::unwrap_err) {
                assert_eq!(error.raw_os_error(), Some(Errno::EXDEV as i32), "{name}");
            }
        }
        remove_tree(&tree).unwrap();
        assert!(elsewhere.join("dir/precious").is_file());
    }

    #[test]
    fn a_tree_deeper_than_the_descriptor_limit_goes() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        std::fs::create_dir(&tree).unwrap();
        let mut current = open_directory(
            open(dir.path(), OFlag::O_RDONLY, Mode::empty())
                .unwrap()
                .as_fd(),
            b"tree",
        )
        .unwrap();
        for _ in 0..3000 {
            nix::sys::stat::mkdirat(&current, c"d", Mode::S_IRWXU).unwrap();
            current = open_directory(current.as_fd(), b"d").unwrap();
        }
        drop(current);
        std::os::unix::fs::symlink("/", tree.join("link")).unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.try_exists().unwrap());
        remove_tree(&tree).unwrap();
    }
}
