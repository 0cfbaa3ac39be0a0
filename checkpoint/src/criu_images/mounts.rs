//! `mountpoints-<n>.img`: what CRIU mounts in a mount namespace.
//!
//! ```text
//! mnt_entry  1 fstype  2 mnt_id  3 root_dev  4 parent_mnt_id  5 flags  6 root  7 mountpoint
//!            8 source  9 options  12 with_plugin  13 ext_mount  14 fsname  16 deleted  17 sb_flags  18 ext_key
//! ```

use std::collections::BTreeSet;
use std::path::Path;

use super::strict::{is_ambiguous, set_varints};
use super::{Image, ImageError, Kind, list, push_bytes, push_entry};

/// `MS_RDONLY` and the like, as in `mount(2)`.
pub mod flags {
    /// Nothing can be written.
    pub const READ_ONLY: u32 = 1;
    /// Set-user-id bits are not honoured.
    pub const NO_SUID: u32 = 2;
    /// Device nodes cannot be opened.
    pub const NO_DEV: u32 = 4;
    /// Files cannot be executed.
    pub const NO_EXEC: u32 = 8;
    /// What is seen elsewhere of mounts below: unbindable, private, slave, shared.
    pub const PROPAGATION: u32 = 0xf << 17;
    /// All that say how a file system is mounted: these, synchronous, mandatory locks, directories synchronous, no links
    /// followed, no times, none of directories, relative, strict, lazy times. With another one `mount(2)` does something
    /// else than to make a file system: it binds a directory, moves or changes a mount.
    pub const OF_A_FILE_SYSTEM: u32 =
        0xf | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 0x800 | 1 << 21 | 1 << 24 | 1 << 25;
}

/// The types that CRIU knows, as far as a container has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FsType {
    /// Any file system that CRIU does not make itself: the root's, or that of a bind mount.
    Unsupported,
    /// `proc`
    Proc,
    /// `sysfs`
    Sysfs,
    /// `tmpfs`
    Tmpfs,
    /// `devpts`
    Devpts,
    /// `cgroup`
    Cgroup,
    /// `mqueue`
    Mqueue,
    /// `overlay`
    Overlay,
    /// `cgroup2`
    Cgroup2,
    /// One that no container gets by a restore (`AUTO`, `BINFMT_MISC`, `DEBUGFS`, ...).
    Other(u32),
}

const TMPFS: u32 = 5;
/// The number of `deleted`.
const DELETED: u64 = 16;

impl FsType {
    fn of(number: u32) -> Self {
        match number {
            0 => Self::Unsupported,
            1 => Self::Proc,
            2 => Self::Sysfs,
            TMPFS => Self::Tmpfs,
            6 => Self::Devpts,
            12 => Self::Cgroup,
            14 => Self::Mqueue,
            17 => Self::Overlay,
            23 => Self::Cgroup2,
            other => Self::Other(other),
        }
    }
}

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Type of the file system.
    pub fs_type: FsType,
    /// Its number.
    pub id: u32,
    /// The number of what it is mounted on.
    pub parent: u32,
    /// Device of the file system.
    pub device: u32,
    /// Flags of the mount.
    pub flags: u32,
    /// Flags of the file system.
    pub fs_flags: u32,
    /// The part of the file system that is mounted.
    pub root: String,
    /// What `mount(2)` is told to mount.
    pub source: String,
    /// Options of `mount(2)`.
    pub options: String,
    /// Where, in the container.
    pub destination: String,
    /// Under which name the runtime says what is mounted here, when it does.
    pub external: Option<String>,
    /// Whether a plugin of CRIU mounts it, or a file system is named by the image.
    pub is_foreign: bool,
    /// Whether what is mounted was removed from where it was: CRIU makes it again, and removes it when it is mounted.
    pub is_removed: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct MntEntry {
    #[prost(uint32, required, tag = "1")]
    fstype: u32,
    #[prost(uint32, required, tag = "2")]
    mnt_id: u32,
    #[prost(uint32, required, tag = "3")]
    root_dev: u32,
    #[prost(uint32, required, tag = "4")]
    parent_mnt_id: u32,
    #[prost(uint32, required, tag = "5")]
    flags: u32,
    #[prost(string, required, tag = "6")]
    root: String,
    #[prost(string, required, tag = "7")]
    mountpoint: String,
    #[prost(string, required, tag = "8")]
    source: String,
    #[prost(string, required, tag = "9")]
    options: String,
    #[prost(bool, optional, tag = "12")]
    with_plugin: Option<bool>,
    #[prost(bool, optional, tag = "13")]
    ext_mount: Option<bool>,
    #[prost(string, optional, tag = "14")]
    fsname: Option<String>,
    #[prost(bool, optional, tag = "16")]
    deleted: Option<bool>,
    #[prost(uint32, optional, tag = "17")]
    sb_flags: Option<u32>,
    #[prost(string, optional, tag = "18")]
    ext_key: Option<String>,
}

