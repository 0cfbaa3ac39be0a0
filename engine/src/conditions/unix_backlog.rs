//! Unix connections that nobody has accepted yet, and that CRIU cannot make again: it has no way to read what was sent,
//! nor can it tell what one that is closed has sent (`dump_one_unix_fd`).

use std::collections::BTreeMap;

use super::Hit;
use super::sock_diag::UnixSocket;
use super::sockets::Owned;

pub(super) fn hits(owned: &Owned<'_>, unix: &BTreeMap<u64, UnixSocket>) -> Vec<Hit> {
    let lost = |inode: &u64| {
        let sent = || unix.get(inode).is_some_and(|socket| socket.unread != 0);
        // What an end outside has sent goes with its connection.
        *inode == 0 || owned.contains_key(inode) && sent()
    };
    let hits = owned.iter().filter_map(|(inode, (seen, _))| {
        let count = { unix.get(inode)?.waiting.iter() }
            .filter(|it| lost(it))
            .count();
        (count > 0).then(|| ("unix-backlog", format!("{count} of {}", seen.called())))
    });
    hits.collect()
}
