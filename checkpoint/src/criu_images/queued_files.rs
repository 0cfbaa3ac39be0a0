//! What no process has open: files that were sent to a socket and not yet received, and unix sockets of others.
//!
//! ```text
//! sk-queues.img    sk_packet_entry  2 length  4 scm: 2 rights: ids of files; then the bytes of the packet
//! fdinfo-<n>.img   fdinfo_entry     1 id
//! files.img        file_entry       1 type  2 id  16 usk
//!                  unix_sk_entry    6 uflags  11 name  13 file_perms: 1 mode  2 uid  3 gid
//! ```

use std::collections::BTreeSet;
use std::path::Path;

use super::strict::{is_ambiguous, parts, submessage};
use super::{Image, ImageError, Kind, list};

const RIGHTS: u64 = 2;
const SCM: u64 = 4;
const UNIX: u64 = 16;
const UNIX_KIND: u32 = 5;

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct FdinfoEntry {
    #[prost(uint32, required, tag = "1")]
    id: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SkPacketEntry {
    #[prost(uint32, required, tag = "2")]
    length: u32,
    #[prost(message, repeated, tag = "4")]
    scm: Vec<ScmEntry>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ScmEntry {
    #[prost(uint32, repeated, packed = "false", tag = "2")]
    rights: Vec<u32>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct FileEntry {
    #[prost(uint32, required, tag = "1")]
    kind: u32,
    #[prost(uint32, required, tag = "2")]
    id: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct UnixSkEntry {
    #[prost(uint32, required, tag = "1")]
    id: u32,
    #[prost(uint32, required, tag = "6")]
    uflags: u32,
    #[prost(message, optional, tag = "13")]
    file_perms: Option<FilePermsEntry>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct FilePermsEntry {
    #[prost(uint32, required, tag = "1")]
    mode: u32,
    #[prost(uint32, required, tag = "2")]
    uid: u32,
    #[prost(uint32, required, tag = "3")]
    gid: u32,
}

/// What is open, and what is not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct QueuedFiles {
    /// Files that were sent and that no process has open, by their numbers.
    pub sent: BTreeSet<u32>,
    /// Whether there is a unix socket that is neither open nor sent, or that CRIU is to treat as one of another program.
    pub has_external_socket: bool,
    /// The files of unix sockets: mode, user and group.
    pub socket_files: Vec<(u32, u32, u32)>,
}

/// Those of the images of `dir`, whose living processes have the files in `tables` open: CRIU looks into no other table.
///
/// # Errors
/// An image that cannot be read, or that says a thing twice.
pub fn queued_files(dir: &Path, tables: &BTreeSet<u32>) -> Result<QueuedFiles, ImageError> {
    let mut open = BTreeSet::new();
    let all = list(dir, Kind::Fdinfo)?.into_iter();
    for (_, path) in all.filter(|(table, _)| tables.contains(table)) {
        let image = Image::read(&path, Kind::Fdinfo)?;
        let mut entries = image.entries();
        while let Some(message) = entries.next_bytes()? {
            if is_ambiguous(message, &[]) {
                return Err(image.ambiguous());
            }
            open.insert(image.decode::<FdinfoEntry>(message)?.id);
        }
    }
    let sent = sent(dir)?;
    let mut found = QueuedFiles::default();
    let image = Image::read(&dir.join("files.img"), Kind::Files)?;
    let mut entries = image.entries();
    while let Some(message) = entries.next_bytes()? {
        if is_ambiguous(message, &[]) {
            return Err(image.ambiguous());
        }
        let FileEntry { kind, .. } = image.decode(message)?;
        let Some(part) = submessage(message, UNIX).filter(|_| kind == UNIX_KIND) else {
            continue;
        };
        if is_ambiguous(part, &[]) {
            return Err(image.ambiguous());
        }
        let socket: UnixSkEntry = image.decode(part)?;
        let is_used = open.contains(&socket.id) || sent.contains(&socket.id);
        found.has_external_socket |= socket.uflags != 0 || !is_used;
        let perms = { socket.file_perms }.map(|it| (it.mode, it.uid, it.gid));
        found.socket_files.extend(perms);
    }
    found.sent = &sent - &open;
    Ok(found)
}

/// Those that packets have with them.
fn sent(dir: &Path) -> Result<BTreeSet<u32>, ImageError> {
    let mut sent = BTreeSet::new();
    let path = dir.join(Kind::SocketQueues.file_name());
    let Some(image) = Image::read_if_there(&path, Kind::SocketQueues)? else {
        return Ok(sent);
    };
    let mut entries = image.entries();
    while let Some(message) = entries.next_bytes()? {
        for scm in parts(&image, message, SCM, &[SCM])? {
            parts(&image, scm, RIGHTS, &[RIGHTS])?;
        }
        let packet: SkPacketEntry = image.decode(message)?;
        sent.extend(packet.scm.into_iter().flat_map(|scm| scm.rights));
        entries.skip(packet.length.into())?;
    }
    Ok(sent)
}

#[cfg(test)]
mod tests {
    use super::super::{push_bytes, push_entry};
    use super::*;

    #[derive(Clone, PartialEq, prost::Message)]
    struct Whole {
        #[prost(uint32, required, tag = "1")]
        kind: u32,
        #[prost(uint32, required, tag = "2")]
        id: u32,
        #[prost(message, optional, tag = "16")]
        usk: Option<UnixSkEntry>,
    }

    fn socket(id: u32, uflags: u32) -> Whole {
        Whole {
            kind: 5,
            id,
            usk: Some(UnixSkEntry {
                id,
                uflags,
                file_perms: None,
            }),
        }
    }

    fn read(sockets: &[Whole]) -> QueuedFiles {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, kind, body: Vec<u8>| {
            let path = dir.path().join(name);
            Image::new(&path, kind, body).replace(&path).unwrap();
        };
        let mut body = Vec::new();
        { sockets.iter() }.for_each(|socket| push_entry(&mut body, socket));
        write("files.img", Kind::Files, body);
        let mut body = Vec::new();
        { 1..3 }.for_each(|id| push_entry(&mut body, &FdinfoEntry { id }));
        write("fdinfo-2.img", Kind::Fdinfo, body);
        let mut body = Vec::new();
        { 1..6 }.for_each(|id| push_entry(&mut body, &FdinfoEntry { id }));
        write("fdinfo-7.img", Kind::Fdinfo, body);
        let mut body = Vec::new();
        for rights in [vec![], vec![2, 3], vec![4]] {
            let scm = vec![ScmEntry { rights }];
            push_entry(&mut body, &SkPacketEntry { length: 3, scm });
            body.extend([9, 9, 9]);
        }
        write("sk-queues.img", Kind::SocketQueues, body);
        queued_files(dir.path(), &BTreeSet::from([2])).unwrap()
    }

    #[test]
    fn what_nobody_has_open_is_sent_or_of_another_program() {
        let found = read(&[socket(1, 0), socket(3, 0)]);
        assert_eq!(found.sent, BTreeSet::from([3, 4]));
        assert!(!found.has_external_socket);
        assert!(read(&[socket(1, 1)]).has_external_socket);
        assert!(read(&[socket(5, 0)]).has_external_socket);
    }

    #[test]
    fn a_packet_has_its_files_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sk-queues.img");
        let mut body = Vec::new();
        // The length twice: what follows is another packet to each of two readers.
        push_bytes(&mut body, b"\x10\x00\x10\x01");
        let image = Image::new(&path, Kind::SocketQueues, body);
        image.replace(&path).unwrap();
        let found = sent(dir.path());
        assert!(
            matches!(found, Err(ImageError::Ambiguous { .. })),
            "{found:?}"
        );
    }
}