/// The mounts of each mount namespace.
///
/// # Errors
/// An image that cannot be read or says a thing twice.
pub fn mounts(dir: &Path) -> Result<Vec<Vec<Mount>>, ImageError> {
    let images = list(dir, Kind::Mounts)?;
    images
        .into_iter()
        .map(|(_, path)| read(&Image::read(&path, Kind::Mounts)?))
        .collect()
}

/// A mount that the new container has and the old one had not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewMount {
    /// Under which name the runtime says what is mounted.
    pub key: String,
    /// Where, in the container, without symbolic links.
    pub destination: String,
    /// `MS_RDONLY` and the like.
    pub flags: u32,
}

/// Adds mounts to the only mount namespace in the images of `dir`: CRIU mounts what the images say, and
/// nothing else of what the runtime offers it.
///
/// # Errors
/// There is not one mount namespace, or its image cannot be read or replaced.
pub fn add(dir: &Path, new: &[NewMount]) -> Result<(), ImageError> {
    let images = list(dir, Kind::Mounts)?;
    let [(_, path)] = images.as_slice() else {
        return Err(ImageError::MountNamespaces {
            dir: dir.to_path_buf(),
            count: images.len(),
        });
    };
    let image = Image::read(path, Kind::Mounts)?;
    let mut mounts = read(&image)?;
    let mut body = image.body().to_vec();
    // A mount below another one comes after it.
    let mut new: Vec<&NewMount> = new.iter().collect();
    new.sort_by(|one, other| one.destination.cmp(&other.destination));
    for mount in new {
        let unused = |used: u32| used.wrapping_add(1);
        let id = unused(mounts.iter().map(|it| it.id).max().unwrap_or_default());
        // To CRIU mounts of one device are parts of one file system.
        let device = unused(mounts.iter().map(|it| it.device).max().unwrap_or_default());
        let destination = Path::new(&mount.destination);
        let beneath = |it: &&Mount| destination.starts_with(&it.destination);
        let parent = { mounts.iter().filter(beneath) }
            .max_by_key(|it| Path::new(&it.destination).components().count());
        let entry = MntEntry {
            fstype: 0,
            mnt_id: id,
            root_dev: device,
            parent_mnt_id: parent.map_or(0, |parent| parent.id),
            flags: mount.flags,
            root: "/".to_owned(),
            mountpoint: mount.destination.clone(),
            sb_flags: Some(0),
            ext_key: Some(mount.key.clone()),
            ..MntEntry::default()
        };
        push_entry(&mut body, &entry);
        mounts.push(Mount {
            fs_type: FsType::Unsupported,
            id,
            parent: entry.parent_mnt_id,
            device,
            flags: mount.flags,
            fs_flags: 0,
            root: entry.root,
            source: entry.source,
            options: entry.options,
            destination: entry.mountpoint,
            external: entry.ext_key,
            is_foreign: false,
            is_removed: false,
        });
    }
    image.with_body(body).replace(path)
}

