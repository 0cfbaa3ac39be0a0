//! Files of the kernel that not everybody may open, and of which it asks nobody again who has them.
//!
//! Of some it asks for a capability, as Linux 5.10 to 6.18 do:
//!
//! ```text
//! proc    kmsg                              CAP_SYSLOG     what the kernel of the node says, taken from it
//!         kallsyms, modules                 CAP_SYSLOG     addresses of the kernel
//!         <pid>/pagemap, <pid>/stack, kpage*, iomem, ioports, bus/pci/*/*
//!                                           CAP_SYS_ADMIN  addresses of the memory, registers of devices
//!         mtrr                              CAP_SYS_ADMIN  how memory is cached, for whoever writes it
//!         <pid>/seccomp_cache               CAP_SYS_ADMIN  which system calls a filter lets through, 5.11
//!         kcore                             CAP_SYS_RAWIO  the memory of the node
//!         pressure/*, when written          CAP_SYS_RESOURCE  work of the kernel for who waits, 5.13; later on
//!                                                          everybody may have it done seldom
//!         <pid>/mem, maps, environ, fd, ... CAP_SYS_PTRACE of a process that is not the container's, as the node's
//!         <pid>/oom_score_adj, comm, ...    CAP_SYS_PTRACE are in a volume with the node's /proc; the others when written
//! nsfs    mnt:[...], net:[...], ...         CAP_SYS_PTRACE namespaces in which none of the container's processes is
//! sysfs   .../config                        CAP_SYS_ADMIN  registers of devices
//!         module/*/sections/*, .../notes/*  CAP_SYSLOG     addresses of the kernel
//! debugfs kprobes/list, kprobes/blacklist   CAP_SYSLOG     addresses of the kernel
//! securityfs
//!         ima/policy, when read             CAP_SYS_ADMIN  what the node measures
//!         safesetid/*, ipe/* when written   CAP_MAC_ADMIN  whom the node lets be whom, and run what (6.12)
//! cgroup  release_agent, when written       CAP_SYS_ADMIN  a program that the kernel runs as root of the node, 5.17
//! dev     kmsg, opened to read              CAP_SYSLOG     where kernel.dmesg_restrict is 1
//!         mem, port, cpu/*/msr              CAP_SYS_RAWIO  the memory of the node, registers
//! ```
//!
//! Some of them everybody may open, and sees less in them then. A process may open those of another one without the
//! capability when both have one user: that is not told from what CRIU has opened.
//!
//! Of all others it asks for the bits of their mode, or CAP_DAC_OVERRIDE: `/sys/devices/.../resource0` and
//! `/proc/sysrq-trigger` are for root. The modes of the directories above are not asked for.
//!
//! A bind mount gives another name to a file, which is then known by the path in its own file system.

use std::collections::BTreeSet;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sys::stat::{major, minor};
use nix::sys::statfs::{
    CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, DEBUGFS_MAGIC, FsType, NSFS_MAGIC, PROC_SUPER_MAGIC,
    SECURITYFS_MAGIC, SYSFS_MAGIC, TRACEFS_MAGIC, statfs,
};

use crate::proc_text::TaskStatus;

/// A capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needed {
    /// Its bit in a set.
    pub bit: u64,
    /// What capabilities(7) calls it.
    pub name: &'static str,
}

impl Needed {
    const fn of(number: u32, name: &'static str) -> Self {
        Self {
            bit: 1 << number,
            name,
        }
    }
}

const DAC_OVERRIDE: Needed = Needed::of(1, "CAP_DAC_OVERRIDE");
/// With it everything may be read that `CAP_DAC_OVERRIDE` lets be read and written.
const DAC_READ_SEARCH: u64 = 1 << 2;
const NET_ADMIN: u64 = 1 << 12;
const SYS_RAWIO: Needed = Needed::of(17, "CAP_SYS_RAWIO");
const SYS_PTRACE: Needed = Needed::of(19, "CAP_SYS_PTRACE");
const SYS_ADMIN: Needed = Needed::of(21, "CAP_SYS_ADMIN");
const SYS_RESOURCE: Needed = Needed::of(24, "CAP_SYS_RESOURCE");
const MAC_ADMIN: Needed = Needed::of(33, "CAP_MAC_ADMIN");
const SYSLOG: Needed = Needed::of(34, "CAP_SYSLOG");

