//! What the CRIU of this node cannot do with a network: dump a TCP socket on a newer kernel, and keep packets away
//! while it dumps.
//!
//! ```text
//!  another network than CRIU's      locked as a whole, whatever is in it
//!  CRIU's own, the node's           each connection that is to stay established
//!     by nftables, if CRIU was built with it and the kernel has it; else iptables-restore is run, and
//!     ip6tables-restore, too, where the kernel has IPv6 (iptables_network_lock_internal of CRIU)
//! ```

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use transship_checkpoint::criu_images::inventory::NetworkLock;
use transship_checkpoint::criu_options::Tcp;
use transship_sandbox::criu_lock;

use super::sockets::{Owned, protocol};
use super::{Hit, Subject};
use crate::version::{Version, cannot_dump_tcp};

const IPTABLES: &str = "iptables-restore";

pub(super) fn hits(subject: &Subject, owned: &Owned<'_>) -> Vec<Hit> {
    let is_tcp =
        |descriptor: &str| protocol(descriptor).is_some_and(|name| name.starts_with("TCP"));
    let has_tcp = owned.values().any(|(_, descriptor)| is_tcp(descriptor));
    let network = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let is_nodes = network(&subject.init.to_string()) == network("self");
    let is_locked = !is_nodes || has_tcp && subject.criu.tcp == Tcp::Established;
    let mut names = Vec::new();
    names.extend((has_tcp && is_too_old()).then_some("tcp-kernel"));
    names.extend((is_locked && way_to_lock().is_none()).then_some("network-lock"));
    names
        .into_iter()
        .map(|name| (name, String::new()))
        .collect()
}

/// Without a CRIU of this name the dump fails, and says so.
fn is_too_old() -> bool {
    // Most kernels are asked alone.
    let newest = Version(u32::MAX, 0, 0);
    let kernel = Version::of_kernel().unwrap_or(Version(0, 0, 0));
    let may_be = cannot_dump_tcp(Version(0, 0, 0), kernel);
    may_be && cannot_dump_tcp(Version::of_criu().unwrap_or(newest), kernel)
}

/// What CRIU locks a network with on this node.
pub(crate) fn way_to_lock() -> Option<&'static str> {
    way(criu_lock(), || {
        let has_ipv6 = Path::new("/proc/sys/net/ipv6").try_exists().unwrap_or(true);
        works(IPTABLES) && (!has_ipv6 || works("ip6tables-restore"))
    })
}

fn works(program: &str) -> bool {
    let mut command = Command::new(program);
    command.arg("--version").stdin(Stdio::null());
    command.output().is_ok_and(|output| output.status.success())
}

fn way(lock: NetworkLock, has_iptables: impl FnOnce() -> bool) -> Option<&'static str> {
    match lock {
        NetworkLock::Nftables => Some("nftables"),
        NetworkLock::Iptables => has_iptables().then_some(IPTABLES),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_nftables_a_network_is_locked_by_iptables() {
        assert_eq!(way(NetworkLock::Nftables, || false), Some("nftables"));
        assert_eq!(way(NetworkLock::Iptables, || true), Some(IPTABLES));
        assert_eq!(way(NetworkLock::Iptables, || false), None);
    }
}
