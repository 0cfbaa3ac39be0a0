//! `files.img`: the open files of which the kernel asks who makes them so.
//!
//! ```text
//! file_entry        1 type  and one of
//!                   3 reg  4 isk  6 psk  7 nlsk  8 efd  9 epfd  10 sgfd  12 tfd  13 ify  14 ffy  15 ext  16 usk  18 pipe
//!                   19 tty  20 memfd  21 bpf  22 pidfd: each has a fown_entry, and sockets an sk_opts_entry
//! inet_sk_entry     4 type  5 proto  7 src_port
//! netlink_sk_entry  3 protocol  8 groups
//! fown_entry        1 uid  2 euid  5 pid
//! sk_opts_entry     1 so_sndbuf  2 so_rcvbuf  8 so_priority  10 so_mark
//! eventpoll_file_entry  4 tfd (repeated): eventpoll_tfd_entry  3 events
//! ```

use std::path::Path;

use super::strict::{edit_submessage, fields, is_ambiguous, set_varints, submessage};
use super::{Image, ImageError, Kind, push_bytes};

/// What takes a capability, and CRIU makes with its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PrivilegedFile {
    /// A packet socket, or a raw one.
    RawSocket,
    /// A TUN or TAP device.
    Tun,
    /// A fanotify group.
    Fanotify,
    /// A BPF map.
    BpfMap,
    /// A netlink socket to which the kernel sends what not everybody may hear.
    NetlinkGroup,
    /// The same for what is audited.
    AuditLog,
    /// A socket whose packets have a mark, by which a node routes and filters.
    Mark,
    /// A socket whose packets go before those of others.
    Priority,
    /// A socket that is bound to this port, which may be one of those that not everybody may have.
    Port(u16),
    /// A file that sends its signals as this user.
    Owner(u32),
    /// An epoll whose events keep the node awake (`EPOLLWAKEUP`, which the kernel takes from who may not have it).
    KeepsAwake,
    /// A timerfd that wakes the node.
    Alarm,
    /// A pipe that holds so many bytes, which may be more than everybody may have.
    Pipe(u32),
    /// A System V segment of huge pages.
    HugePages,
    /// A socket that keeps so many bytes, which may be more than everybody may have.
    Buffers(Buffers),
}

/// How much a socket keeps, as the kernel counts it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Buffers {
    /// Whether it is of TCP, for which the kernel itself takes more.
    pub of_tcp: bool,
    /// Bytes to be sent.
    pub send: u32,
    /// Bytes that were received.
    pub receive: u32,
}

/// The most that sockets may keep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BufferLimits {
    /// Of TCP.
    pub tcp: Buffers,
    /// All others.
    pub others: Buffers,
}

