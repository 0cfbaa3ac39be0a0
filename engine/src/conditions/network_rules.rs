//! Rules of packet filters in the network of a pod, or of a container that has its own: the new network has none of
//! them, and an init container that has made them does not run again.
//!
//! ```text
//!  request  nlmsghdr { len u32 = 20, type u16 = 0x0a07, flags u16 = 0x301, seq u32, pid u32 }
//!           nfgenmsg { family u8 = 0: all, version u8, id u16 }
//!  answer   nlmsghdr { len, type = 0x0a06 (a rule) | 2 (error) | 3 (done), ... }  nfgenmsg
//!           nlattr { len u16, type u16 = 1 (table) } name, a zero
//!
//!  /proc/PID/net/ip_tables_names, ip6_tables_names    tables of the older iptables, which nf_tables(7) does not know:
//!  iptables-legacy-save                               their rules, where the node has the program
//! ```
//!
//! A table without rules is what a look into it leaves, or CRIU, when it has locked the network with iptables.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};
use transship_checkpoint::cri_names::annotations::SANDBOX_ID;
use transship_sandbox::read_proc;

use super::{Hit, Subject};
use crate::network_namespace::within;
use crate::own_networks::has_own_network;

const GET_RULE: u16 = 0x0a07;
const NEW_RULE: u16 = 0x0a06;
const REQUEST_DUMP: u16 = 0x301;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const ATTRIBUTE_TABLE: u16 = 1;
/// Lengths of `nlmsghdr` and `nfgenmsg`.
const HEADER: usize = 16;
const MESSAGE: usize = 4;
/// Tables of a lock that CRIU or we have put on the network for a moment.
const LOCKS: [&str; 2] = ["CRIU", "transship"];
const OLDER: [(&str, &str); 2] = [
    ("ip_tables_names", "iptables-legacy-save"),
    ("ip6_tables_names", "ip6tables-legacy-save"),
];

pub(super) fn hits(subject: &Subject) -> Vec<Hit> {
    let network = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let is_of_node = network(&subject.init.to_string()) == network("self");
    // One that somebody else has made and names is made by them again.
    let in_pod = subject.spec.annotations().contains_key(SANDBOX_ID);
    if is_of_node || !(in_pod || has_own_network(&subject.spec)) {
        return Vec::new();
    }
    let newer = within(subject.init, tables_with_rules);
    let mut tables = newer.ok().and_then(Result::ok).unwrap_or_default();
    tables.retain(|table| !LOCKS.iter().any(|lock| table.starts_with(lock)));
    for (names, save) in OLDER {
        let names = read_proc(format!("/proc/{}/net/{names}", subject.init));
        if names.is_ok_and(|names| !names.trim().is_empty()) {
            tables.extend(older_tables(subject.init, save));
        }
    }
    let hit = |table: String| ("network-rules", table.escape_debug().to_string());
    tables.into_iter().map(hit).collect()
}

fn tables_with_rules() -> Result<BTreeSet<String>, Errno> {
    let socket: OwnedFd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    let to_kernel = NetlinkAddr::new(0, 0);
    let none = MsgFlags::empty();
    sendto(socket.as_raw_fd(), &request(), &to_kernel, none)?;
    let mut tables = BTreeSet::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, none)?;
        if length == 0 || read(&buffer[..length], &mut tables) {
            return Ok(tables);
        }
    }
}

fn request() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(20);
    bytes.extend(20_u32.to_ne_bytes());
    bytes.extend(GET_RULE.to_ne_bytes());
    bytes.extend(REQUEST_DUMP.to_ne_bytes());
    bytes.extend([0; 12]);
    bytes
}

/// Reads the messages of one datagram; true at the end of the answer.
fn read(mut bytes: &[u8], tables: &mut BTreeSet<String>) -> bool {
    while let (Some(length), Some(kind)) = (u32_at(bytes, 0), u16_at(bytes, 4)) {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let message = bytes.get(HEADER..length);
        let (false, Some(message)) = (matches!(kind, ERROR | DONE), message) else {
            return true;
        };
        if kind == NEW_RULE {
            tables.extend(table_of(message));
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    false
}

fn table_of(message: &[u8]) -> Option<String> {
    let mut attributes = message.get(MESSAGE..)?;
    while let (Some(length), Some(name)) = (u16_at(attributes, 0), u16_at(attributes, 2)) {
        let value = attributes.get(4..usize::from(length))?;
        if name == ATTRIBUTE_TABLE {
            let name = value.strip_suffix(&[0]).unwrap_or(value);
            return Some(String::from_utf8_lossy(name).into_owned());
        }
        let next = usize::from(length).next_multiple_of(4);
        attributes = attributes.get(next..).unwrap_or_default();
    }
    None
}

fn older_tables(init: u32, save: &str) -> BTreeSet<String> {
    let saved = within(init, || Command::new(save).output());
    match saved.and_then(|saved| saved) {
        Ok(output) => tables_saved(&String::from_utf8_lossy(&output.stdout)),
        Err(_) => BTreeSet::new(),
    }
}

/// `*nat`, `:PREROUTING ACCEPT [0:0]`, `-A PREROUTING -p tcp -j REDIRECT --to-ports 15006`, `COMMIT`
fn tables_saved(saved: &str) -> BTreeSet<String> {
    let mut table = "";
    let mut tables = BTreeSet::new();
    for line in saved.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        } else if line.starts_with("-A ")
            && !line.starts_with("-A CRIU")
            && !line.ends_with("-j CRIU")
        {
            tables.insert(table.to_owned());
        }
    }
    tables
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
    use super::*;

    fn message(kind: u16, attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut body = vec![0; MESSAGE];
        for (name, value) in attributes {
            let length = u16::try_from(value.len() + 4).unwrap();
            body.extend(length.to_ne_bytes());
            body.extend(name.to_ne_bytes());
            body.extend(*value);
            body.resize(body.len().next_multiple_of(4), 0);
        }
        let length = u32::try_from(HEADER + body.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn each_table_is_named_once() {
        let rule = |table: &[u8]| message(NEW_RULE, &[(9, &[0; 3]), (ATTRIBUTE_TABLE, table)]);
        let mut tables = BTreeSet::new();
        let first = [rule(b"mesh\0"), rule(b"nat\0"), rule(b"mesh\0")].concat();
        assert!(!read(&first, &mut tables));
        assert!(read(&message(DONE, &[]), &mut tables));
        assert_eq!(tables, BTreeSet::from(["mesh", "nat"].map(String::from)));
        for length in 0..first.len() {
            // Whatever is cut off is no panic.
            read(&first[..length], &mut BTreeSet::new());
        }
    }

    #[test]
    fn only_rules_count() {
        let saved = "*filter\n:INPUT ACCEPT [0:0]\n:CRIU - [0:0]\n-A INPUT -j CRIU\n-A CRIU -j DROP\nCOMMIT\n\
            *nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -p tcp -j REDIRECT --to-ports 15001\nCOMMIT\n";
        assert_eq!(tables_saved(saved), BTreeSet::from(["nat".to_owned()]));
    }
}
