//! The mount table of the images against the mounts of the spec.
//!
//! ```text
//!  external (the runtime says what is mounted)   a mount of the spec is there, a hierarchy below the
//!                                                spec's cgroup mount, or /dev/null hides a file
//!  proc, sysfs, cgroup, cgroup2                  the spec mounts that type there; or it makes the part
//!                                                of its parent that is seen there read-only
//!  tmpfs                                         the spec mounts one there (or cgroups, on v1), or it
//!                                                hides something and is read-only
//!  devpts, mqueue                                anywhere: each is the container's own
//!  the root's file system                        the root, a read-only path that shows itself
//!  all others                                    nowhere
//! ```
//!
//! CRIU makes a file system once, and each further mount of the same device is a bind mount of the part of it that
//! the image names: by a path that it walks in the tree of the node. So `..`, and a link that a process left in a
//! tmpfs, lead to the node's files, and a mount that has the device of one of the node's directories is that
//! directory, with flags of its own. A part is hence one that has no links, or what would be seen there anyway; what is
//! on the way to either is looked at in `mount_ways`.
//!
//! The flags of an image are those of `mount(2)`, which binds a directory of the node by one of them, and the archive of a
//! tmpfs is unpacked there. So they are none but those that say how a file system is mounted.
//!
//! A process with `CAP_SYS_ADMIN` can mount for itself: then more mounts of these types are no privilege.
//! The flags of a mount of the spec are at least the spec's, always: what is mounted read-only there
//! is the node's.

use std::path::Path;

use transship_checkpoint::criu_images::mounts::{FsType, Mount, flags};

use super::allowance::{Allowance, SpecMount};
use super::capabilities::SYS_ADMIN;
use super::environment::is_plain;
use super::{Admission, Environment, Refusal};

/// `DEVTMPFS` and the like of a file that is bind mounted from the node are no harm; these are: CRIU
/// acts on them before it knows that they are external.
const NEVER: [u32; 2] = [4, 16];
const NULL: &str = "/dev/null";
const FLAG_NAMES: [(u32, &str); 4] = [
    (flags::READ_ONLY, "read-only"),
    (flags::NO_SUID, "nosuid"),
    (flags::NO_DEV, "nodev"),
    (flags::NO_EXEC, "noexec"),
];

/// Compares the tables of all mount namespaces.
pub(super) fn compare(
    tables: &[Vec<Mount>],
    allowed: &Allowance,
    here: &Environment,
    admission: &mut Admission,
) {
    let may_mount = allowed.capabilities.has(SYS_ADMIN);
    match tables.len() {
        0 => admission.refuse(Refusal::Damaged {
            what: "there is no mount namespace".to_owned(),
        }),
        1 => {}
        _ if may_mount => {}
        _ => admission.refuse(Refusal::Namespace {
            who: "a process".to_owned(),
            namespace: "mount",
        }),
    }
    for table in tables {
        let table = Table {
            mounts: table,
            allowed,
            may_mount,
        };
        table.compare(here, admission);
    }
}

struct Table<'a> {
    mounts: &'a [Mount],
    allowed: &'a Allowance,
    may_mount: bool,
}

