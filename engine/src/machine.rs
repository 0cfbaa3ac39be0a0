//! What this machine is, and has.

use std::fs;
use std::path::Path;

use crate::error::{Context, Result};

/// This machine, as in `uname -m`.
///
/// # Errors
/// The kernel does not say.
pub fn architecture() -> Result<String> {
    let uname = nix::sys::utsname::uname().context("cannot ask the kernel for its name")?;
    Ok(uname.machine().to_string_lossy().into_owned())
}

/// How many dumps or restores are worked on at once. Each has one processor at most, and waits for half of its time: for
/// programs that it starts, and for grace periods of the kernel.
pub(crate) fn at_once() -> usize {
    2 * std::thread::available_parallelism().map_or(1, usize::from)
}

/// Bytes of memory that could be had.
pub(crate) fn free_memory() -> u64 {
    available(&fs::read_to_string("/proc/meminfo").unwrap_or_default())
}

/// Bytes of huge pages of all sizes that are free.
pub(crate) fn free_huge_pages() -> u64 {
    free_huge_pages_of(Path::new("/sys/kernel/mm/hugepages"))
}

/// `dir` has a directory `hugepages-<size>kB` for each size.
fn free_huge_pages_of(dir: &Path) -> u64 {
    let sizes = fs::read_dir(dir).into_iter().flatten().flatten();
    let free = sizes.filter_map(|size| {
        let name = size.file_name();
        let kilobytes = { name.to_str()?.strip_prefix("hugepages-")? }.strip_suffix("kB")?;
        let pages = fs::read_to_string(size.path().join("free_hugepages")).ok()?;
        let pages: u64 = pages.trim().parse().ok()?;
        Some(kilobytes.parse::<u64>().ok()? * 1024 * pages)
    });
    free.sum()
}

fn available(meminfo: &str) -> u64 {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kilobytes.unwrap_or_default() * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_of_all_sizes_are_free() {
        let dir = tempfile::tempdir().unwrap();
        for (size, free) in [(2048, 3), (1_048_576, 1)] {
            let dir = dir.path().join(format!("hugepages-{size}kB"));
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join("free_hugepages"), format!("{free}\n")).unwrap();
        }
        assert_eq!(free_huge_pages_of(dir.path()), (1 << 30) + (6 << 20));
        assert_eq!(free_huge_pages_of(&dir.path().join("none")), 0);
    }

    #[test]
    fn what_could_be_had_is_told_in_kilobytes() {
        let memory = "MemTotal:  8 kB\nMemAvailable:      3 kB\n";
        assert_eq!(available(memory), 3072);
    }
}
