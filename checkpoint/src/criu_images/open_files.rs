//! `files.img`: the kinds of open files that take a capability to make.
//!
//! ```text
//! file_entry  1 type  2 id  4 isk: inet_sk_entry 4 type
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
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct FileEntry {
    #[prost(uint32, required, tag = "1")]
    kind: u32,
    #[prost(message, optional, tag = "4")]
    isk: Option<InetSkEntry>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct InetSkEntry {
    #[prost(uint32, required, tag = "4")]
    kind: u32,
}

const INETSK: u32 = 4;
const PACKETSK: u32 = 10;
const FANOTIFY: u32 = 12;
const TUNF: u32 = 15;
const BPFMAP: u32 = 19;
const SOCK_RAW: u32 = 3;

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
            _ => None,
        });
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}
