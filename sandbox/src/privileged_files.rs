//! Files of which the kernel asks for a capability of who has opened them, as Linux 5.10 to 6.18 do:
//!
//! ```text
//! proc    kmsg                              CAP_SYSLOG     what the kernel of the node says, taken from it
//!         kallsyms, modules                 CAP_SYSLOG     addresses of the kernel
//!         <pid>/pagemap, <pid>/stack, kpage*, iomem, ioports, bus/pci/*/*
//!                                           CAP_SYS_ADMIN  addresses of the memory, registers of devices
//!         kcore                             CAP_SYS_RAWIO  the memory of the node
//! sysfs   .../config                        CAP_SYS_ADMIN  registers of devices
//!         module/*/sections/*, .../notes/*  CAP_SYSLOG     addresses of the kernel
//! dev     kmsg, opened to read              CAP_SYSLOG     where kernel.dmesg_restrict is 1
//!         mem, port, cpu/*/msr              CAP_SYS_RAWIO  the memory of the node, registers
//! ```
//!
//! Some of them everybody may open, and sees less in them then.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::stat::{major, minor};
use nix::sys::statfs::{PROC_SUPER_MAGIC, SYSFS_MAGIC, statfs};

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

/// What it takes to open the file `found` of the path `target`, which `link` of `/proc/<pid>` leads to.
///
/// # Errors
/// The file system cannot be told, or how a device was opened.
pub fn taken_to_open(link: &Path, target: &Path, found: &Metadata) -> io::Result<Option<Needed>> {
    if found.file_type().is_char_device() {
        return of_device(link, found.rdev());
    }
    let (of_proc, of_sysfs) = (in_proc(target), in_sysfs(target));
    // Nearly all files have other names, and are asked no further.
    if of_proc.is_none() && of_sysfs.is_none() {
        return Ok(None);
    }
    Ok(match statfs(link)?.filesystem_type() {
        PROC_SUPER_MAGIC => of_proc,
        SYSFS_MAGIC => of_sysfs,
        _ => None,
    })
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

/// Whether the descriptor `link` is open to read; what is none is a mapping, which only such ones have.
fn is_read(link: &Path) -> io::Result<bool> {
    let (Some(number), Some(proc)) = (link.file_name(), link.parent().and_then(Path::parent))
    else {
        return Ok(true);
    };
    if !link.starts_with(proc.join("fd")) {
        return Ok(true);
    }
    let info = fs::read_to_string(proc.join("fdinfo").join(number))?;
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
    let flags = flags.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok(flags & OFlag::O_ACCMODE.bits() != OFlag::O_WRONLY.bits())
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
        let look = |link: &str, target: &str| {
            let link = Path::new(link);
            taken_to_open(link, Path::new(target), &fs::metadata(link).unwrap()).unwrap()
        };
        assert_eq!(look("/proc/meminfo", "/proc/self/meminfo"), None);
        // A file of that name in another file system is one like others.
        assert_eq!(look("/", "/kmsg"), None);
        assert_eq!(look("/dev/null", "/dev/kmsg"), None);
        attainable(Path::new("/proc/self")).unwrap();
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
