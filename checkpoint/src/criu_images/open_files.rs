//! `files.img`: the kinds of open files that take a capability to make.
//!
//! ```text
//! file_entry  1 type  2 id  4 isk: inet_sk_entry 4 type  7 nlsk: netlink_sk_entry 3 protocol  8 groups
//! ```

use std::path::Path;

use super::{Image, ImageError, Kind};

/// A kind of open file that CRIU makes with its own capabilities.
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
}

#[derive(Clone, PartialEq, prost::Message)]
struct FileEntry {
    #[prost(uint32, required, tag = "1")]
    kind: u32,
    #[prost(message, optional, tag = "4")]
    isk: Option<InetSkEntry>,
    #[prost(message, optional, tag = "7")]
    nlsk: Option<NetlinkSkEntry>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct InetSkEntry {
    #[prost(uint32, required, tag = "4")]
    kind: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct NetlinkSkEntry {
    #[prost(uint32, required, tag = "3")]
    protocol: u32,
    #[prost(uint32, repeated, packed = "false", tag = "8")]
    groups: Vec<u32>,
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

const INETSK: u32 = 4;
const PACKETSK: u32 = 10;
const FANOTIFY: u32 = 12;
const NETLINKSK: u32 = 13;
const TUNF: u32 = 15;
const BPFMAP: u32 = 19;
const SOCK_RAW: u32 = 3;
const NETLINK_ROUTE: u32 = 0;
const NETLINK_AUDIT: u32 = 9;
const NETLINK_KOBJECT_UEVENT: u32 = 15;

/// Those that the dump has.
///
/// # Errors
/// The image cannot be read: each dump has it, and without it CRIU looks for others.
pub fn privileged(dir: &Path) -> Result<Vec<PrivilegedFile>, ImageError> {
    let path = dir.join("files.img");
    let image = Image::read(&path, Kind::Files)?;
    let mut entries = image.entries();
    let mut found = Vec::new();
    while let Some(entry) = entries.next::<FileEntry>()? {
        let raw = entry.isk.is_some_and(|socket| socket.kind == SOCK_RAW);
        found.extend(match entry.kind {
            PACKETSK => Some(PrivilegedFile::RawSocket),
            INETSK if raw => Some(PrivilegedFile::RawSocket),
            TUNF => Some(PrivilegedFile::Tun),
            FANOTIFY => Some(PrivilegedFile::Fanotify),
            BPFMAP => Some(PrivilegedFile::BpfMap),
            NETLINKSK => entry.nlsk.as_ref().and_then(NetlinkSkEntry::privilege),
            _ => None,
        });
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::super::push_entry;
    use super::*;

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
            let path = dir.path().join("files.img");
            let mut body = Vec::new();
            let nlsk = Some(NetlinkSkEntry { protocol, groups });
            let entry = FileEntry {
                kind: NETLINKSK,
                isk: None,
                nlsk,
            };
            push_entry(&mut body, &entry);
            Image::new(&path, Kind::Files, body).replace(&path).unwrap();
            let found = privileged(dir.path()).unwrap();
            assert_eq!(
                found,
                expected.into_iter().collect::<Vec<_>>(),
                "{protocol}"
            );
        }
    }
}
