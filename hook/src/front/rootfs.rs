//! The container's root file system: an overlay whose upperdir gets the files of the checkpoint.
//!
//! ```text
//!  <bundle>/rootfs   mounted by the shim (options from /proc/self/mountinfo)
//!      unmount  -->  fill the upperdir from rootfs-diff.tar  -->  mount as it was
//! ```
//!
//! Changing the upperdir of a mounted overlay is undefined (kernel, Documentation/filesystems/
//! overlayfs.rst), and writing through the mount would copy whole files up. Before the container is
//! created nobody uses the mount, so it can be taken away for that moment, whichever snapshotter
//! made it.

use std::fs::{self, File};
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use transship_layer::{
    ImportError, ImportOptions, decompress, import_into_upperdir, remove_contents,
};

use super::bundle::Bundle;

/// Why the files of a checkpoint are not in the container.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RootfsError {
    /// There is no upperdir to fill.
    #[error("the root file system {path} of the container is no overlay, so it cannot be filled")]
    NoOverlay {
        /// The mount point.
        path: PathBuf,
    },
    /// The layer cannot be imported.
    #[error("cannot fill {upperdir} from {layer}")]
    Import {
        /// The upperdir.
        upperdir: PathBuf,
        /// The layer.
        layer: PathBuf,
        /// Why.
        source: ImportError,
    },
    /// A system call failed.
    #[error("cannot {act} {path}")]
    Io {
        /// The act.
        act: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// An overlay mount, as the kernel tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OverlayMount {
    flags: MsFlags,
    data: String,
    pub(super) upperdir: PathBuf,
    lowerdirs: Vec<PathBuf>,
    /// What relative lowerdirs are relative to: containerd shortens long lists by `chdir`.
    base: PathBuf,
}

impl OverlayMount {
    /// The last mount on `root`, if it is an overlay that can be written to.
    pub(super) fn on(root: &str, mountinfo: &str) -> Option<Self> {
        // id parent major:minor root mount-point options... - type source super-options
        let line = mountinfo
            .lines()
            .rfind(|line| line.split(' ').nth(4) == Some(root))?;
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = file_system.split(' ');
        if fields.next()? != "overlay" {
            return None;
        }
        let options = unescape(fields.nth(1)?);
        let value = |name: &str| {
            options
                .split(',')
                .find_map(|option| option.strip_prefix(name))
        };
        let upperdir = PathBuf::from(value("upperdir=")?);
        // <snapshots>/<id>/fs: containerd makes lowerdirs relative to <snapshots>.
        let base = upperdir.ancestors().nth(2)?.to_path_buf();
        let lowerdirs = value("lowerdir=")?
            .split(':')
            .filter(|dir| !dir.is_empty())
            .map(|dir| base.join(dir));
        let lowerdirs = lowerdirs.collect();
        let flag = |option: &str| match option {
            "ro" => MsFlags::MS_RDONLY,
            "nosuid" => MsFlags::MS_NOSUID,
            "nodev" => MsFlags::MS_NODEV,
            "noexec" => MsFlags::MS_NOEXEC,
            "noatime" => MsFlags::MS_NOATIME,
            "nodiratime" => MsFlags::MS_NODIRATIME,
            _ => MsFlags::empty(),
        };
        let flags = mount.split(' ').nth(5)?.split(',').map(flag).collect();
        let own = |option: &&str| !matches!(*option, "rw" | "ro" | "seclabel");
        let data = options.split(',').filter(own).collect::<Vec<_>>().join(",");
        Some(Self {
            flags,
            data,
            upperdir,
            lowerdirs,
            base,
        })
    }

    fn mount(&self, root: &Path) -> Result<(), RootfsError> {
        // The front does nothing with relative paths of its own; the runtime is started after this
        // with the directory that the shim gave.
        let before = std::env::current_dir().during("find", ".")?;
        std::env::set_current_dir(&self.base).during("enter", &self.base)?;
        let mounted = mount(
            Some("overlay"),
            root,
            Some("overlay"),
            self.flags,
            Some(self.data.as_str()),
        );
        std::env::set_current_dir(&before).during("enter", &before)?;
        mounted.during("mount", root)
    }
}

