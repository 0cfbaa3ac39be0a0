//! Options of TCP sockets that CRIU does not keep (3.17 to 4.2): read from a socket of a frozen process, and given to the
//! one that CRIU has made in its place. The descriptor of the other process is got with `pidfd_getfd(2)`, and means the
//! same socket.

use std::ffi::OsString;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::sys::socket::sockopt::{TcpCongestion, TcpUserTimeout};
use nix::sys::socket::{getsockopt, setsockopt};
use nix::{getsockopt_impl, libc, setsockopt_impl, sockopt_impl};
use serde::{Deserialize, Serialize};

sockopt_impl!(
    /// Seconds that a listener waits for the first data of a connection.
    TcpDeferAccept,
    Both,
    libc::IPPROTO_TCP,
    libc::TCP_DEFER_ACCEPT,
    u32
);
sockopt_impl!(
    /// How many connections may wait that came with data in their first packet.
    TcpFastOpen,
    Both,
    libc::IPPROTO_TCP,
    libc::TCP_FASTOPEN,
    u32
);

/// The options that are not what a new socket has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpOptions {
    /// `TCP_DEFER_ACCEPT`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub defer_accept: Option<u32>,
    /// `TCP_USER_TIMEOUT`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_timeout: Option<u32>,
    /// `TCP_FASTOPEN`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fast_open: Option<u32>,
    /// `TCP_CONGESTION`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub congestion: Option<String>,
}

impl TcpOptions {
    /// Whether a new socket has the same.
    #[must_use]
    pub fn are_ordinary(&self) -> bool {
        *self == Self::default()
    }

    /// Those of a socket; none if it is not one of TCP. `usual` is the congestion control of its network.
    #[must_use]
    pub fn read(socket: &impl AsFd, usual: &str) -> Option<Self> {
        let some = |value: u32| (value != 0).then_some(value);
        let user_timeout = some(getsockopt(socket, TcpUserTimeout).ok()?);
        let defer_accept = getsockopt(socket, TcpDeferAccept).ok().and_then(some);
        let fast_open = getsockopt(socket, TcpFastOpen).ok().and_then(some);
        let congestion = getsockopt(socket, TcpCongestion).ok();
        let congestion = congestion.and_then(|name| name.into_string().ok());
        Some(Self {
            defer_accept,
            user_timeout,
            fast_open,
            congestion: congestion.filter(|name| !name.is_empty() && name != usual),
        })
    }

    /// Gives them to a socket; `allowed` are the names of congestion controls that everybody may choose. Gives what it
    /// could not have, for people.
    pub fn give(&self, socket: &impl AsFd, allowed: &[&str]) -> Vec<String> {
        let mut lost = Vec::new();
        let mut note = |what: &str, given: Result<(), Errno>| {
            lost.extend(given.err().map(|errno| format!("{what}: {errno}")));
        };
        if let Some(seconds) = self.defer_accept {
            note(
                "TCP_DEFER_ACCEPT",
                setsockopt(socket, TcpDeferAccept, &seconds),
            );
        }
        if let Some(timeout) = self.user_timeout {
            note(
                "TCP_USER_TIMEOUT",
                setsockopt(socket, TcpUserTimeout, &timeout),
            );
        }
        if let Some(queue) = self.fast_open {
            note("TCP_FASTOPEN", setsockopt(socket, TcpFastOpen, &queue));
        }
        if let Some(name) = &self.congestion {
            // The caller may load modules of the kernel by such a name, and the container may not.
            let given = match allowed.contains(&name.as_str()) {
                true => setsockopt(socket, TcpCongestion, &OsString::from(name)),
                false => Err(Errno::EPERM),
            };
            note(
                &format!("the congestion control {}", name.escape_debug()),
                given,
            );
        }
        lost
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn one_socket_gets_what_another_has() {
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (one, two) = (listen(), listen());
        let usual = getsockopt(&one, TcpCongestion)
            .unwrap()
            .into_string()
            .unwrap();
        let read = |of| TcpOptions::read(of, &usual).unwrap();
        assert!(read(&one).are_ordinary());
        let options = TcpOptions {
            defer_accept: Some(7),
            user_timeout: Some(30_000),
            fast_open: Some(16),
            congestion: None,
        };
        assert!(options.give(&one, &[]).is_empty());
        assert_eq!(read(&one), options);
        assert!(read(&one).give(&two, &[]).is_empty());
        assert_eq!(read(&two), options);
        // As in a network that has another one by default.
        let other = TcpOptions::read(&one, "other").unwrap();
        assert_eq!(other.congestion.as_deref(), Some(usual.as_str()));
        assert_eq!(other.give(&two, &["another"]).len(), 1);
        assert!(other.give(&two, &[&usual]).is_empty());
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert_eq!(TcpOptions::read(&udp, &usual), None);
    }
}
