//! Lists of what the kernel has in the caller's network namespace, netlink(7).
//!
//! ```text
//!  question  nlmsghdr { len u32, type u16, flags u16 = 0x301, seq u32, pid u32 }, then what the type wants
//!  answer    nlmsghdr { len, type = the type's own | 2 (error) | 3 (done), ... }, then what it has, padded to 4
//!  nlattr    { len u16, type u16 }, its value, padded to 4
//! ```

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// More sockets than this are not looked at.
const SOCKETS: usize = 1 << 20;
/// `NLM_F_REQUEST | NLM_F_DUMP`.
const REQUEST_DUMP: u16 = 0x301;
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// Length of `nlmsghdr`, and of `nlattr`.
const HEADER: usize = 16;
const ATTRIBUTE: usize = 4;

/// Asks, and gives each message of the answer, with its type, to `take`, as long as that wants more.
///
/// # Errors
/// The kernel knows no such protocol.
pub(super) fn list(
    protocol: SockProtocol,
    kind: u16,
    wanted: &[u8],
    mut take: impl FnMut(u16, &[u8]) -> bool,
) -> Result<(), Errno> {
    let socket: OwnedFd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        protocol,
    )?;
    let (to_kernel, none) = (NetlinkAddr::new(0, 0), MsgFlags::empty());
    let question = question(kind, wanted);
    sendto(socket.as_raw_fd(), &question, &to_kernel, none)?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, none)?;
        if length == 0 || read(&buffer[..length], &mut take) {
            return Ok(());
        }
    }
}

/// The sockets of a family, as sock_diag(7) tells them when it is asked for those that are `wanted`, by their inodes.
///
/// # Errors
/// The kernel knows no such protocol.
pub(super) fn sockets<S>(
    wanted: &[u8],
    socket_of: impl Fn(&[u8]) -> Option<(u64, S)>,
) -> Result<BTreeMap<u64, S>, Errno> {
    let mut sockets = BTreeMap::new();
    list(
        SockProtocol::NetlinkSockDiag,
        SOCK_DIAG_BY_FAMILY,
        wanted,
        |kind, message| {
            if let (SOCK_DIAG_BY_FAMILY, Some((inode, socket))) = (kind, socket_of(message)) {
                sockets.insert(inode, socket);
            }
            sockets.len() < SOCKETS
        },
    )?;
    Ok(sockets)
}

fn question(kind: u16, wanted: &[u8]) -> Vec<u8> {
    let length = HEADER + wanted.len();
    let length = u32::try_from(length).expect("it is a constant of this program");
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(REQUEST_DUMP.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend(wanted);
    bytes
}

/// Reads the messages of one datagram; true at the end of the answer.
fn read(mut bytes: &[u8], take: &mut dyn FnMut(u16, &[u8]) -> bool) -> bool {
    while let (Some(length), Some(kind)) = (u32_at(bytes, 0), u16_at(bytes, 4)) {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let message = bytes.get(HEADER..length);
        let (false, Some(message)) = (matches!(kind, ERROR | DONE), message) else {
            return true;
        };
        if !take(kind, message) {
            return true;
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

/// The attributes of a message, with their types; those that are cut off are not there.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (length, kind) = (usize::from(u16_at(bytes, 0)?), u16_at(bytes, 2)?);
        let value = bytes.get(ATTRIBUTE..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + 2)?;
    Some(u16::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_off_ends_the_answer() {
        let whole = question(20, &[7; 24]);
        let mut taken = Vec::new();
        for length in 0..whole.len() {
            let end = read(&whole[..length], &mut |kind, _| {
                taken.push(kind);
                true
            });
            assert_eq!(end, length >= 6, "{length}");
        }
        assert!(taken.is_empty());
        let two = [whole.clone(), whole].concat();
        assert!(!read(&two, &mut |kind, message| {
            taken.push(kind);
            message == [7; 24]
        }));
        assert_eq!(taken, [20, 20]);
        assert!(read(&two, &mut |_, _| false));
        assert!(read(&question(DONE, &[]), &mut |_, _| true));
    }

    #[test]
    fn attributes_are_padded() {
        let bytes = [
            &5_u16.to_ne_bytes()[..],
            &1_u16.to_ne_bytes(),
            &[9, 0, 0, 0],
            &8_u16.to_ne_bytes(),
            &2_u16.to_ne_bytes(),
            &[1, 2, 3, 4],
            &9_u16.to_ne_bytes(),
            &3_u16.to_ne_bytes(),
            &[1],
        ]
        .concat();
        let found: Vec<_> = attributes(&bytes).collect();
        assert_eq!(found, [(1, &[9][..]), (2, &[1, 2, 3, 4])]);
    }
}
