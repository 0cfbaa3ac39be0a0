//! Unix sockets whose other end is held by a process that CRIU would not dump with them. CRIU asks the kernel for those of
//! the container's network alone, so that one of another network has no other end for it.

use std::collections::BTreeMap;

use procfs::process::{FDTarget, all_processes};

use super::sock_diag::UnixSocket;
use super::sockets::Owned;
use super::{Hit, Subject};

const DATAGRAM: u8 = 2;

pub(super) fn hits(
    subject: &Subject,
    owned: &Owned<'_>,
    unix: &BTreeMap<u64, UnixSocket>,
) -> Vec<Hit> {
    let outside = owned.iter().filter_map(|(inode, (seen, _))| {
        let end = unix.get(inode)?;
        let peer = end.peer?;
        let kept = end.kind == DATAGRAM && subject.criu.ext_unix_sk && unix.contains_key(&peer);
        (!kept && !owned.contains_key(&peer)).then_some((seen, peer))
    });
    let outside: Vec<_> = outside.collect();
    if outside.is_empty() {
        return Vec::new();
    }
    // One that nobody holds is on its way in a message, which CRIU may know of.
    let held = outside.into_iter().filter_map(|(seen, peer)| {
        let holder = holder_of(peer)?;
        Some(("outside-socket", format!("{} to {holder}", seen.called())))
    });
    held.collect()
}

fn holder_of(inode: u64) -> Option<String> {
    let mut all = all_processes().into_iter().flatten().flatten();
    let holder = all.find(|process| {
        let mut open = process.fd().into_iter().flatten().flatten();
        open.any(|open| open.target == FDTarget::Socket(inode))
    })?;
    let name = holder.stat().ok()?.comm;
    Some(format!("{} ({})", holder.pid, name.escape_debug()))
}
