//! Files of which the kernel asks for a capability of who has opened them, as Linux 5.10 to 6.18 do:
//!
//! ```text
//! proc    kmsg                              CAP_SYSLOG     what the kernel of the node says, taken from it
//!         kallsyms, modules                 CAP_SYSLOG     addresses of the kernel
//!         <pid>/pagemap, <pid>/stack, kpage*, iomem, ioports, bus/pci/*/*
//!                                           CAP_SYS_ADMIN  addresses of the memory, registers of devices
//!         kcore                             CAP_SYS_RAWIO  the memory of the node
//!         <pid>/mem, maps, environ, fd, ... CAP_SYS_PTRACE of a process that is not the container's, as the node's
//!         <pid>/oom_score_adj, comm, ...    CAP_SYS_PTRACE are in a volume with the node's /proc; the others when written
//! nsfs    mnt:[...], net:[...], ...         CAP_SYS_PTRACE namespaces in which none of the container's processes is
//! sysfs   .../config                        CAP_SYS_ADMIN  registers of devices
//!         module/*/sections/*, .../notes/*  CAP_SYSLOG     addresses of the kernel
//! dev     kmsg, opened to read              CAP_SYSLOG     where kernel.dmesg_restrict is 1
//!         mem, port, cpu/*/msr              CAP_SYS_RAWIO  the memory of the node, registers
//! ```
//!
//! Some of them everybody may open, and sees less in them then. A process may open those of another one without the
//! capability when both have one user: that is not told from what CRIU has opened.

use std::collections::BTreeSet;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sys::stat::{major, minor};
use nix::sys::statfs::{NSFS_MAGIC, PROC_SUPER_MAGIC, SYSFS_MAGIC, statfs};

use crate::proc_text::TaskStatus;

/// A capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needed {
    /// Its bit in a set.
    pub bit: u64,
    /// What capabilities(7) calls it.
    pub name: &'static str,
}

const SYS_RAWIO: Needed = Needed {
    bit: 1 << 17,
    name: "CAP_SYS_RAWIO",
};
const SYS_PTRACE: Needed = Needed {
    bit: 1 << 19,
    name: "CAP_SYS_PTRACE",
};
const SYS_ADMIN: Needed = Needed {
    bit: 1 << 21,
    name: "CAP_SYS_ADMIN",
};
const SYSLOG: Needed = Needed {
    bit: 1 << 34,
    name: "CAP_SYSLOG",
};

const DMESG_RESTRICT: &str = "/proc/sys/kernel/dmesg_restrict";
const MEMORY_DEVICES: u64 = 1;
const MSR_DEVICES: u64 = 202;

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

/// The capability that it takes to open the file `found` of the path `target`, which `link` of `/proc/<pid>` leads to,
/// and that is not in the set `bounds`; `own` are the processes of the container.
///
/// # Errors
/// The file system cannot be told, or how a file was opened.
pub fn lacking_to_open(
    link: &Path,
    (target, found): (&Path, &Metadata),
    own: &OwnProcesses,
    bounds: u64,
) -> io::Result<Option<Needed>> {
    let taken = taken_to_open(link, target, found, own)?;
    let mut lacking = taken.into_iter().flatten();
    Ok(lacking.find(|needed| bounds & needed.bit == 0))
}

fn taken_to_open(
    link: &Path,
    target: &Path,
    found: &Metadata,
    own: &OwnProcesses,
) -> io::Result<[Option<Needed>; 2]> {
    if found.file_type().is_char_device() {
        return Ok([of_device(link, found.rdev())?, None]);
    }
    let (of_proc, of_sysfs) = (in_proc(target), in_sysfs(target));
    let (of_process, is_namespace) = (of_process(target), is_namespace(target));
    // Nearly all files have other names, and are asked no further.
    if of_proc.is_none() && of_sysfs.is_none() && of_process.is_none() && !is_namespace {
        return Ok([None; 2]);
    }
    Ok(match statfs(link)?.filesystem_type() {
        PROC_SUPER_MAGIC => {
            let foreign = of_process.filter(|(pid, _)| !own.have(found, *pid));
            let is_taken = match foreign {
                Some((_, Use::Written)) => access(link)? != OFlag::O_RDONLY,
                other => other.is_some(),
            };
            [of_proc, is_taken.then_some(SYS_PTRACE)]
        }
        NSFS_MAGIC => {
            let is_own = own.namespaces.contains(&(found.dev(), found.ino()));
            [(!is_own).then_some(SYS_PTRACE), None]
        }
        SYSFS_MAGIC => [of_sysfs, None],
        _ => [None; 2],
    })
}