impl Bundle {
    /// Fills the upperdir of the bundle's root file system from the layer in `diff`. A checkpoint
    /// without a layer leaves it as it is.
    ///
    /// # Errors
    /// The mount is as it was; what was filled in is for the caller's caller to remove, together
    /// with the container.
    pub(super) fn fill_rootfs(&self, diff: &Path) -> Result<(), RootfsError> {
        let layer = match File::open(diff) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            file => file.during("open", diff)?,
        };
        let (root, overlay) = self.unmount_rootfs()?;
        let import = || {
            let tar = decompress(BufReader::with_capacity(1 << 20, layer)).during("read", diff)?;
            let options = ImportOptions::default();
            import_into_upperdir(tar, &overlay.upperdir, &overlay.lowerdirs, &options).map_err(
                |source| RootfsError::Import {
                    upperdir: overlay.upperdir.clone(),
                    layer: diff.to_path_buf(),
                    source,
                },
            )
        };
        let imported = import();
        overlay.mount(&root)?;
        imported.map(drop)
    }

    /// Takes everything out of the upperdir again: the container starts from its image.
    ///
    /// # Errors
    /// A system call failed.
    pub(super) fn empty_upperdir(&self) -> Result<(), RootfsError> {
        let (root, overlay) = self.unmount_rootfs()?;
        let emptied = remove_contents(&overlay.upperdir).during("empty", &overlay.upperdir);
        overlay.mount(&root)?;
        emptied
    }

    fn unmount_rootfs(&self) -> Result<(PathBuf, OverlayMount), RootfsError> {
        let path = self.path("rootfs");
        let root = path.canonicalize().during("find", &path)?;
        let table = "/proc/self/mountinfo";
        let mountinfo = fs::read_to_string(table).during("read", table)?;
        let overlay = root
            .to_str()
            .and_then(|root| OverlayMount::on(root, &mountinfo));
        let overlay = overlay.ok_or(RootfsError::NoOverlay { path })?;
        umount2(&root, MntFlags::UMOUNT_NOFOLLOW).during("unmount", &root)?;
        Ok((root, overlay))
    }
}

trait RootfsContext<T> {
    fn during(self, act: &'static str, path: impl AsRef<Path>) -> Result<T, RootfsError>;
}

impl<T, E: Into<io::Error>> RootfsContext<T> for Result<T, E> {
    fn during(self, act: &'static str, path: impl AsRef<Path>) -> Result<T, RootfsError> {
        self.map_err(|error| RootfsError::Io {
            act,
            path: path.as_ref().to_path_buf(),
            source: error.into(),
        })
    }
}

/// mountinfo writes blanks and the like as three octal digits.
fn unescape(field: &str) -> String {
    let mut text = String::with_capacity(field.len());
    let mut rest = field;
    while let Some((front, back)) = rest.split_once('\\') {
        text.push_str(front);
        let code = back
            .get(..3)
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => {
                text.push(char::from(code));
                rest = &back[3..];
            }
            None => {
                text.push('\\');
                rest = back;
            }
        }
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    const SNAPSHOTS: &str = "/var/lib/containerd/x/snapshots";

    #[test]
    fn a_mount_is_read_as_it_can_be_made_again() {
        let info = format!(
            "20 1 8:1 / / rw - ext4 /dev/vda rw\n\
             90 20 0:50 / /run/b/rootfs rw,nosuid,relatime shared:7 - overlay overlay \
             rw,lowerdir=12/fs:11/fs,upperdir={SNAPSHOTS}/13/fs,workdir={SNAPSHOTS}/13/work,index=off\n"
        );
        let mount = OverlayMount::on("/run/b/rootfs", &info).unwrap();
        assert_eq!(mount.upperdir, Path::new(SNAPSHOTS).join("13/fs"));
        assert_eq!(mount.lowerdirs[0], Path::new(SNAPSHOTS).join("12/fs"));
        assert_eq!(mount.flags, MsFlags::MS_NOSUID);
        assert!(mount.data.starts_with("lowerdir=12/fs:11/fs,upperdir="));
        assert!(mount.data.ends_with("index=off"));
        assert_eq!(OverlayMount::on("/", &info), None);
        assert_eq!(OverlayMount::on("/elsewhere", &info), None);
    }

    #[test]
    fn blanks_are_unescaped() {
        assert_eq!(
            unescape(r"lowerdir=/a\040b:/c\134d,x"),
            r"lowerdir=/a b:/c\d,x"
        );
        assert_eq!(unescape(r"odd\"), r"odd\");
    }
}
