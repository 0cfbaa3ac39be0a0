//! `files.img`: the internet sockets of a container.
//!
//! ```text
//! file_entry      1 type: 4 (INETSK of images/fdinfo.proto)  4 isk: inet_sk_entry (files_image)
//! inet_sk_entry   5 proto  6 state  7 src_port  8 dst_port  11 src_addr  12 dst_addr, and others
//! ```
//!
//! An address is one or four words, each as it lies in memory in the byte order of the network.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use prost::Message as _;

use super::files_image::{self, NAME as FILES_IMAGE, OfKind};
use super::strict::set_varints;
use super::{Image, ImageError, Kind};

const SOCKETS: OfKind = OfKind {
    kind: 4,
    entry: 4,
    repeated: &[SRC_ADDR, DST_ADDR],
};
const SRC_ADDR: u64 = 11;
const DST_ADDR: u64 = 12;
const IPPROTO_TCP: u32 = 6;
/// Of `include/net/tcp_states.h`.
const TCP_CLOSE: u32 = 7;
const TCP_LISTEN: u32 = 10;

/// One end of a TCP connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Connection {
    /// The socket's own address.
    pub local: SocketAddr,
    /// The address of the other end.
    pub peer: SocketAddr,
}

impl Connection {
    /// The other end of it.
    #[must_use]
    pub fn other_end(&self) -> Self {
        Self {
            local: self.peer,
            peer: self.local,
        }
    }
}

/// `file_entry` of `images/fdinfo.proto`.
#[derive(Clone, PartialEq, prost::Message)]
struct FileEntry {
    #[prost(uint32, required, tag = "1")]
    kind: u32,
    #[prost(message, optional, tag = "4")]
    isk: Option<InetSkEntry>,
}

/// `inet_sk_entry` of `images/sk-inet.proto`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct InetSkEntry {
    #[prost(uint32, required, tag = "5")]
    pub(super) proto: u32,
    #[prost(uint32, required, tag = "6")]
    pub(super) state: u32,
    #[prost(uint32, required, tag = "7")]
    pub(super) src_port: u32,
    #[prost(uint32, required, tag = "8")]
    pub(super) dst_port: u32,
    #[prost(uint32, repeated, packed = "false", tag = "11")]
    pub(super) src_addr: Vec<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "12")]
    pub(super) dst_addr: Vec<u32>,
}

/// The ends of TCP connections that the tasks in the images of `dir` have.
///
/// # Errors
/// An image that cannot be read.
pub fn connections(dir: &Path) -> Result<Vec<Connection>, ImageError> {
    let path = dir.join(FILES_IMAGE);
    let image = Image::read(&path, Kind::Files)?;
    let mut entries = image.entries();
    let mut found = Vec::new();
    while let Some(file) = entries.next::<FileEntry>()? {
        found.extend(file.isk.as_ref().and_then(InetSkEntry::connection));
    }
    Ok(found)
}

/// Binds sockets to no address in particular whose own is none that `is_there` knows, in the images of `dir`: UDP
/// sockets that talk to one other, which the kernel then gives an address that there is, and those of TCP
/// connections that have ended. CRIU could not bind them.
///
/// One that waits for others stays as it is, since more of them could reach it; so does a TCP connection, which CRIU
/// does not bind where connections are closed.
///
/// # Errors
/// The image cannot be read or replaced.
pub fn leave_lost_addresses(
    dir: &Path,
    is_there: impl Fn(IpAddr) -> bool,
) -> Result<(), ImageError> {
    files_image::edit(dir, &SOCKETS, |entry| {
        let socket = InetSkEntry::decode(entry).ok();
        let lost = socket.filter(|socket| {
            let waits_for_nobody = match socket.proto {
                IPPROTO_TCP => socket.state == TCP_CLOSE,
                _ => socket.dst_port != 0,
            };
            let is_one = |own: &IpAddr| !own.is_unspecified() && !own.is_multicast();
            let own = address(&socket.src_addr).filter(is_one);
            waits_for_nobody && socket.src_port != 0 && own.is_some_and(|own| !is_there(own))
        });
        Ok(lost.map(|socket| set_varints(entry, SRC_ADDR, &vec![0; socket.src_addr.len()])))
    })
}

