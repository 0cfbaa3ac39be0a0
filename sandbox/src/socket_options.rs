//! Options of sockets that CRIU does not keep (3.17 to 4.2): read from a socket of a frozen process, and given to the
//! one that CRIU has made in its place. The descriptor of the other process is got with `pidfd_getfd(2)`, and means the
//! same socket.
//!
//! What is written down is what a new socket of the same kind in the same network does not have. The options that are
//! plain numbers are in `socket_options/plain.rs`.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::sockopt::{AcceptConn, SockType as TypeOf, TcpCongestion};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockProtocol, SockType, getsockopt, setsockopt, socket,
};
use nix::{getsockopt_impl, libc, sockopt_impl};
use transship_checkpoint::task_attributes::SocketOptions;

mod plain;

use plain::{Plain, Rule, TABLE};

/// The bits of a traffic class that are not the program's.
const ECN: u32 = 3;

sockopt_impl!(
    /// The address family of a socket.
    Domain,
    GetOnly,
    libc::SOL_SOCKET,
    libc::SO_DOMAIN,
    i32
);

/// Sockets of one kind have the same options when they are new.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SocketKind {
    /// TCP over IPv4.
    Tcp,
    /// TCP over IPv6.
    Tcp6,
    /// UDP, and what else is over IPv4.
    Datagram,
    /// UDP, and what else is over IPv6.
    Datagram6,
    /// Of every protocol.
    Netlink,
    /// Unix sockets, and those that have the options of every socket alone.
    Plain,
}

impl SocketKind {
    /// That of a socket; none if it is no socket.
    #[must_use]
    pub fn of(socket: &impl AsFd) -> Option<Self> {
        let stream = getsockopt(socket, TypeOf).ok()? == SockType::Stream;
        Some(match (getsockopt(socket, Domain).ok()?, stream) {
            (libc::AF_INET, true) => Self::Tcp,
            (libc::AF_INET6, true) => Self::Tcp6,
            (libc::AF_INET, false) => Self::Datagram,
            (libc::AF_INET6, false) => Self::Datagram6,
            (libc::AF_NETLINK, _) => Self::Netlink,
            _ => Self::Plain,
        })
    }

    /// A new one in the network of the caller.
    ///
    /// # Errors
    /// The network has none of these.
    pub fn make(self) -> nix::Result<OwnedFd> {
        let (family, kind, protocol) = match self {
            Self::Tcp => (AddressFamily::Inet, SockType::Stream, None),
            Self::Tcp6 => (AddressFamily::Inet6, SockType::Stream, None),
            Self::Datagram => (AddressFamily::Inet, SockType::Datagram, None),
            Self::Datagram6 => (AddressFamily::Inet6, SockType::Datagram, None),
            Self::Netlink => (
                AddressFamily::Netlink,
                SockType::Raw,
                Some(SockProtocol::NetlinkRoute),
            ),
            Self::Plain => (AddressFamily::Unix, SockType::Datagram, None),
        };
        socket(family, kind, SockFlag::SOCK_CLOEXEC, protocol)
    }
}

/// What new sockets of a kind have. What such a socket has not is not asked of others: this is done while a container
/// stands still, for each of its sockets.
#[derive(Debug)]
pub struct Usual {
    is_stream: bool,
    plain: Vec<(&'static Plain, u32)>,
    congestion: Option<String>,
}

impl Usual {
    /// That of the kind of a new socket, in its network.
    #[must_use]
    pub fn of(new: &impl AsFd) -> Self {
        let new = new.as_fd();
        let is_stream = getsockopt(&new, TypeOf).is_ok_and(|it| it == SockType::Stream);
        let options = { TABLE.iter() }.filter(|it| it.rule != Rule::OfDatagrams || !is_stream);
        let plain = options.filter_map(|option| Some((option, (option.get)(new).ok()?)));
        Self {
            is_stream,
            plain: plain.collect(),
            congestion: congestion(new),
        }
    }
}

fn congestion(of: BorrowedFd<'_>) -> Option<String> {
    let name = getsockopt(&of, TcpCongestion).ok()?.into_string().ok()?;
    Some(name).filter(|name| !name.is_empty())
}

/// What a restored socket may be given.
#[derive(Debug, Clone, Copy)]
pub struct Allowed<'a> {
    /// Congestion controls that everybody may choose.
    pub congestion: &'a [&'a str],
    /// Those that the process can have at all, as a set of bits.
    pub capabilities: u64,
}

