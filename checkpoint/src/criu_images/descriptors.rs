//! What the processes of a dump have open, for people who look into it.
//!
//! ```text
//! files.img            file_entry: 1 type  2 id  3 reg  4 isk  16 usk  17 fifo
//! reg_file_entry       2 flags  6 name
//! inet_sk_entry        4 type  5 proto  6 state  7 src_port  8 dst_port  11 src_addr  12 dst_addr
//! unix_sk_entry        3 type  4 state  8 peer  11 name
//! ids-<pid>.img        2 files_id
//! fdinfo-<files_id>.img   1 id  4 fd       one entry a descriptor
//! ```

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;

use super::inet_sockets::{InetSkEntry, address};
use super::{Image, ImageError, Kind, Room, list, shown};

/// What is open behind a descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Open {
    /// A file or directory.
    File {
        /// Its path in the container.
        path: String,
    },
    /// A socket of TCP, UDP or another protocol over IP.
    Inet(InetSocket),
    /// A socket of the machine.
    Unix(UnixSocket),
    /// Something else, by its name in CRIU.
    Other(&'static str),
}

impl Open {
    fn name_bytes(&self) -> usize {
        match self {
            Self::File { path } => path.len(),
            Self::Unix(socket) => socket.name.as_ref().map_or(0, String::len),
            Self::Inet(_) | Self::Other(_) => 0,
        }
    }
}

/// A socket over IP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InetSocket {
    /// `tcp`, `udp`, `icmp`, `raw`, ...
    pub protocol: &'static str,
    /// `listening`, `connected`, or what it is else.
    pub state: &'static str,
    /// Its own address.
    pub local: SocketAddr,
    /// The other end of it, when it is connected.
    pub peer: Option<SocketAddr>,
}

/// A socket of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnixSocket {
    /// `listening`, `connected`, or what it is else.
    pub state: &'static str,
    /// Its path; with `@` in front where it has none in a file system.
    pub name: Option<String>,
}

/// A descriptor of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// The process, by its id in the container.
    pub pid: u32,
    /// Its number.
    pub fd: u32,
    /// What it leads to.
    pub open: Open,
}

/// What is open in a dump, by the number that descriptors and mappings have for it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FileTable(BTreeMap<u32, Open>);

impl FileTable {
    /// The path of a file.
    #[must_use]
    pub fn path_of(&self, id: u32) -> Option<&str> {
        match self.0.get(&id)? {
            Open::File { path } => Some(path),
            _ => None,
        }
    }
}

/// Names of `fd_types`, by number.
const TYPES: [&str; 21] = [
    "unknown",
    "file",
    "pipe",
    "fifo",
    "socket",
    "socket",
    "eventfd",
    "eventpoll",
    "inotify",
    "signalfd",
    "packet socket",
    "terminal",
    "fanotify",
    "netlink socket",
    "namespace",
    "tun",
    "external",
    "timerfd",
    "memfd",
    "bpf map",
    "pidfd",
];

