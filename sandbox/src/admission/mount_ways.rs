//! The ways that CRIU walks to mount something, in the tree of the node, before the root is the container's.
//!
//! ```text
//!  .../mnt-<id>/<root>            the part of a file system that is shown, in another mount of it
//!  .../<n>/<destination>          the place, in the mount that it is on
//! ```
//!
//! A symbolic link on one of them leads to the node's own directories: one in a tmpfs that CRIU has just filled from the
//! images, in a volume, in the container's layer, or one of those that `/proc` has for each process. So a directory of the
//! node would be shown in the container, or what the container has filled would cover one of the node's for CRIU and the
//! programs that it runs. The kernel told both without links at the dump.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use transship_checkpoint::criu_images::mounts::{FsType, Mount};

use super::allowance::Allowance;
use super::environment::resolve_within;
use super::mounts::kind;
use super::{Admission, Refusal, Restored};

/// The links in a file system that CRIU will make; none where that is not known.
pub type MadeLinks = Option<Rc<BTreeSet<PathBuf>>>;

const LINK: &str = "to which or to whose place a symbolic link leads, as none did at the dump";

/// Refuses mounts behind links; the arguments are those of `refuse_links`.
pub(super) fn refuse_links(
    restored: &Restored,
    allowed: &Allowance,
    rootfs: &Path,
    made: &dyn Fn(&Mount) -> MadeLinks,
    admission: &mut Admission,
) {
    let first = restored.mounts.first();
    // A sandbox within the container may have a root of its own, which CRIU makes.
    let is_first = |mount: &Mount| first.is_some_and(|table| table.contains(mount));
    let is_own_root = |mount: &Mount| {
        mount.destination == "/" && (mount.fs_type != FsType::Tmpfs || is_first(mount))
    };
    let directory = |mount: &Mount| match is_own_root(mount) {
        true => Some(rootfs.to_path_buf()),
        false => directory_of(mount, allowed),
    };
    let ways = Ways {
        known: { restored.mounts.iter().flatten() }
            .filter_map(|it| Some((it, directory(it)?)))
            .collect(),
        made,
    };
    for table in &restored.mounts {
        for mount in table.iter().filter(|it| it.destination != "/") {
            let place = Path::new(&mount.destination);
            let on = mount_below(table, mount);
            if on.is_some_and(|on| ways.lead_through_link(on, place)) || ways.show_by_link(mount) {
                admission.refuse(Refusal::Mount {
                    destination: place.to_path_buf(),
                    what: kind(mount),
                    why: LINK.to_owned(),
                });
            }
        }
    }
}

/// What it is mounted on: its parent, or what else is there.
fn mount_below<'m>(table: &'m [Mount], mount: &Mount) -> Option<&'m Mount> {
    let place = Path::new(&mount.destination);
    let holds = |it: &&Mount| it.id != mount.id && place.starts_with(&it.destination);
    let others = || table.iter().filter(holds);
    let parent = others().find(|it| it.id == mount.parent);
    parent.or_else(|| others().max_by_key(|it| Path::new(&it.destination).components().count()))
}

/// The directory of this node that the runtime mounts.
pub(super) fn directory_of(mount: &Mount, allowed: &Allowance) -> Option<PathBuf> {
    mount.external.as_ref()?;
    let mut there = allowed.mounts.iter();
    let there = there.find(|it| it.destination == Path::new(&mount.destination))?;
    Some(there.source.clone())
}

struct Ways<'a> {
    /// Mounts of directories of this node.
    known: Vec<(&'a Mount, PathBuf)>,
    made: &'a dyn Fn(&Mount) -> MadeLinks,
}

impl Ways<'_> {
    /// Whether a link is on the way to `place`, from the mount that it is on.
    fn lead_through_link(&self, on: &Mount, place: &Path) -> bool {
        let Ok(below) = place.strip_prefix(&on.destination) else {
            return true;
        };
        if below.as_os_str().is_empty() {
            return false;
        }
        match self.known.iter().find(|(mount, _)| *mount == on) {
            Some((_, dir)) => is_behind_link(dir, below),
            None => self.is_behind_link_of(on, &Path::new(&on.root).join(below)),
        }
    }

    /// Whether a link is on the way to what it shows.
    fn show_by_link(&self, mount: &Mount) -> bool {
        let part = Path::new(&mount.root);
        mount.external.is_none() && part != Path::new("/") && self.is_behind_link_of(mount, part)
    }

    /// Whether a link is on the way to `path`, in the file system of the mount.
    fn is_behind_link_of(&self, mount: &Mount, path: &Path) -> bool {
        let names = path.strip_prefix("/").unwrap_or(path);
        if mount.fs_type == FsType::Proc {
            return is_of_process(names);
        }
        if mount.fs_type == FsType::Tmpfs && mount.external.is_none() {
            let links = (self.made)(mount);
            if links.is_none_or(|links| names.ancestors().any(|it| links.contains(it))) {
                return true;
            }
        }
        let of_device = { self.known.iter() }.filter(|(it, _)| it.device == mount.device);
        { of_device.filter(|(it, _)| *it != mount) }
            .filter_map(|(it, dir)| Some((dir, path.strip_prefix(&it.root).ok()?)))
            .any(|(dir, below)| is_behind_link(dir, below))
    }
}