const DMESG_RESTRICT: &str = "/proc/sys/kernel/dmesg_restrict";
const MEMORY_DEVICES: u64 = 1;
const MSR_DEVICES: u64 = 202;

/// From `linux/magic.h`; nix does not have them.
const PSTOREFS_MAGIC: FsType = FsType(0x6165_676c);
const EFIVARFS_MAGIC: FsType = FsType(0xde5e_81e4);
/// File systems with files that take a capability by their names.
const NAMED: [FsType; 5] = [
    PROC_SUPER_MAGIC,
    SYSFS_MAGIC,
    DEBUGFS_MAGIC,
    SECURITYFS_MAGIC,
    CGROUP_SUPER_MAGIC,
];
/// File systems of the kernel, whose modes say who may open a file.
const OF_KERNEL: [FsType; 9] = [
    PROC_SUPER_MAGIC,
    SYSFS_MAGIC,
    DEBUGFS_MAGIC,
    TRACEFS_MAGIC,
    SECURITYFS_MAGIC,
    PSTOREFS_MAGIC,
    EFIVARFS_MAGIC,
    CGROUP_SUPER_MAGIC,
    CGROUP2_SUPER_MAGIC,
];
const READ: u32 = 0o4;
const WRITE: u32 = 0o2;

/// Files and directories of a process, in `/proc/<pid>`, that are for those who may trace it.
const OF_TRACERS: [&str; 15] = [
    "auxv",
    "environ",
    "fd",
    "fdinfo",
    "io",
    "map_files",
    "maps",
    "mem",
    "ns",
    "numa_maps",
    "pagemap",
    "smaps",
    "smaps_rollup",
    "stack",
    "syscall",
];
/// Those that everybody may read, and change what the process is.
const WRITTEN: [&str; 14] = [
    "autogroup",
    "clear_refs",
    "comm",
    "coredump_filter",
    "gid_map",
    "loginuid",
    "oom_adj",
    "oom_score_adj",
    "projid_map",
    "sched",
    "setgroups",
    "timens_offsets",
    "timerslack_ns",
    "uid_map",
];
const DELETED: &str = " (deleted)";

/// The processes of a container, as the file systems of the kernel name them.
#[derive(Debug, Clone, Default)]
pub struct OwnProcesses {
    /// Numbers of their threads here, and the device of the `/proc` in which they are that.
    here: BTreeSet<u32>,
    proc: u64,
    /// Numbers of their threads in the container.
    inside: BTreeSet<u32>,
    /// Devices and inodes of their namespaces.
    namespaces: BTreeSet<(u64, u64)>,
}

impl OwnProcesses {
    /// Those with these numbers; one that has ended is left out.
    ///
    /// # Errors
    /// There is no `/proc`.
    pub fn of(pids: impl IntoIterator<Item = i32>) -> io::Result<Self> {
        let mut own = Self {
            proc: fs::metadata("/proc")?.dev(),
            ..Self::default()
        };
        for pid in pids {
            let process = Path::new("/proc").join(pid.to_string());
            for thread in entries(&process.join("task")) {
                let number = thread.file_name().and_then(|name| name.to_str());
                own.here
                    .extend(number.and_then(|it| it.parse::<u32>().ok()));
                let status = TaskStatus::of(&thread).unwrap_or_default();
                own.inside.extend(status.id_in_container());
            }
            let namespaces = entries(&process.join("ns"));
            let namespaces = namespaces.filter_map(|it| fs::metadata(it).ok());
            own.namespaces
                .extend(namespaces.map(|it| (it.dev(), it.ino())));
        }
        Ok(own)
    }

    /// Whether a file of `/proc` with this metadata, below the number `pid`, is of one of them.
    fn have(&self, file: &Metadata, pid: Option<u32>) -> bool {
        let numbers = match file.dev() == self.proc {
            true => &self.here,
            false => &self.inside,
        };
        pid.is_some_and(|pid| numbers.contains(&pid))
    }
}

fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path())
}

/// A file that a process has.
#[derive(Debug, Clone, Copy)]
pub struct Opened<'a> {
    /// What `/proc/<pid>` has of it: `fd/<n>`, `map_files/<range>`, `cwd`, `root`, `exe`.
    pub link: &'a Path,
    /// Where that leads.
    pub target: &'a Path,
    /// The path in its file system, where it is known: of what is bind mounted the target is another one.
    pub inside: Option<&'a Path>,
    /// What it is.
    pub found: &'a Metadata,
}

impl<'a> Opened<'a> {
    fn names(&self) -> impl Iterator<Item = &'a Path> + use<'a> {
        [Some(self.target), self.inside].into_iter().flatten()
    }

    /// The path in `/proc` of what is there.
    fn in_proc(&self) -> Option<&'a Path> {
        if let Some(inside) = self.inside {
            return inside.strip_prefix("/").ok();
        }
        let mut below = self.target.components();
        below.find(|name| name.as_os_str() == "proc")?;
        Some(below.as_path())
    }

    /// Whether it is of one of these processes: one that may not be dumped has files of root. Those in `<pid>/net` are of
    /// its network.
    fn is_of(&self, own: &OwnProcesses) -> bool {
        let mut names = { self.in_proc().into_iter() }
            .flat_map(Path::components)
            .map(|name| name.as_os_str());
        let pid = names.next().and_then(|name| name.to_str()?.parse().ok());
        own.have(self.found, pid) && names.all(|name| name != "net")
    }
}

/// Who has a file, and what it may be at all.
#[derive(Debug, Clone, Default)]
pub struct Opener {
    /// Its user ids.
    pub users: Vec<u32>,
    /// Its group ids.
    pub groups: Vec<u32>,
    /// The capabilities that it can have.
    pub bounds: u64,
    /// Those of them that count for files of the node: none of who is in a user namespace of its own.
    pub bounds_on_node: u64,
}

impl Opener {
    /// The process at `proc`.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn of(proc: &Path) -> io::Result<Self> {
        let status = TaskStatus::of(proc)?;
        let known = || {
            let bounds = status.attainable()?;
            Some((status.users()?, status.groups()?, bounds))
        };
        let unknown = || io::Error::from(io::ErrorKind::InvalidData);
        let (users, groups, bounds) = known().ok_or_else(unknown)?;
        let is_of_node = match fs::read_link("/proc/self/ns/user") {
            // A kernel without user namespaces.
            Err(error) if error.kind() == io::ErrorKind::NotFound => true,
            here => fs::read_link(proc.join("ns/user"))? == here?,
        };
        Ok(Self {
            users,
            groups,
            bounds,
            bounds_on_node: if is_of_node { bounds } else { 0 },
        })
    }

    /// The capability without which it cannot open for `access` what has this mode, user and group.
    fn lacks_for(
        &self,
        (mode, user, group): (u32, u32, u32),
        access: u32,
        is_owner: bool,
    ) -> Option<Needed> {
        let classes = [
            (6, is_owner || self.users.contains(&user)),
            (3, self.groups.contains(&group)),
            (0, true),
        ];
        let allows = |(bits, counts): (u32, bool)| counts && mode >> bits & access == access;
        let read_only = if access == READ { DAC_READ_SEARCH } else { 0 };
        let may = classes.into_iter().any(allows)
            || self.bounds_on_node & (DAC_OVERRIDE.bit | read_only) != 0;
        (!may).then_some(DAC_OVERRIDE)
    }
}

