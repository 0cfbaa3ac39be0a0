//! Netlink sockets that CRIU does not dump: with messages that wait to be read, or in groups that its image has no room for.
//!
//! ```text
//!  question  type 20 (netlink)
//!           netlink_diag_req { family u8 = 16, protocol u8 = 255 (all), pad u16, inode u32, show u32, cookie [u32; 2] }
//!  answer    type 20
//!           netlink_diag_msg { family u8, type u8, protocol u8, state u8, portid u32, to portid u32, to group u32,
//!                              inode u32, cookie [u32; 2] }
//!           nlattr { len u16, type u16 = 0 (memory) } waits to be read u32, ...
//!           nlattr { len u16, type u16 = 1 (groups) } bits [u32], of one that has ever joined any
//! ```
//!
//! CRIU takes 32 groups, and none of a socket without an address (`dump_one_netlink_fd`, 3.17 to 4.2).

use std::collections::BTreeMap;

use nix::errno::Errno;

use super::Hit;
use super::netlink::{self, u32_at};
use super::sockets::Owned;
use crate::network_namespace::within;

const NETLINK: u8 = 16;
const ALL_PROTOCOLS: u8 = 255;
/// `NDIAG_SHOW_MEMINFO` and `NDIAG_SHOW_GROUPS`.
const SHOW: u32 = 1 | 2;
const ATTRIBUTE_MEMORY: u16 = 0;
const ATTRIBUTE_GROUPS: u16 = 1;
/// Length of `netlink_diag_msg`.
const MESSAGE: usize = 28;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct NetlinkSocket {
    port: u32,
    unread: u32,
    groups: Option<Vec<u32>>,
}

/// Nothing where the kernel does not tell: CRIU asks it the same.
pub(super) fn hits(init: u32, owned: &Owned<'_>) -> Vec<Hit> {
    if owned.is_empty() {
        return Vec::new();
    }
    let sockets = within(init, ask).ok().and_then(Result::ok);
    let sockets = sockets.unwrap_or_default();
    let hits = owned.iter().filter_map(|(inode, (seen, _))| {
        let name = not_dumped(sockets.get(inode)?)?;
        Some((name, seen.called()))
    });
    hits.collect()
}

fn not_dumped(socket: &NetlinkSocket) -> Option<&'static str> {
    if socket.unread != 0 {
        return Some("netlink-data");
    }
    let groups = socket.groups.as_deref()?;
    // The kernel has them in words of 64 bits, of which CRIU leaves out an empty half.
    let words = match groups {
        [.., 0] => groups.len() - 1,
        _ => groups.len(),
    };
    let refused = words > 1 || !groups.is_empty() && socket.port == 0;
    refused.then_some("netlink-groups")
}

fn ask() -> Result<BTreeMap<u64, NetlinkSocket>, Errno> {
    netlink::sockets(&wanted(), socket_of)
}

fn wanted() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(20);
    bytes.extend([NETLINK, ALL_PROTOCOLS, 0, 0]);
    bytes.extend([0; 4]);
    bytes.extend(SHOW.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes
}

fn socket_of(message: &[u8]) -> Option<(u64, NetlinkSocket)> {
    let mut socket = NetlinkSocket {
        port: u32_at(message, 4)?,
        ..NetlinkSocket::default()
    };
    let inode = u32_at(message, 16)?;
    for (name, value) in netlink::attributes(message.get(MESSAGE..)?) {
        match name {
            ATTRIBUTE_MEMORY => socket.unread = u32_at(value, 0)?,
            ATTRIBUTE_GROUPS => {
                let words = value.chunks_exact(4).filter_map(|word| u32_at(word, 0));
                socket.groups = Some(words.collect());
            }
            _ => {}
        }
    }
    Some((u64::from(inode), socket))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use nix::sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, sendto,
        socket,
    };

    use super::super::processes::Processes;
    use super::super::sockets::owned;
    use super::*;

    #[test]
    fn root_what_waits_and_groups_are_seen() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let open = || {
            socket(
                AddressFamily::Netlink,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::NetlinkRoute,
            )
            .unwrap()
        };
        let inode = |socket: &std::os::fd::OwnedFd| {
            let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
            std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap())
        };
        let (ordinary, asking) = (open(), open());
        // Group 1 is that of links.
        bind(ordinary.as_raw_fd(), &NetlinkAddr::new(0, 1)).unwrap();
        let mut question = Vec::new();
        // RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP; nobody reads the answer.
        question.extend(32_u32.to_ne_bytes());
        question.extend(18_u16.to_ne_bytes());
        question.extend(0x301_u16.to_ne_bytes());
        question.extend([0; 24]);
        let (kernel, none) = (NetlinkAddr::new(0, 0), MsgFlags::empty());
        sendto(asking.as_raw_fd(), &question, &kernel, none).unwrap();
        let own = std::process::id();
        let sockets = within(own, ask).unwrap().unwrap();
        assert_eq!(not_dumped(&sockets[&inode(&ordinary)]), None);
        assert_eq!(not_dumped(&sockets[&inode(&asking)]), Some("netlink-data"));
        let processes = Processes::read(own, &[own]);
        let hits = hits(own, &owned(&processes));
        assert!(hits.iter().any(|hit| hit.0 == "netlink-data"), "{hits:?}");
    }

    #[test]
    fn groups_are_counted_as_criu_does() {
        let told = |port, groups: &[u32]| {
            not_dumped(&NetlinkSocket {
                port,
                unread: 0,
                groups: Some(groups.to_vec()),
            })
        };
        assert_eq!(told(7, &[1, 0]), None);
        assert_eq!(told(7, &[0, 0]), None);
        assert_eq!(told(7, &[0, 1]), Some("netlink-groups"));
        assert_eq!(told(7, &[1, 0, 0, 0]), Some("netlink-groups"));
        assert_eq!(told(0, &[1, 0]), Some("netlink-groups"));
        assert_eq!(not_dumped(&NetlinkSocket::default()), None);
        assert_eq!(socket_of(&[0; MESSAGE - 1]), None);
    }
}
