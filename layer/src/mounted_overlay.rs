//! An overlay as `/proc/self/mountinfo` shows it, with all that is needed to mount it again.
//!
//! ```text
//! 90 20 0:50 / /run/b/rootfs rw,nosuid shared:7 - overlay overlay rw,lowerdir=12/fs:11/fs,upperdir=...
//! id parent device root  mount point  flags  optional fields...  - type source super block options
//! ```
//!
//! Blanks, backslashes and, inside the value of an option, commas are written as three octal digits.
//! The labels of SELinux are the exception: they stand in quotes, with their commas as they are.

use std::path::{Path, PathBuf};

use crate::overlay_stack::{OverlayStack, StackError, read_overlay};

/// A mounted overlay.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MountedOverlay {
    /// Its directories.
    pub stack: OverlayStack,
    /// Flags of the mount point, such as `nosuid`.
    pub flags: Vec<String>,
    /// What `mount(2)` takes as data to mount it again, in the directory [`Self::base`].
    pub data: String,
    /// Where overlay prepares files.
    pub workdir: Option<PathBuf>,
    /// Whether it leaves what is written in memory (`volatile`): then it marks the workdir, and refuses a
    /// second mount of it.
    pub is_volatile: bool,
    /// The directory that relative lowerdirs are relative to: containerd shortens a list that is longer than
    /// a page by changing into `<snapshots>`, where each snapshot is `<id>/fs`.
    pub base: PathBuf,
}

impl MountedOverlay {
    /// Reads the last mount on `mount_point` from the text of `/proc/self/mountinfo`.
    ///
    /// # Errors
    /// See [`StackError`]: nothing is mounted there, no overlay, or one that cannot be written to or whose
    /// options are not all understood.
    pub fn on(mount_point: &Path, mountinfo: &str) -> Result<Self, StackError> {
        let is_there = |line: &&str| {
            let field = line.split(' ').nth(4);
            field.is_some_and(|field| Path::new(&unescaped_text(field)) == mount_point)
        };
        let not_mounted = || StackError::NotMounted(mount_point.to_path_buf());
        let line = mountinfo.lines().rfind(is_there).ok_or_else(not_mounted)?;
        let (mount, file_system) = line.split_once(" - ").ok_or_else(not_mounted)?;
        let mut fields = file_system.split(' ');
        let fs_type = fields.next().unwrap_or_default();
        if fs_type != "overlay" {
            return Err(StackError::FsType(fs_type.to_owned()));
        }
        let options: Vec<_> = split_options(fields.nth(1).unwrap_or_default())
            .into_iter()
            .map(unescaped_text)
            .collect();
        let upperdir = options
            .iter()
            .find_map(|option| option.strip_prefix("upperdir="))
            .map(Path::new);
        let Some(base) = upperdir.and_then(|dir| dir.ancestors().nth(2)) else {
            return Err(StackError::FsType("overlay, read-only".to_owned()));
        };
        let base = base.to_path_buf();
        if !base.is_absolute() {
            // Relative to where whoever has mounted it was.
            return Err(StackError::Directory(base.display().to_string()));
        }
        let stack = read_overlay(options.iter().map(String::as_str), Some(&base))?;
        // What the kernel adds to the options that it was given.
        let given = |option: &&str| !matches!(*option, "rw" | "ro" | "seclabel");
        let given: Vec<_> = options.iter().map(String::as_str).filter(given).collect();
        let flags = mount.split(' ').nth(5).unwrap_or_default();
        let mut flags: Vec<_> = flags.split(',').map(str::to_owned).collect();
        // The whole file system may be, where this mount of it says `rw`.
        if !stack.is_writable {
            flags.retain(|flag| flag != "rw" && flag != "ro");
            flags.push("ro".to_owned());
        }
        Ok(MountedOverlay {
            stack,
            flags,
            data: given.join(","),
            workdir: { options.iter() }
                .find_map(|option| option.strip_prefix("workdir="))
                .map(PathBuf::from),
            is_volatile: { options.iter() }
                .any(|option| matches!(option.as_str(), "volatile" | "fsync=volatile")),
            base,
        })
    }
}

/// Splits at the commas outside of quotes.
fn split_options(text: &str) -> Vec<&str> {
    let mut options = Vec::new();
    let mut rest = text;
    loop {
        let is_label = rest
            .split_once("context=\"")
            .is_some_and(|(kind, _)| matches!(kind, "" | "fs" | "def" | "root"));
        let quoted = if is_label {
            rest.splitn(3, '"').take(2).map(|part| part.len() + 1).sum()
        } else {
            0
        };
        match rest.get(quoted..).and_then(|behind| behind.find(',')) {
            Some(comma) => {
                options.push(&rest[..quoted + comma]);
                rest = &rest[quoted + comma + 1..];
            }
            None => {
                options.push(rest);
                return options;
            }
        }
    }
}

