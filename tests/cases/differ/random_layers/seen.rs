//! All that a program can see of a snapshot.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Context as _, ensure};
use containerd_client::types::Mount;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::SFlag;
use transship_testbed::Node;

/// What is seen of one name. Access times are left out: reading changes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    mode: u32,
    owner: (u32, u32),
    pub(super) mtime: (i64, i64),
    device: u64,
    size: u64,
    /// How many names it has, and the first of them.
    links: (u64, String),
    /// A hash of the data, or the text of a symlink.
    content: String,
    xattrs: BTreeMap<String, Vec<u8>>,
}

impl Seen {
    pub(super) fn is_directory(&self) -> bool {
        SFlag::from_bits_truncate(self.mode) & SFlag::S_IFMT == SFlag::S_IFDIR
    }
}

pub(super) type Tree = BTreeMap<String, Seen>;

/// Enters a copy of the node's mount namespace, with this thread alone: overlay takes no directories of
/// another one, and nothing stays mounted.
pub(super) fn enter_mounts_of(node: &Node) -> anyhow::Result<()> {
    let namespace = fs::File::open(format!("/proc/{}/ns/mnt", node.pid()))?;
    unshare(CloneFlags::CLONE_FS)?;
    setns(namespace, CloneFlags::CLONE_NEWNS)?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none: Option<&str> = None;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    Ok(mount(none, "/", none, private, none)?)
}

/// Mounts a view and reads it. Names that are listed and cannot be opened are left out and counted.
pub(super) fn read_view(mounts: &[Mount]) -> anyhow::Result<(Tree, usize)> {
    let [view] = mounts else {
        anyhow::bail!("{mounts:?}");
    };
    if view.r#type == "bind" {
        return read(Path::new(&view.source));
    }
    let (overlay, at, options) = (Some("overlay"), Path::new("/mnt"), view.options.join(","));
    mount(
        overlay,
        at,
        overlay,
        MsFlags::MS_RDONLY,
        Some(options.as_str()),
    )
    .with_context(|| format!("cannot mount {options}"))?;
    let seen = read(at);
    umount2(at, MntFlags::empty())?;
    seen
}

fn read(root: &Path) -> anyhow::Result<(Tree, usize)> {
    let mut reading = Reading::default();
    reading.read(root, "")?;
    Ok((reading.tree, reading.ghosts))
}

#[derive(Default)]
struct Reading {
    tree: Tree,
    ghosts: usize,
    first_names: HashMap<(u64, u64), String>,
}

impl Reading {
    fn read(&mut self, dir: &Path, path: &str) -> anyhow::Result<()> {
        let mut names: Vec<_> = fs::read_dir(dir)?.collect::<Result<_, _>>()?;
        names.sort_by_key(fs::DirEntry::file_name);
        for name in names {
            let below = format!("{path}/{}", name.file_name().display());
            let metadata = match fs::symlink_metadata(name.path()) {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    self.ghosts += 1;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let seen = self.see(&name.path(), &below, &metadata)?;
            ensure!(
                self.tree.insert(below.clone(), seen).is_none(),
                "{below} is there twice"
            );
            if metadata.is_dir() {
                self.read(&name.path(), &below)?;
            }
        }
        Ok(())
    }

    fn see(&mut self, path: &Path, name: &str, metadata: &fs::Metadata) -> anyhow::Result<Seen> {
        let kind = metadata.file_type();
        let content = if kind.is_file() {
            transship_digest::sha256_hex(fs::read(path)?)
        } else if kind.is_symlink() {
            transship_digest::hex(fs::read_link(path)?.as_os_str().as_bytes())
        } else {
            String::new()
        };
        let links = if kind.is_dir() {
            (0, String::new())
        } else {
            let inode = (metadata.dev(), metadata.ino());
            let first = self
                .first_names
                .entry(inode)
                .or_insert_with(|| name.to_owned());
            (metadata.nlink(), first.clone())
        };
        Ok(Seen {
            mode: metadata.mode(),
            owner: (metadata.uid(), metadata.gid()),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            device: metadata.rdev(),
            size: if kind.is_dir() { 0 } else { metadata.size() },
            links,
            content,
            xattrs: read_xattrs(path)?,
        })
    }
}

fn read_xattrs(path: &Path) -> anyhow::Result<BTreeMap<String, Vec<u8>>> {
    let mut names = vec![0; 65536];
    let len = match rustix::fs::llistxattr(path, &mut names[..]) {
        Err(rustix::io::Errno::NOTSUP) => 0,
        len => len?,
    };
    let names = names[..len]
        .split(|byte| *byte == 0)
        // A lowest layer is seen without an overlay, and so its marks are.
        .filter(|name| !name.is_empty() && !name.starts_with(b"trusted.overlay."));
    names
        .map(|name| {
            let mut value = vec![0; 65536];
            let len = rustix::fs::lgetxattr(path, name, &mut value[..])?;
            value.truncate(len);
            Ok((String::from_utf8_lossy(name).into_owned(), value))
        })
        .collect()
}
