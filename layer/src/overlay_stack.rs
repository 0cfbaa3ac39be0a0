//! The directories of an overlay, read from how it is mounted.
//!
//! A snapshotter describes a snapshot by mounts, and for overlayfs they name its directories; the
//! kernel tells the same in `/proc/self/mountinfo` ([`MountedOverlay`]):
//!
//! ```text
//! overlay  upperdir=U,lowerdir=P:G     active, parents P (nearest) and G     top U   lower P, G   writable
//! overlay  lowerdir=C:P:G              view of C                             top C   lower P, G
//! overlay  ...,lowerdir=P::D           D has data only, for metacopy files                 data D
//! bind     C                           view of C, which has no parent        top C
//! bind     U                           active, no parent                     top U                writable
//! ```
//!
//! An option that is not known is an error that names it: it may change what the directories mean.
//! Inside `lowerdir=` a backslash makes the colon (or backslash) behind it part of a name; in the
//! other options it does so for a comma.
//!
//! [`MountedOverlay`]: crate::MountedOverlay

use std::path::{Path, PathBuf};

use crate::overlay_marks::OverlayXattrs;

/// One mount as containerd's API has it (`containerd.types.Mount`).
#[derive(Debug, Clone, Copy)]
pub struct MountFields<'a> {
    /// `overlay`, `bind`, ...
    pub fs_type: &'a str,
    /// The directory of a bind mount; overlay does not look at it.
    pub source: &'a str,
    /// Where below the root of the snapshot it is mounted; empty for the root itself.
    pub target: &'a str,
    /// The options, one a string.
    pub options: &'a [String],
}

/// The directories that make up one snapshot, and how overlay reads them.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct OverlayStack {
    /// What the snapshot adds to the layers below: the upperdir, or the topmost lowerdir of a view.
    pub top: PathBuf,
    /// The merged layers below it, nearest first.
    pub lowerdirs: Vec<PathBuf>,
    /// Layers that show nothing by themselves and only hold data for `metacopy` files (Linux 6.5).
    pub data_dirs: Vec<PathBuf>,
    /// Whether the mount lets its users write, which changes `top`.
    pub is_writable: bool,
    /// Where overlay keeps its marks.
    pub overlay_xattrs: OverlayXattrs,
    /// The layers below are shown through an id mapping (`uidmap=`, `gidmap=`: a pod in a user namespace of
    /// its own): their owners on the disk are not those that the container sees.
    pub has_idmapped_lowers: bool,
}

/// Why mounts do not tell the directories of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StackError {
    /// A snapshot of overlay's is one mount.
    #[error("{0} mounts")]
    MountCount(usize),
    /// The mount is not that of the whole snapshot.
    #[error("mounted on {0:?}")]
    Target(String),
    /// Neither an overlay nor a bind mount.
    #[error("mounts of type {0:?}")]
    FsType(String),
    /// An option whose effect on the directories is not known.
    #[error("mount option {0:?}")]
    Option(String),
    /// A directory that is not absolute, or that is empty.
    #[error("the directory {0:?}")]
    Directory(String),
    /// An overlay without a lower layer.
    #[error("an overlay without lowerdir=")]
    NoLowerdir,
    /// Nothing is mounted there.
    #[error("nothing is mounted on {0:?}")]
    NotMounted(PathBuf),
}

impl OverlayStack {
    /// A directory, to be read and written as if it were mounted by root over `lowerdirs` (nearest
    /// first).
    pub fn new(top: impl Into<PathBuf>, lowerdirs: impl Into<Vec<PathBuf>>) -> Self {
        OverlayStack {
            top: top.into(),
            lowerdirs: lowerdirs.into(),
            data_dirs: Vec::new(),
            is_writable: true,
            overlay_xattrs: OverlayXattrs::Trusted,
            has_idmapped_lowers: false,
        }
    }

    /// The same directories, mounted with the marks in another place.
    #[must_use]
    pub fn with_overlay_xattrs(mut self, overlay_xattrs: OverlayXattrs) -> Self {
        self.overlay_xattrs = overlay_xattrs;
        self
    }

    /// Reads the mounts that a snapshotter gives for a snapshot.
    ///
    /// ```
    /// use transship_layer::{MountFields, OverlayStack};
    ///
    /// let options = ["workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/2/fs:/s/1/fs"];
    /// let options: Vec<_> = options.iter().map(ToString::to_string).collect();
    /// let mount = MountFields { fs_type: "overlay", source: "overlay", target: "", options: &options };
    /// let stack = OverlayStack::from_mounts([mount])?;
    /// assert_eq!(stack.top.to_str(), Some("/s/3/fs"));
    /// assert_eq!(stack.lowerdirs.len(), 2);
    /// # Ok::<(), transship_layer::StackError>(())
    /// ```
    ///
    /// # Errors
    /// See [`StackError`]: the mounts are none of an overlay, or say what is not understood.
    pub fn from_mounts<'a>(
        mounts: impl IntoIterator<Item = MountFields<'a>>,
    ) -> Result<Self, StackError> {
        let mounts: Vec<_> = mounts.into_iter().collect();
        let [mount] = &mounts[..] else {
            return Err(StackError::MountCount(mounts.len()));
        };
        if !matches!(mount.target, "" | "/") {
            return Err(StackError::Target(mount.target.to_owned()));
        }
        match mount.fs_type {
            "bind" => read_bind(mount),
            "overlay" => read_overlay(mount.options.iter().map(String::as_str), None),
            other => Err(StackError::FsType(other.to_owned())),
        }
    }
}