#[derive(Clone, PartialEq, prost::Message)]
struct FileEntry {
    #[prost(uint32, required, tag = "1")]
    kind: u32,
    #[prost(uint32, required, tag = "2")]
    id: u32,
    #[prost(message, optional, tag = "3")]
    reg: Option<RegFileEntry>,
    #[prost(message, optional, tag = "4")]
    isk: Option<InetSkEntry>,
    #[prost(message, optional, tag = "16")]
    usk: Option<UnixSkEntry>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RegFileEntry {
    #[prost(bytes = "vec", required, tag = "6")]
    name: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct UnixSkEntry {
    #[prost(uint32, required, tag = "4")]
    state: u32,
    #[prost(uint32, required, tag = "8")]
    peer: u32,
    #[prost(bytes = "vec", required, tag = "11")]
    name: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct IdsEntry {
    #[prost(uint32, required, tag = "2")]
    files_id: u32,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct FdinfoEntry {
    #[prost(uint32, required, tag = "1")]
    id: u32,
    #[prost(uint32, required, tag = "4")]
    fd: u32,
}

/// What is open in the images of `dir`.
///
/// # Errors
/// The image cannot be read.
pub fn files(dir: &Path) -> Result<FileTable, ImageError> {
    let path = dir.join("files.img");
    let mut table = BTreeMap::new();
    if path.symlink_metadata().is_err() {
        return Ok(FileTable(table));
    }
    let image = Image::read(&path, Kind::Files)?;
    let mut entries = image.entries();
    while let Some(entry) = entries.next::<FileEntry>()? {
        let open = match (entry.reg, entry.isk, entry.usk) {
            (Some(file), _, _) => Open::File {
                path: shown(&file.name),
            },
            (_, Some(socket), _) => Open::Inet(inet(&socket)),
            (_, _, Some(socket)) => Open::Unix(unix(&socket)),
            _ => {
                let kind = usize::try_from(entry.kind).ok();
                Open::Other(kind.and_then(|kind| TYPES.get(kind)).unwrap_or(&TYPES[0]))
            }
        };
        table.insert(entry.id, open);
    }
    Ok(FileTable(table))
}

/// The descriptors of the processes in the images of `dir`, by process and number. Processes that share
/// their descriptors have them each.
///
/// # Errors
/// An image that cannot be read; or they are more than can be shown.
pub fn descriptors(dir: &Path) -> Result<Vec<Descriptor>, ImageError> {
    let files = files(dir)?;
    let (mut found, mut room) = (Vec::new(), Room::new());
    for (pid, path) in list(dir, Kind::Ids)? {
        let ids: Option<IdsEntry> = Image::read(&path, Kind::Ids)?.entries().next()?;
        let Some(ids) = ids else { continue };
        let path = dir.join(format!("fdinfo-{}.img", ids.files_id));
        // A zombie has none.
        if path.symlink_metadata().is_err() {
            continue;
        }
        let image = Image::read(&path, Kind::Fdinfo)?;
        let mut entries = image.entries();
        while let Some(entry) = entries.next::<FdinfoEntry>()? {
            let open = files.0.get(&entry.id);
            let name = open.map_or(0, Open::name_bytes);
            room.take::<Descriptor>(name, &path)?;
            let open = open.cloned();
            found.push(Descriptor {
                pid,
                fd: entry.fd,
                open: open.unwrap_or(Open::Other(TYPES[0])),
            });
        }
    }
    found.sort_by_key(|it| (it.pid, it.fd));
    Ok(found)
}

/// `TCP_*` of `include/net/tcp_states.h`, which sockets of other protocols use too.
fn state_of(state: u32) -> &'static str {
    match state {
        1 => "connected",
        7 => "unconnected",
        10 => "listening",
        _ => "closing",
    }
}

fn inet(socket: &InetSkEntry) -> InetSocket {
    let of = |words: &[u32], port: u32| {
        let nowhere = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let port = u16::try_from(port).unwrap_or_default();
        SocketAddr::new(address(words).unwrap_or(nowhere), port)
    };
    let peer = of(&socket.dst_addr, socket.dst_port);
    InetSocket {
        protocol: match socket.proto {
            1 | 58 => "icmp",
            6 => "tcp",
            17 => "udp",
            136 => "udplite",
            262 => "mptcp",
            _ => "raw",
        },
        state: state_of(socket.state),
        local: of(&socket.src_addr, socket.src_port),
        peer: (peer.port() != 0 && socket.state != 10).then_some(peer),
    }
}

fn unix(socket: &UnixSkEntry) -> UnixSocket {
    let name = match socket.name.split_first() {
        None => None,
        Some((0, abstract_name)) => Some(format!("@{}", shown(abstract_name))),
        Some(_) => {
            let text = shown(&socket.name);
            Some(text.trim_end_matches('\0').to_owned())
        }
    };
    UnixSocket {
        state: match (socket.state, socket.peer) {
            (7, peer) if peer != 0 => "connected",
            (state, _) => state_of(state),
        },
        name,
    }
}

#[cfg(test)]
mod tests {
    use super::super::push_entry;
    use super::*;

    /// One long name, one list of descriptors that lead to it, and processes that share that list.
    #[test]
    fn a_few_bytes_are_not_shown_again_and_again() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, kind, body: Vec<u8>| {
            let path = dir.path().join(name);
            Image::new(&path, kind, body).replace(&path).unwrap();
        };
        let mut body = Vec::new();
        let name = vec![b'x'; 1 << 20];
        let file = FileEntry {
            kind: 1,
            id: 5,
            reg: Some(RegFileEntry { name }),
            isk: None,
            usk: None,
        };
        push_entry(&mut body, &file);
        write("files.img", Kind::Files, body);
        let mut body = Vec::new();
        for fd in 0..100 {
            push_entry(&mut body, &FdinfoEntry { id: 5, fd });
        }
        write("fdinfo-3.img", Kind::Fdinfo, body);
        for pid in 1..=3 {
            let few = descriptors(dir.path()).map(|it| it.len());
            assert_eq!(few.unwrap(), (pid - 1) * 100);
            let mut body = Vec::new();
            push_entry(&mut body, &IdsEntry { files_id: 3 });
            write(&format!("ids-{pid}.img"), Kind::Ids, body);
        }
        let many = descriptors(dir.path()).unwrap_err();
        assert!(matches!(many, ImageError::TooMuch { .. }), "{many}");
    }

    #[test]
    fn descriptors_lead_to_what_is_open() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, kind, body: Vec<u8>| {
            let path = dir.path().join(name);
            Image::new(&path, kind, body).replace(&path).unwrap();
        };
        let entry = |kind, id| FileEntry {
            kind,
            id,
            reg: None,
            isk: None,
            usk: None,
        };
        let socket = InetSkEntry {
            proto: 6,
            state: 10,
            src_port: 8080,
            dst_port: 0,
            src_addr: vec![u32::from_ne_bytes([127, 0, 0, 1])],
            dst_addr: vec![0],
        };
        let mut body = Vec::new();
        let name = "/var/log/web.log".to_owned();
        for entry in [
            FileEntry {
                reg: Some(RegFileEntry { name: name.into() }),
                ..entry(1, 5)
            },
            FileEntry {
                isk: Some(socket),
                ..entry(4, 6)
            },
            FileEntry {
                usk: Some(UnixSkEntry {
                    state: 10,
                    peer: 0,
                    name: b"\0control".to_vec(),
                }),
                ..entry(5, 7)
            },
            entry(7, 8),
        ] {
            push_entry(&mut body, &entry);
        }
        write("files.img", Kind::Files, body);
        let mut body = Vec::new();
        push_entry(&mut body, &IdsEntry { files_id: 3 });
        write("ids-1.img", Kind::Ids, body);
        let mut body = Vec::new();
        for (fd, id) in [(4, 8), (0, 5), (2, 7), (1, 6), (9, 77)] {
            push_entry(&mut body, &FdinfoEntry { id, fd });
        }
        write("fdinfo-3.img", Kind::Fdinfo, body);
        let all = descriptors(dir.path()).unwrap();
        let open: Vec<_> = all.iter().map(|it| (it.fd, it.open.clone())).collect();
        let Open::Inet(listening) = &open[1].1 else {
            panic!("{open:?}");
        };
        assert_eq!((listening.protocol, listening.state), ("tcp", "listening"));
        assert_eq!(listening.local, "127.0.0.1:8080".parse().unwrap());
        assert_eq!(
            open[0],
            (
                0,
                Open::File {
                    path: "/var/log/web.log".into()
                }
            )
        );
        let control = UnixSocket {
            state: "listening",
            name: Some("@control".into()),
        };
        assert_eq!(open[2], (2, Open::Unix(control)));
        assert_eq!(open[3], (4, Open::Other("eventpoll")));
        assert_eq!(open[4], (9, Open::Other("unknown")));
        assert_eq!(
            files(dir.path()).unwrap().path_of(5),
            Some("/var/log/web.log")
        );
    }
}
