//! Whether this process has a user namespace of its own: there nobody may make devices, or set `trusted.*` attributes.

use std::fs;
use std::io;

/// Whether user ids of this process are mapped, that is, not all of them are its own.
///
/// # Errors
/// `/proc/self/uid_map` cannot be read.
pub fn in_user_namespace() -> io::Result<bool> {
    let map = fs::read_to_string("/proc/self/uid_map")?;
    Ok(!map.split_whitespace().eq(["0", "0", "4294967295"]))
}