fn read_bind(mount: &MountFields<'_>) -> Result<OverlayStack, StackError> {
    let unknown = |option: &&String| !matches!(option.as_str(), "bind" | "rbind" | "ro" | "rw");
    if let Some(option) = mount.options.iter().find(unknown) {
        return Err(StackError::Option(option.clone()));
    }
    let is_writable = !mount.options.iter().any(|option| option == "ro");
    Ok(OverlayStack {
        is_writable,
        ..OverlayStack::new(absolute(mount.source, None)?, [])
    })
}

/// Reads the options of an overlay. `base` is what relative lowerdirs are relative to.
pub(crate) fn read_overlay<'a>(
    options: impl IntoIterator<Item = &'a str>,
    base: Option<&Path>,
) -> Result<OverlayStack, StackError> {
    let mut upper = None;
    let (mut lower, mut data) = (Vec::new(), Vec::new());
    let (mut is_read_only, mut is_idmapped) = (false, false);
    let mut overlay_xattrs = OverlayXattrs::Trusted;
    for option in options {
        match option.split_once('=').unwrap_or((option, "")) {
            ("upperdir", dir) => upper = Some(absolute(&unescape(dir), base)?),
            ("lowerdir", dirs) => (lower, data) = split_lowerdirs(dirs, base)?,
            // One directory each, nothing escaped (Linux 6.8).
            ("lowerdir+", dir) => lower.push(absolute(dir, base)?),
            ("datadir+", dir) => data.push(absolute(dir, base)?),
            ("userxattr", _) => overlay_xattrs = OverlayXattrs::User,
            ("uidmap" | "gidmap", _) => is_idmapped = true,
            ("ro", _) => is_read_only = true,
            // These change how the kernel keeps its books, whose rights it uses, which label it shows, or are
            // seen in the layer by themselves (redirect_dir, metacopy).
            (
                "workdir"
                | "rw"
                | "index"
                | "volatile"
                | "fsync"
                | "xino"
                | "nfs_export"
                | "uuid"
                | "redirect_dir"
                | "metacopy"
                | "verity"
                | "noatime"
                | "nodiratime"
                | "relatime"
                | "default_permissions"
                | "override_creds"
                | "nooverride_creds"
                | "seclabel"
                | "context"
                | "fscontext"
                | "defcontext"
                | "rootcontext",
                _,
            ) => {}
            _ => return Err(StackError::Option(option.to_owned())),
        }
    }
    let is_writable = upper.is_some() && !is_read_only;
    let mut dirs = upper.into_iter().chain(lower);
    let top = dirs.next().ok_or(StackError::NoLowerdir)?;
    let lowerdirs: Vec<_> = dirs.collect();
    // The kernel takes no upperdir alone.
    if lowerdirs.is_empty() && is_writable {
        return Err(StackError::NoLowerdir);
    }
    Ok(OverlayStack {
        top,
        lowerdirs,
        data_dirs: data,
        is_writable,
        overlay_xattrs,
        has_idmapped_lowers: is_idmapped,
    })
}

/// Splits `a:b::c` into the merged layers a, b and the data-only layer c.
fn split_lowerdirs(
    dirs: &str,
    base: Option<&Path>,
) -> Result<(Vec<PathBuf>, Vec<PathBuf>), StackError> {
    let (mut lower, mut data) = (Vec::new(), Vec::new());
    let mut is_data = false;
    let mut parts = split_unescaped(dirs, ':').into_iter();
    while let Some(part) = parts.next() {
        let part = if part.is_empty() && !lower.is_empty() {
            is_data = true;
            parts.next().unwrap_or_default()
        } else if is_data {
            // The kernel: no merged layer behind a data-only one.
            return Err(StackError::Directory(part.to_owned()));
        } else {
            part
        };
        let dir = absolute(&unescape(part), base)?;
        if is_data { &mut data } else { &mut lower }.push(dir);
    }
    Ok((lower, data))
}

/// Splits at each `separator` that has no backslash before it.
fn split_unescaped(text: &str, separator: char) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut start, mut is_escaped) = (0, false);
    for (at, character) in text.char_indices() {
        if is_escaped {
            is_escaped = false;
        } else if character == '\\' {
            is_escaped = true;
        } else if character == separator {
            parts.push(&text[start..at]);
            start = at + separator.len_utf8();
        }
    }
    parts.push(&text[start..]);
    parts
}

