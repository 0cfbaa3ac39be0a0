//! How CRIU locks a network on this node, while connections are dumped and restored.
//!
//! By iptables CRIU (3.16 to 4.2) runs two programs to lock and five to unlock, one after the other, each for some ten
//! milliseconds in which the container stands still; containers of a pod, whose network is one, take each other's chain
//! away. By nftables it runs none, and each CRIU has a table of its own. It was built for that or not, and the kernel has
//! it or not:
//!
//! ```text
//! /run/transship/criu-lock    SECONDS.NANOSECONDS nftables|iptables      when /run/criu.kdat was written, and what CRIU
//!                                                                        could then
//! /run/criu.kdat              CRIU's own: what the kernel can; written again by another CRIU or below another kernel
//! ```

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::process::{Command, Stdio};

use transship_checkpoint::criu_images::inventory::NetworkLock;

use crate::DEFAULT_RUN_DIR;

const REMEMBERED: &str = "criu-lock";
const KERNEL: &str = "/run/criu.kdat";

/// The way that takes less time of those that CRIU knows on this node. CRIU is asked once; then this is the content of
/// a file.
#[must_use]
pub fn criu_lock() -> NetworkLock {
    let dir = Path::new(DEFAULT_RUN_DIR);
    let known = written_at(Path::new(KERNEL)).and_then(|at| remembered(dir, &at));
    known.unwrap_or_else(|| {
        let lock = ask_criu();
        if let Some(at) = written_at(Path::new(KERNEL)) {
            // One that cannot be remembered is asked again.
            drop(remember(dir, &at, lock));
        }
        lock
    })
}

fn ask_criu() -> NetworkLock {
    let asked = Command::new("criu")
        .args(["check", "--feature", "network_lock_nftables"])
        .stdin(Stdio::null())
        .output();
    match asked {
        Ok(output) if output.status.success() => NetworkLock::Nftables,
        _ => NetworkLock::Iptables,
    }
}

/// When a file was written; none if it is not there.
fn written_at(path: &Path) -> Option<String> {
    let meta = fs::metadata(path).ok()?;
    Some(format!("{}.{}", meta.mtime(), meta.mtime_nsec()))
}

fn remembered(dir: &Path, at: &str) -> Option<NetworkLock> {
    let text = fs::read_to_string(dir.join(REMEMBERED)).ok()?;
    let (written, lock) = text.trim_end().split_once(' ')?;
    let all = [NetworkLock::Nftables, NetworkLock::Iptables];
    { all.into_iter() }.find(|it| written == at && lock == it.name())
}

fn remember(dir: &Path, at: &str, lock: NetworkLock) -> io::Result<()> {
    let new = dir.join(format!("{REMEMBERED}.{}", std::process::id()));
    let mut options = fs::OpenOptions::new();
    let mut file = { options.write(true).create(true).truncate(true).mode(0o600) }.open(&new)?;
    writeln!(file, "{at} {}", lock.name())?;
    fs::rename(&new, dir.join(REMEMBERED))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_is_remembered_until_criu_looks_again() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("kdat");
        assert_eq!(written_at(&kernel), None);
        fs::write(&kernel, "").unwrap();
        let at = written_at(&kernel).unwrap();
        assert_eq!(remembered(dir.path(), &at), None);
        remember(dir.path(), &at, NetworkLock::Nftables).unwrap();
        assert_eq!(remembered(dir.path(), &at), Some(NetworkLock::Nftables));
        assert_eq!(remembered(dir.path(), "1.0"), None);
        remember(dir.path(), &at, NetworkLock::Iptables).unwrap();
        assert_eq!(remembered(dir.path(), &at), Some(NetworkLock::Iptables));
        fs::write(dir.path().join(REMEMBERED), format!("{at} ipchains\n")).unwrap();
        assert_eq!(remembered(dir.path(), &at), None);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
