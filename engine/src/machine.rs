//! What this machine is, and has.

use std::fs;

use crate::error::{Context, Result};

/// This machine, as in `uname -m`.
///
/// # Errors
/// The kernel does not say.
pub fn architecture() -> Result<String> {
    let uname = nix::sys::utsname::uname().context("cannot ask the kernel for its name")?;
    Ok(uname.machine().to_string_lossy().into_owned())
}

/// Bytes of memory that could be had.
pub(crate) fn free_memory() -> u64 {
    available(&fs::read_to_string("/proc/meminfo").unwrap_or_default())
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
    fn what_could_be_had_is_told_in_kilobytes() {
        let memory = "MemTotal:  8 kB\nMemAvailable:      3 kB\n";
        assert_eq!(available(memory), 3072);
    }
}
