//! `files.img`: the TCP connections of a container.
//!
//! ```text
//! file_entry { type, id, ..., isk (4): inet_sk_entry, ... }
//! inet_sk_entry { family, type, proto, state, src_port, dst_port, src_addr, dst_addr, ... }
//! ```
//!
//! An address is one or four words, each as it lies in memory in the byte order of the network.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use super::{Image, ImageError, Kind};

const FILES_IMAGE: &str = "files.img";
const IPPROTO_TCP: u32 = 6;
/// `TCP_CLOSE` and `TCP_LISTEN` of `include/net/tcp_states.h`: no connection.
const UNCONNECTED: [u32; 2] = [7, 10];

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

impl InetSkEntry {
    fn connection(&self) -> Option<Connection> {
        if self.proto != IPPROTO_TCP || UNCONNECTED.contains(&self.state) {
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

    #[test]
    fn connections_are_told_from_other_sockets() {
        let local = u32::from_ne_bytes([127, 0, 0, 1]);
        let mapped = vec![0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]), local];
        let socket = |proto, state, src_addr: &[u32]| FileEntry {
            isk: Some(InetSkEntry {
                proto,
                state,
                src_port: 7000,
                dst_port: 40000,
                src_addr: src_addr.to_vec(),
                dst_addr: src_addr.to_vec(),
            }),
        };
        let mut body = Vec::new();
        for entry in [
            FileEntry { isk: None },
            socket(17, 1, &[local]),
            socket(6, 10, &[local]),
            socket(6, 1, &[local]),
            socket(6, 8, &mapped),
        ] {
            push_entry(&mut body, &entry);
        }
        let dir = tempfile::tempdir().unwrap();
        let bytes = [0x5456_4319_u32, 0x5630_3138]
            .map(u32::to_le_bytes)
            .concat();
        std::fs::write(dir.path().join(FILES_IMAGE), [bytes, body].concat()).unwrap();
        let one = Connection {
            local: "127.0.0.1:7000".parse().unwrap(),
            peer: "127.0.0.1:40000".parse().unwrap(),
        };
        assert_eq!(connections(dir.path()).unwrap(), [one, one]);
        assert_eq!(one.other_end().other_end(), one);
    }
}
