//! Sockets: of what kind, and which TCP connections nobody has decided about.
//!
//! ```text
//!  system.sockprotoname of /proc/PID/fd/N  -> "MPTCP\0"   the protocol's name in the kernel
//!  /proc/PID/net/tcp, tcp6                 -> state, and the inode that ties it to a descriptor
//! ```

use std::collections::BTreeMap;

use procfs::net::{TcpNetEntry, TcpState};
use procfs::process::FDTarget;
use transship_checkpoint::criu_options::Tcp;

use super::processes::{Processes, Seen};
use super::{Hit, Subject};

/// What the names of the protocols begin with that CRIU dumps.
const KNOWN: [&str; 6] = ["TCP", "UDP", "RAW", "UNIX", "NETLINK", "PACKET"];

/// The sockets of the container by their inodes.
pub(super) type Owned<'p> = BTreeMap<u64, (&'p Seen, String)>;

/// All sockets that CRIU would dump, with the path of a descriptor.
pub(super) fn owned(processes: &Processes) -> Owned<'_> {
    let sockets = processes
        .descriptors()
        .filter_map(|(seen, number, target)| match target {
            FDTarget::Socket(inode) => Some((*inode, (seen, seen.descriptor(number)))),
            _ => None,
        });
    sockets.collect()
}

pub(super) fn hits(subject: &Subject, owned: &Owned<'_>) -> Vec<Hit> {
    let kinds = owned.values().filter_map(|(seen, descriptor)| {
        let name = protocol(descriptor)?;
        unknown_kind(&name, seen)
    });
    let mut hits: Vec<Hit> = kinds.collect();
    let Some(first) = owned.values().find_map(|(seen, _)| seen.process().ok()) else {
        return hits;
    };
    let tables = [first.tcp(), first.tcp6()];
    let connections = tables.into_iter().flatten().flatten();
    hits.extend(connections.filter_map(|entry| {
        owned
            .contains_key(&entry.inode)
            .then(|| undecided(subject, &entry))?
    }));
    hits
}

fn unknown_kind(name: &str, seen: &Seen) -> Option<Hit> {
    if name.starts_with("MPTCP") {
        return Some(("mptcp", seen.called()));
    }
    let known = name.is_empty() || KNOWN.iter().any(|known| name.starts_with(known));
    (!known).then(|| ("socket-kind", format!("{name} of {}", seen.called())))
}

/// The kernel's name of a socket's protocol.
pub(crate) fn protocol(descriptor: &str) -> Option<String> {
    let mut name = [0; 64];
    let length = rustix::fs::getxattr(descriptor, "system.sockprotoname", &mut name[..]).ok()?;
    let name = name.get(..length)?;
    let name = name.split(|byte| *byte == 0).next()?;
    Some(String::from_utf8_lossy(name).escape_debug().to_string())
}

fn undecided(subject: &Subject, entry: &TcpNetEntry) -> Option<Hit> {
    match entry.state {
        TcpState::Listen if entry.rx_queue > 0 && !subject.criu.skip_in_flight => {
            let at = entry.local_address;
            Some(("in-flight", format!("{} to {at}", entry.rx_queue)))
        }
        TcpState::Established
        | TcpState::SynSent
        | TcpState::FinWait1
        | TcpState::FinWait2
        | TcpState::CloseWait
        | TcpState::LastAck
        | TcpState::Closing
            if subject.criu.tcp == Tcp::Refuse =>
        {
            let (here, there) = (entry.local_address, entry.remote_address);
            Some(("tcp", format!("{here} to {there}")))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::fd::AsRawFd;

    use transship_checkpoint::criu_options::CriuOptions;
    use transship_checkpoint::spec::Spec;

    use super::*;

    fn subject(criu: CriuOptions) -> Subject {
        Subject {
            id: String::new(),
            init: std::process::id(),
            pids: vec![std::process::id()],
            spec: Spec::parse(b"{}").unwrap(),
            criu,
        }
    }

    #[test]
    fn connections_are_found_until_somebody_decides() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let accepted = TcpStream::connect(address).unwrap();
        let server = listener.accept().unwrap();
        let waiting = TcpStream::connect(address).unwrap();
        let own = std::process::id();
        let found = |criu: CriuOptions| {
            let subject = subject(criu);
            let processes = Processes::read(own, &[own]);
            // The test runs beside others that may have sockets, too.
            let of_address = |hit: &Hit| hit.1.contains(&address.to_string());
            let mut names: Vec<_> = hits(&subject, &owned(&processes))
                .into_iter()
                .filter(of_address)
                .map(|(name, _)| name)
                .collect();
            names.sort_unstable();
            names.dedup();
            names
        };
        assert_eq!(found(CriuOptions::default()), ["in-flight", "tcp"]);
        let decided = CriuOptions {
            tcp: Tcp::Close,
            skip_in_flight: true,
            ..CriuOptions::default()
        };
        assert!(found(decided).is_empty());
        drop((accepted, server, waiting));
    }

    #[test]
    fn the_kernel_names_the_protocol() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let descriptor = format!("/proc/self/fd/{}", socket.as_raw_fd());
        assert_eq!(protocol(&descriptor).as_deref(), Some("UDP"));
        let own = std::process::id();
        let processes = Processes::read(own, &[own]);
        let kind = |name| unknown_kind(name, &processes.tree[0]).map(|(name, _)| name);
        for (name, told) in [
            ("TCPv6", None),
            ("UNIX-STREAM", None),
            ("", None),
            ("MPTCPv6", Some("mptcp")),
            ("SCTP", Some("socket-kind")),
            ("PING", Some("socket-kind")),
        ] {
            assert_eq!(kind(name), told, "{name}");
        }
    }
}