/// The capability that it takes to open a file and that `opener`, who has it, cannot have; `own` are the processes of the
/// container.
///
/// # Errors
/// The file system cannot be told, or how a file was opened.
pub fn lacking_to_open(
    file: &Opened<'_>,
    own: &OwnProcesses,
    opener: &Opener,
) -> io::Result<Option<Needed>> {
    let lacking = |needed: &Needed| opener.bounds_on_node & needed.bit == 0;
    let Opened { link, found, .. } = *file;
    if found.file_type().is_char_device() {
        return Ok(of_device(link, found.rdev())?.filter(lacking));
    }
    let of_found = (found.mode(), found.uid(), found.gid());
    let access = access_of(link)?;
    // Nearly all files have other names and are open to who has them, and are asked no further.
    if opener.lacks_for(of_found, access, false).is_none()
        && !is_namespace(file.target)
        && !file.names().any(is_named)
    {
        return Ok(None);
    }
    let kind = statfs(link)?.filesystem_type();
    if kind == NSFS_MAGIC {
        let is_own = own.namespaces.contains(&(found.dev(), found.ino()));
        let takes = is_namespace(file.target) && !is_own;
        return Ok(takes.then_some(SYS_PTRACE).filter(lacking));
    }
    let of_proc = kind == PROC_SUPER_MAGIC;
    for name in file.names() {
        let foreign = of_process(name).filter(|(pid, _)| of_proc && !own.have(found, *pid));
        let taken = [
            by_name(kind, name),
            foreign.map(|(_, how)| (SYS_PTRACE, how)),
        ];
        for (needed, how) in taken.into_iter().flatten() {
            if lacking(&needed) && is_used(link, how)? {
                return Ok(Some(needed));
            }
        }
    }
    if !OF_KERNEL.contains(&kind) || (of_proc && file.is_of(own)) {
        return Ok(None);
    }
    // Who administrates a network has the rights of its root there (net_ctl_permissions).
    let is_of_network = of_proc && file.in_proc().is_some_and(|it| it.starts_with("sys/net"));
    let is_owner = is_of_network && opener.bounds & NET_ADMIN != 0;
    Ok(opener.lacks_for(of_found, access, is_owner))
}

/// How a file is open when it takes a capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Any,
    Read,
    Written,
}

fn is_used(link: &Path, how: Use) -> io::Result<bool> {
    match how {
        Use::Any => Ok(true),
        Use::Read => is_read(link),
        Use::Written => Ok(access(link)? != OFlag::O_RDONLY),
    }
}

fn is_named(path: &Path) -> bool {
    of_process(path).is_some() || NAMED.iter().any(|kind| by_name(*kind, path).is_some())
}

fn by_name(kind: FsType, path: &Path) -> Option<(Needed, Use)> {
    match kind {
        PROC_SUPER_MAGIC => in_proc(path),
        SYSFS_MAGIC => in_sysfs(path).map(|needed| (needed, Use::Any)),
        DEBUGFS_MAGIC => {
            let is_of_kprobes =
                path.ends_with("kprobes/list") || path.ends_with("kprobes/blacklist");
            is_of_kprobes.then_some((SYSLOG, Use::Any))
        }
        SECURITYFS_MAGIC => in_securityfs(path),
        CGROUP_SUPER_MAGIC => path
            .ends_with("release_agent")
            .then_some((SYS_ADMIN, Use::Written)),
        _ => None,
    }
}

/// Whether a path is, in `/proc`, of one process: by its number, where the path has it.
fn of_process(path: &Path) -> Option<(Option<u32>, Use)> {
    let name = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
    let number = |path: &Path| name(path.parent()?)?.parse().ok();
    let last = name(path)?;
    // Of a process that has ended.
    let last = last.strip_suffix(DELETED).unwrap_or(&last);
    // `pressure/io` is the node's.
    if path.parent()?.ends_with("pressure") {
        return None;
    }
    if OF_TRACERS.contains(&last) {
        return Some((number(path), Use::Any));
    }
    if WRITTEN.contains(&last) {
        return Some((number(path), Use::Written));
    }
    let dir = path.parent()?;
    // What is in one of the directories: descriptors, mappings, namespaces.
    let is_of_tracers = OF_TRACERS.contains(&name(dir)?.as_str());
    is_of_tracers.then(|| (number(dir), Use::Any))
}

/// What the kernel calls namespaces: `mnt:[4026531841]`.
fn is_namespace(target: &Path) -> bool {
    let name = target.to_str().unwrap_or_default();
    !name.starts_with('/') && name.ends_with(']') && name.contains(":[")
}

