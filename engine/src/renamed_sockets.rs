//! Unix sockets whose file has another name than the one of `bind`, in the images of a dump whose container still stands
//! still.
//!
//! A program binds a name that nobody knows, and renames the file, or links it and removes the first name (supervisord,
//! HAProxy), so that who connects finds nothing or a socket that is ready. CRIU binds the first name again. The file
//! is looked for where it was, then in what the container has written, or in the mount that it is in. One that is
//! nowhere is what CRIU makes of it.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use procfs::process::MountInfo;
use transship_checkpoint::beneath::{Links, open_directory};
use transship_checkpoint::criu_images::unix_sockets;
use walkdir::WalkDir;

use crate::conditions::sock_diag::{UnixSocket, unix_sockets};
use crate::error::{Context, Error, Result};
use crate::process_files;

/// More files of a directory than this are not looked at.
const FILES: usize = 100_000;
/// More files of a mount than this are not looked at: the container stands still meanwhile.
const FILES_OF_MOUNT: usize = 20_000;

/// The container whose sockets are named.
#[derive(Debug, Clone)]
pub(crate) struct Named {
    /// Its first process.
    pub(crate) pid: u32,
    /// What it has written to its root file system.
    pub(crate) upperdir: PathBuf,
}

/// Gives the sockets of the container the names that their files have.
///
/// # Errors
/// The images cannot be read or replaced.
pub(crate) async fn rename(images: &Path, container: Named) -> Result<()> {
    let dir = images.to_path_buf();
    let rename = move || {
        let sockets = OnceCell::new();
        let find = |inode, path: &[u8]| container.name_now(&sockets, inode, path);
        unix_sockets::rename(&dir, find)
    };
    let renamed = tokio::task::spawn_blocking(rename).await?;
    let failed = || format!("cannot edit the unix sockets in {}", images.display());
    renamed.map_err(Error::caused_by).with_context(failed)
}

impl Named {
    /// The path of the socket's file, when it is not the one of `bind`.
    fn name_now(
        &self,
        sockets: &OnceCell<BTreeMap<u64, UnixSocket>>,
        inode: u32,
        bound: &[u8],
    ) -> Option<Vec<u8>> {
        let sockets = sockets.get_or_init(|| unix_sockets(self.pid));
        let socket = sockets.get(&u64::from(inode))?;
        let file = socket.file?;
        let bound = Path::new(OsStr::from_bytes(bound));
        if self.is_at(file, bound) {
            return None;
        }
        let found = { self.in_directory(file, bound.parent()?) }
            .or_else(|| self.in_mounts(file, socket.device?));
        Some(found?.into_os_string().into_vec())
    }

    /// A directory of the container, in which no link leads out of it.
    fn open(&self, path: &Path) -> Option<OwnedFd> {
        let root = PathBuf::from(format!("/proc/{}/root", self.pid));
        open_directory(&root, path, Links::Within).ok()
    }

    fn is_at(&self, file: u32, path: &Path) -> bool {
        let parent = path.parent().and_then(|it| self.open(it));
        let (Some(parent), Some(name)) = (parent, path.file_name()) else {
            return false;
        };
        is_file(file, &path_of(&parent).join(name))
    }

    fn in_directory(&self, file: u32, path: &Path) -> Option<PathBuf> {
        let directory = self.open(path)?;
        let mut names: Vec<_> = std::fs::read_dir(path_of(&directory))
            .ok()?
            .take(FILES)
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|it| it.is_socket()))
            .filter(|entry| is_file(file, &entry.path()))
            .map(|entry| entry.file_name())
            .collect();
        // The same one each time.
        names.sort();
        Some(path.join(names.into_iter().next()?))
    }

    /// Below the mounts of the file system that it is in. Of the root only what was written is gone through: a socket is.
    fn in_mounts(&self, file: u32, (major, minor): (u32, u32)) -> Option<PathBuf> {
        let device = format!("{major}:{minor}");
        let mounts = process_files::mountinfo(self.pid).ok()?.0.into_iter();
        let mut mounts = mounts.filter(|mount| mount.majmin == device);
        mounts.find_map(|mount| {
            let is_root = mount.mount_point == Path::new("/") && mount.fs_type == "overlay";
            if is_root {
                return self.below(file, &self.upperdir, &mount);
            }
            let directory = self.open(&mount.mount_point)?;
            // With a slash: the walk goes through links at the end alone.
            self.below(file, &path_of(&directory).join(""), &mount)
        })
    }

    fn below(&self, file: u32, top: &Path, mount: &MountInfo) -> Option<PathBuf> {
        let walk = WalkDir::new(top).min_depth(1).same_file_system(true);
        walk.sort_by_file_name()
            .into_iter()
            .take(FILES_OF_MOUNT)
            .flatten()
            .filter(|entry| entry.file_type().is_socket())
            .filter_map(|entry| Some(mount.mount_point.join(entry.path().strip_prefix(top).ok()?)))
            .find(|path| self.is_at(file, path))
    }
}

/// The kernel tells half of the number of an inode.
fn is_file(file: u32, path: &Path) -> bool {
    let low_half = |it: u64| it & u64::from(u32::MAX);
    path.symlink_metadata()
        .is_ok_and(|it| it.file_type().is_socket() && low_half(it.ino()) == u64::from(file))
}

fn path_of(directory: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()))
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
        let own = Named {
            pid: std::process::id(),
            upperdir: PathBuf::new(),
        };
        let found = own.name_now(
            &OnceCell::new(),
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
