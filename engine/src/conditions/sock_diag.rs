//! The other ends of unix sockets, their files and what waits in them, which only `sock_diag(7)` tells.
//!
//! ```text
//!  question  type 20 (netlink)
//!           unix_diag_req { family u8 = 1, protocol u8, pad u16, states u32, inode u32, show u32, cookie [u32; 2] }
//!  answer    type 20
//!           unix_diag_msg { family u8, type u8, state u8, pad u8, inode u32, cookie [u32; 2] }
//!           nlattr { len u16, type u16 = 1 (file) } inode u32, device u32
//!           nlattr { len u16, type u16 = 2 (peer) } inode u32
//!           nlattr { len u16, type u16 = 3 (icons) } inodes [u32]: of a listener, the other ends of what waits
//!           nlattr { len u16, type u16 = 4 (rqlen) } to read u32, not read by the other end u32
//! ```
//!
//! The kernel answers for the network namespace of the caller, so a thread of its own enters that of
//! the container.

use std::collections::BTreeMap;

use nix::errno::Errno;

use super::netlink::{self, u32_at};
use crate::network_namespace::within;

/// `UDIAG_SHOW_VFS`, `_PEER`, `_ICONS` and `_RQLEN`.
const SHOW: u32 = 2 | 4 | 8 | 16;
const ATTRIBUTE_FILE: u16 = 1;
const ATTRIBUTE_PEER: u16 = 2;
const ATTRIBUTE_ICONS: u16 = 3;
const ATTRIBUTE_RQLEN: u16 = 4;
/// Length of `unix_diag_msg`.
const MESSAGE: usize = 16;

/// One unix socket.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct UnixSocket {
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub(crate) kind: u8,
    /// The inode of the other end.
    pub(crate) peer: Option<u64>,
    /// The low half of the inode of the file that it is bound to, also of one that has no name any more.
    pub(crate) file: Option<u32>,
    /// Major and minor number of the file system that it is in.
    pub(crate) device: Option<(u32, u32)>,
    /// Of a listener: the inodes of the other ends of connections that wait to be accepted; 0: it is closed.
    pub(crate) waiting: Vec<u64>,
    /// Bytes that were sent and not read, as the kernel accounts for them.
    pub(crate) unread: u32,
}

/// The unix sockets in the network namespace of a process, by their inodes; none when the
/// kernel does not tell.
pub(crate) fn unix_sockets(pid: u32) -> BTreeMap<u64, UnixSocket> {
    let answer = within(pid, ask).ok();
    answer.and_then(Result::ok).unwrap_or_default()
}

fn ask() -> Result<BTreeMap<u64, UnixSocket>, Errno> {
    netlink::sockets(&wanted(), socket_of)
}

fn wanted() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(24);
    // AF_UNIX; every state; every inode.
    bytes.extend([1, 0, 0, 0]);
    bytes.extend(u32::MAX.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend(SHOW.to_ne_bytes());
    bytes.extend([0xff; 8]);
    bytes
}

fn socket_of(message: &[u8]) -> Option<(u64, UnixSocket)> {
    let mut socket = UnixSocket {
        kind: *message.get(1)?,
        ..UnixSocket::default()
    };
    let inode = u32_at(message, 4)?;
    for (name, value) in netlink::attributes(message.get(MESSAGE..)?) {
        match name {
            ATTRIBUTE_FILE => {
                socket.file = u32_at(value, 0);
                // As the kernel has it in memory: twelve bits and twenty.
                socket.device = u32_at(value, 4).map(|it| (it >> 20, it & 0xf_ffff));
            }
            ATTRIBUTE_PEER => socket.peer = u32_at(value, 0).filter(|it| *it != 0).map(u64::from),
            ATTRIBUTE_ICONS => {
                let inodes = value.chunks_exact(4).filter_map(|inode| u32_at(inode, 0));
                socket.waiting = inodes.map(u64::from).collect();
            }
            ATTRIBUTE_RQLEN => socket.unread = u32_at(value, 4)?,
            _ => {}
        }
    }
    Some((u64::from(inode), socket))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::fd::AsRawFd as _;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn inode(stream: &UnixStream) -> u64 {
        let path = format!("/proc/self/fd/{}", stream.as_raw_fd());
        std::fs::metadata(path).unwrap().ino()
    }

    #[test]
    fn root_each_end_knows_the_other() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let (one, two) = UnixStream::pair().unwrap();
        let sockets = unix_sockets(std::process::id());
        assert_eq!(sockets[&inode(&one)].peer, Some(inode(&two)));
        assert_eq!(sockets[&inode(&two)].peer, Some(inode(&one)));
        assert_eq!(sockets[&inode(&one)].kind, 1);
        assert_eq!(sockets[&inode(&one)].unread, 0);
        (&one).write_all(b"x").unwrap();
        assert!(unix_sockets(std::process::id())[&inode(&one)].unread > 0);
    }

    #[test]
    fn who_waits_is_in_an_attribute() {
        assert_eq!(socket_of(&[0; 15]), None);
        let waiting = [&[0; MESSAGE][..], &[12, 0, 3, 0, 7, 0, 0, 0, 0, 0, 0, 0]].concat();
        if cfg!(target_endian = "little") {
            assert_eq!(socket_of(&waiting).unwrap().1.waiting, [7, 0]);
        }
    }
}