fn of_device(link: &Path, device: u64) -> io::Result<Option<Needed>> {
    Ok(match (major(device), minor(device)) {
        (MEMORY_DEVICES, 1 | 4) | (MSR_DEVICES, _) => Some(SYS_RAWIO),
        (MEMORY_DEVICES, 11) => {
            let is_closed = fs::read_to_string(DMESG_RESTRICT)?.trim() != "0";
            (is_closed && is_read(link)?).then_some(SYSLOG)
        }
        _ => None,
    })
}

fn is_read(link: &Path) -> io::Result<bool> {
    Ok(access(link)? != OFlag::O_WRONLY)
}

fn access(link: &Path) -> io::Result<OFlag> {
    Ok(flags(link)? & OFlag::O_ACCMODE)
}

/// How the descriptor `link` is open; what is none is a mapping or a directory, which only those have that may read.
///
/// # Errors
/// `/proc` cannot be read.
pub fn flags(link: &Path) -> io::Result<OFlag> {
    let (Some(number), Some(proc)) = (link.file_name(), link.parent().and_then(Path::parent))
    else {
        return Ok(OFlag::O_RDONLY);
    };
    if !link.starts_with(proc.join("fd")) {
        return Ok(OFlag::O_RDONLY);
    }
    let info = fs::read_to_string(proc.join("fdinfo").join(number))?;
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    let flags = flags.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok(OFlag::from_bits_retain(flags))
}

/// The bits of a mode that it takes to open what a link leads to as it is open.
fn access_of(link: &Path) -> io::Result<u32> {
    let is_in = |name| link.parent().is_some_and(|dir| dir.ends_with(name));
    if is_in("map_files") {
        // The mode of the link says how the file was opened that is mapped, whatever the mapping is.
        return Ok(fs::symlink_metadata(link)?.mode() >> 6 & (READ | WRITE));
    }
    // Who has another directory for its own, or runs a program, has opened neither.
    if !is_in("fd") {
        return Ok(0);
    }
    let flags = flags(link)?;
    if flags.contains(OFlag::O_PATH) {
        return Ok(0);
    }
    Ok(match flags & OFlag::O_ACCMODE {
        OFlag::O_RDONLY => READ,
        OFlag::O_WRONLY => WRITE,
        // Both, also where neither can be done then: open(2).
        _ => READ | WRITE,
    })
}

fn in_proc(path: &Path) -> Option<(Needed, Use)> {
    let needed = match path.file_name()?.to_str()? {
        "kmsg" | "kallsyms" | "modules" => SYSLOG,
        "kcore" => SYS_RAWIO,
        "pagemap" | "stack" | "iomem" | "ioports" | "mtrr" | "seccomp_cache" => SYS_ADMIN,
        "kpagecount" | "kpageflags" | "kpagecgroup" => SYS_ADMIN,
        "cpu" | "io" | "irq" | "memory" if path.parent()?.ends_with("pressure") => {
            return Some((SYS_RESOURCE, Use::Written));
        }
        _ => {
            let mut above = path.ancestors().skip(1);
            let is_of_bus = above.any(|dir| dir.ends_with("bus/pci"));
            return (is_of_bus && !path.ends_with("bus/pci/devices"))
                .then_some((SYS_ADMIN, Use::Any));
        }
    };
    Some((needed, Use::Any))
}

fn in_sysfs(path: &Path) -> Option<Needed> {
    let parent = path.parent()?.file_name();
    if parent.is_some_and(|dir| dir == "sections" || dir == "notes") {
        return Some(SYSLOG);
    }
    (path.file_name()? == "config").then_some(SYS_ADMIN)
}

