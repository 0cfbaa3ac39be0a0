//! Rules of packet filters in the network of a pod, or of a container that has its own: the new network has none of
//! them, and an init container that has made them does not run again.
//!
//! ```text
//!  question  type 0x0a07   nfgenmsg { family u8 = 0: all, version u8, id u16 }          (netlink)
//!  answer    type 0x0a06   nfgenmsg  nlattr 1: the name of the table, and a zero
//!
//!  /proc/PID/net/ip_tables_names, ip6_tables_names    tables of the older iptables, which nf_tables(7) does not know:
//!  iptables-legacy-save                               their rules, where the node has the program
//! ```
//!
//! A table without rules is what a look into it leaves, or CRIU, when it has locked the network with iptables.

use std::collections::BTreeSet;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::socket::SockProtocol;
use transship_checkpoint::cri_names::annotations::SANDBOX_ID;
use transship_sandbox::read_proc;

use super::{Hit, Subject, netlink};
use crate::network_namespace::within;
use crate::own_networks::has_own_network;

const GET_RULE: u16 = 0x0a07;
const NEW_RULE: u16 = 0x0a06;
const ATTRIBUTE_TABLE: u16 = 1;
/// Length of `nfgenmsg`.
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
    let mut tables = BTreeSet::new();
    let all = [0; MESSAGE];
    netlink::list(
        SockProtocol::NetlinkNetFilter,
        GET_RULE,
        &all,
        |kind, rule| {
            if kind == NEW_RULE {
                tables.extend(table_of(rule));
            }
            true
        },
    )?;
    Ok(tables)
}

fn table_of(rule: &[u8]) -> Option<String> {
    let mut attributes = netlink::attributes(rule.get(MESSAGE..)?);
    let (_, name) = attributes.find(|(kind, _)| *kind == ATTRIBUTE_TABLE)?;
    let name = name.strip_suffix(&[0]).unwrap_or(name);
    Some(String::from_utf8_lossy(name).into_owned())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_names_its_table() {
        // nfgenmsg; attribute 9 with three bytes; the table.
        let rule = [
            &[0; MESSAGE][..],
            &7_u16.to_ne_bytes(),
            &9_u16.to_ne_bytes(),
            &[1, 2, 3, 0],
            &9_u16.to_ne_bytes(),
            &ATTRIBUTE_TABLE.to_ne_bytes(),
            b"mesh\0",
        ]
        .concat();
        assert_eq!(table_of(&rule).as_deref(), Some("mesh"));
        for length in 0..rule.len() {
            assert_eq!(table_of(&rule[..length]), None, "{length}");
        }
    }

    #[test]
    fn only_rules_count() {
        let saved = "*filter\n:INPUT ACCEPT [0:0]\n:CRIU - [0:0]\n-A INPUT -j CRIU\n-A CRIU -j DROP\nCOMMIT\n\
            *nat\n:OUTPUT ACCEPT [0:0]\n-A OUTPUT -p tcp -j REDIRECT --to-ports 15001\nCOMMIT\n";
        assert_eq!(tables_saved(saved), BTreeSet::from(["nat".to_owned()]));
    }
}