/// Those of a socket; `usual` is that of its kind in its network.
#[must_use]
pub fn read(socket: &impl AsFd, usual: &Usual) -> SocketOptions {
    let socket = socket.as_fd();
    let listens = getsockopt(&socket, AcceptConn).unwrap_or_default();
    let is_stream = usual.is_stream;
    let plain = usual.plain.iter().filter_map(|(option, usual)| {
        if option.rule == Rule::OfListeners && !listens {
            return None;
        }
        let value = (option.get)(socket).ok()?;
        let value = match option.rule {
            // The kernel of a connection keeps in two bits whether it tells of congestion.
            Rule::TrafficClass if is_stream => value & !ECN | usual & ECN,
            _ => value,
        };
        (value != *usual).then(|| (option.name.to_owned(), value))
    });
    // Only TCP has one.
    let chosen = { usual.congestion.as_ref() }.and_then(|_| congestion(socket));
    SocketOptions {
        plain: plain.collect(),
        congestion: chosen.filter(|it| usual.congestion.as_ref() != Some(it)),
    }
}

/// Gives a socket these options. Gives what it could not have, for people.
#[must_use]
pub fn give(options: &SocketOptions, socket: &impl AsFd, allowed: Allowed<'_>) -> Vec<String> {
    let socket = socket.as_fd();
    let mut lost = Vec::new();
    let mut note = |what: &str, given: Result<(), Errno>| {
        lost.extend(given.err().map(|errno| format!("{what}: {errno}")));
    };
    for (name, value) in &options.plain {
        let given = match TABLE.iter().find(|option| option.name == name) {
            None => Err(Errno::ENOPROTOOPT),
            // The caller could set it, and the container could not.
            Some(option) if !option.rule.allows(allowed.capabilities) => Err(Errno::EPERM),
            Some(option) => (option.set)(socket, *value),
        };
        note(&format!("{} (it was {value})", name.escape_debug()), given);
    }
    if let Some(name) = &options.congestion {
        // The caller may load modules of the kernel by such a name, and the container may not.
        let given = match allowed.congestion.contains(&name.as_str()) {
            true => setsockopt(&socket, TcpCongestion, &OsString::from(name)),
            false => Err(Errno::EPERM),
        };
        note(
            &format!("the congestion control {}", name.escape_debug()),
            given,
        );
    }
    lost
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use super::*;

    const NONE: Allowed<'_> = Allowed {
        congestion: &[],
        capabilities: 0,
    };

    fn options<const N: usize>(plain: [(&str, u32); N]) -> SocketOptions {
        SocketOptions {
            congestion: None,
            plain: plain.map(|(name, value)| (name.to_owned(), value)).into(),
        }
    }

    #[test]
    fn one_socket_gets_what_another_has() {
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (one, two) = (listen(), listen());
        assert_eq!(SocketKind::of(&one), Some(SocketKind::Tcp));
        let usual = Usual::of(&SocketKind::Tcp.make().unwrap());
        let read = |of| super::read(of, &usual);
        assert_eq!(read(&one), SocketOptions::default());
        let given = options([
            ("defer_accept", 7),
            ("fast_open", 16),
            ("tcp_maxseg", 900),
            ("tcp_syncnt", 3),
            ("user_timeout", 30_000),
        ]);
        assert!(give(&given, &one, NONE).is_empty());
        assert_eq!(read(&one), given);
        assert!(give(&read(&one), &two, NONE).is_empty());
        assert_eq!(read(&two), given);
    }

    #[test]
    fn a_congestion_control_is_one_that_everybody_may_choose() {
        let new = SocketKind::Tcp.make().unwrap();
        let usual = getsockopt(&new, TcpCongestion).unwrap();
        let usual = usual.into_string().unwrap();
        let chosen = SocketOptions {
            congestion: Some(usual.clone()),
            ..SocketOptions::default()
        };
        assert_eq!(give(&chosen, &new, NONE).len(), 1);
        let congestion = &[usual.as_str()][..];
        assert!(give(&chosen, &new, Allowed { congestion, ..NONE }).is_empty());
    }

    #[test]
    fn new_sockets_of_each_kind_are_ordinary() {
        for kind in [
            SocketKind::Tcp,
            SocketKind::Datagram,
            SocketKind::Netlink,
            SocketKind::Plain,
        ] {
            let (one, two) = (kind.make().unwrap(), kind.make().unwrap());
            assert_eq!(SocketKind::of(&one), Some(kind));
            assert!(read(&one, &Usual::of(&two)).are_ordinary());
        }
    }

    #[test]
    fn connections_are_ordinary() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else {
                // A machine without IPv6.
                continue;
            };
            let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let two = listener.accept().unwrap().0;
            let usual = Usual::of(&SocketKind::of(&one).unwrap().make().unwrap());
            for socket in [one.as_fd(), two.as_fd(), listener.as_fd()] {
                assert_eq!(read(&socket, &usual), SocketOptions::default());
            }
        }
    }

    #[test]
    fn what_means_nothing_or_needs_a_capability_is_told() {
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let given = options([("ip_transparent", 1), ("no\nsuch", 1)]);
        let lost = give(&given, &udp, NONE);
        assert_eq!(lost.len(), 2, "{lost:?}");
        assert!(!lost.concat().contains('\n'), "{lost:?}");
    }
}