/// Takes each backslash away and the character behind it literally, as `ovl_unescape` of the kernel.
fn unescape(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => plain.extend(characters.next()),
            character => plain.push(character),
        }
    }
    plain
}

fn absolute(dir: &str, base: Option<&Path>) -> Result<PathBuf, StackError> {
    match base {
        _ if Path::new(dir).is_absolute() => Ok(PathBuf::from(dir)),
        Some(base) if !dir.is_empty() => Ok(base.join(dir)),
        _ => Err(StackError::Directory(dir.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<OverlayStack, StackError> {
        let mut words = text.split(' ');
        let (fs_type, source) = (words.next().unwrap(), words.next().unwrap());
        let options: Vec<_> = words
            .flat_map(|word| word.split(';'))
            .map(str::to_owned)
            .collect();
        OverlayStack::from_mounts([MountFields {
            fs_type,
            source,
            target: "",
            options: &options,
        }])
    }

    fn shown(dirs: &[PathBuf]) -> String {
        let dirs: Vec<_> = dirs.iter().map(|dir| dir.to_str().unwrap()).collect();
        dirs.join(" ")
    }

    #[test]
    fn mounts_name_the_directories() {
        for (mount, top, lower, data, writable) in [
            (
                "overlay overlay index=off;workdir=/w;upperdir=/u;lowerdir=/b:/a",
                "/u",
                "/b /a",
                "",
                true,
            ),
            (
                "overlay overlay lowerdir=/c:/b:/a",
                "/c",
                "/b /a",
                "",
                false,
            ),
            (
                "overlay overlay upperdir=/u;lowerdir=/a;ro",
                "/u",
                "/a",
                "",
                false,
            ),
            ("bind /c ro;rbind", "/c", "", "", false),
            ("bind /u rw;rbind", "/u", "", "", true),
            (
                "overlay overlay upperdir=/u;lowerdir=/a::/d::/e",
                "/u",
                "/a",
                "/d /e",
                true,
            ),
            (
                "overlay overlay upperdir=/u;lowerdir+=/b;lowerdir+=/a;datadir+=/d",
                "/u",
                "/b /a",
                "/d",
                true,
            ),
            (
                r"overlay overlay upperdir=/u\,v;lowerdir=/a\:b:/c\\d",
                "/u,v",
                r"/a:b /c\d",
                "",
                true,
            ),
        ] {
            let stack = read(mount).unwrap();
            assert_eq!(stack.top, Path::new(top), "{mount}");
            assert_eq!(shown(&stack.lowerdirs), lower, "{mount}");
            assert_eq!(shown(&stack.data_dirs), data, "{mount}");
            assert_eq!(stack.is_writable, writable, "{mount}");
            assert_eq!(stack.overlay_xattrs, OverlayXattrs::Trusted, "{mount}");
            assert!(!stack.has_idmapped_lowers, "{mount}");
        }
    }

    #[test]
    fn how_it_is_mounted_is_kept() {
        let stack = read("overlay overlay userxattr;upperdir=/u;lowerdir=/a").unwrap();
        assert_eq!(stack.overlay_xattrs, OverlayXattrs::User);
        let stack = read("overlay overlay uidmap=0:1:2;gidmap=0:1:2;upperdir=/u;lowerdir=/a");
        assert!(stack.unwrap().has_idmapped_lowers);
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (mount, error) in [
            ("btrfs /dev/sda subvol=1", "mounts of type \"btrfs\""),
            (
                "overlay overlay upperdir=/u;lowerdir=/a;new=x",
                "mount option \"new=x\"",
            ),
            ("bind /u uidmap=0:1:2;rw", "mount option \"uidmap=0:1:2\""),
            ("bind u rw", "the directory \"u\""),
            (
                "overlay overlay upperdir=u;lowerdir=/a",
                "the directory \"u\"",
            ),
            (
                "overlay overlay upperdir=/u;lowerdir=/a:b",
                "the directory \"b\"",
            ),
            (
                "overlay overlay upperdir=/u;lowerdir=",
                "the directory \"\"",
            ),
            (
                "overlay overlay upperdir=/u;lowerdir=:/a",
                "the directory \"\"",
            ),
            (
                "overlay overlay upperdir=/u;lowerdir=/a::",
                "the directory \"\"",
            ),
            (
                "overlay overlay upperdir=/u;lowerdir=/a::/d:/b",
                "the directory \"/b\"",
            ),
            (
                "overlay overlay upperdir=/u;workdir=/w",
                "an overlay without lowerdir=",
            ),
        ] {
            assert_eq!(read(mount).unwrap_err().to_string(), error, "{mount}");
        }
        let none = OverlayStack::from_mounts([]);
        assert_eq!(none, Err(StackError::MountCount(0)));
    }
}
