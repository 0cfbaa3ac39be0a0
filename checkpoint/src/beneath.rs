//! Opens files of a directory that somebody else has filled.
//!
//! A name in such a directory may be a link to a file of the node, a FIFO that blocks whoever opens
//! it, or a device that does something when it is opened. So the kernel is asked to stay beneath the
//! directory (`openat2`, Linux 5.6), nothing waits, and what is no regular file is refused.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;

const DIRECTORY: OFlag = OFlag::O_PATH
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_CLOEXEC);

/// What is done about symbolic links on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// None is followed.
    Refused,
    /// They are followed within the directory, which is their root (kubelet's volumes have them).
    Within,
}

/// Opens the regular file at `path` beneath the directory `root`, for reading.
///
/// # Errors
/// It is no regular file, lies elsewhere, or a system call failed.
pub fn open_regular(root: &Path, path: &Path, links: Links) -> io::Result<File> {
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let file = File::from(open_with(root, path, links, flags)?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is no regular file",
        ));
    }
    Ok(file)
}

/// The same of the file at `path`, of which nothing but the last name is anybody else's.
///
/// # Errors
/// See [`open_regular`].
pub fn open_last(path: &Path) -> io::Result<File> {
    let name = Path::new(path.file_name().unwrap_or_default());
    open_regular(
        path.parent().unwrap_or(Path::new("/")),
        name,
        Links::Refused,
    )
}

/// Opens the directory at `path` beneath the directory `root`, to look things up in it.
///
/// # Errors
/// It is no directory, lies elsewhere, or a system call failed.
pub fn open_directory(root: &Path, path: &Path, links: Links) -> io::Result<OwnedFd> {
    open_with(root, path, links, DIRECTORY)
}

/// Checks that no link leads to the directory at `path` beneath the directory `root`.
///
/// # Errors
/// There is one, it is no directory, or a system call failed.
pub fn require_directory(root: &Path, path: &Path) -> io::Result<()> {
    open_directory(root, path, Links::Refused).map(drop)
}

fn open_with(root: &Path, path: &Path, links: Links, flags: OFlag) -> io::Result<OwnedFd> {
    let root = open(root, DIRECTORY, Mode::empty())?;
    let resolve = match links {
        Links::Refused => ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS,
        Links::Within => ResolveFlag::RESOLVE_IN_ROOT,
    };
    let how = OpenHow::new()
        .flags(flags)
        .resolve(resolve | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    Ok(openat2(&root, path, how)?)
}

/// Reads such a file, which may have `limit` bytes at most.
///
/// # Errors
/// See [`open_regular`]; or it is longer.
pub fn read_regular(root: &Path, path: &Path, links: Links, limit: u64) -> io::Result<Vec<u8>> {
    let file = open_regular(root, path, links)?;
    let mut bytes = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("it is longer than {limit} bytes"),
        ));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use nix::unistd::mkfifo;

    use super::*;

    #[test]
    fn only_regular_files_beneath_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("..data")).unwrap();
        fs::write(dir.path().join("secret"), "outside").unwrap();
        fs::write(root.join("..data/token"), "inside").unwrap();
        symlink("..data/token", root.join("token")).unwrap();
        symlink("../secret", root.join("up")).unwrap();
        symlink(dir.path().join("secret"), root.join("absolute")).unwrap();
        symlink("/proc/self/exe", root.join("magic")).unwrap();
        mkfifo(&root.join("fifo"), Mode::S_IRWXU).unwrap();
        let read = |name: &str, links| read_regular(&root, Path::new(name), links, 6);
        assert_eq!(read("..data/token", Links::Refused).unwrap(), b"inside");
        assert_eq!(read("token", Links::Within).unwrap(), b"inside");
        assert!(read("token", Links::Refused).is_err());
        for name in ["up", "absolute", "magic", "fifo", ".", "none", "../secret"] {
            assert!(read(name, Links::Refused).is_err(), "{name}");
            assert!(read(name, Links::Within).is_err(), "{name}");
        }
        symlink("..data", root.join("link")).unwrap();
        assert!(require_directory(&root, Path::new("..data")).is_ok());
        for name in ["link", "link/token", "token", "..", "none"] {
            assert!(require_directory(&root, Path::new(name)).is_err(), "{name}");
        }
        assert!(open_last(&root.join("..data/token")).is_ok());
        for name in ["token", "fifo", "link"] {
            assert!(open_last(&root.join(name)).is_err(), "{name}");
        }
        let long = read_regular(&root, Path::new("token"), Links::Within, 5);
        assert!(long.unwrap_err().to_string().contains("longer than 5"));
    }
}
