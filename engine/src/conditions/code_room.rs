//! Room for the code that CRIU runs in each process: its first executable mapping; and what a tracer of the node has put
//! into one.
//!
//! CRIU writes there with PTRACE_POKEDATA (`get_exec_start`, 3.17 to 4.2). The kernel copies a private page for that, and
//! writes to a shared one only if the process could (`FOLL_FORCE`).

use procfs::process::{MMPermissions, MMapPath, MemoryMap};

use super::Hit;
use super::processes::{Processes, Seen};
use crate::process_files;

/// A shorter one is not taken (`PARASITE_START_AREA_MIN`), in bytes.
const SHORTEST: u64 = 4096;

pub(super) fn hits(processes: &Processes) -> Vec<Hit> {
    processes.tree.iter().flat_map(of_one).collect()
}

/// Nothing where the mappings cannot be read.
fn of_one(seen: &Seen) -> Vec<Hit> {
    let maps: Vec<MemoryMap> = process_files::maps(seen.pid)
        .into_iter()
        .flatten()
        .collect();
    let mut names = Vec::new();
    if maps.iter().any(|map| is_of_uprobes(&map.pathname)) {
        names.push("uprobes");
    }
    if first_executable(maps).is_some_and(|first| !is_room(first.perms)) {
        names.push("shared-code");
    }
    names
        .into_iter()
        .map(|name| (name, seen.called()))
        .collect()
}

/// Whether the kernel has made it for a uprobe that was hit.
fn is_of_uprobes(path: &MMapPath) -> bool {
    matches!(path, MMapPath::Other(name) if name == "uprobes")
}

fn first_executable(maps: impl IntoIterator<Item = MemoryMap>) -> Option<MemoryMap> {
    maps.into_iter().find(|map| {
        let (from, to) = map.address;
        map.perms.contains(MMPermissions::EXECUTE) && to - from >= SHORTEST
    })
}

fn is_room(perms: MMPermissions) -> bool {
    !perms.contains(MMPermissions::SHARED) || perms.contains(MMPermissions::WRITE)
}

#[cfg(test)]
mod tests {
    use procfs::FromRead as _;
    use procfs::process::MemoryMaps;

    use super::*;

    const PHP: &str = "\
556cba600000-556cc2600000 rw-s 00000000 00:01 34487                      /dev/zero (deleted)
556cc2600000-556cc6600000 r-xs 08000000 00:01 34487                      /dev/zero (deleted)
556cc67d7000-556cc6b39000 r-xp 000e3000 00:178 892251                    /usr/sbin/php-fpm8.4
";

    #[test]
    fn a_mapping_of_uprobes_is_known() {
        let told = |text: &str| {
            let maps = MemoryMaps::from_read(text.as_bytes()).unwrap();
            maps.into_iter().any(|map| is_of_uprobes(&map.pathname))
        };
        assert!(told(
            "7fffffffe000-7ffffffff000 --xp 00000000 00:00 0    [uprobes]\n"
        ));
        assert!(!told(
            "7fffffffe000-7ffffffff000 r-xp 00000000 00:00 0    [vdso]\n"
        ));
    }

    #[test]
    fn the_first_that_can_be_executed_counts() {
        let room = |text: &str| {
            let maps = MemoryMaps::from_read(text.as_bytes()).unwrap();
            is_room(first_executable(maps).unwrap().perms)
        };
        assert!(!room(PHP));
        assert!(room(&PHP.replace("r-xs", "rwxs")));
        assert!(room(&PHP.replace("r-xs", "r--s")));
        assert!(room(&PHP.replace("556cc6600000 r-xs", "556cc2600800 r-xs")));
    }
}
