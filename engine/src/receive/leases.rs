//! The lease of a migration that arrives, and those of processes that were killed in the middle of one.
//!
//! ```text
//! transship-receive-<pid>-<start>-<n>    start: moment of the process's start, in ticks since the boot
//! ```
//!
//! containerd ends such a lease after a week: a link that is slow takes days for much memory, and a clock that is set
//! counts as well. Until then what it holds takes room, so the guard of the migration, or whoever comes next, ends those
//! whose process is gone, and waits for the garbage collection: a layer that is found must not go while it is used.

use transship_containerd::{Containerd, unique};

use crate::Result;
use crate::image_blobs::LEASE;

const PREFIX: &str = "transship-receive-";

/// The same containerd under a lease of this process, without leases of processes that are gone.
pub(super) async fn take(node: &Containerd) -> Result<Containerd> {
    end_those_of_the_gone(node).await?;
    let pid = std::process::id();
    let start = started(pid).unwrap_or_default();
    let id = format!("{PREFIX}{pid}-{start}-{}", unique());
    Ok(node.with_lease_called(&id, LEASE).await?)
}

/// Ends the leases of processes that were killed in the middle of a migration.
pub(super) async fn end_those_of_the_gone(node: &Containerd) -> Result<()> {
    for id in node.lease_ids().await? {
        if owner(&id).is_some_and(|(pid, start)| started(pid) != Some(start)) {
            node.end_lease_called(&id).await?;
        }
    }
    Ok(())
}

fn owner(lease: &str) -> Option<(u32, u64)> {
    let mut parts = lease.strip_prefix(PREFIX)?.split('-');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn started(pid: u32) -> Option<u64> {
    let process = procfs::process::Process::new(i32::try_from(pid).ok()?).ok()?;
    Some(process.stat().ok()?.starttime)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_is_in_the_name() {
        assert_eq!(owner("transship-receive-7-123-18eb-0"), Some((7, 123)));
        assert_eq!(owner("transship-18eb-0"), None);
        assert_eq!(owner("transship-receive-x-1"), None);
        let own = std::process::id();
        assert!(started(own).is_some());
        assert_eq!(started(u32::MAX), None);
    }
}
