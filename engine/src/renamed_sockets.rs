//! Unix sockets whose file has another name than the one of `bind`, in the images of a dump whose container still stands
//! still.
//!
//! A program binds a name that nobody knows, and renames the file, or links it and removes the first name (supervisord,
//! HAProxy), so that who connects finds nothing or a socket that is ready. CRIU binds the first name again. The file
//! is looked for where it was, then in what the container has written, or in the mount that it is in. One that is
//! nowhere is what CRIU makes of it.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::DirEntry;
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

/// More files than these, of directories and mounts together, are not looked at: the container stands still meanwhile.
const FILES: usize = 100_000;

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
        let mut search = Search::new(container);
        let find = |inode, path: &[u8]| search.name_now(inode, path);
        unix_sockets::rename(&dir, find)
    };
    let renamed = tokio::task::spawn_blocking(rename).await?;
    let failed = || format!("cannot edit the unix sockets in {}", images.display());
    renamed.map_err(Error::caused_by).with_context(failed)
}

/// Socket files by half of the number of their inode, which is what the kernel tells of a socket: the first one by its name.
type Files = BTreeMap<u32, PathBuf>;

/// What was looked for and found, once for all sockets of a container.
struct Search {
    container: Named,
    sockets: Option<BTreeMap<u64, UnixSocket>>,
    of_directories: BTreeMap<PathBuf, Files>,
    of_devices: BTreeMap<(u32, u32), Files>,
    /// Files that may still be looked at.
    left: usize,
}

impl Search {
    fn new(container: Named) -> Self {
        Self {
            container,
            sockets: None,
            of_directories: BTreeMap::new(),
            of_devices: BTreeMap::new(),
            left: FILES,
        }
    }

    /// The path of the socket's file, when it is not the one of `bind`.
    fn name_now(&mut self, inode: u32, bound: &[u8]) -> Option<Vec<u8>> {
        let pid = self.container.pid;
        let sockets = self.sockets.get_or_insert_with(|| unix_sockets(pid));
        let socket = sockets.get(&u64::from(inode))?;
        let (file, device) = (socket.file?, socket.device);
        let bound = Path::new(OsStr::from_bytes(bound));
        if self.container.file_at(bound) == Some(file) {
            return None;
        }
        let found = { self.in_directory(bound.parent()?).get(&file).cloned() }
            .or_else(|| self.in_mounts(device?).get(&file).cloned());
        Some(found?.into_os_string().into_vec())
    }

    fn in_directory(&mut self, path: &Path) -> &Files {
        if !self.of_directories.contains_key(path) {
            let mut files = Files::new();
            let directory = self.container.open(path);
            let names = directory.and_then(|it| std::fs::read_dir(path_of(&it)).ok());
            let is_socket = |it: &DirEntry| it.file_type().is_ok_and(|it| it.is_socket());
            for entry in names.into_iter().flatten().flatten() {
                if !self.may_look() {
                    break;
                }
                if is_socket(&entry) {
                    self.container.add(path.join(entry.file_name()), &mut files);
                }
            }
            self.of_directories.insert(path.to_path_buf(), files);
        }
        self.of_directories.entry(path.to_path_buf()).or_default()
    }

    /// Below the mounts of the file system that it is in. Of the root only what was written is gone through: a socket is.
    fn in_mounts(&mut self, device: (u32, u32)) -> &Files {
        if !self.of_devices.contains_key(&device) {
            let mut files = Files::new();
            let (major, minor) = device;
            let majmin = format!("{major}:{minor}");
            let mounts = process_files::mountinfo(self.container.pid).map(|it| it.0);
            let mounts = mounts.into_iter().flatten();
            for mount in mounts.filter(|mount| mount.majmin == majmin) {
                let is_root = mount.mount_point == Path::new("/") && mount.fs_type == "overlay";
                if is_root {
                    let top = self.container.upperdir.clone();
                    self.below(&top, &mount, &mut files);
                } else if let Some(directory) = self.container.open(&mount.mount_point) {
                    // With a slash: the walk goes through links at the end alone.
                    self.below(&path_of(&directory).join(""), &mount, &mut files);
                }
            }
            self.of_devices.insert(device, files);
        }
        self.of_devices.entry(device).or_default()
    }

    fn below(&mut self, top: &Path, mount: &MountInfo, files: &mut Files) {
        let walk = WalkDir::new(top).min_depth(1).same_file_system(true);
        for entry in walk.into_iter().flatten() {
            if !self.may_look() {
                break;
            }
            if entry.file_type().is_socket()
                && let Ok(path) = entry.path().strip_prefix(top)
            {
                self.container.add(mount.mount_point.join(path), files);
            }
        }
    }

    fn may_look(&mut self) -> bool {
        let may = self.left > 0;
        self.left = self.left.saturating_sub(1);
        may
    }
}

impl Named {
    /// A directory of the container, in which no link leads out of it.
    fn open(&self, path: &Path) -> Option<OwnedFd> {
        let root = PathBuf::from(format!("/proc/{}/root", self.pid));
        open_directory(&root, path, Links::Within).ok()
    }

    /// Half of the number of the inode of a socket file, as the container sees it.
    fn file_at(&self, path: &Path) -> Option<u32> {
        let parent = self.open(path.parent()?)?;
        let found = { path_of(&parent).join(path.file_name()?) }.symlink_metadata();
        let found = found.ok().filter(|it| it.file_type().is_socket())?;
        u32::try_from(found.ino() & u64::from(u32::MAX)).ok()
    }

    fn add(&self, path: PathBuf, files: &mut Files) {
        if let Some(file) = self.file_at(&path) {
            let known = files.entry(file).or_insert_with(|| path.clone());
            // The same one each time.
            if path < *known {
                *known = path;
            }
        }
    }
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
        let mut own = Search::new(Named {
            pid: std::process::id(),
            upperdir: PathBuf::new(),
        });
        let found = own.name_now(inode(listener), bound.as_os_str().as_bytes());
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
