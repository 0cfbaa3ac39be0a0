//! What the kernel does with the data of a socket, which CRIU does not read, and which no other socket can be given:
//! keys and numbers of TLS, the kind of an encapsulation, the clock of packets that are sent at set times.
//!
//! ```text
//!  TCP_ULP      "tls"                   CRIU would go on with the connection in clear
//!  UDP_ENCAP    2                       UDP_ENCAP_ESPINUDP
//!  UDP_CORK     1                       a datagram is being put together
//!  SO_TXTIME    clock 11, flags 0       0 and 0 is what a socket without it has
//! ```

use std::os::fd::OwnedFd;

use nix::sys::socket::getsockopt;
use nix::{getsockopt_impl, libc, setsockopt_impl, sockopt_impl};
use procfs::process::FDTarget;
use transship_sandbox::DescriptorsOf;

use super::Hit;
use super::processes::Processes;

/// From `linux/udp.h`; libc does not have it.
const UDP_ENCAP: libc::c_int = 100;
/// What names of protocols the kernel has room for (`TCP_ULP_NAME_MAX`).
const NAME: usize = 16;

sockopt_impl!(
    /// What is between a TCP connection and its user.
    UpperProtocol, Both, libc::IPPROTO_TCP, libc::TCP_ULP, OsString<[u8; NAME]>
);
sockopt_impl!(
    /// What UDP takes out of its datagrams.
    Encapsulation,
    GetOnly,
    libc::IPPROTO_UDP,
    UDP_ENCAP,
    u32
);
sockopt_impl!(
    /// Whether datagrams are held back until they are whole.
    Cork,
    Both,
    libc::IPPROTO_UDP,
    libc::UDP_CORK,
    u32
);
sockopt_impl!(
    /// The clock, and flags.
    SendTime,
    GetOnly,
    libc::SOL_SOCKET,
    libc::SO_TXTIME,
    [u32; 2]
);

pub(super) fn hits(processes: &Processes) -> Vec<Hit> {
    sockets_that(processes, "socket-mode", mode)
}

/// Sockets that hold back what is sent: CRIU refuses them, whether anything was (`dump_one_inet_fd`).
pub(super) fn corked(processes: &Processes) -> Vec<Hit> {
    sockets_that(processes, "udp-cork", cork)
}

fn sockets_that(
    processes: &Processes,
    condition: &'static str,
    is_so: fn(&OwnedFd) -> Option<String>,
) -> Vec<Hit> {
    let mut hits = Vec::new();
    for seen in &processes.tree {
        // One that has ended, or was closed meanwhile, has no mode.
        let Ok(descriptors) = DescriptorsOf::process(seen.pid.cast_signed()) else {
            continue;
        };
        let sockets = { seen.descriptors.iter() }
            .filter(|(_, target)| matches!(target, FDTarget::Socket(_)))
            .filter_map(|(number, _)| descriptors.get(*number).ok());
        let modes = sockets.filter_map(|socket| is_so(&socket));
        hits.extend(modes.map(|mode| (condition, format!("{mode} of {}", seen.called()))));
    }
    hits
}

fn cork(socket: &OwnedFd) -> Option<String> {
    // What is no option of such a socket is an error.
    let corked = getsockopt(socket, Cork).is_ok_and(|on| on != 0);
    corked.then(|| "UDP_CORK".to_owned())
}

fn mode(socket: &OwnedFd) -> Option<String> {
    // What is no option of such a socket is an error.
    let upper = getsockopt(socket, UpperProtocol).unwrap_or_default();
    // Multipath TCP has a condition of its own.
    if !upper.is_empty() && upper != "mptcp" {
        return Some(upper.to_string_lossy().escape_debug().to_string());
    }
    if getsockopt(socket, Encapsulation).is_ok_and(|kind| kind != 0) {
        return Some("UDP_ENCAP".to_owned());
    }
    let timed = getsockopt(socket, SendTime).is_ok_and(|clock| clock != [0, 0]);
    timed.then(|| "SO_TXTIME".to_owned())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn ordinary_sockets_have_no_mode() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let tcp = tcp.into();
        assert_eq!((mode(&tcp), cork(&tcp)), (None, None));
        let udp = udp.into();
        assert_eq!((mode(&udp), cork(&udp)), (None, None));
        nix::sys::socket::setsockopt(&udp, Cork, &1).unwrap();
        assert_eq!(cork(&udp).as_deref(), Some("UDP_CORK"));
    }
}
