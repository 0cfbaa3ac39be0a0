//! What CRIU does not keep of the descriptors of frozen processes: options of sockets, see
//! [`transship_sandbox::socket_options`], and what they have not read.
//!
//! ```text
//!  /proc/PID/fd/N -> socket:[4711]        --> pidfd_getfd --> getsockopt    of each of its kind
//!                    socket of UDP, inotify                  FIONREAD
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::time::Duration;

use procfs::process::{FDTarget, Process};
use rustix::io::ioctl_fionread;
use transship_checkpoint::task_attributes::{Socket, Unread, UnreadKind};
use transship_sandbox::socket_options::{self, SocketKind, Usual};
use transship_sandbox::{DescriptorsOf, TaskStatus};

use crate::conditions::protocol;
use crate::network_namespace::within;
use crate::process_files;
use crate::wall_clock_timers::wall_clock_now;

/// Bytes of what the kernel tells of a timer, at most.
const TIMER: u64 = 1024;
/// More sockets than this are not looked at, since it takes some microseconds of the freeze for each.
const SOCKETS: usize = 1 << 16;

/// Sockets with options that a new one has not, and what was not read.
#[derive(Debug, Default)]
pub(crate) struct OfDescriptors {
    pub(crate) sockets: Vec<Socket>,
    /// How many were not looked at.
    pub(crate) left_out: u64,
    pub(crate) unread: Vec<Unread>,
    /// When timers fire that are set to a moment of the wall clock, in its nanoseconds.
    pub(crate) moments: Vec<u64>,
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
                FDTarget::AnonInode(kind) if kind == "[timerfd]" => {
                    let left = process_files::descriptor(*pid, open.fd, TIMER).ok();
                    let left = left.as_deref().and_then(left_of_wall_clock);
                    found
                        .moments
                        .extend(left.map(|left| wall_clock_now().saturating_add(left)));
                }
                FDTarget::AnonInode(kind) if kind == "[fanotify]" => {
                    found.unread(&process, open.fd, UnreadKind::Fanotify);
                }
                _ => {}
            }
        }
    }
    found
}

/// Nanoseconds that are left of a timer which is set to a moment of the wall clock; none of others.
///
/// ```text
/// clockid: 0              of /proc/PID/fdinfo/FD, proc(5)
/// settime flags: 01       in octal; TFD_TIMER_ABSTIME is 1
/// it_value: (29, 994102417)
/// ```
fn left_of_wall_clock(text: &str) -> Option<u64> {
    let field = |name| process_files::field(text, name);
    let flags = u32::from_str_radix(field("settime flags:")?, 8).ok()?;
    let value = field("it_value:")?;
    let (seconds, nanoseconds) = { value.strip_prefix('(') }
        .and_then(|it| it.strip_suffix(')'))
        .and_then(|it| it.split_once(", "))?;
    let left = Duration::new(seconds.parse().ok()?, nanoseconds.parse().ok()?);
    let is_one = ["0", "8"].contains(&field("clockid:")?) && flags & 1 != 0 && !left.is_zero();
    is_one.then(|| u64::try_from(left.as_nanos()).unwrap_or(u64::MAX))
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
    fn timers_of_a_moment_are_told_from_others() {
        let text = |clock: u32, flags: &str, value: &str| {
            format!(
                "pos:\t0\nclockid: {clock}\nticks: 0\nsettime flags: {flags}\nit_value: {value}\nit_interval: (0, 0)\n"
            )
        };
        let left = |clock, flags, value| left_of_wall_clock(&text(clock, flags, value));
        assert_eq!(left(0, "01", "(29, 5)"), Some(29_000_000_005));
        assert_eq!(left(0, "03", "(0, 5)"), Some(5));
        assert_eq!(left(0, "01", "(0, 0)"), None);
        assert_eq!(left(0, "00", "(29, 5)"), None);
        assert_eq!(left(1, "01", "(29, 5)"), None);
        assert_eq!(left_of_wall_clock("it_value: (1"), None);
    }

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
