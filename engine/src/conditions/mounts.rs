//! Mounts that the spec does not know: what an OCI hook, a CDI device or somebody with nsenter has
//! mounted. And those that share with others what is mounted below them.
//!
//! ```text
//! 332 310 254:0 /usr/lib/driver /driver rw,relatime shared:7 master:1 - ext4 /dev/vda rw
//! id  parent device  root       mount point          peers            type
//! ```
//!
//! CRIU makes again what has no device (proc, tmpfs, ...) when the whole of it is mounted, what the runtime
//! tells it of (the spec's bind mounts), and a part of a file system that the container has another mount of.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use procfs::process::{MountInfo, MountOptFields};
use transship_checkpoint::spec::Spec;

use super::{Hit, Subject};
use crate::process_files;

/// Types that CRIU mounts again by themselves (`criu/filesystems.c`).
const MADE_AGAIN: [&str; 16] = [
    "autofs",
    "binfmt_misc",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "fusectl",
    "mqueue",
    "overlay",
    "proc",
    "pstore",
    "securityfs",
    "sysfs",
    "tmpfs",
];

pub(super) fn hits(subject: &Subject) -> Vec<Hit> {
    let mounts = process_files::mountinfo(subject.init);
    let mounts: Vec<MountInfo> = mounts.into_iter().flatten().collect();
    // Whoever started the shim has the mounts of the node.
    let shim = process_files::status(subject.init).map(|init| init.ppid.cast_unsigned());
    let of_node = shim.and_then(process_files::mountinfo);
    let of_node = of_node.into_iter().flatten().filter_map(|it| peers(&it));
    let of_node: BTreeSet<u32> = of_node.collect();
    let known = known(&subject.spec);
    let foreign: Vec<&MountInfo> = foreign(&mounts, &known).collect();
    let is_of_node = |mount: &&MountInfo| {
        let is_told = foreign.iter().any(|other| other.mnt_id == mount.mnt_id);
        // A root that is shared is so with what the runtime has made it of.
        let is_root = mount.mount_point == Path::new("/");
        !is_told && peers(mount).is_some_and(|group| is_root || of_node.contains(&group))
    };
    let hit = |name| {
        move |mount: &MountInfo| {
            let at = mount.mount_point.display().to_string();
            (name, at.escape_debug().to_string())
        }
    };
    let shared = mounts.iter().filter(is_of_node);
    { foreign.iter().copied().map(hit("hook-mount")) }
        .chain(shared.map(hit("node-mount")))
        .collect()
}

/// The number of the group with which it shares what is mounted below.
fn peers(mount: &MountInfo) -> Option<u32> {
    mount.opt_fields.iter().find_map(|field| match field {
        MountOptFields::Shared(group) => Some(*group),
        _ => None,
    })
}

/// Where the runtime mounts something.
fn known(spec: &Spec) -> BTreeSet<PathBuf> {
    let paths = |pointer: &str| {
        let list = spec.get(pointer).and_then(|list| list.as_array());
        let list: Vec<PathBuf> = list
            .into_iter()
            .flatten()
            .filter_map(|path| Some(PathBuf::from(path.as_str()?)))
            .collect();
        list
    };
    // Of a path that a link of the image leads to, the kernel tells where it is.
    let mut known: BTreeSet<PathBuf> = spec.mount_destinations().into_iter().collect();
    known.extend(paths("/linux/maskedPaths"));
    known.extend(paths("/linux/readonlyPaths"));
    known.extend(["/", "/dev/console"].map(PathBuf::from));
    known
}

fn foreign<'m>(
    mounts: &'m [MountInfo],
    known: &'m BTreeSet<PathBuf>,
) -> impl Iterator<Item = &'m MountInfo> {
    let names: BTreeSet<&std::ffi::OsStr> = known.iter().filter_map(|it| it.file_name()).collect();
    mounts.iter().filter(move |mount| {
        let at = mount.mount_point.as_path();
        let of_spec = known.contains(at)
            // Through a link of the image (/var/run -> /run) it is elsewhere under its own name.
            || at.file_name().is_some_and(|name| names.contains(name))
            // What lies below a recursive bind mount comes with it.
            || below(at, known)
            // Devices of a container in a user namespace.
            || at.parent() == Some(Path::new("/dev"));
        let part = || {
            mounts.iter().any(|other| {
                other.mnt_id != mount.mnt_id
                    && other.majmin == mount.majmin
                    && Path::new(&mount.root).starts_with(&other.root)
            })
        };
        // Of a part alone CRIU cannot make the whole.
        let whole = mount.root == "/" && MADE_AGAIN.contains(&mount.fs_type.as_str());
        !of_spec && !whole && !part()
    })
}

fn below(at: &Path, known: &BTreeSet<PathBuf>) -> bool {
    at.ancestors()
        .skip(1)
        .any(|above| above != Path::new("/") && known.contains(above))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_has_told_of_is_foreign() {
        let mounts = "\
310 1 0:57 / / rw - overlay overlay rw
311 310 0:58 / /proc rw - proc proc rw
312 310 254:0 /var/lib/vol /data rw - ext4 /dev/vda rw
313 310 254:0 /etc/hosts /run/hosts rw - ext4 /dev/vda rw
314 310 254:0 /var/lib/vol/part /part rw - ext4 /dev/vda rw
315 310 254:0 /usr/lib/driver /driver rw master:1 - ext4 /dev/vda rw
316 310 0:60 / /own rw - tmpfs tmpfs rw
317 312 254:1 / /data/disk rw - ext4 /dev/vdb rw
318 310 254:2 / /dev/nvidia0 rw - ext4 /dev/vdb rw
319 310 0:61 /var/lib/driver /tool rw - overlay overlay rw
320 310 0:62 /made /made rw - tmpfs tmpfs rw
321 316 0:60 /part /part rw - tmpfs tmpfs rw";
        let mounts: Vec<MountInfo> = mounts
            .lines()
            .map(|line| MountInfo::from_line(line).unwrap())
            .collect();
        let spec = br#"{"mounts":[{"destination":"/proc"},{"destination":"/data"},
            {"destination":"/var/run/hosts"}]}"#;
        let known = known(&Spec::parse(spec).unwrap());
        let found: Vec<_> = foreign(&mounts, &known)
            .map(|it| it.mount_point.to_str().unwrap())
            .collect();
        assert_eq!(found, ["/driver", "/tool", "/made"]);
    }
}
