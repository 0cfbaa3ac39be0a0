//! An overlay of temporary directories, mounted as containerd mounts one.

use std::fs;
use std::path::{Path, PathBuf};

use sys_mount::{Mount, MountFlags, UnmountDrop, UnmountFlags};
use tempfile::TempDir;

use crate::OverlayStack;

/// Lower layers, an upperdir, and the place where they are mounted.
pub(crate) struct OverlayDirs {
    pub(crate) base: TempDir,
    /// Nearest first.
    pub(crate) lowerdirs: Vec<PathBuf>,
    pub(crate) upperdir: PathBuf,
    pub(crate) merged: PathBuf,
    pub(crate) mount_options: String,
    uppers: usize,
}

impl OverlayDirs {
    /// On tmpfs if the machine has one in the usual place, which is ten times faster than a disk.
    pub(crate) fn in_memory() -> Self {
        let shm = Path::new("/dev/shm");
        Self::under(if shm.is_dir() { shm } else { Path::new("/tmp") })
    }

    pub(crate) fn on_disk() -> Self {
        Self::under(&std::env::temp_dir())
    }

    fn under(parent: &Path) -> Self {
        let base = tempfile::Builder::new()
            .prefix("transship-layer-")
            .tempdir_in(parent)
            .unwrap();
        let lowest = base.path().join("lower");
        let merged = base.path().join("merged");
        fs::create_dir(&lowest).unwrap();
        fs::create_dir(&merged).unwrap();
        let mut dirs = OverlayDirs {
            lowerdirs: vec![lowest],
            upperdir: PathBuf::new(),
            merged,
            mount_options: "index=off".to_owned(),
            uppers: 0,
            base,
        };
        dirs.new_upper();
        dirs
    }

    /// Goes on with a fresh, empty upperdir; the one before stays on the disk. Returns that one.
    pub(crate) fn new_upper(&mut self) -> PathBuf {
        self.uppers += 1;
        let fresh = self.base.path().join(format!("upper{}", self.uppers));
        fs::create_dir(&fresh).unwrap();
        fs::create_dir(self.work()).unwrap();
        std::mem::replace(&mut self.upperdir, fresh)
    }

    /// Makes the upperdir the nearest lower layer, as a commit does.
    pub(crate) fn commit(&mut self) {
        let committed = self.new_upper();
        self.lowerdirs.insert(0, committed);
    }

    /// The directories as the code under test is told of them.
    pub(crate) fn stack(&self) -> OverlayStack {
        OverlayStack::new(&self.upperdir, self.lowerdirs.clone())
    }

    fn work(&self) -> PathBuf {
        self.base.path().join(format!("work{}", self.uppers))
    }

    pub(crate) fn mount(&self) -> UnmountDrop<Mount> {
        let lowers: Vec<_> = self
            .lowerdirs
            .iter()
            .map(|dir| dir.to_str().unwrap())
            .collect();
        let data = format!(
            "{},workdir={},upperdir={},lowerdir={}",
            self.mount_options,
            self.work().display(),
            self.upperdir.display(),
            lowers.join(":")
        );
        Mount::builder()
            .fstype("overlay")
            .flags(MountFlags::empty())
            .data(&data)
            .mount_autodrop("overlay", &self.merged, UnmountFlags::empty())
            .unwrap()
    }
}