impl Table<'_> {
    fn compare(&self, here: &Environment, admission: &mut Admission) {
        let roots = self.mounts.iter().filter(|it| it.destination == "/");
        if roots.count() != 1 {
            admission.refuse(Refusal::Damaged {
                what: "a mount namespace has not one root".to_owned(),
            });
        }
        for mount in self.mounts {
            if let Err(why) = self.check(mount) {
                admission.refuse(Refusal::Mount {
                    destination: mount.destination.clone().into(),
                    what: kind(mount),
                    why,
                });
            }
        }
        if self.may_mount {
            return;
        }
        for (paths, wanted) in [
            (&self.allowed.masked, "masked"),
            (&self.allowed.read_only, "read-only"),
        ] {
            for path in paths.iter().filter(|path| here.present.contains(*path)) {
                let protects = match wanted {
                    "masked" => masks,
                    _ => is_read_only,
                };
                if !self.at(path).any(protects) && !self.is_read_only_beneath(path, wanted) {
                    admission.refuse(Refusal::Unprotected {
                        path: path.clone(),
                        wanted,
                    });
                }
            }
        }
    }

    fn check(&self, mount: &Mount) -> Result<(), String> {
        let destination = Path::new(&mount.destination);
        if !is_plain(destination) {
            return Err("which is no plain path".to_owned());
        }
        if mount.is_foreign {
            return Err("by a plugin or by the name of a file system".to_owned());
        }
        if matches!(mount.fs_type, FsType::Other(number) if NEVER.contains(&number)) {
            return Err("a type that no container has".to_owned());
        }
        let strange = mount.flags & !(flags::OF_A_FILE_SYSTEM | flags::PROPAGATION)
            | mount.fs_flags & !flags::OF_A_FILE_SYSTEM;
        if strange != 0 {
            return Err(format!(
                "with the flags {strange:#x} of mount(2), which make something else than a file system"
            ));
        }
        if mount.is_removed && mount.external.is_none() && !self.may_mount {
            return Err("which was removed, and no runtime mounts such a thing".to_owned());
        }
        if mount.destination == "/" {
            return match self.allowed.read_only_root && mount.flags & flags::READ_ONLY == 0 {
                true => Err("and the new container's root is read-only".to_owned()),
                false => Ok(()),
            };
        }
        self.check_place(mount, destination)?;
        match &mount.external {
            Some(key) => self.check_external(mount, destination, Path::new(key)),
            None => self.check_own(mount, destination),
        }
    }

    /// Whether it hides or is hidden by another one.
    fn check_place(&self, mount: &Mount, destination: &Path) -> Result<(), String> {
        let in_spec = self.of_spec(destination).count();
        if self.at(destination).count() > in_spec.max(1) && !self.may_mount {
            return Err("where there is another mount".to_owned());
        }
        let below = self
            .mounts
            .iter()
            .filter(|other| {
                let other = Path::new(&other.destination);
                other != destination && destination.starts_with(other)
            })
            .map(|other| other.destination.len())
            .max();
        let parent = self.mounts.iter().find(|other| other.id == mount.parent);
        match (parent, below) {
            (Some(parent), Some(len))
                if parent.destination.len() == len
                    && destination.starts_with(&parent.destination) =>
            {
                Ok(())
            }
            _ if self.may_mount => Ok(()),
            _ => Err("on something that another mount hides".to_owned()),
        }
    }

    fn check_external(&self, mount: &Mount, destination: &Path, key: &Path) -> Result<(), String> {
        // runc's name for what it hides files with.
        if key == Path::new(NULL) && mount.root.ends_with("/null") {
            return Ok(());
        }
        if key != destination && !self.of_spec(destination).any(|spec| spec.name == key) {
            return Err(format!("in the place of {}", key.display()));
        }
        let mut there = self.of_spec(destination).peekable();
        if there.peek().is_some() {
            return there.try_for_each(|spec| check_flags(mount.flags, spec));
        }
        if self.allowed.masked.iter().any(|path| path == destination) {
            return Ok(());
        }
        let cgroups = self
            .spec_mounts("cgroup")
            .find(|spec| destination.starts_with(&spec.destination));
        match cgroups {
            Some(spec) => check_flags(mount.flags, spec),
            None => Err("where the new container has no mount".to_owned()),
        }
    }

    fn check_own(&self, mount: &Mount, destination: &Path) -> Result<(), String> {
        self.check_part(mount, destination)?;
        let all_flags = mount.flags | mount.fs_flags;
        if let Some(spec) = self.of_spec(destination).last() {
            // On cgroup v1 a tmpfs of the container's own, which runc leaves writable: the hierarchies
            // on it are what is read-only.
            let holds_cgroups = spec.kind == "cgroup" && mount.fs_type == FsType::Tmpfs;
            let own = if holds_cgroups { flags::READ_ONLY } else { 0 };
            check_flags(all_flags | own, spec)?;
        }
        let same_kind = |kinds: &[&str]| {
            let mut there = self.of_spec(destination);
            there.any(|spec| kinds.contains(&spec.kind.as_str()))
        };
        let masked = self.allowed.masked.iter().any(|path| path == destination);
        let read_only = self
            .allowed
            .read_only
            .iter()
            .any(|path| path == destination);
        let fits = match mount.fs_type {
            FsType::Devpts | FsType::Mqueue => true,
            FsType::Proc => mount.root == "/" && same_kind(&["proc"]),
            FsType::Sysfs => mount.root == "/" && same_kind(&["sysfs"]),
            FsType::Cgroup | FsType::Cgroup2 => self
                .spec_mounts("cgroup")
                .chain(self.spec_mounts("cgroup2"))
                .any(|spec| {
                    destination.starts_with(&spec.destination)
                        && check_flags(all_flags, spec).is_ok()
                        && makes_no_hierarchy(mount)
                }),
            FsType::Tmpfs => masks(mount) || same_kind(&["tmpfs", "cgroup", "bind"]),
            FsType::Unsupported | FsType::Overlay => {
                read_only
                    && is_read_only(mount)
                    && self.is_of_root(mount)
                    && self.is_part_of_parent(mount, destination)
            }
            FsType::Other(_) => masked && masks(mount),
        };
        let is_part = matches!(mount.fs_type, FsType::Proc | FsType::Sysfs)
            && is_read_only(mount)
            && self.is_part_of_parent(mount, destination);
        if fits || is_part {
            return Ok(());
        }
        let known = !matches!(mount.fs_type, FsType::Other(_) | FsType::Unsupported);
        if self.may_mount && known && (mount.fs_type != FsType::Overlay || self.is_of_root(mount)) {
            return Ok(());
        }
        Err("and the new container does not".to_owned())
    }

    /// Whether the part of its file system that it shows is one of the container's own.
    fn check_part(&self, mount: &Mount, destination: &Path) -> Result<(), String> {
        if !is_plain(Path::new(&mount.root)) {
            return Err("of which it shows what is no plain path".to_owned());
        }
        if self.may_mount {
            return Ok(());
        }
        let has_links = !matches!(
            mount.fs_type,
            FsType::Devpts | FsType::Mqueue | FsType::Cgroup | FsType::Cgroup2
        );
        let is_own = matches!(mount.root.as_str(), "/" | "/null")
            || self.is_part_of_parent(mount, destination);
        if has_links && !is_own {
            return Err("of which it shows another part than is there".to_owned());
        }
        let is_of_node = |it: &&Mount| {
            let key = it.external.as_deref();
            it.device == mount.device && key.is_some_and(|key| key != NULL)
        };
        // Where the root is a directory of the node, others of its file system are mounted as well.
        let of_root = matches!(mount.fs_type, FsType::Unsupported | FsType::Overlay);
        match self.mounts.iter().find(is_of_node).filter(|_| !of_root) {
            Some(other) => Err(format!("which is that of {}", other.destination)),
            None => Ok(()),
        }
    }

    /// Whether it shows what would be seen there without it.
    fn is_part_of_parent(&self, mount: &Mount, destination: &Path) -> bool {
        let parent = self.mounts.iter().find(|it| it.id == mount.parent);
        parent.is_some_and(|parent| {
            let Ok(rest) = destination.strip_prefix(&parent.destination) else {
                return false;
            };
            parent.device == mount.device
                && Path::new(&parent.root).join(rest) == Path::new(&mount.root)
        })
    }

    /// Whether it is on the file system of the root: CRIU makes another one where it is mounted otherwise.
    fn is_of_root(&self, mount: &Mount) -> bool {
        let how = |it: &Mount| (it.device, it.fs_type, it.source.clone(), it.options.clone());
        let mut roots = self.mounts.iter().filter(|it| it.destination == "/");
        roots.any(|root| how(root) == how(mount))
    }

    /// Whether the mount that the path is on is read-only itself: then the runtime need not add one.
    fn is_read_only_beneath(&self, path: &Path, wanted: &str) -> bool {
        let under = self
            .mounts
            .iter()
            .filter(|it| path.starts_with(&it.destination))
            .max_by_key(|it| it.destination.len());
        wanted == "read-only" && under.is_some_and(is_read_only)
    }

    fn at<'a>(&'a self, path: &'a Path) -> impl Iterator<Item = &'a Mount> {
        self.mounts
            .iter()
            .filter(move |it| Path::new(&it.destination) == path)
    }

    fn of_spec<'a>(&'a self, path: &'a Path) -> impl Iterator<Item = &'a SpecMount> {
        self.allowed
            .mounts
            .iter()
            .filter(move |it| it.destination == path)
    }

    fn spec_mounts<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a SpecMount> {
        self.allowed.mounts.iter().filter(move |it| it.kind == kind)
    }
}

