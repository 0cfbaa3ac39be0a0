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
//! ```

use std::fs;
use std::io;
use std::path::Path;

use nix::sys::statfs::{PROC_SUPER_MAGIC, SYSFS_MAGIC, statfs};

/// A capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Needed {
    /// Its bit in a set.
    pub(super) bit: u64,
    /// What capabilities(7) calls it.
    pub(super) name: &'static str,
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

/// What it takes to open the file of the path `target`, which `link` leads to.
///
/// # Errors
/// The file system cannot be told.
pub(super) fn taken_to_open(link: &Path, target: &Path) -> io::Result<Option<Needed>> {
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
pub(super) fn bounding_set(proc: &Path) -> io::Result<u64> {
    let status = fs::read(proc.join("status"))?;
    let lines = status.split(|byte| *byte == b'\n');
    let digits = { lines }.find_map(|line| line.strip_prefix(b"CapBnd:\t"));
    let digits = digits.and_then(|digits| std::str::from_utf8(digits).ok());
    let set = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
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
        let own = Path::new("/proc/self/meminfo");
        assert_eq!(
            taken_to_open(Path::new("/proc/meminfo"), own).unwrap(),
            None
        );
        // A file of that name in another file system is one like others.
        let found = taken_to_open(Path::new("/"), Path::new("/kmsg")).unwrap();
        assert_eq!(found, None);
        bounding_set(Path::new("/proc/self")).unwrap();
    }
}
