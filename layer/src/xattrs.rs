//! Extended attributes, read and written without ever naming a whole path.
//!
//! nix has no xattr calls, hence rustix. Regular files and directories are reached by their
//! descriptor. A symlink, device node or FIFO cannot be opened without an effect, and the `*xattrat`
//! calls came only with Linux 6.13, so those are named as `/proc/self/fd/<directory>/<name>` with the
//! `l*xattr` calls: never longer than 300 bytes, and the last component is not followed.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::{
    XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr, getxattr, lgetxattr, listxattr,
    llistxattr, lsetxattr, setxattr,
};
use rustix::io::Errno;

/// Longest list of names and longest value that Linux allows: `XATTR_LIST_MAX`, `XATTR_SIZE_MAX`.
pub(crate) const XATTR_MAX: usize = 64 * 1024;
/// What nearly all lists and values fit into.
const FIRST_BYTES: usize = 256;

/// One extended attribute: full name (`user.origin`) and value, both any bytes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Xattr {
    pub(crate) name: Vec<u8>,
    pub(crate) value: Vec<u8>,
}

/// The inode whose attributes are meant.
#[derive(Debug, Clone, Copy)]
pub(crate) enum XattrHolder<'a> {
    /// A regular file or directory open for reading or writing (not `O_PATH`).
    Open(BorrowedFd<'a>),
    /// Any inode, by an `O_PATH` descriptor of it.
    Path(BorrowedFd<'a>),
    /// Any inode, by the directory that holds it and its name there.
    Named {
        directory: BorrowedFd<'a>,
        name: &'a [u8],
    },
}

/// Leads to the inode of a descriptor and nowhere else, also when that is a symlink.
fn proc_fd(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn proc_path(directory: BorrowedFd<'_>, name: &[u8]) -> Vec<u8> {
    let mut path = format!("/proc/self/fd/{}/", directory.as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    path
}

/// Buffers for the list of names and one value, kept so that a file without attributes costs one
/// system call and no allocation.
///
/// They begin small and grow on `ERANGE`: before it asks the file system, the kernel takes (and for
/// values clears) memory of the size of the caller's buffer, at every call.
#[derive(Debug)]
pub(crate) struct XattrReader {
    names: Vec<u8>,
    value: Vec<u8>,
}

impl XattrReader {
    pub(crate) fn new() -> Self {
        XattrReader {
            names: vec![0; FIRST_BYTES],
            value: vec![0; FIRST_BYTES],
        }
    }

    /// Calls `each` with name and value of every attribute, in the order of the file system. Values
    /// that are not wanted are not asked for, a system call less, and are handed over as empty.
    pub(crate) fn for_each(
        &mut self,
        holder: XattrHolder<'_>,
        is_wanted: impl Fn(&[u8]) -> bool,
        mut each: impl FnMut(&[u8], &[u8]),
    ) -> io::Result<()> {
        let listed = growing(&mut self.names, |names| match holder {
            XattrHolder::Open(fd) => flistxattr(fd, names),
            XattrHolder::Path(fd) => listxattr(proc_fd(fd), names),
            XattrHolder::Named { directory, name } => llistxattr(proc_path(directory, name), names),
        });
        let len = match listed {
            Ok(len) => len,
            // The file system has no extended attributes at all.
            Err(Errno::NOTSUP) => 0,
            Err(errno) => return Err(errno.into()),
        };
        for name in self.names[..len]
            .split(|byte| *byte == 0)
            .filter(|name| !name.is_empty())
        {
            if !is_wanted(name) {
                each(name, b"");
            } else if let Some(len) = get(holder, name, &mut self.value)? {
                each(name, &self.value[..len]);
            }
        }
        Ok(())
    }

    /// Value of one attribute, None when the inode does not have it.
    pub(crate) fn value(
        &mut self,
        holder: XattrHolder<'_>,
        name: &[u8],
    ) -> io::Result<Option<&[u8]>> {
        Ok(get(holder, name, &mut self.value)?.map(|len| &self.value[..len]))
    }
}

/// Asks again with a larger buffer as long as the answer does not fit.
fn growing(
    buffer: &mut Vec<u8>,
    mut ask: impl FnMut(&mut [u8]) -> rustix::io::Result<usize>,
) -> rustix::io::Result<usize> {
    loop {
        match ask(buffer) {
            // What does not fit into the most that Linux allows, no buffer will hold.
            Err(Errno::RANGE) if buffer.len() < XATTR_MAX => {
                buffer.resize((buffer.len() * 8).min(XATTR_MAX), 0);
            }
            answer => return answer,
        }
    }
}

fn get(holder: XattrHolder<'_>, name: &[u8], value: &mut Vec<u8>) -> io::Result<Option<usize>> {
    let got = growing(value, |value| match holder {
        XattrHolder::Open(fd) => fgetxattr(fd, name, value),
        XattrHolder::Path(fd) => getxattr(proc_fd(fd), name, value),
        XattrHolder::Named {
            directory,
            name: file,
        } => lgetxattr(proc_path(directory, file), name, value),
    });
    match got {
        Ok(len) => Ok(Some(len)),
        Err(Errno::NODATA | Errno::NOTSUP) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Sets one attribute, replacing an earlier value.
pub(crate) fn set_xattr(holder: XattrHolder<'_>, name: &[u8], value: &[u8]) -> io::Result<()> {
    match holder {
        XattrHolder::Open(fd) => fsetxattr(fd, name, value, XattrFlags::empty())?,
        XattrHolder::Path(fd) => setxattr(proc_fd(fd), name, value, XattrFlags::empty())?,
        XattrHolder::Named {
            directory,
            name: file,
        } => {
            lsetxattr(proc_path(directory, file), name, value, XattrFlags::empty())?;
        }
    }
    Ok(())
}

/// Removes one attribute of an open inode; one that is not there is no error.
pub(crate) fn remove_xattr(fd: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    match fremovexattr(fd, name) {
        Ok(()) | Err(Errno::NODATA | Errno::NOTSUP) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn buffers_grow_with_names_and_values() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("file")).unwrap();
        let holder = XattrHolder::Open(file.as_fd());
        // Larger than the first buffer, and one that its next size holds too; 3 KiB is what ext4 takes.
        let value = |n: u8| vec![n; if n == 0 { 3000 } else { usize::from(n) }];
        let name = |n: u8| format!("user.{}{n:02}", "n".repeat(80)).into_bytes();
        for n in 0..8 {
            set_xattr(holder, &name(n), &value(n)).unwrap();
        }
        let mut reader = XattrReader::new();
        for _ in 0..2 {
            let mut read = Vec::new();
            reader
                .for_each(
                    holder,
                    |_| true,
                    |name, value| {
                        read.push((name.to_vec(), value.to_vec()));
                    },
                )
                .unwrap();
            read.retain(|(name, _)| name.starts_with(b"user."));
            read.sort();
            let all: Vec<_> = (0..8).map(|n| (name(n), value(n))).collect();
            assert_eq!(read, all);
        }
        assert_eq!(
            XattrReader::new().value(holder, &name(0)).unwrap(),
            Some(&value(0)[..])
        );
        assert_eq!(reader.value(holder, b"user.none").unwrap(), None);
    }
}
