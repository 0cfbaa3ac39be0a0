//! Devices that a process has open or mapped: CRIU knows those of memory, terminals and tun, as
//! `dump_chrdev` has them; its plugins know some GPUs.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::sys::stat::{major, minor};
use procfs::process::{FDTarget, MMapPath};

use super::Hit;
use super::processes::Processes;
use crate::process_files;

/// Where CRIU looks for plugins, as distributions build it.
const PLUGINS: [&str; 5] = [
    "/usr/lib/criu",
    "/usr/lib64/criu",
    "/usr/lib/x86_64-linux-gnu/criu",
    "/usr/local/lib/criu",
    "/var/lib/criu",
];
const MISC: u64 = 10;
const TUN: u64 = 200;
const AUTOFS: u64 = 235;

pub(super) fn hits(processes: &Processes) -> Vec<Hit> {
    let mut hits = Vec::new();
    for (seen, number, target) in processes.descriptors() {
        if let FDTarget::Path(path) = target
            && has_state(&seen.descriptor(number))
        {
            let path = path.display().to_string();
            hits.push((
                "device",
                format!("{} of {}", path.escape_debug(), seen.called()),
            ));
        }
    }
    for seen in &processes.tree {
        for map in process_files::maps(seen.pid).into_iter().flatten() {
            let MMapPath::Path(path) = &map.pathname else {
                continue;
            };
            let (from, to) = map.address;
            if path.starts_with("/dev")
                && has_state(&format!("/proc/{}/map_files/{from:x}-{to:x}", seen.pid))
            {
                let path = path.display().to_string();
                hits.push((
                    "device",
                    format!("{} of {}", path.escape_debug(), seen.called()),
                ));
            }
        }
    }
    // Which devices a plugin knows, it alone can tell.
    match hits.is_empty() || PLUGINS.iter().any(|dir| has_plugins(Path::new(dir))) {
        true => Vec::new(),
        false => hits,
    }
}

fn has_state(file: &str) -> bool {
    let Ok(file) = fs::metadata(file) else {
        return false;
    };
    let device = (major(file.rdev()), minor(file.rdev()));
    file.file_type().is_block_device() || file.file_type().is_char_device() && !is_known(device)
}

/// Memory, consoles and terminals, slaves of ptys, tun.
fn is_known(device: (u64, u64)) -> bool {
    matches!(device, (1 | 4 | 5 | 136..=143, _) | (MISC, TUN | AUTOFS))
}

fn has_plugins(dir: &Path) -> bool {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .any(|path| path.extension().is_some_and(|end| end == "so"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_terminals_have_no_state() {
        for (device, known) in [
            ((1, 3), true),
            ((5, 2), true),
            ((136, 0), true),
            ((10, 200), true),
            ((10, 229), false),
            ((195, 0), false),
            ((226, 128), false),
        ] {
            assert_eq!(is_known(device), known, "{device:?}");
        }
        assert!(!has_state("/dev/null") && !has_state("/nothing"));
    }
}
