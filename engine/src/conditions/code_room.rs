//! Room for the code that CRIU runs in each process: its first executable mapping.
//!
//! CRIU writes there with PTRACE_POKEDATA (`get_exec_start`, 3.17 to 4.2). The kernel copies a private page for that, and
//! writes to a shared one only if the process could (`FOLL_FORCE`).

use procfs::process::{MMPermissions, MemoryMap};

use super::Hit;
use super::processes::{Processes, Seen};
use crate::process_files;

/// A shorter one is not taken (`PARASITE_START_AREA_MIN`), in bytes.
const SHORTEST: u64 = 4096;

pub(super) fn hits(processes: &Processes) -> Vec<Hit> {
    let without = processes.tree.iter().filter(|seen| !has_room(seen));
    without.map(|seen| ("shared-code", seen.called())).collect()
}

/// Also where the mappings cannot be read.
fn has_room(seen: &Seen) -> bool {
    let maps = process_files::maps(seen.pid).into_iter().flatten();
    first_executable(maps).is_none_or(|first| is_room(first.perms))
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
