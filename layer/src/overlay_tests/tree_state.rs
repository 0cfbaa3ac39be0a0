//! Everything that a program can see of a tree, for comparison.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::sparse::{Segment, find_segments};
use crate::xattrs::{XattrHolder, XattrReader};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileState {
    pub(crate) mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    device: u64,
    pub(crate) size: u64,
    /// Data or link target, long ones by their hash.
    content: Vec<u8>,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl FileState {
    /// Forgets what GNU tar does not write: outside of its PAX format all attributes and the
    /// nanoseconds; with `--xattrs` what belongs to other options (ACLs, and all but user.*).
    pub(crate) fn forget_what_tar_lacks(&mut self, is_pax: bool) {
        self.xattrs
            .retain(|name, _| is_pax && name.starts_with(b"user."));
        if !is_pax {
            self.mtime.1 = 0;
        }
    }

    /// Forgets when it was changed.
    pub(crate) fn forget_time(&mut self) {
        self.mtime = (0, 0);
    }

    /// Forgets what libarchive 3.6 (Debian 12) does not take from PAX records: attributes, which it
    /// knows under a key of its own, and fractions of seconds before 1970, which it adds.
    pub(crate) fn forget_what_libarchive_lacks(&mut self) {
        self.xattrs.clear();
        if self.mtime.0 <= 0 {
            self.mtime = (0, 0);
        }
    }
}

pub(crate) type TreeState = BTreeMap<PathBuf, FileState>;

fn relative_paths(root: &Path) -> Vec<PathBuf> {
    let mut paths = vec![PathBuf::new()];
    let mut next = 0;
    while next < paths.len() {
        let path = root.join(&paths[next]);
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            for entry in fs::read_dir(&path).unwrap() {
                let below = paths[next].join(entry.unwrap().file_name());
                paths.push(below);
            }
        }
        next += 1;
    }
    paths
}

/// Reads the tree below `root`, the root itself as the empty path.
pub(crate) fn read_tree(root: &Path) -> TreeState {
    let mut reader = XattrReader::new();
    relative_paths(root)
        .into_iter()
        .map(|path| {
            let state = read_file(&mut reader, &root.join(&path));
            (path, state)
        })
        .collect()
}

fn read_file(reader: &mut XattrReader, path: &Path) -> FileState {
    let metadata = fs::symlink_metadata(path)
        .unwrap_or_else(|error| panic!("{} is listed, but: {error}", path.display()));
    let file_type = metadata.file_type();
    let content = if file_type.is_symlink() {
        fs::read_link(path).unwrap().as_os_str().as_bytes().to_vec()
    } else if file_type.is_file() {
        fs::read(path).unwrap()
    } else {
        Vec::new()
    };
    let mut xattrs = BTreeMap::new();
    let directory = fs::File::open(path.parent().unwrap()).unwrap();
    let name = path.file_name().map_or(&b"."[..], OsStr::as_bytes);
    let holder = XattrHolder::Named {
        directory: std::os::fd::AsFd::as_fd(&directory),
        name,
    };
    reader
        .for_each(
            holder,
            |_| true,
            |name, value| {
                xattrs.insert(name.to_vec(), value.to_vec());
            },
        )
        .unwrap();
    let is_device = file_type.is_char_device() || file_type.is_block_device();
    FileState {
        mode: metadata.mode(),
        owner: (metadata.uid(), metadata.gid()),
        mtime: (metadata.mtime(), metadata.mtime_nsec()),
        device: if is_device { metadata.rdev() } else { 0 },
        size: if metadata.is_dir() {
            0
        } else {
            metadata.size()
        },
        content,
        xattrs,
    }
}

/// Names the first differences of two trees, for a message one can read.
pub(crate) fn differences(before: &TreeState, after: &TreeState) -> Vec<String> {
    let paths: BTreeSet<_> = before.keys().chain(after.keys()).collect();
    paths
        .into_iter()
        .filter(|path| before.get(*path) != after.get(*path))
        .map(|path| {
            format!(
                "{}:\n  before {:?}\n  after  {:?}",
                path.display(),
                before.get(path),
                after.get(path)
            )
        })
        .take(5)
        .collect()
}

/// Sets of names of the same inode in an upperdir, whiteouts and sockets aside.
pub(crate) fn link_groups(upperdir: &Path) -> BTreeSet<BTreeSet<PathBuf>> {
    let mut groups: HashMap<u64, BTreeSet<PathBuf>> = HashMap::new();
    for path in relative_paths(upperdir) {
        let metadata = fs::symlink_metadata(upperdir.join(&path)).unwrap();
        let is_whiteout = metadata.file_type().is_char_device() && metadata.rdev() == 0;
        if !metadata.is_dir() && !is_whiteout && !metadata.file_type().is_socket() {
            groups.entry(metadata.ino()).or_default().insert(path);
        }
    }
    groups
        .into_values()
        .filter(|group| group.len() > 1)
        .collect()
}

/// Where the regular files of an upperdir have holes.
pub(crate) fn holes(upperdir: &Path) -> BTreeMap<PathBuf, Vec<Segment>> {
    relative_paths(upperdir)
        .into_iter()
        .filter_map(|path| {
            let metadata = fs::symlink_metadata(upperdir.join(&path)).unwrap();
            if !metadata.is_file() {
                return None;
            }
            let file = fs::File::open(upperdir.join(&path)).unwrap();
            find_segments(&file, metadata.len())
                .unwrap()
                .map(|segments| (path, segments))
        })
        .collect()
}

/// Takes out the sockets: those that are in the upperdir, because a layer cannot have them, or all.
pub(crate) fn without_upper_sockets(mut tree: TreeState, upperdir: Option<&PathBuf>) -> TreeState {
    let is_socket = |mode: u32| mode & 0o170_000 == 0o140_000;
    tree.retain(|path, state| {
        !is_socket(state.mode)
            || upperdir.is_some_and(|dir| fs::symlink_metadata(dir.join(path)).is_err())
    });
    tree
}