/// What is done with a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It stays as it is.
    Kept,
    /// It is not there any more.
    Removed,
    /// It becomes a tmpfs that CRIU makes, with these options of `mount(2)`.
    Tmpfs(&'static str),
    /// The runtime says under this name what is mounted.
    External(String),
}

/// Changes the mounts of all mount namespaces in the images of `dir` as `fate` says. Returns the devices of new
/// tmpfs: CRIU wants their content in `tmpfs-dev-<device>.tar.gz.img`. Mounts of one device are one tmpfs.
///
/// # Errors
/// An image that cannot be read or replaced.
pub fn change(dir: &Path, fate: impl Fn(&Mount) -> Fate) -> Result<BTreeSet<u32>, ImageError> {
    let mut devices = BTreeSet::new();
    for (_, path) in list(dir, Kind::Mounts)? {
        let image = Image::read(&path, Kind::Mounts)?;
        let mut body = Vec::new();
        let mut entries = image.entries();
        for mount in read(&image)? {
            let Some(message) = entries.next_bytes()? else {
                break;
            };
            let entry: MntEntry = image.decode(message)?;
            let entry = match fate(&mount) {
                Fate::Kept => {
                    push_bytes(&mut body, message);
                    continue;
                }
                Fate::Removed => continue,
                Fate::External(key) => MntEntry {
                    ext_key: Some(key),
                    deleted: None,
                    ..entry
                },
                Fate::Tmpfs(options) => {
                    devices.insert(mount.device);
                    MntEntry {
                        fstype: TMPFS,
                        root: "/".to_owned(),
                        source: "tmpfs".to_owned(),
                        options: options.to_owned(),
                        with_plugin: None,
                        ext_mount: None,
                        fsname: None,
                        deleted: None,
                        ext_key: None,
                        ..entry
                    }
                }
            };
            push_entry(&mut body, &entry);
        }
        image.with_body(body).replace(&path)?;
    }
    Ok(devices)
}

/// Forgets in the images of `dir` that what was mounted by the runtime had been removed from the node, as kubelet removes
/// the file of a `subPath` when its ConfigMap changes: the runtime says what is mounted now, and CRIU would make the
/// removed one there, where it finds the new one.
///
/// # Errors
/// An image that cannot be read or replaced.
pub fn forget_removed(dir: &Path) -> Result<(), ImageError> {
    let is_forgotten = |mount: &Mount| mount.is_removed && mount.external.is_some();
    for (_, path) in list(dir, Kind::Mounts)? {
        let image = Image::read(&path, Kind::Mounts)?;
        let mounts = read(&image)?;
        if !mounts.iter().any(is_forgotten) {
            continue;
        }
        let mut body = Vec::new();
        let mut entries = image.entries();
        for mount in &mounts {
            let Some(message) = entries.next_bytes()? else {
                break;
            };
            match is_forgotten(mount) {
                true => push_bytes(&mut body, &set_varints(message, DELETED, &[])),
                false => push_bytes(&mut body, message),
            }
        }
        image.with_body(body).replace(&path)?;
    }
    Ok(())
}

