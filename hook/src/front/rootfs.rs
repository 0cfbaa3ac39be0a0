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
//! made it. The kernel writes out the upperdir's file system for that (`ovl_sync_fs`), so a receiver that knows the upperdir
//! fills it before the shim mounts it ([`transship_sandbox::Once`]).

use std::fs;
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use transship_checkpoint::beneath::open_last;
use transship_checkpoint::manifest::contents_in_filled;
use transship_layer::{
    ImportOptions, MountedOverlay, decompress, import_into_upperdir, remove_contents,
};
use transship_path_error::During as _;
use transship_sandbox::read_proc;

use super::RootfsError;
use super::bundle::Bundle;

/// Mounts an overlay on `root` as it was.
fn mount_again(overlay: &MountedOverlay, root: &Path) -> Result<(), RootfsError> {
    let flag = |option: &String| match option.as_str() {
        "ro" => MsFlags::MS_RDONLY,
        "nosuid" => MsFlags::MS_NOSUID,
        "nodev" => MsFlags::MS_NODEV,
        "noexec" => MsFlags::MS_NOEXEC,
        "noatime" => MsFlags::MS_NOATIME,
        "nodiratime" => MsFlags::MS_NODIRATIME,
        _ => MsFlags::empty(),
    };
    if let Some(workdir) = volatile_workdir(overlay) {
        // Overlay refuses a second mount of a volatile one, because what was written before may not be on
        // the disk. Of this one all that was written came from here, and no crash lies between.
        let mark = workdir.join("work/incompat/volatile");
        match fs::remove_dir_all(&mark) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            removed => removed.during("remove", &mark)?,
        }
    }
    // The front does nothing with relative paths of its own; the runtime is started after this
    // with the directory that the shim gave.
    let before = std::env::current_dir().during("find", ".")?;
    std::env::set_current_dir(&overlay.base).during("enter", &overlay.base)?;
    let mounted = mount(
        Some("overlay"),
        root,
        Some("overlay"),
        overlay.flags.iter().map(flag).collect(),
        Some(overlay.data.as_str()),
    );
    std::env::set_current_dir(&before).during("enter", &before)?;
    Ok(mounted.during("mount", root)?)
}

/// The workdir of an overlay that is mounted `volatile` (Linux 5.10).
fn volatile_workdir(overlay: &MountedOverlay) -> Option<PathBuf> {
    overlay.workdir.clone().filter(|_| overlay.is_volatile)
}

impl Bundle {
    /// Fills the upperdir of the bundle's root file system from the layer in `diff`, which is of `checkpoint`. A
    /// checkpoint without a layer leaves it as it is.
    ///
    /// # Errors
    /// The mount is as it was; what was filled in is for the caller's caller to remove, together
    /// with the container.
    pub(super) fn fill_rootfs(&self, diff: &Path, checkpoint: &str) -> Result<(), RootfsError> {
        let layer = match open_last(diff) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            file => file.during("open", diff)?,
        };
        let len = layer.metadata().during("stat", diff)?.len();
        let (root, overlay) = self.unmount_rootfs()?;
        let import = || {
            let tar = decompress(BufReader::with_capacity(1 << 20, layer)).during("read", diff)?;
            // What a migration has sent before the freeze. Nobody but the receiver can have made it: nothing has run here.
            let contents = contents_in_filled(checkpoint);
            let has_come = { overlay.stack.top.join(&contents).symlink_metadata() };
            let has_come = has_come.is_ok_and(|it| it.is_dir());
            let options = ImportOptions {
                contents: has_come.then_some(contents),
                ..ImportOptions::for_checkpoint(len, tar.compression())
            };
            import_into_upperdir(tar, &overlay.stack, &options).map_err(|source| {
                RootfsError::Import {
                    upperdir: overlay.stack.top.clone(),
                    layer: diff.to_path_buf(),
                    source,
                }
            })
        };
        let imported = import();
        mount_again(&overlay, &root)?;
        imported.map(drop)
    }

    /// Takes everything out of the upperdir again: the container starts from its image.
    ///
    /// # Errors
    /// A system call failed.
    pub(super) fn empty_upperdir(&self) -> Result<(), RootfsError> {
        let (root, overlay) = self.unmount_rootfs()?;
        let upperdir = &overlay.stack.top;
        let emptied = remove_contents(upperdir).during("empty", upperdir);
        mount_again(&overlay, &root)?;
        Ok(emptied?)
    }

    fn unmount_rootfs(&self) -> Result<(PathBuf, MountedOverlay), RootfsError> {
        let path = self.path("rootfs");
        let root = path.canonicalize().during("find", &path)?;
        let table = "/proc/self/mountinfo";
        let mountinfo = read_proc(table).during("read", table)?;
        let overlay = match MountedOverlay::on(&root, &mountinfo) {
            Ok(overlay) => overlay,
            Err(source) => return Err(RootfsError::NoOverlay { path, source }),
        };
        // containerd (`remap-ids`) mounts over idmapped mounts of the layers, which it takes away at once.
        let lost = { overlay.stack.lowerdirs.iter() }.find(|dir| !dir.is_dir());
        if let Some(lowerdir) = lost.cloned() {
            return Err(RootfsError::LostLayer { path, lowerdir });
        }
        umount2(&root, MntFlags::UMOUNT_NOFOLLOW).during("unmount", &root)?;
        Ok((root, overlay))
    }
}
