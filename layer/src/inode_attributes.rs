//! What one `stat` call says of an inode, in the units of the rest of the crate.

use nix::sys::stat::{FileStat, major, minor};

/// A point in time as the kernel keeps it: `nanos` counts forward from `secs`, also before 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Timestamp {
    pub(crate) secs: i64,
    pub(crate) nanos: u32,
}

impl Timestamp {
    pub(crate) fn from_kernel(secs: i64, nanos: i64) -> Self {
        Timestamp {
            secs,
            nanos: u32::try_from(nanos).unwrap_or(0),
        }
    }
}

/// The types of inode that Linux has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum InodeType {
    Regular,
    Directory,
    Symlink,
    CharDevice,
    BlockDevice,
    Fifo,
    Socket,
}

/// The attributes of one inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct InodeAttributes {
    pub(crate) inode_type: InodeType,
    /// Permission bits with setuid, setgid and sticky (07777).
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) size: u64,
    pub(crate) links: u64,
    /// Device number of a device node, (major, minor).
    pub(crate) device: (u64, u64),
    pub(crate) mtime: Timestamp,
    pub(crate) atime: Timestamp,
    ctime: Timestamp,
    /// Identity of the inode on this machine: (device, inode number).
    pub(crate) identity: (u64, u64),
}

impl InodeAttributes {
    /// Whether this is overlay's whiteout: a character device 0:0 (kernel: `WHITEOUT_DEV`).
    pub(crate) fn is_whiteout_device(&self) -> bool {
        self.inode_type == InodeType::CharDevice && self.device == (0, 0)
    }

    pub(crate) fn is_directory(&self) -> bool {
        self.inode_type == InodeType::Directory
    }

    /// Whether `later` was taken of the same inode with nothing changed in between.
    ///
    /// The change time is what a writer cannot set back. On kernels before 6.13 it moves in steps of
    /// a timer tick, so two writes within one tick (1-10 ms) can look like one.
    pub(crate) fn unchanged_in(&self, later: &InodeAttributes) -> bool {
        self.identity == later.identity
            && self.size == later.size
            && self.mtime == later.mtime
            && self.ctime == later.ctime
    }
}

impl From<FileStat> for InodeAttributes {
    fn from(stat: FileStat) -> Self {
        // S_IFMT is 0o170000 on every Linux architecture.
        let inode_type = match stat.st_mode & 0o170_000 {
            0o040_000 => InodeType::Directory,
            0o120_000 => InodeType::Symlink,
            0o020_000 => InodeType::CharDevice,
            0o060_000 => InodeType::BlockDevice,
            0o010_000 => InodeType::Fifo,
            0o140_000 => InodeType::Socket,
            _ => InodeType::Regular,
        };
        InodeAttributes {
            inode_type,
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            links: stat.st_nlink,
            device: (major(stat.st_rdev), minor(stat.st_rdev)),
            mtime: Timestamp::from_kernel(stat.st_mtime, stat.st_mtime_nsec),
            atime: Timestamp::from_kernel(stat.st_atime, stat.st_atime_nsec),
            ctime: Timestamp::from_kernel(stat.st_ctime, stat.st_ctime_nsec),
            identity: (stat.st_dev, stat.st_ino),
        }
    }
}