fn read(image: &Image) -> Result<Vec<Mount>, ImageError> {
    let mut entries = image.entries();
    let mut mounts = Vec::new();
    while let Some(message) = entries.next_bytes()? {
        if is_ambiguous(message, &[]) {
            return Err(image.ambiguous());
        }
        let entry: MntEntry = image.decode(message)?;
        // CRIU before 3.x kept the flags of the file system among those of the mount.
        let fs_flags = { entry.sb_flags }.unwrap_or(entry.flags & !flags::PROPAGATION);
        let external = match entry.ext_mount {
            Some(true) => Some(entry.root.clone()),
            _ => entry.ext_key,
        };
        mounts.push(Mount {
            fs_type: FsType::of(entry.fstype),
            id: entry.mnt_id,
            parent: entry.parent_mnt_id,
            device: entry.root_dev,
            flags: entry.flags,
            fs_flags,
            root: entry.root,
            source: entry.source,
            options: entry.options,
            destination: entry.mountpoint,
            external,
            is_foreign: entry.with_plugin == Some(true) || entry.fsname.is_some(),
            is_removed: entry.deleted == Some(true),
        });
    }
    Ok(mounts)
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    #[test]
    fn a_new_mount_is_on_what_it_lies_in() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mountpoints-12.img");
        let entry = |mnt_id, mountpoint: &str| MntEntry {
            mnt_id,
            mountpoint: mountpoint.to_owned(),
            root_dev: 30 + mnt_id,
            ..MntEntry::default()
        };
        let mut body = Vec::new();
        for entry in [entry(5, "/"), entry(6, "/data"), entry(7, "/database")] {
            push_entry(&mut body, &entry);
        }
        Image::new(&path, Kind::Mounts, body)
            .replace(&path)
            .unwrap();
        let new = |destination: &str, flags| NewMount {
            key: format!("/var{destination}"),
            destination: destination.to_owned(),
            flags,
        };
        add(
            dir.path(),
            &[new("/data/a/b", 0), new("/data/a", flags::READ_ONLY)],
        )
        .unwrap();
        let all = mounts(dir.path()).unwrap().remove(0);
        let seen = |mount: &Mount| {
            let external = mount.external.clone().unwrap_or_default();
            (mount.id, mount.parent, mount.flags, external)
        };
        assert_eq!(all.len(), 5);
        assert_eq!(
            seen(&all[3]),
            (8, 6, flags::READ_ONLY, "/var/data/a".into())
        );
        assert_eq!(seen(&all[4]), (9, 8, 0, "/var/data/a/b".into()));
        assert!(all[3].device != all[4].device);
        let fate = |mount: &Mount| match mount.destination.as_str() {
            "/database" => Fate::Removed,
            "/data/a" => Fate::Tmpfs("size=4k"),
            "/data/a/b" => Fate::External("b".to_owned()),
            _ => Fate::Kept,
        };
        let devices = change(dir.path(), fate).unwrap();
        assert_eq!(devices, BTreeSet::from([all[3].device]));
        let left = mounts(dir.path()).unwrap().remove(0);
        let names: Vec<_> = left.iter().map(|it| it.destination.as_str()).collect();
        assert_eq!(names, ["/", "/data", "/data/a", "/data/a/b"]);
        assert_eq!((left[2].fs_type, &left[2].external), (FsType::Tmpfs, &None));
        assert_eq!(left[3].external.as_deref(), Some("b"));
    }

    #[test]
    fn what_the_runtime_mounts_was_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mountpoints-12.img");
        let entry = |mnt_id, ext_key: Option<&str>| MntEntry {
            mnt_id,
            mountpoint: format!("/{mnt_id}"),
            deleted: Some(true),
            ext_key: ext_key.map(ToOwned::to_owned),
            ..MntEntry::default()
        };
        let mut body = Vec::new();
        for entry in [entry(5, None), entry(6, Some("/6"))] {
            // A field that is not looked at, `shared_id`.
            push_bytes(&mut body, &set_varints(&entry.encode_to_vec(), 10, &[7]));
        }
        Image::new(&path, Kind::Mounts, body)
            .replace(&path)
            .unwrap();
        forget_removed(dir.path()).unwrap();
        let left = mounts(dir.path()).unwrap().remove(0);
        let removed: Vec<bool> = left.iter().map(|it| it.is_removed).collect();
        assert_eq!(removed, [true, false]);
        let image = Image::read(&path, Kind::Mounts).unwrap();
        let mut entries = image.entries();
        while let Some(entry) = entries.next_bytes().unwrap() {
            let fields = super::super::strict::fields(entry).unwrap();
            assert!(fields.iter().any(|field| field.number == 10));
        }
    }
}