fn is_behind_link(dir: &Path, below: &Path) -> bool {
    let below = Path::new("/").join(below);
    resolve_within(dir, &below) != below
}

/// Whether a path in `/proc` is of one process: CRIU is one, whose root is the node's.
fn is_of_process(path: &Path) -> bool {
    let first = path.iter().next().and_then(|name| name.to_str());
    first.is_some_and(|name| {
        matches!(name, "self" | "thread-self") || name.bytes().all(|byte| byte.is_ascii_digit())
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use transship_checkpoint::criu_images::mounts::flags;
    use transship_checkpoint::spec::Spec;

    use super::super::compare_names;
    use super::super::tests::{mount, restored, spec};
    use super::*;

    /// Whether these mounts are refused, beside those that every container has.
    fn is_refused(more: &[Mount], links: &[&str]) -> bool {
        let (root, volume) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for dir in [root.path(), volume.path()] {
            std::fs::create_dir(dir.join("dir")).unwrap();
            symlink("/etc", dir.join("link")).unwrap();
        }
        let mut spec = spec();
        spec["mounts"][3]["source"] = volume.path().to_str().unwrap().into();
        let spec = Spec::parse(spec.to_string().as_bytes()).unwrap();
        let allowed = Allowance::of(&spec, &Path::to_path_buf);
        let mut images = restored();
        images.mounts[0].extend(more.iter().cloned());
        let links: BTreeSet<PathBuf> = links.iter().map(PathBuf::from).collect();
        let links = Rc::new(links);
        let made = |mount: &Mount| (mount.device != 77).then(|| Rc::clone(&links));
        let mut found = Admission::default();
        compare_names(&images, &allowed, root.path(), &made, &mut found);
        !found.refusals.is_empty()
    }

    #[test]
    fn nothing_is_mounted_at_the_end_of_a_link() {
        let links = ["fd", "deep/link"];
        assert!(!is_refused(&[], &links));
        // The place, what it is on, and whether a link leads there.
        for (place, on, refused) in [
            ("/dir/x", 1, false),
            ("/link", 1, true),
            ("/link/x", 1, true),
            ("/dev/pts", 3, false),
            ("/dev/fd", 3, true),
            ("/dev/fd/x", 3, true),
            ("/dev/deep/x", 3, false),
            ("/dev/deep/link/x", 3, true),
            ("/rw/dir", 5, false),
            ("/rw/link/x", 5, true),
            ("/proc/bus", 2, false),
            ("/proc/self/root/etc", 2, true),
            ("/proc/1/cwd", 2, true),
        ] {
            let queues = mount(20, on, place, FsType::Mqueue);
            assert_eq!(is_refused(&[queues], &links), refused, "{place}");
        }
    }

    #[test]
    fn no_part_is_shown_that_a_link_leads_to() {
        let part = |fs_type, device, root: &str| Mount {
            root: root.to_owned(),
            device,
            flags: flags::READ_ONLY,
            ..mount(20, 1, "/dir", fs_type)
        };
        // /dev of the test has the device 1, as its parent; the root 0.
        for (fs_type, device, root, refused) in [
            (FsType::Tmpfs, 1, "/null", false),
            (FsType::Tmpfs, 1, "/dir/x", false),
            (FsType::Tmpfs, 1, "/fd", true),
            (FsType::Tmpfs, 1, "/fd/shadow", true),
            (FsType::Tmpfs, 77, "/x", true),
            (FsType::Proc, 1, "/sys", false),
            (FsType::Proc, 1, "/self/root/etc", true),
            (FsType::Overlay, 0, "/dir", false),
            (FsType::Overlay, 0, "/link/x", true),
        ] {
            let part = part(fs_type, device, root);
            assert_eq!(is_refused(&[part], &["fd"]), refused, "{fs_type:?} {root}");
        }
    }
}