/// Whether it is a hierarchy of the node and not one that is made by mounting it: that could name a program
/// (`release_agent`) that the kernel starts on the node.
fn makes_no_hierarchy(mount: &Mount) -> bool {
    let is_known = |option: &str| {
        option == "name=systemd" || !option.contains('=') && !matches!(option, "none" | "all")
    };
    mount.fs_type == FsType::Cgroup2 || mount.options.split(',').all(is_known)
}

fn check_flags(found: u32, spec: &SpecMount) -> Result<(), String> {
    let missing = spec.flags & !found;
    match FLAG_NAMES.iter().find(|(flag, _)| missing & flag != 0) {
        Some((_, name)) => Err(format!(
            "not {name}, and the new container's mount there is"
        )),
        None => Ok(()),
    }
}

/// An empty directory that cannot be written, or `/dev/null` over a file.
fn masks(mount: &Mount) -> bool {
    let null = mount.root.ends_with("/null");
    let empty = mount.fs_type == FsType::Tmpfs && is_read_only(mount);
    null && matches!(mount.fs_type, FsType::Tmpfs | FsType::Other(_)) || empty || {
        // The runtime says what is mounted there.
        mount.external.as_deref() == Some(mount.destination.as_str())
    }
}

fn is_read_only(mount: &Mount) -> bool {
    (mount.flags | mount.fs_flags) & flags::READ_ONLY != 0
}

pub(super) fn kind(mount: &Mount) -> String {
    match (mount.fs_type, &mount.external) {
        (_, Some(_)) => "a directory or file of the node".to_owned(),
        (FsType::Unsupported, None) => "a file system".to_owned(),
        (FsType::Other(number), None) => format!("a file system of CRIU's type {number}"),
        (known, None) => format!("{known:?}").to_lowercase(),
    }
}
