//! The other ends of unix sockets and their files, which only `sock_diag(7)` tells.
//!
//! ```text
//!  request  nlmsghdr { len u32, type u16 = 20, flags u16 = 0x301, seq u32, pid u32 }
//!           unix_diag_req { family u8 = 1, protocol u8, pad u16, states u32, inode u32, show u32, cookie [u32; 2] }
//!  answer   nlmsghdr { len, type = 20 | 2 (error) | 3 (done), ... }
//!           unix_diag_msg { family u8, type u8, state u8, pad u8, inode u32, cookie [u32; 2] }
//!           nlattr { len u16, type u16 = 1 (file) } inode u32, device u32
//!           nlattr { len u16, type u16 = 2 (peer) } inode u32
//! ```
//!
//! The kernel answers for the network namespace of the caller, so a thread of its own enters that of
//! the container.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const REQUEST_DUMP: u16 = 0x301;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const SHOW_FILE: u32 = 2;
const SHOW_PEER: u32 = 4;
const ATTRIBUTE_FILE: u16 = 1;
const ATTRIBUTE_PEER: u16 = 2;
/// Lengths of `nlmsghdr` and `unix_diag_msg`.
const HEADER: usize = 16;
const MESSAGE: usize = 16;
/// More sockets than this are not looked at.
const SOCKETS: usize = 1 << 20;

/// One unix socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct UnixSocket {
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub(crate) kind: u8,
    /// The inode of the other end.
    pub(crate) peer: Option<u64>,
    /// The low half of the inode of the file that it is bound to, also of one that has no name any more.
    pub(crate) file: Option<u32>,
}

/// The unix sockets in the network namespace of a process, by their inodes; none when the kernel does not tell.
pub(crate) fn unix_sockets(pid: u32) -> BTreeMap<u64, UnixSocket> {
    let asked = std::thread::Builder::new()
        .name("unix sockets".to_owned())
        .spawn(move || ask(pid));
    let answer = asked.ok().and_then(|thread| thread.join().ok());
    answer.and_then(Result::ok).unwrap_or_default()
}

fn ask(pid: u32) -> Result<BTreeMap<u64, UnixSocket>, Errno> {
    let namespace = File::open(format!("/proc/{pid}/ns/net")).map_err(|_| Errno::ENOENT)?;
    setns(&namespace, CloneFlags::CLONE_NEWNET)?;
    let socket: OwnedFd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )?;
    let to_kernel = NetlinkAddr::new(0, 0);
    sendto(
        socket.as_raw_fd(),
        &request(),
        &to_kernel,
        MsgFlags::empty(),
    )?;
    let mut sockets = BTreeMap::new();
    let mut buffer = vec![0; 64 << 10];
    while sockets.len() < SOCKETS {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        if length == 0 || read(&buffer[..length], &mut sockets) {
            break;
        }
    }
    Ok(sockets)
}

fn request() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(40);
    bytes.extend(40_u32.to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend(REQUEST_DUMP.to_ne_bytes());
    bytes.extend([0; 8]);
    // AF_UNIX; every state; every inode.
    bytes.extend([1, 0, 0, 0]);
    bytes.extend(u32::MAX.to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend((SHOW_FILE | SHOW_PEER).to_ne_bytes());
    bytes.extend([0xff; 8]);
    bytes
}

/// Reads the messages of one datagram; true at the end of the answer.
fn read(mut bytes: &[u8], sockets: &mut BTreeMap<u64, UnixSocket>) -> bool {
    while let (Some(length), Some(kind)) = (u32_at(bytes, 0), u16_at(bytes, 4)) {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if matches!(kind, ERROR | DONE) || length < HEADER {
            return true;
        }
        let Some(message) = bytes.get(HEADER..length) else {
            return true;
        };
        if let (SOCK_DIAG_BY_FAMILY, Some((inode, socket))) = (kind, socket_of(message)) {
            sockets.insert(inode, socket);
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

fn socket_of(message: &[u8]) -> Option<(u64, UnixSocket)> {
    let mut socket = UnixSocket {
        kind: *message.get(1)?,
        peer: None,
        file: None,
    };
    let inode = u32_at(message, 4)?;
    let mut attributes = message.get(MESSAGE..)?;
    while let (Some(length), Some(name)) = (u16_at(attributes, 0), u16_at(attributes, 2)) {
        let length = usize::from(length);
        if length < 4 {
            break;
        }
        match name {
            ATTRIBUTE_FILE => socket.file = u32_at(attributes, 4),
            ATTRIBUTE_PEER => {
                socket.peer = u32_at(attributes, 4).filter(|it| *it != 0).map(u64::from);
            }
            _ => {}
        }
        attributes = attributes
            .get(length.next_multiple_of(4)..)
            .unwrap_or_default();
    }
    Some((u64::from(inode), socket))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + 2)?;
    Some(u16::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
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
    }

    #[test]
    fn what_is_cut_off_ends_the_answer() {
        let mut none = BTreeMap::new();
        let whole = request();
        for length in 0..whole.len() {
            assert_eq!(read(&whole[..length], &mut none), length >= 6, "{length}");
        }
        assert!(none.is_empty());
        assert_eq!(socket_of(&[0; MESSAGE - 1]), None);
        let plain = UnixSocket {
            kind: 0,
            peer: None,
            file: None,
        };
        for length in [MESSAGE, MESSAGE + 2, MESSAGE + 4] {
            assert_eq!(socket_of(&vec![0; length]), Some((0, plain)), "{length}");
        }
    }
}