/// Turns `\040` and the like, as in `/proc/self/mountinfo`, into the bytes that they stand for.
#[must_use]
pub fn unescape_octal(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let code = tail
            .get(..3)
            .filter(|digits| {
                byte == b'\\' && digits.iter().all(|digit| matches!(digit, b'0'..=b'7'))
            })
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match code {
            Some(code) => {
                bytes.push(code);
                rest = &tail[3..];
            }
            None => {
                bytes.push(byte);
                rest = tail;
            }
        }
    }
    bytes
}

/// The same of text: only ASCII is written that way.
fn unescaped_text(field: &str) -> String {
    let bytes = unescape_octal(field.as_bytes());
    String::from_utf8(bytes).unwrap_or_else(|_| field.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::OverlayXattrs;

    const SNAPSHOTS: &str = "/var/lib/containerd/x/snapshots";

    #[test]
    fn a_mount_is_read_as_it_can_be_made_again() {
        let info = format!(
            "20 1 8:1 / / rw - ext4 /dev/vda rw\n\
             90 20 0:50 / /run/b/rootfs rw,nosuid,relatime shared:7 - overlay overlay \
             rw,lowerdir=12/fs:11/fs,upperdir={SNAPSHOTS}/13/fs,workdir={SNAPSHOTS}/13/work,index=off\n"
        );
        let mount = MountedOverlay::on(Path::new("/run/b/rootfs"), &info).unwrap();
        assert_eq!(mount.stack.top, Path::new(SNAPSHOTS).join("13/fs"));
        assert_eq!(mount.stack.lowerdirs[0], Path::new(SNAPSHOTS).join("12/fs"));
        assert_eq!(mount.flags, ["rw", "nosuid", "relatime"]);
        assert!(mount.data.starts_with("lowerdir=12/fs:11/fs,upperdir="));
        assert!(mount.data.ends_with("index=off"));
        let read_only = info.replace("rw,lowerdir", "ro,lowerdir");
        let read_only = MountedOverlay::on(Path::new("/run/b/rootfs"), &read_only).unwrap();
        assert_eq!(read_only.flags, ["nosuid", "relatime", "ro"]);
        for (path, error) in [
            ("/", "mounts of type \"ext4\""),
            ("/elsewhere", "nothing is mounted on \"/elsewhere\""),
        ] {
            let read = MountedOverlay::on(Path::new(path), &info);
            assert_eq!(read.unwrap_err().to_string(), error);
        }
    }

    #[test]
    fn the_last_mount_on_a_path_counts() {
        let info = "\
40 22 0:41 / /b/rootfs rw - overlay overlay rw,lowerdir=/l,upperdir=/s/1/fs,workdir=/w\n\
41 22 0:42 / /b/rootfs rw - overlay overlay rw,lowerdir=/l,upperdir=/s/2/fs,workdir=/w\n\
42 22 0:43 / /c/rootfs rw - overlay overlay ro,lowerdir=/l:/m\n";
        let on = |path: &str| MountedOverlay::on(Path::new(path), info);
        assert_eq!(on("/b/rootfs").unwrap().stack.top, Path::new("/s/2/fs"));
        assert!(on("/c/rootfs").is_err());
    }

    #[test]
    fn odd_characters_and_labels_are_read() {
        let info = "90 20 0:50 / /run/a\\040b rw - overlay overlay rw,\
                    context=\"system_u:object_r:container_file_t:s0:c1,c2\",\
                    lowerdir=/l\\040m:/c\\134:d,upperdir=/s/1\\054/fs,workdir=/w,userxattr\n";
        let mount = MountedOverlay::on(Path::new("/run/a b"), info).unwrap();
        assert_eq!(mount.stack.top, Path::new("/s/1,/fs"));
        assert_eq!(
            mount.stack.lowerdirs,
            [Path::new("/l m"), Path::new("/c:d")]
        );
        assert_eq!(mount.stack.overlay_xattrs, OverlayXattrs::User);
        assert!(
            mount
                .data
                .starts_with("context=\"system_u:object_r:container_file_t:s0:c1,c2\",")
        );
        let unknown = info.replace("userxattr", "new=on");
        let read = MountedOverlay::on(Path::new("/run/a b"), &unknown);
        assert_eq!(read, Err(StackError::Option("new=on".to_owned())));
    }
}