fn in_securityfs(path: &Path) -> Option<(Needed, Use)> {
    if path.ends_with("ima/policy") {
        return Some((SYS_ADMIN, Use::Read));
    }
    let mut above = path.ancestors().skip(1);
    let is_policy = above.any(|dir| dir.ends_with("safesetid") || dir.ends_with("ipe"));
    is_policy.then_some((MAC_ADMIN, Use::Written))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_asks_the_opener_for_is_known() {
        let any = |needed| Some((needed, Use::Any));
        let written = |needed| Some((needed, Use::Written));
        let (proc, sysfs) = (PROC_SUPER_MAGIC, SYSFS_MAGIC);
        for (kind, path, needed) in [
            (proc, "/proc/kmsg", any(SYSLOG)),
            (proc, "/host/proc/kallsyms", any(SYSLOG)),
            (proc, "/proc/7/task/7/pagemap", any(SYS_ADMIN)),
            (proc, "/7/seccomp_cache", any(SYS_ADMIN)),
            (proc, "/mtrr", any(SYS_ADMIN)),
            (proc, "/kcore", any(SYS_RAWIO)),
            (proc, "/pressure/cpu", written(SYS_RESOURCE)),
            (proc, "/proc/pressure/irq", written(SYS_RESOURCE)),
            (proc, "/proc/pressure", None),
            (proc, "/proc/7/io", None),
            (proc, "/proc/bus/pci/00/1f.0", any(SYS_ADMIN)),
            (proc, "/proc/bus/pci/devices", None),
            (proc, "/proc/meminfo", None),
            (proc, "/proc/7/maps", None),
            (proc, "/proc", None),
            (proc, "/", None),
            (sysfs, "/sys/devices/pci0000:00/config", any(SYS_ADMIN)),
            (sysfs, "/sys/module/nf_nat/sections/.text", any(SYSLOG)),
            (sysfs, "/sys/devices/system/cpu/online", None),
            (sysfs, "/sys", None),
            (DEBUGFS_MAGIC, "/kprobes/list", any(SYSLOG)),
            (DEBUGFS_MAGIC, "/kprobes/enabled", None),
            (
                SECURITYFS_MAGIC,
                "/integrity/ima/policy",
                Some((SYS_ADMIN, Use::Read)),
            ),
            (
                SECURITYFS_MAGIC,
                "/safesetid/uid_allowlist_policy",
                written(MAC_ADMIN),
            ),
            (
                SECURITYFS_MAGIC,
                "/ipe/policies/one/active",
                written(MAC_ADMIN),
            ),
            (SECURITYFS_MAGIC, "/lockdown", None),
            (CGROUP_SUPER_MAGIC, "/release_agent", written(SYS_ADMIN)),
            (CGROUP_SUPER_MAGIC, "/notify_on_release", None),
            (CGROUP2_SUPER_MAGIC, "/release_agent", None),
        ] {
            assert_eq!(by_name(kind, Path::new(path)), needed, "{path}");
        }
        let own = OwnProcesses::default();
        let look = |link: &str, target: &str, inside: Option<&str>| {
            let found = fs::metadata(link).unwrap();
            let file = Opened {
                link: Path::new(link),
                target: Path::new(target),
                inside: inside.map(Path::new),
                found: &found,
            };
            lacking_to_open(&file, &own, &Opener::default()).unwrap()
        };
        assert_eq!(look("/proc/meminfo", "/proc/self/meminfo", None), None);
        // A file of that name in another file system is one like others.
        assert_eq!(look("/", "/kmsg", None), None);
        assert_eq!(look("/", "/mem", None), None);
        assert_eq!(look("/", "/x", Some("/kcore")), None);
        assert_eq!(look("/dev/null", "/dev/kmsg", None), None);
        // What is mounted elsewhere.
        assert_eq!(look("/proc/meminfo", "/x", Some("/meminfo")), None);
        assert_eq!(look("/proc/meminfo", "/x", Some("/kcore")), Some(SYS_RAWIO));
        assert_eq!(
            look("/proc/meminfo", "/x/maps", Some("/7/maps")),
            Some(SYS_PTRACE)
        );
        // Nobody has written it.
        assert_eq!(look("/proc/meminfo", "/x", Some("/pressure/io")), None);
        let known = Opener::of(Path::new("/proc/self")).unwrap();
        assert_eq!((known.users.len(), known.bounds), (4, known.bounds_on_node));
    }

    #[test]
    fn a_mode_is_for_who_opens() {
        let user = Opener {
            users: vec![1000, 1001],
            groups: vec![1000, 44],
            ..Opener::default()
        };
        let (all, both) = (u64::MAX, READ | WRITE);
        let with = |bounds| Opener {
            bounds: all,
            bounds_on_node: bounds,
            ..user.clone()
        };
        let none = Some(DAC_OVERRIDE);
        for (opener, file, access, lacks) in [
            (&user, (0o100_400, 0, 0), READ, none),
            (&user, (0o100_444, 0, 0), READ, None),
            (&user, (0o100_444, 0, 0), both, none),
            (&user, (0o100_644, 0, 0), WRITE, none),
            (&user, (0o100_600, 0, 0), 0, None),
            (&user, (0o100_600, 1001, 0), both, None),
            (&user, (0o100_400, 1001, 0), WRITE, none),
            (&user, (0o100_660, 0, 44), both, None),
            (&user, (0o100_640, 0, 44), both, none),
            // Of two classes neither has both.
            (&user, (0o100_420, 1000, 44), both, none),
            (&user, (0o040_500, 0, 0), READ, none),
            (&with(DAC_READ_SEARCH), (0o100_600, 0, 0), READ, None),
            (&with(DAC_READ_SEARCH), (0o100_600, 0, 0), both, none),
            (&with(DAC_OVERRIDE.bit), (0o100_200, 0, 0), WRITE, None),
            (&with(SYS_ADMIN.bit), (0o100_600, 0, 0), READ, none),
            // In a user namespace of its own.
            (&with(0), (0o100_400, 0, 0), READ, none),
        ] {
            let found = opener.lacks_for(file, access, false);
            assert_eq!(found, lacks, "{file:?} for {access:o}");
        }
        assert_eq!(user.lacks_for((0o100_600, 0, 0), both, true), None);
        assert_eq!(user.lacks_for((0o100_444, 0, 0), WRITE, true), none);
    }

    #[test]
    fn a_link_tells_how_it_was_opened() {
        use std::os::fd::AsRawFd;
        let of = |file: &dyn AsRawFd| {
            let link = format!("/proc/self/fd/{}", file.as_raw_fd());
            access_of(link.as_ref()).unwrap()
        };
        let opened = |flags| {
            let mode = nix::sys::stat::Mode::empty();
            nix::fcntl::open("/dev/null", flags, mode).unwrap()
        };
        assert_eq!(of(&opened(OFlag::O_RDONLY)), READ);
        assert_eq!(of(&opened(OFlag::O_WRONLY)), WRITE);
        assert_eq!(of(&opened(OFlag::O_RDWR)), READ | WRITE);
        assert_eq!(of(&opened(OFlag::O_PATH)), 0);
        assert_eq!(access_of("/proc/self/exe".as_ref()).unwrap(), 0);
        let exe = fs::read_link("/proc/self/exe").unwrap();
        let mut mapped = entries(Path::new("/proc/self/map_files"));
        let link = mapped.find(|it| fs::read_link(it).is_ok_and(|to| to == exe));
        assert_eq!(access_of(&link.unwrap()).unwrap(), READ);
    }

    #[test]
    fn what_is_of_a_process_is_told_by_the_path_in_proc() {
        let found = fs::metadata("/proc/self/stat").unwrap();
        let pid = std::process::id();
        let own = OwnProcesses::of([pid.cast_signed()]).unwrap();
        let is_own = |target: &str, inside: Option<&str>| {
            let file = Opened {
                link: Path::new("/proc/self/stat"),
                target: Path::new(target),
                inside: inside.map(Path::new),
                found: &found,
            };
            file.is_of(&own)
        };
        assert!(is_own("/x", Some(&format!("/{pid}/stat"))));
        assert!(is_own(&format!("/host/proc/{pid}/task/{pid}/stat"), None));
        assert!(!is_own(&format!("/{pid}/stat"), None));
        for inside in ["irq/PID/smp_affinity", "PID/net/nf_conntrack", "sys", ""] {
            let inside = format!("/{}", inside.replace("PID", &pid.to_string()));
            assert!(
                !is_own(&format!("/proc/{pid}/stat"), Some(&inside)),
                "{inside}"
            );
        }
    }

    #[test]
    fn files_of_other_processes_are_for_their_tracers() {
        use std::os::fd::AsRawFd;
        for (path, found) in [
            ("/proc/7/mem", Some((Some(7), Use::Any))),
            ("/host/proc/7/task/8/maps", Some((Some(8), Use::Any))),
            ("/proc/7/maps (deleted)", Some((Some(7), Use::Any))),
            ("/proc/7/fd", Some((Some(7), Use::Any))),
            ("/proc/7/fdinfo/3", Some((Some(7), Use::Any))),
            ("/one/environ", Some((None, Use::Any))),
            ("/proc/7/comm", Some((Some(7), Use::Written))),
            ("/proc/7/status", None),
            ("/proc/7/task", None),
            ("/proc/meminfo", None),
            ("/proc/pressure/io", None),
            ("/proc", None),
        ] {
            assert_eq!(of_process(Path::new(path)), found, "{path}");
        }
        let pid = std::process::id();
        let mut other = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        let own = OwnProcesses::of([pid.cast_signed()]).unwrap();
        let both = OwnProcesses::of([pid, other.id()].map(u32::cast_signed)).unwrap();
        let known = Opener::of(Path::new("/proc/self")).unwrap();
        let look_as = |opener: &Opener, file: &fs::File, own: &OwnProcesses| {
            let link = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
            let target = fs::read_link(&link).unwrap();
            let found = fs::metadata(&link).unwrap();
            let file = Opened {
                link: &link,
                target: &target,
                inside: None,
                found: &found,
            };
            lacking_to_open(&file, own, opener).unwrap()
        };
        let look = |file: &fs::File, own: &OwnProcesses, bounds| {
            let opener = Opener {
                bounds_on_node: bounds,
                ..known.clone()
            };
            look_as(&opener, file, own)
        };
        let opened = |pid: u32, name: &str| fs::File::open(format!("/proc/{pid}/{name}")).unwrap();
        let foreign = opened(other.id(), "maps");
        assert_eq!(look(&opened(pid, "maps"), &own, 0), None);
        assert_eq!(look(&foreign, &own, 0), Some(SYS_PTRACE));
        assert_eq!(look(&foreign, &own, SYS_PTRACE.bit), None);
        assert_eq!(look(&foreign, &both, 0), None);
        assert_eq!(look(&opened(other.id(), "fd"), &own, 0), Some(SYS_PTRACE));
        assert_eq!(look(&opened(other.id(), "status"), &own, 0), None);
        // Everybody reads it.
        assert_eq!(look(&opened(other.id(), "comm"), &own, 0), None);
        let mut written = fs::OpenOptions::new();
        let written = written
            .write(true)
            .open(format!("/proc/{}/comm", other.id()));
        assert_eq!(look(&written.unwrap(), &own, 0), Some(SYS_PTRACE));
        // Its owner may read it, and who is one of the container.
        let nobody = Opener::default();
        let personality = opened(other.id(), "personality");
        assert_eq!(look(&personality, &own, 0), None);
        assert_eq!(look_as(&nobody, &personality, &own), Some(DAC_OVERRIDE));
        assert_eq!(look_as(&nobody, &personality, &both), None);
        let network = opened(pid, "ns/net");
        assert_eq!(look(&network, &own, 0), None);
        assert_eq!(
            look(&network, &OwnProcesses::default(), 0),
            Some(SYS_PTRACE)
        );
        other.kill().unwrap();
        other.wait().unwrap();
    }

    #[test]
    fn a_device_counts_by_its_number_and_the_log_by_who_reads_it() {
        use std::os::fd::AsRawFd;
        let device = |minor| nix::sys::stat::makedev(MEMORY_DEVICES, minor);
        let written = fs::OpenOptions::new()
            .write(true)
            .open("/dev/null")
            .unwrap();
        let read = fs::File::open("/dev/null").unwrap();
        let of = |file: &fs::File| format!("/proc/self/fd/{}", file.as_raw_fd());
        assert!(!is_read(of(&written).as_ref()).unwrap() && is_read(of(&read).as_ref()).unwrap());
        let log = of_device(of(&written).as_ref(), device(11)).unwrap();
        assert_eq!(log, None);
        let memory = of_device(of(&written).as_ref(), device(1)).unwrap();
        assert_eq!(memory, Some(SYS_RAWIO));
    }
}