impl BufferLimits {
    /// Those of `found` with what is too much cut off.
    #[must_use]
    pub fn cut(&self, found: Buffers) -> Buffers {
        let most = if found.of_tcp { self.tcp } else { self.others };
        Buffers {
            of_tcp: found.of_tcp,
            send: found.send.min(most.send),
            receive: found.receive.min(most.receive),
        }
    }
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct FileEntry {
    #[prost(uint32, required, tag = "1")]
    kind: u32,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct InetSkEntry {
    #[prost(uint32, required, tag = "4")]
    kind: u32,
    #[prost(uint32, required, tag = "5")]
    proto: u32,
    #[prost(uint32, required, tag = "7")]
    src_port: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct NetlinkSkEntry {
    #[prost(uint32, required, tag = "3")]
    protocol: u32,
    #[prost(uint32, repeated, packed = "false", tag = "8")]
    groups: Vec<u32>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct TimerfdEntry {
    #[prost(uint32, required, tag = "4")]
    clockid: u32,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct FownEntry {
    #[prost(uint32, required, tag = "1")]
    uid: u32,
    #[prost(uint32, required, tag = "2")]
    euid: u32,
    #[prost(uint32, required, tag = "5")]
    pid: u32,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct SkOptsEntry {
    #[prost(uint32, required, tag = "1")]
    so_sndbuf: u32,
    #[prost(uint32, required, tag = "2")]
    so_rcvbuf: u32,
    #[prost(uint32, optional, tag = "8")]
    so_priority: Option<u32>,
    #[prost(uint32, optional, tag = "10")]
    so_mark: Option<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct EventpollFileEntry {
    #[prost(message, repeated, tag = "4")]
    tfd: Vec<EventpollTfdEntry>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct EventpollTfdEntry {
    #[prost(uint32, required, tag = "3")]
    events: u32,
}

impl InetSkEntry {
    /// As CRIU binds it: to the lower half of the number, and not at all if it has no ports.
    fn port(self) -> Option<PrivilegedFile> {
        let has_ports =
            self.kind != SOCK_RAW && ![IPPROTO_ICMP, IPPROTO_ICMPV6].contains(&self.proto);
        let port = u16::try_from(self.src_port & 0xffff).ok()?;
        (has_ports && port != 0).then_some(PrivilegedFile::Port(port))
    }
}

impl NetlinkSkEntry {
    fn privilege(&self) -> Option<PrivilegedFile> {
        let hears = self.groups.iter().any(|groups| *groups != 0);
        match self.protocol {
            _ if !hears => None,
            // Of these the kernel lets everybody hear.
            NETLINK_ROUTE | NETLINK_KOBJECT_UEVENT => None,
            NETLINK_AUDIT => Some(PrivilegedFile::AuditLog),
            _ => Some(PrivilegedFile::NetlinkGroup),
        }
    }
}

impl FownEntry {
    /// CRIU makes nobody the owner where there is no process.
    fn owners(self) -> impl Iterator<Item = PrivilegedFile> {
        let users = [self.uid, self.euid].into_iter();
        users
            .filter(move |_| self.pid != 0)
            .map(PrivilegedFile::Owner)
    }
}

/// Where the entry of a type is, the owner in it, and the options of a socket.
struct Part {
    entry: u64,
    owner: u64,
    options: Option<u64>,
}

const fn part(entry: u64, owner: u64, options: Option<u64>) -> Part {
    Part {
        entry,
        owner,
        options,
    }
}

const ISK: u64 = 4;
const TFD: u64 = 12;
const NLSK: u64 = 7;
const EPFD: u64 = 9;
const PARTS: [Part; 17] = [
    part(3, 5, None),
    part(ISK, 13, Some(14)),
    part(6, 6, Some(7)),
    part(NLSK, 11, Some(12)),
    part(8, 3, None),
    part(EPFD, 3, None),
    part(10, 3, None),
    part(12, 3, None),
    part(13, 4, None),
    part(14, 3, None),
    part(15, 5, None),
    part(16, 9, Some(10)),
    part(18, 4, None),
    part(19, 4, None),
    part(20, 4, None),
    part(21, 4, None),
    part(22, 5, None),
];
/// Source and destination addresses.
const REPEATED_OF_ISK: [u64; 2] = [11, 12];
const GROUPS: u64 = 8;
/// What an epoll waits for.
const TFDS: u64 = 4;
/// Instructions of a socket's filter.
const SO_FILTER: u64 = 16;
const SO_SNDBUF: u64 = 1;
const SO_RCVBUF: u64 = 2;
/// A higher one takes a capability.
const MOST_PRIORITY: u32 = 6;
/// `CLOCK_REALTIME_ALARM` and `CLOCK_BOOTTIME_ALARM`.
const ALARM_CLOCKS: [u32; 2] = [8, 9];
const EPOLLWAKEUP: u32 = 1 << 29;
const IPPROTO_ICMP: u32 = 1;
const IPPROTO_TCP: u32 = 6;
const IPPROTO_ICMPV6: u32 = 58;
const PACKETSK: u32 = 10;
const FANOTIFY: u32 = 12;
const TUNF: u32 = 15;
const BPFMAP: u32 = 19;
const SOCK_RAW: u32 = 3;
const NETLINK_ROUTE: u32 = 0;
const NETLINK_AUDIT: u32 = 9;
const NETLINK_KOBJECT_UEVENT: u32 = 15;

/// Those that the dump has.
///
/// # Errors
/// The image cannot be read: each dump has it, and without it CRIU looks for others. It says a thing twice.
pub fn privileged(dir: &Path) -> Result<Vec<PrivilegedFile>, ImageError> {
    let path = dir.join("files.img");
    let image = Image::read(&path, Kind::Files)?;
    let mut entries = image.entries();
    let mut found = Vec::new();
    while let Some(message) = entries.next_bytes()? {
        if is_ambiguous(message, &[]) {
            return Err(image.ambiguous());
        }
        found.extend(match image.decode::<FileEntry>(message)?.kind {
            PACKETSK => Some(PrivilegedFile::RawSocket),
            TUNF => Some(PrivilegedFile::Tun),
            FANOTIFY => Some(PrivilegedFile::Fanotify),
            BPFMAP => Some(PrivilegedFile::BpfMap),
            _ => None,
        });
        for part in &PARTS {
            if let Some(entry) = submessage(message, part.entry) {
                add_part(&image, part, entry, &mut found)?;
            }
        }
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

fn add_part(
    image: &Image,
    part: &Part,
    entry: &[u8],
    found: &mut Vec<PrivilegedFile>,
) -> Result<(), ImageError> {
    let mut of_tcp = false;
    match part.entry {
        ISK => {
            if is_ambiguous(entry, &REPEATED_OF_ISK) {
                return Err(image.ambiguous());
            }
            let socket: InetSkEntry = image.decode(entry)?;
            of_tcp = socket.proto == IPPROTO_TCP;
            found.extend((socket.kind == SOCK_RAW).then_some(PrivilegedFile::RawSocket));
            found.extend(socket.port());
        }
        NLSK => {
            if is_ambiguous(entry, &[GROUPS]) {
                return Err(image.ambiguous());
            }
            found.extend(image.decode::<NetlinkSkEntry>(entry)?.privilege());
        }
        EPFD => {
            let all = fields(entry).ok_or_else(|| image.ambiguous())?;
            let mut waits = all.iter().filter(|field| field.number == TFDS);
            if is_ambiguous(entry, &[TFDS])
                || waits.any(|field| is_ambiguous(&entry[field.value.clone()], &[]))
            {
                return Err(image.ambiguous());
            }
            let epoll: EventpollFileEntry = image.decode(entry)?;
            let mut waits = epoll.tfd.iter();
            let keeps_awake = waits.any(|wait| wait.events & EPOLLWAKEUP != 0);
            found.extend(keeps_awake.then_some(PrivilegedFile::KeepsAwake));
        }
        TFD => {
            if is_ambiguous(entry, &[]) {
                return Err(image.ambiguous());
            }
            let clock = image.decode::<TimerfdEntry>(entry)?.clockid;
            found.extend(
                ALARM_CLOCKS
                    .contains(&clock)
                    .then_some(PrivilegedFile::Alarm),
            );
        }
        _ => {}
    }
    if let Some(owner) = only(image, entry, part.owner)? {
        if is_ambiguous(owner, &[]) {
            return Err(image.ambiguous());
        }
        found.extend(image.decode::<FownEntry>(owner)?.owners());
    }
    let Some(number) = part.options else {
        return Ok(());
    };
    if let Some(options) = only(image, entry, number)? {
        if is_ambiguous(options, &[SO_FILTER]) {
            return Err(image.ambiguous());
        }
        let options: SkOptsEntry = image.decode(options)?;
        found.push(PrivilegedFile::Buffers(options.buffers(of_tcp)));
        let is_marked = options.so_mark.is_some_and(|mark| mark != 0);
        found.extend(is_marked.then_some(PrivilegedFile::Mark));
        let goes_first = { options.so_priority }.is_some_and(|priority| priority > MOST_PRIORITY);
        found.extend(goes_first.then_some(PrivilegedFile::Priority));
    }
    Ok(())
}

impl SkOptsEntry {
    fn buffers(self, of_tcp: bool) -> Buffers {
        Buffers {
            of_tcp,
            send: self.so_sndbuf,
            receive: self.so_rcvbuf,
        }
    }
}

/// A submessage that is there once or not at all.
fn only<'a>(image: &Image, entry: &'a [u8], number: u64) -> Result<Option<&'a [u8]>, ImageError> {
    let fields = fields(entry).ok_or_else(|| image.ambiguous())?;
    match fields.iter().filter(|field| field.number == number).count() {
        0 | 1 => Ok(submessage(entry, number)),
        _ => Err(image.ambiguous()),
    }
}

/// Gives the sockets in the images of `dir` no more buffers than `limits`.
///
/// # Errors
/// The image cannot be read or replaced.
pub fn limit_buffers(dir: &Path, limits: &BufferLimits) -> Result<(), ImageError> {
    let path = dir.join("files.img");
    let image = Image::read(&path, Kind::Files)?;
    let (mut entries, mut body) = (image.entries(), Vec::new());
    while let Some(message) = entries.next_bytes()? {
        let mut message = message.to_vec();
        for part in &PARTS {
            let (Some(entry), Some(number)) = (submessage(&message, part.entry), part.options)
            else {
                continue;
            };
            let of_tcp =
                part.entry == ISK && image.decode::<InetSkEntry>(entry)?.proto == IPPROTO_TCP;
            let Some(options) = submessage(entry, number) else {
                continue;
            };
            let found = image.decode::<SkOptsEntry>(options)?.buffers(of_tcp);
            let cut = limits.cut(found);
            if cut != found {
                message = edit_submessage(&message, part.entry, |entry| {
                    edit_submessage(entry, number, |options| {
                        let options = set_varints(options, SO_SNDBUF, &[cut.send.into()]);
                        set_varints(&options, SO_RCVBUF, &[cut.receive.into()])
                    })
                });
            }
        }
        push_bytes(&mut body, &message);
    }
    image.with_body(body).replace(&path)
}

#[cfg(test)]
mod tests {
    use super::super::push_entry;
    use super::*;

    #[derive(Clone, PartialEq, prost::Message)]
    struct Entry {
        #[prost(uint32, required, tag = "1")]
        kind: u32,
        #[prost(message, optional, tag = "4")]
        isk: Option<Inet>,
        #[prost(message, optional, tag = "7")]
        nlsk: Option<NetlinkSkEntry>,
        #[prost(message, optional, tag = "12")]
        tfd: Option<TimerfdEntry>,
        #[prost(message, optional, tag = "9")]
        epfd: Option<EventpollFileEntry>,
        #[prost(message, optional, tag = "16")]
        usk: Option<Unix>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    struct Inet {
        #[prost(uint32, required, tag = "4")]
        kind: u32,
        #[prost(uint32, required, tag = "5")]
        proto: u32,
        #[prost(uint32, required, tag = "7")]
        src_port: u32,
        #[prost(message, repeated, tag = "13")]
        fown: Vec<FownEntry>,
        #[prost(message, optional, tag = "14")]
        opts: Option<SkOptsEntry>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    struct Unix {
        #[prost(message, optional, tag = "10")]
        opts: Option<SkOptsEntry>,
    }

    fn write(dir: &Path, entries: &[Entry]) {
        let path = dir.join("files.img");
        let mut body = Vec::new();
        { entries.iter() }.for_each(|entry| push_entry(&mut body, entry));
        Image::new(&path, Kind::Files, body).replace(&path).unwrap();
    }

    fn inet(kind: u32, proto: u32, src_port: u32) -> Inet {
        Inet {
            kind,
            proto,
            src_port,
            ..Inet::default()
        }
    }

    fn read(isk: Inet) -> Result<Vec<PrivilegedFile>, ImageError> {
        let dir = tempfile::tempdir().unwrap();
        let entry = Entry {
            kind: 4,
            isk: Some(isk),
            ..Entry::default()
        };
        write(dir.path(), &[entry]);
        privileged(dir.path())
    }

    #[test]
    fn what_the_kernel_tells_everybody_takes_nothing() {
        for (protocol, groups, expected) in [
            (NETLINK_ROUTE, vec![1], None),
            (NETLINK_KOBJECT_UEVENT, vec![1], None),
            (NETLINK_AUDIT, vec![], None),
            (NETLINK_AUDIT, vec![0], None),
            (NETLINK_AUDIT, vec![1], Some(PrivilegedFile::AuditLog)),
            // NETLINK_NETFILTER: connections.
            (12, vec![0, 7], Some(PrivilegedFile::NetlinkGroup)),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let entry = Entry {
                kind: 13,
                nlsk: Some(NetlinkSkEntry { protocol, groups }),
                ..Entry::default()
            };
            write(dir.path(), &[entry]);
            let found = privileged(dir.path()).unwrap();
            assert_eq!(
                found,
                expected.into_iter().collect::<Vec<_>>(),
                "{protocol}"
            );
        }
    }

    #[test]
    fn what_keeps_the_node_awake_is_seen() {
        let epoll = |events: &[u32]| Entry {
            epfd: Some(EventpollFileEntry {
                tfd: { events.iter() }
                    .map(|events| EventpollTfdEntry { events: *events })
                    .collect(),
            }),
            ..Entry::default()
        };
        let timer = |clockid| Entry {
            tfd: Some(TimerfdEntry { clockid }),
            ..Entry::default()
        };
        for (entry, expected) in [
            (epoll(&[1, 1 << 31]), vec![]),
            (
                epoll(&[1, 1 | EPOLLWAKEUP]),
                vec![PrivilegedFile::KeepsAwake],
            ),
            (timer(1), vec![]),
            (timer(9), vec![PrivilegedFile::Alarm]),
        ] {
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), std::slice::from_ref(&entry));
            assert_eq!(privileged(dir.path()).unwrap(), expected, "{entry:?}");
        }
    }

    #[test]
    fn a_port_is_the_one_that_criu_binds() {
        let port = PrivilegedFile::Port;
        for (kind, proto, src_port, expected) in [
            (1, IPPROTO_TCP, 80, Some(port(80))),
            (1, IPPROTO_TCP, (1 << 16) + 80, Some(port(80))),
            (1, IPPROTO_TCP, 0, None),
            (2, 17, 53, Some(port(53))),
            (2, IPPROTO_ICMP, 7, None),
            (3, 17, 7, Some(PrivilegedFile::RawSocket)),
        ] {
            let found = read(inet(kind, proto, src_port)).unwrap();
            let expected: Vec<_> = expected.into_iter().collect();
            assert_eq!(found, expected, "{proto} {src_port}");
        }
    }

    #[test]
    fn an_owner_is_told_once() {
        let [owner, nobody] = [5, 0].map(|pid| FownEntry {
            uid: 7,
            euid: 0,
            pid,
        });
        for (fown, expected) in [
            (
                vec![owner],
                Some(vec![PrivilegedFile::Owner(0), PrivilegedFile::Owner(7)]),
            ),
            (vec![nobody], Some(vec![])),
            (vec![nobody, owner], None),
        ] {
            let mut socket = inet(2, 17, 0);
            socket.fown = fown;
            assert_eq!(read(socket).ok(), expected);
        }
    }

    #[test]
    fn buffers_are_cut_and_nothing_else() {
        let options = |so_sndbuf, so_rcvbuf| SkOptsEntry {
            so_sndbuf,
            so_rcvbuf,
            so_priority: Some(7),
            so_mark: Some(9),
        };
        let entries = |buffers: [SkOptsEntry; 3]| {
            let [tcp, udp, unix] = buffers.map(Some);
            [
                Entry {
                    kind: 4,
                    isk: Some(Inet {
                        opts: tcp,
                        ..inet(1, IPPROTO_TCP, 0)
                    }),
                    ..Entry::default()
                },
                Entry {
                    kind: 4,
                    isk: Some(Inet {
                        opts: udp,
                        ..inet(2, 17, 0)
                    }),
                    ..Entry::default()
                },
                Entry {
                    kind: 5,
                    usk: Some(Unix { opts: unix }),
                    ..Entry::default()
                },
            ]
        };
        let limits = BufferLimits {
            tcp: Buffers {
                of_tcp: true,
                send: 300,
                receive: 400,
            },
            others: Buffers {
                of_tcp: false,
                send: 100,
                receive: 200,
            },
        };
        let dir = tempfile::tempdir().unwrap();
        let found = [options(350, 350), options(350, 350), options(50, 200)];
        write(dir.path(), &entries(found));
        let before = privileged(dir.path()).unwrap();
        assert!(
            before.contains(&PrivilegedFile::Mark) && before.contains(&PrivilegedFile::Priority)
        );
        limit_buffers(dir.path(), &limits).unwrap();
        let path = dir.path().join("files.img");
        let image = Image::read(&path, Kind::Files).unwrap();
        let (mut left, mut seen) = (image.entries(), Vec::new());
        while let Some(entry) = left.next::<Entry>().unwrap() {
            seen.push(entry);
        }
        let cut = [options(300, 350), options(100, 200), options(50, 200)];
        assert_eq!(seen, entries(cut));
    }
}
