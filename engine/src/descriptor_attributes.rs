//! What CRIU does not keep of the descriptors of frozen processes: options of sockets, see
//! [`transship_sandbox::socket_options`], and what they have not read.
//!
//! ```text
//!  /proc/PID/fd/N -> socket:[4711]        --> pidfd_getfd --> getsockopt    of each of its kind
//!                    socket of UDP, inotify                  FIONREAD
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;

use procfs::process::{FDTarget, Process};
use rustix::io::ioctl_fionread;
use transship_checkpoint::task_attributes::{Socket, Unread, UnreadKind};
use transship_sandbox::socket_options::{self, SocketKind, Usual};
use transship_sandbox::{DescriptorsOf, TaskStatus};

use crate::conditions::protocol;
use crate::network_namespace::within;

/// More sockets than this are not looked at, since it takes some microseconds of the freeze for each.
const SOCKETS: usize = 1 << 16;

/// Sockets with options that a new one has not, and what was not read.
#[derive(Debug, Default)]
pub(crate) struct OfDescriptors {
    pub(crate) sockets: Vec<Socket>,
    /// How many were not looked at.
    pub(crate) left_out: u64,
    pub(crate) unread: Vec<Unread>,
    /// Whether there is a timer, whatever it is set to.
    pub(crate) has_timer: bool,
}

/// Looks at all descriptors, at each socket once.
pub(crate) fn read(pids: &[u32]) -> OfDescriptors {
    let mut seen = BTreeSet::new();
    let mut found = OfDescriptors::default();
    // All processes of a container are in one network.
    let mut usual = BTreeMap::new();
    for pid in pids {
        // A zombie has no descriptors.
        let Some(process) = Opened::open(*pid) else {
            continue;
        };
        for open in process.process.fd().into_iter().flatten().flatten() {
            match &open.target {
                FDTarget::Socket(inode) if seen.insert(*inode) => {
                    if seen.len() <= SOCKETS {
                        found.socket(&process, open.fd, &mut usual);
                    } else {
                        found.left_out += 1;
                    }
                }
                FDTarget::AnonInode(kind) if kind == "inotify" => {
                    found.unread(&process, open.fd, UnreadKind::Inotify);
                }
                FDTarget::AnonInode(kind) if kind == "[timerfd]" => found.has_timer = true,
                FDTarget::AnonInode(kind) if kind == "[fanotify]" => {
                    found.unread(&process, open.fd, UnreadKind::Fanotify);
                }
                _ => {}
            }
        }
    }
    found
}

/// A process whose descriptors can be had.
struct Opened {
    process: Process,
    /// Its id in the container.
    id: u32,
    descriptors: DescriptorsOf,
}

impl Opened {
    fn open(pid: u32) -> Option<Self> {
        let process = Process::new(pid.cast_signed()).ok()?;
        let status = TaskStatus::of(format!("/proc/{pid}")).ok()?;
        Some(Self {
            id: status.id_in_container()?,
            descriptors: DescriptorsOf::process(process.pid).ok()?,
            process,
        })
    }

    fn pid(&self) -> u32 {
        self.process.pid.cast_unsigned()
    }

    fn descriptor(&self, number: i32) -> Option<OwnedFd> {
        self.descriptors.get(number).ok()
    }
}

impl OfDescriptors {
    /// `usual` has what new sockets of each kind have.
    fn socket(
        &mut self,
        of: &Opened,
        number: i32,
        usual: &mut BTreeMap<SocketKind, Option<Usual>>,
    ) {
        let Some(socket) = of.descriptor(number) else {
            return;
        };
        let Some(kind) = SocketKind::of(&socket) else {
            return;
        };
        let make = || within(of.pid(), || kind.make()).ok()?.ok();
        let usual = { usual.entry(kind) }.or_insert_with(|| make().as_ref().map(Usual::of));
        let options = { usual.as_ref() }.map(|usual| socket_options::read(&socket, usual));
        if let Some(options) = options.filter(|options| !options.are_ordinary()) {
            self.sockets.push(Socket {
                process: of.id,
                descriptor: number,
                options,
            });
        }
        if matches!(kind, SocketKind::Datagram | SocketKind::Datagram6) {
            let name = protocol(&format!("/proc/{}/fd/{number}", of.pid()));
            if name.is_some_and(|name| name.starts_with("UDP")) {
                self.unread(of, number, UnreadKind::Udp);
            }
        }
    }

    fn unread(&mut self, of: &Opened, number: i32, kind: UnreadKind) {
        let bytes = of
            .descriptor(number)
            .and_then(|file| ioctl_fionread(file).ok());
        self.unread
            .extend(bytes.filter(|bytes| *bytes > 0).map(|bytes| Unread {
                process: of.id,
                descriptor: number,
                kind,
                bytes,
            }));
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};
    use std::os::fd::AsRawFd as _;

    use transship_checkpoint::task_attributes::SocketOptions;
    use transship_sandbox::socket_options::{Allowed, give};

    use super::*;

    #[test]
    fn root_a_listener_is_found_by_its_descriptor() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let own = std::process::id();
        let (listener, other) = (
            TcpListener::bind("127.0.0.1:0").unwrap(),
            TcpListener::bind("127.0.0.1:0").unwrap(),
        );
        let options = SocketOptions {
            plain: [("user_timeout".to_owned(), 4711)].into(),
            ..SocketOptions::default()
        };
        let none = Allowed {
            congestion: &[],
            capabilities: 0,
        };
        assert!(give(&options, &listener, none).is_empty());
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        receiver
            .send_to(b"hello", receiver.local_addr().unwrap())
            .unwrap();
        let found = read(&[own, u32::MAX >> 1]);
        let of = |descriptor| found.sockets.iter().find(|it| it.descriptor == descriptor);
        let mut unread = found.unread.iter();
        let unread = unread
            .find(|it| it.descriptor == receiver.as_raw_fd())
            .unwrap();
        assert_eq!((unread.kind, unread.bytes), (UnreadKind::Udp, 5));
        assert_eq!(of(listener.as_raw_fd()).unwrap().options, options);
        assert_eq!(of(other.as_raw_fd()), None);
    }
}
