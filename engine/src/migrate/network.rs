//! A network of its own does not come along: the interfaces of a network namespace belong to the node.

use std::fs;

use crate::error::{Error, Result};
use crate::source::SourceContainer;

/// What the kernel puts into a new network namespace by itself: loopback, and the fallback devices of
/// tunnel modules (`net.core.fb_tunnels_only_for_init_net`).
const OF_EVERY_NAMESPACE: [&str; 11] = [
    "lo",
    "tunl0",
    "gre0",
    "gretap0",
    "erspan0",
    "ip_vti0",
    "ip6_vti0",
    "sit0",
    "ip6tnl0",
    "ip6gre0",
    "ip6gretap0",
];

/// Refuses a container whose interfaces would be lost, unless they may be.
pub(super) fn check(container: &SourceContainer, may_be_lost: bool) -> Result<()> {
    let own = !container
        .container
        .joined
        .iter()
        .any(|kind| kind == "network");
    if may_be_lost || !own || is_network_of_node(&container.spec) {
        return Ok(());
    }
    // A program that has ended is found by the freeze.
    let table = fs::read_to_string(format!("/proc/{}/net/dev", container.pid)).unwrap_or_default();
    let lost = own_interfaces(&table);
    if lost.is_empty() {
        return Ok(());
    }
    let id = container.id();
    Err(Error::refused(format!(
        "{id:?} has network interfaces of its own, which stay behind: {}; run it in the network of a \
         sandbox (--sandbox on the other node), or let it lose them (--allow-lost network)",
        lost.join(", ")
    )))
}

fn is_network_of_node(spec: &[u8]) -> bool {
    let spec: serde_json::Value = serde_json::from_slice(spec).unwrap_or_default();
    let mut namespaces = spec["linux"]["namespaces"].as_array().into_iter().flatten();
    namespaces.all(|namespace| namespace["type"] != "network")
}

/// The interfaces in `/proc/PID/net/dev`, without those of every namespace.
fn own_interfaces(table: &str) -> Vec<&str> {
    let names = table
        .lines()
        .skip(2)
        .filter_map(|line| line.split_once(':'));
    names
        .map(|(name, _)| name.trim())
        .filter(|name| !OF_EVERY_NAMESPACE.contains(name))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_that_somebody_made_are_found() {
        let table = "Inter-|   Receive  |  Transmit\n face |bytes |bytes\n    lo: 0 0\n  tunl0: 0\n  \
                     eth0: 5 5\n";
        assert_eq!(own_interfaces(table), ["eth0"]);
        assert!(own_interfaces("").is_empty());
    }

    #[test]
    fn without_a_namespace_it_is_the_nodes() {
        assert!(is_network_of_node(
            br#"{"linux":{"namespaces":[{"type":"pid"}]}}"#
        ));
        assert!(!is_network_of_node(
            br#"{"linux":{"namespaces":[{"type":"network"}]}}"#
        ));
    }
}
