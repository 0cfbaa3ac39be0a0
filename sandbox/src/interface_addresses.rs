//! The addresses of a network namespace, and how its neighbours hear where they are now: a copy that keeps its address
//! is behind another port of their switch.
//!
//! ```text
//!  each IPv4 address   ARP request for itself (RFC 5227, section 3), to all
//!  each IPv6 address   unsolicited neighbour advertisement (RFC 4861, section 7.2.6), to all nodes
//! ```

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use etherparse::icmpv6::NeighborAdvertisementHeader;
use etherparse::{ArpHardwareId, ArpOperation, ArpPacket, EtherType, Icmpv6Type, PacketBuilder};
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, SockaddrStorage, sendto, socket,
};

use crate::error::SandboxError;
use crate::pins::in_network;

/// Of Ethernet.
type Mac = [u8; 6];

const BROADCAST: Mac = [0xff; 6];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// That of `ALL_NODES` (RFC 2464, section 7).
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];
/// Any other value is ignored, as it may come from another network (RFC 4861, section 7.1.2).
const HOP_LIMIT: u8 = 255;
/// "Target link-layer address", of one unit of 8 bytes (RFC 4861, section 4.6.1).
const TARGET_MAC: [u8; 2] = [2, 1];

/// The addresses in a network namespace.
///
/// # Errors
/// A system call failed.
pub fn addresses_of(namespace: &Path) -> Result<Vec<IpAddr>, SandboxError> {
    in_network("list the addresses of", namespace, addresses)
}

/// Tells the neighbours in the network namespace of a process that its addresses are there now.
///
/// # Errors
/// A system call failed; some may have been told.
pub fn announce_addresses_of(pid: i32) -> Result<(), SandboxError> {
    let path = PathBuf::from(format!("/proc/{pid}/ns/net"));
    in_network("announce the addresses of", &path, announce)
}

/// Those of the calling thread.
fn addresses() -> io::Result<Vec<IpAddr>> {
    let found = getifaddrs()?.filter_map(|entry| entry.address);
    let address = |it: SockaddrStorage| {
        let v4 = it.as_sockaddr_in().map(|it| IpAddr::from(it.ip()));
        v4.or_else(|| it.as_sockaddr_in6().map(|it| IpAddr::from(it.ip())))
    };
    Ok(found.filter_map(address).collect())
}

/// Announces those of the calling thread.
fn announce() -> io::Result<()> {
    let found: Vec<_> = getifaddrs()?.collect();
    let mut links: BTreeMap<&str, LinkAddr> = BTreeMap::new();
    for entry in &found {
        let is_up = entry.flags.contains(InterfaceFlags::IFF_UP);
        let link = entry
            .address
            .as_ref()
            .and_then(SockaddrStorage::as_link_addr);
        if is_up && !entry.flags.contains(InterfaceFlags::IFF_LOOPBACK) {
            links.extend(link.map(|link| (&*entry.interface_name, *link)));
        }
    }
    // Without a protocol nothing is received.
    let socket = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    for entry in &found {
        let Some((link, address)) = links
            .get(&*entry.interface_name)
            .zip(entry.address.as_ref())
        else {
            continue;
        };
        let Some(mac) = link.addr() else { continue };
        let frame = if let Some(address) = address.as_sockaddr_in() {
            request_for_itself(mac, address.ip())?
        } else if let Some(address) = address.as_sockaddr_in6() {
            advertisement(mac, address.ip())?
        } else {
            continue;
        };
        sendto(socket.as_raw_fd(), &frame, link, MsgFlags::empty())?;
    }
    Ok(())
}

fn request_for_itself(mac: Mac, address: Ipv4Addr) -> io::Result<Vec<u8>> {
    let address = address.octets();
    let request = ArpPacket::new(
        ArpHardwareId::ETHERNET,
        EtherType::IPV4,
        ArpOperation::REQUEST,
        &mac,
        &address,
        &[0; 6],
        &address,
    );
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(mac, BROADCAST)
        .arp(request.map_err(io::Error::other)?)
        .write(&mut frame)
        .map_err(io::Error::other)?;
    Ok(frame)
}

fn advertisement(mac: Mac, address: Ipv6Addr) -> io::Result<Vec<u8>> {
    let advertisement = Icmpv6Type::NeighborAdvertisement(NeighborAdvertisementHeader {
        router: false,
        solicited: false,
        // What the neighbours have is replaced.
        r#override: true,
    });
    let address = address.octets();
    let payload = [&address[..], &TARGET_MAC, &mac].concat();
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(mac, ALL_NODES_MAC)
        .ipv6(address, ALL_NODES.octets(), HOP_LIMIT)
        .icmpv6(advertisement)
        .write(&mut frame, &payload)
        .map_err(io::Error::other)?;
    Ok(frame)
}

#[cfg(test)]
mod tests {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};

    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 7];

    #[test]
    fn a_request_asks_for_its_own_address() {
        let frame = request_for_itself(MAC, Ipv4Addr::new(10, 0, 0, 9)).unwrap();
        let packet = SlicedPacket::from_ethernet(&frame).unwrap();
        let Some(NetSlice::Arp(request)) = packet.net else {
            panic!("{packet:?}");
        };
        assert_eq!(request.sender_hw_addr(), MAC);
        assert_eq!(request.sender_protocol_addr(), [10, 0, 0, 9]);
        assert_eq!(request.target_protocol_addr(), [10, 0, 0, 9]);
        assert_eq!(frame[..6], BROADCAST);
    }

    #[test]
    fn an_advertisement_is_one_for_all_nodes() {
        let address: Ipv6Addr = "fd77::9".parse().unwrap();
        let frame = advertisement(MAC, address).unwrap();
        let packet = SlicedPacket::from_ethernet(&frame).unwrap();
        let (Some(NetSlice::Ipv6(net)), Some(TransportSlice::Icmpv6(message))) =
            (packet.net, packet.transport)
        else {
            panic!("no ICMPv6");
        };
        let (from, to) = (net.header().source(), net.header().destination());
        assert_eq!((from, to), (address.octets(), ALL_NODES.octets()));
        assert_eq!(net.header().hop_limit(), HOP_LIMIT);
        assert!(message.is_checksum_valid(from, to));
        // Type, code, checksum, flags, target, option.
        assert_eq!(message.slice()[0], 136);
        assert_eq!(message.slice()[4], 0x20);
        assert_eq!(message.slice()[8..24], address.octets());
        assert_eq!(message.slice()[24..], [2, 1, 2, 0, 0, 0, 0, 7]);
    }
}
