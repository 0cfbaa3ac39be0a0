//! Sockets with options that no new one has and CRIU does not keep:
//!
//! ```text
//!   options           sockets of TCP, UDP over IPv4 and IPv6, unix and netlink
//! ```

#![expect(unsafe_code, reason = "there is no safe wrapper for any option")]

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

/// libc does not name it everywhere.
const NETLINK_GET_STRICT_CHK: i32 = 12;
const NETLINK_CAP_ACK: i32 = 10;
const UDP_GRO: i32 = 104;
const TCP_NOTSENT_LOWAT: i32 = 25;
const IPV6_DONTFRAG: i32 = 62;

/// The length of each option.
const INT: libc::socklen_t = 4;

/// One of each kind.
pub(super) struct Options {
    tcp: TcpListener,
    udp: UdpSocket,
    udp6: UdpSocket,
    unix: UnixDatagram,
    netlink: OwnedFd,
}

/// What is set: level, name, value.
const TCP: [(i32, i32, i32); 4] = [
    (libc::IPPROTO_TCP, libc::TCP_SYNCNT, 3),
    (libc::IPPROTO_TCP, TCP_NOTSENT_LOWAT, 16_384),
    (libc::IPPROTO_TCP, libc::TCP_LINGER2, 7),
    (libc::IPPROTO_TCP, libc::TCP_MAXSEG, 900),
];
const UDP: [(i32, i32, i32); 4] = [
    (
        libc::IPPROTO_IP,
        libc::IP_MTU_DISCOVER,
        libc::IP_PMTUDISC_DO,
    ),
    (libc::IPPROTO_IP, libc::IP_RECVTTL, 1),
    (libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 1),
    (libc::IPPROTO_UDP, UDP_GRO, 1),
];
const UDP6: [(i32, i32, i32); 4] = [
    (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, 9),
    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS, 0x20),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVERR, 1),
    (libc::IPPROTO_IPV6, IPV6_DONTFRAG, 1),
];
const UNIX: [(i32, i32, i32); 1] = [(libc::SOL_SOCKET, libc::SO_TIMESTAMP, 1)];
const NETLINK: [(i32, i32, i32); 2] = [
    (libc::SOL_NETLINK, NETLINK_CAP_ACK, 1),
    (libc::SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1),
];

impl Options {
    pub(super) fn take() -> io::Result<Self> {
        let taken = Self {
            tcp: TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?,
            udp: UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?,
            udp6: UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?,
            unix: UnixDatagram::unbound()?,
            netlink: socket(
                AddressFamily::Netlink,
                SockType::Raw,
                SockFlag::empty(),
                SockProtocol::NetlinkRoute,
            )?,
        };
        for (socket, (level, name, value)) in taken.all() {
            // SAFETY: the kernel reads an int.
            let done = unsafe {
                libc::setsockopt(
                    socket.as_raw_fd(),
                    level,
                    name,
                    (&raw const value).cast(),
                    INT,
                )
            };
            if done < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(taken)
    }

    /// Fails with all that is another one.
    pub(super) fn check(&self) -> io::Result<()> {
        let mut others = Vec::new();
        for (socket, (level, name, value)) in self.all() {
            let mut found = 0_i32;
            let mut length = INT;
            // SAFETY: the kernel writes an int at most.
            unsafe {
                libc::getsockopt(
                    socket.as_raw_fd(),
                    level,
                    name,
                    (&raw mut found).cast(),
                    &raw mut length,
                )
            };
            if found != value {
                others.push(format!("{level}:{name} is {found}"));
            }
        }
        match others.is_empty() {
            true => Ok(()),
            false => Err(io::Error::other(others.join(", "))),
        }
    }

    fn all(&self) -> impl Iterator<Item = (BorrowedFd<'_>, (i32, i32, i32))> {
        fn of<'a>(
            socket: &'a impl AsFd,
            options: &'static [(i32, i32, i32)],
        ) -> impl Iterator<Item = (BorrowedFd<'a>, (i32, i32, i32))> {
            options.iter().map(move |option| (socket.as_fd(), *option))
        }
        of(&self.tcp, &TCP)
            .chain(of(&self.udp, &UDP))
            .chain(of(&self.udp6, &UDP6))
            .chain(of(&self.unix, &UNIX))
            .chain(of(&self.netlink, &NETLINK))
    }
}