/// How a file of another process may not be open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Any,
    Written,
}

/// Whether a path is, in `/proc`, of one process: by its number, where the path has it.
fn of_process(path: &Path) -> Option<(Option<u32>, Use)> {
    let name = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
    let number = |path: &Path| name(path.parent()?)?.parse().ok();
    let last = name(path)?;
    // Of a process that has ended.
    let last = last.strip_suffix(DELETED).unwrap_or(&last);
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

fn in_proc(path: &Path) -> Option<Needed> {
    match path.file_name()?.to_str()? {
        "kmsg" | "kallsyms" | "modules" => Some(SYSLOG),
        "kcore" => Some(SYS_RAWIO),
        "pagemap" | "stack" | "iomem" | "ioports" => Some(SYS_ADMIN),
        "kpagecount" | "kpageflags" | "kpagecgroup" => Some(SYS_ADMIN),
        _ => {
            let mut above = path.ancestors().skip(1);
            let is_of_bus = above.any(|dir| dir.ends_with("bus/pci"));
            (is_of_bus && !path.ends_with("bus/pci/devices")).then_some(SYS_ADMIN)
        }
    }
}

fn in_sysfs(path: &Path) -> Option<Needed> {
    let parent = path.parent()?.file_name();
    if parent.is_some_and(|dir| dir == "sections" || dir == "notes") {
        return Some(SYSLOG);
    }
    (path.file_name()? == "config").then_some(SYS_ADMIN)
}

/// The capabilities that a process can have at all.
///
/// # Errors
/// `/proc` cannot be read.
pub fn attainable(proc: &Path) -> io::Result<u64> {
    let set = TaskStatus::of(proc)?.attainable();
    set.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_asks_the_opener_for_is_known() {
        for (path, needed) in [
            ("/proc/kmsg", Some(SYSLOG)),
            ("/host/proc/kallsyms", Some(SYSLOG)),
            ("/proc/7/task/7/pagemap", Some(SYS_ADMIN)),
            ("/proc/bus/pci/00/1f.0", Some(SYS_ADMIN)),
            ("/proc/bus/pci/devices", None),
            ("/proc/meminfo", None),
            ("/proc/7/maps", None),
            ("/proc", None),
        ] {
            assert_eq!(in_proc(Path::new(path)), needed, "{path}");
        }
        for (path, needed) in [
            ("/sys/devices/pci0000:00/config", Some(SYS_ADMIN)),
            ("/sys/module/nf_nat/sections/.text", Some(SYSLOG)),
            ("/sys/devices/system/cpu/online", None),
            ("/sys", None),
        ] {
            assert_eq!(in_sysfs(Path::new(path)), needed, "{path}");
        }
        let own = OwnProcesses::default();
        let look = |link: &str, target: &str| {
            let (link, found) = (Path::new(link), fs::metadata(link).unwrap());
            lacking_to_open(link, (Path::new(target), &found), &own, 0).unwrap()
        };
        assert_eq!(look("/proc/meminfo", "/proc/self/meminfo"), None);
        // A file of that name in another file system is one like others.
        assert_eq!(look("/", "/kmsg"), None);
        assert_eq!(look("/", "/mem"), None);
        assert_eq!(look("/dev/null", "/dev/kmsg"), None);
        attainable(Path::new("/proc/self")).unwrap();
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
        let look = |file: &fs::File, own: &OwnProcesses, bounds| {
            let link = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
            let target = fs::read_link(&link).unwrap();
            let found = fs::metadata(&link).unwrap();
            lacking_to_open(&link, (&target, &found), own, bounds).unwrap()
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
