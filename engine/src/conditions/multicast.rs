//! Multicast groups that sockets have joined: CRIU does not read them from a socket.
//!
//! ```text
//!  /proc/PID/net/igmp    1  eth0 : 2 V3              a device, then its groups
//!                            030201EF     1 0:...    239.1.2.3, as this processor has it in memory
//!  /proc/PID/net/igmp6   1 eth0 ff15...0007 1 ...
//! ```
//!
//! The kernel tells which groups a network namespace is in, not which socket has joined one. So all that the kernel does
//! not join by itself are those of a container that has sockets for datagrams there, and in the network of the node
//! nothing is known.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::processes::Seen;
use super::sockets::{Owned, protocol};
use super::{Hit, Subject};

/// Protocols whose sockets join groups.
const DATAGRAMS: [&str; 3] = ["UDP", "RAW", "PING"];

pub(super) fn hits(subject: &Subject, owned: &Owned<'_>) -> Vec<Hit> {
    let network = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let init = subject.init.to_string();
    let own = network(&init);
    let of_datagrams = |(_, descriptor): &(&Seen, String)| {
        let name = protocol(descriptor).unwrap_or_default();
        // A socket may come from another namespace; the kernel does not tell.
        DATAGRAMS.iter().any(|it| name.starts_with(it))
    };
    if own == network("self") || !owned.values().any(of_datagrams) {
        return Vec::new();
    }
    // One that has ended is in no group.
    let table =
        |name: &str| fs::read_to_string(format!("/proc/{init}/net/{name}")).unwrap_or_default();
    let mut groups = groups_v4(&table("igmp"));
    groups.extend(groups_v6(&table("igmp6")));
    groups
        .into_iter()
        .map(|group| ("multicast", group.to_string()))
        .collect()
}

fn groups_v4(igmp: &str) -> BTreeSet<IpAddr> {
    let groups = igmp.lines().filter(|line| line.starts_with('\t'));
    let groups = groups.filter_map(|line| {
        let group = line.split_whitespace().next().filter(|it| it.len() == 8)?;
        let group = u32::from_str_radix(group, 16).ok()?;
        Some(Ipv4Addr::from(group.to_ne_bytes()))
    });
    let joined = groups.filter(|group| *group != Ipv4Addr::new(224, 0, 0, 1));
    joined.map(IpAddr::V4).collect()
}

fn groups_v6(igmp6: &str) -> BTreeSet<IpAddr> {
    let groups = igmp6.lines().filter_map(|line| {
        let group = line.split_whitespace().nth(2).filter(|it| it.len() == 32)?;
        Some(Ipv6Addr::from(u128::from_str_radix(group, 16).ok()?))
    });
    groups
        .filter(|group| !is_of_kernel(*group))
        .map(IpAddr::V6)
        .collect()
}

/// All nodes, all routers, all snoopers, and the groups of its own addresses (`addrconf.c`, `mcast.c`, `br_multicast.c`).
fn is_of_kernel(group: Ipv6Addr) -> bool {
    match group.segments() {
        [0xff01 | 0xff02, 0, 0, 0, 0, 0, 0, 1 | 2] | [0xff05, 0, 0, 0, 0, 0, 0, 2] => true,
        [0xff02, 0, 0, 0, 0, 0, 0, 0x6a] => true,
        [0xff02, 0, 0, 0, 0, 1, last, _] => last >> 8 == 0xff,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_that_the_kernel_joins_are_nobodys() {
        let igmp = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n1\tlo        :     2      V3\n\
                    \t\t\t\t030201EF     1 0:00000000\t\t0\n\t\t\t\t010000E0     1 0:00000000\t\t0\n";
        // As a processor has it that begins with the lowest byte.
        if cfg!(target_endian = "little") {
            let groups = groups_v4(igmp);
            assert_eq!(groups, BTreeSet::from(["239.1.2.3".parse().unwrap()]));
        }
        let igmp6 = "1    lo              ff150000000000000000000000000007     1 00000004 0\n\
                     1    lo              ff020000000000000000000000000001     1 0000000C 0\n\
                     2    eth0            ff0200000000000000000001ff0012ab     1 0000000C 0\n\
                     1    lo              ff010000000000000000000000000001     1 00000008 0\n";
        assert_eq!(
            groups_v6(igmp6),
            BTreeSet::from(["ff15::7".parse().unwrap()])
        );
        assert!(groups_v4("").is_empty() && groups_v6("").is_empty());
    }
}