impl InetSkEntry {
    fn connection(&self) -> Option<Connection> {
        if self.proto != IPPROTO_TCP || [TCP_CLOSE, TCP_LISTEN].contains(&self.state) {
            return None;
        }
        let address = |words: &[u32], port: u32| {
            Some(SocketAddr::new(address(words)?, u16::try_from(port).ok()?))
        };
        Some(Connection {
            local: address(&self.src_addr, self.src_port)?,
            peer: address(&self.dst_addr, self.dst_port)?,
        })
    }
}

pub(super) fn address(words: &[u32]) -> Option<IpAddr> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let address = match bytes.len() {
        4 => IpAddr::from(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        16 => IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?)),
        _ => return None,
    };
    // The other end of a mapped one says the plain one.
    Some(address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::super::push_entry;
    use super::*;

    fn socket(proto: u32, state: u32, src_addr: &[u32]) -> FileEntry {
        FileEntry {
            kind: 4,
            isk: Some(InetSkEntry {
                proto,
                state,
                src_port: 7000,
                dst_port: 40000,
                src_addr: src_addr.to_vec(),
                dst_addr: src_addr.to_vec(),
            }),
        }
    }

    fn write(dir: &Path, entries: &[FileEntry]) {
        let mut bytes = [0x5456_4319_u32, 0x5630_3138]
            .map(u32::to_le_bytes)
            .concat();
        { entries.iter() }.for_each(|entry| push_entry(&mut bytes, entry));
        std::fs::write(dir.join(FILES_IMAGE), bytes).unwrap();
    }

    #[test]
    fn connections_are_told_from_other_sockets() {
        let local = u32::from_ne_bytes([127, 0, 0, 1]);
        let mapped = vec![0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]), local];
        let dir = tempfile::tempdir().unwrap();
        write(
            dir.path(),
            &[
                FileEntry { kind: 1, isk: None },
                socket(17, 1, &[local]),
                socket(6, 10, &[local]),
                socket(6, 1, &[local]),
                socket(6, 8, &mapped),
            ],
        );
        let one = Connection {
            local: "127.0.0.1:7000".parse().unwrap(),
            peer: "127.0.0.1:40000".parse().unwrap(),
        };
        assert_eq!(connections(dir.path()).unwrap(), [one, one]);
        assert_eq!(one.other_end().other_end(), one);
    }
    #[test]
    fn sockets_leave_addresses_that_are_lost() {
        let [there, lost, group] =
            [[10, 0, 0, 1], [10, 0, 0, 2], [224, 0, 0, 1]].map(u32::from_ne_bytes);
        let mut waiting = socket(17, TCP_CLOSE, &[lost]);
        waiting.isk.iter_mut().for_each(|it| it.dst_port = 0);
        let as_they_were = [
            socket(6, TCP_CLOSE, &[there]),
            socket(6, TCP_LISTEN, &[lost]),
            socket(6, 1, &[lost]),
            socket(17, 1, &[group]),
            waiting,
        ];
        let ended = socket(
            6,
            TCP_CLOSE,
            &[0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]), lost],
        );
        let datagrams = socket(17, 1, &[lost]);
        let dir = tempfile::tempdir().unwrap();
        write(
            dir.path(),
            &[&as_they_were[..], &[ended, datagrams]].concat(),
        );
        let is_there = |own| own == IpAddr::from([10, 0, 0, 1]);
        leave_lost_addresses(dir.path(), is_there).unwrap();
        let image = Image::read(&dir.path().join(FILES_IMAGE), Kind::Files).unwrap();
        let (mut entries, mut found) = (image.entries(), Vec::new());
        while let Some(entry) = entries.next::<FileEntry>().unwrap() {
            found.push(entry);
        }
        assert_eq!(found[..5], as_they_were);
        let own = |at: usize| found[at].isk.as_ref().unwrap().src_addr.clone();
        assert_eq!((own(5), own(6)), (vec![0; 4], vec![0]));
    }
}
