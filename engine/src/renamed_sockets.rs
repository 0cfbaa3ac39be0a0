//! Unix sockets whose file has another name than the one of `bind`, in the images of a dump whose container still stands
//! still.
//!
//! A program binds a name that nobody knows, and renames the file, or links it and removes the first name (supervisord,
//! HAProxy), so that who connects finds nothing or a socket that is ready. CRIU binds the first name again. The file
//! is looked for where it was: one that went to another directory is not found, and is what CRIU makes of it.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use transship_checkpoint::beneath::{Links, open_directory};
use transship_checkpoint::criu_images::unix_sockets;

use crate::conditions::sock_diag::{UnixSocket, unix_sockets};
use crate::error::{Context, Error, Result};

/// More files of a directory than this are not looked at.
const FILES: usize = 100_000;

/// Gives the sockets of the container, whose first process is `pid`, the names that their files have.
///
/// # Errors
/// The images cannot be read or replaced.
pub(crate) async fn rename(images: &Path, pid: u32) -> Result<()> {
    let dir = images.to_path_buf();
    let rename = move || {
        let sockets = OnceCell::new();
        let find = |inode, path: &[u8]| name_now(&sockets, pid, inode, path);
        unix_sockets::rename(&dir, find)
    };
    let renamed = tokio::task::spawn_blocking(rename).await?;
    let failed = || format!("cannot edit the unix sockets in {}", images.display());
    renamed.map_err(Error::caused_by).with_context(failed)
}

/// The path of the socket's file, when it is not the one of `bind`.
fn name_now(
    sockets: &OnceCell<BTreeMap<u64, UnixSocket>>,
    pid: u32,
    inode: u32,
    bound: &[u8],
) -> Option<Vec<u8>> {
    let sockets = sockets.get_or_init(|| unix_sockets(pid));
    let file = sockets.get(&u64::from(inode))?.file?;
    let bound = Path::new(std::ffi::OsStr::from_bytes(bound));
    let (parent, name) = (bound.parent()?, bound.file_name()?);
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let directory = open_directory(&root, parent, Links::Within).ok()?;
    let here = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    let is_it = |path: &Path| {
        let found = path.symlink_metadata();
        let low_half = |it: u64| it & u64::from(u32::MAX);
        found.is_ok_and(|it| it.file_type().is_socket() && low_half(it.ino()) == u64::from(file))
    };
    if is_it(&here.join(name)) {
        return None;
    }
    let mut names: Vec<_> = std::fs::read_dir(&here)
        .ok()?
        .take(FILES)
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|it| it.is_socket()) && is_it(&entry.path()))
        .map(|entry| entry.file_name())
        .collect();
    // The same one each time.
    names.sort();
    let name = names.into_iter().next()?;
    Some(parent.join(name).into_os_string().into_vec())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn inode(listener: &UnixListener) -> u32 {
        let path = format!("/proc/self/fd/{}", listener.as_raw_fd());
        u32::try_from(std::fs::metadata(path).unwrap().ino()).unwrap()
    }

    fn now(listener: &UnixListener, bound: &Path) -> Option<PathBuf> {
        let found = name_now(
            &OnceCell::new(),
            std::process::id(),
            inode(listener),
            bound.as_os_str().as_bytes(),
        );
        found.map(|path| PathBuf::from(std::ffi::OsString::from_vec(path)))
    }

    #[test]
    fn root_a_socket_is_found_by_its_file() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let [renamed, linked, kept, removed] = ["renamed", "linked", "kept", "removed"]
            .map(|it| UnixListener::bind(path(it)).unwrap());
        std::fs::rename(path("renamed"), path("a")).unwrap();
        std::fs::hard_link(path("linked"), path("b")).unwrap();
        std::fs::remove_file(path("linked")).unwrap();
        std::fs::remove_file(path("removed")).unwrap();
        // Another one has taken its name.
        let _next = UnixListener::bind(path("renamed")).unwrap();
        assert_eq!(now(&renamed, &path("renamed")), Some(path("a")));
        assert_eq!(now(&linked, &path("linked")), Some(path("b")));
        assert_eq!(now(&kept, &path("kept")), None);
        assert_eq!(now(&removed, &path("removed")), None);
    }
}
