//! `iptables-<n>.img`, `ip6tables-<n>.img`, `nftables-<n>.img`: the rules for packets of a network that CRIU makes, as
//! the tools print them.
//!
//! ```text
//! *filter                              table ip filter {
//! :INPUT ACCEPT [0:0]                      chain CRIU {
//! -A INPUT -j CRIU                             counter packets 0 bytes 0 drop
//! COMMIT                               }
//! ```
//!
//! CRIU hands the text to the tools as root, where it is itself: in the mounts of the node. There a rule of iptables may
//! name a program to load modules with (`--modprobe`) and libraries (`-m ../x`), and nft includes files. What the
//! tools print themselves has none of it.
//!
//! Where CRIU locks the network by rules, a dump has these, too.

use std::collections::BTreeSet;
use std::path::Path;

use super::{ImageError, file_names, read_raw};

const PREFIXES: [&str; 3] = ["iptables-", "ip6tables-", "nftables-"];
const SUFFIX: &str = ".img";
const NFTABLES: &str = PREFIXES[2];

/// Rules by which CRIU locks a network, by iptables.
const LOCK: [&str; 4] = [
    "-A INPUT -j CRIU",
    "-A OUTPUT -j CRIU",
    "-A CRIU -m mark --mark 0xc114 -j ACCEPT",
    "-A CRIU -j DROP",
];
/// The same by nftables, also where iptables is made of these. Numbers of packets are not compared.
const NFT_LOCK: [&str; 17] = [
    "}",
    "table ip filter {",
    "table ip6 filter {",
    "table inet CRIU {",
    "chain CRIU {",
    "chain INPUT {",
    "chain OUTPUT {",
    "chain input {",
    "chain output {",
    "type filter hook input priority filter; policy accept;",
    "type filter hook output priority filter; policy accept;",
    "type filter hook input priority filter; policy drop;",
    "type filter hook output priority filter; policy drop;",
    "meta mark 0x0000c114 accept",
    "counter jump CRIU",
    "meta mark 0x0000c114 counter accept",
    "counter drop",
];
/// Most bytes of a line: of a longer one iptables-restore takes the rest for another line.
const LONGEST_LINE: usize = 10_238;
/// Options whose next word is a text of the user's.
const WITH_TEXT: [&str; 4] = ["--comment", "--log-prefix", "--nflog-prefix", "--string"];

/// Whether the networks but those of the `external` numbers have rules beside CRIU's own.
///
/// # Errors
/// An image that cannot be read, or [`ImageError::PacketRules`]: it has what no tool prints.
pub fn has_rules(dir: &Path, external: &BTreeSet<u32>) -> Result<bool, ImageError> {
    let mut found = false;
    for name in file_names::all(dir)? {
        let Some(prefix) = PREFIXES.iter().find(|prefix| name.starts_with(**prefix)) else {
            continue;
        };
        let number = name[prefix.len()..].strip_suffix(SUFFIX);
        if number
            .and_then(|number| number.parse().ok())
            .is_some_and(|number| external.contains(&number))
        {
            continue;
        }
        let path = dir.join(&name);
        let text = read_raw(&path)?;
        // Their ends are not NULs: nft would read no further, and iptables would.
        let Some(text) = std::str::from_utf8(&text).ok().filter(|it| is_text(it)) else {
            return Err(ImageError::PacketRules { path });
        };
        let rules = match *prefix == NFTABLES {
            true => nft_rules(text),
            false => iptables_rules(text),
        };
        found |= rules.ok_or(ImageError::PacketRules { path })?;
    }
    Ok(found)
}

fn is_text(text: &str) -> bool {
    { text.chars() }.all(|it| !it.is_control() || matches!(it, '\n' | '\t'))
}

/// Whether there are others than CRIU's; none where it has what no tool prints.
fn iptables_rules(text: &str) -> Option<bool> {
    let mut found = false;
    if text.lines().any(|line| line.len() > LONGEST_LINE) {
        return None;
    }
    for line in { text.lines() }.filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let is_frame = line == "COMMIT" || { line.strip_prefix('*') }.is_some_and(is_name) || {
            line.strip_prefix(':')
        }
        .is_some_and(is_chain);
        if is_frame {
            // Who drops all has a rule, too.
            found |= line.starts_with(':') && line.split(' ').nth(1) == Some("DROP");
            continue;
        }
        let words = words(line)?;
        if words.first().map(String::as_str) != Some("-A") || !are_plain(&words) {
            return None;
        }
        found |= !LOCK.contains(&line);
    }
    Some(found)
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && { name.bytes() }
        .all(|it| it.is_ascii_alphanumeric() || b"_-.:+".contains(&it))
}

/// `NAME POLICY [PACKETS:BYTES]`
fn is_chain(chain: &str) -> bool {
    let words: Vec<&str> = chain.split(' ').collect();
    let is_count = |it: &&str| { it.bytes() }.all(|it| it.is_ascii_digit() || b"[:]".contains(&it));
    match words[..] {
        [name, policy, ref counts @ ..] => {
            !name.starts_with('-')
                && { name.bytes() }.all(|it| it.is_ascii_graphic())
                && matches!(policy, "-" | "ACCEPT" | "DROP")
                && counts.len() <= 1
                && counts.iter().all(is_count)
        }
        _ => false,
    }
}

/// As iptables-restore tells them apart: by blanks that are not in quotes.
fn words(line: &str) -> Option<Vec<String>> {
    let (mut words, mut word, mut quoted) = (Vec::new(), None::<String>, false);
    let mut rest = line.chars();
    while let Some(it) = rest.next() {
        match it {
            '\\' if quoted => word.get_or_insert_default().push(rest.next()?),
            // It ends the word, whatever follows.
            '"' if quoted => {
                quoted = false;
                words.push(word.take().unwrap_or_default());
            }
            '"' => {
                word.get_or_insert_default();
                quoted = true;
            }
            ' ' | '\t' if !quoted => words.extend(word.take()),
            it => word.get_or_insert_default().push(it),
        }
    }
    words.extend(word);
    (!quoted).then_some(words)
}

/// Whether no word leads to a program, a library or a file.
fn are_plain(words: &[String]) -> bool {
    let mut before = "";
    words.iter().all(|word| {
        let is_text = WITH_TEXT.contains(&before);
        before = word;
        if is_text {
            // The tool itself would take a text for an option that looks like one.
            return !word.starts_with('-');
        }
        // getopt_long(3) knows an option by its beginning.
        let option = word.split('=').next().unwrap_or(word);
        let is_modprobe = option.starts_with("--m") && "--modprobe".starts_with(option);
        let are_several = word.starts_with('-') && !word.starts_with("--") && word.len() > 2;
        let is_path =
            word.contains("..") || word.contains('/') && !is_with_mask(word) && !is_rate(word);
        !is_modprobe && !are_several && word != "-M" && word != "--" && !is_path
    })
}

/// How often: `5/min`, `512kb/s`.
fn is_rate(word: &str) -> bool {
    let units = ["s", "sec", "second", "min", "minute", "hour", "day"];
    word.split_once('/').is_some_and(|(count, unit)| {
        count.starts_with(|it: char| it.is_ascii_digit())
            && { count.bytes() }.all(|it| it.is_ascii_alphanumeric())
            && units.contains(&unit)
    })
}

/// An address or a number with its mask: `10.0.0.0/8`, `fe80::/10`, `0x1/0xff`.
fn is_with_mask(word: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty() && { part.bytes() }
            .all(|it| it.is_ascii_hexdigit() || b"x.:".contains(&it))
    };
    let Some((value, mask)) = word.split_once('/') else {
        return false;
    };
    is_part(value) && is_part(mask) && !value.starts_with('.')
}

/// Whether there are others than CRIU's; none where it has what no tool prints.
fn nft_rules(text: &str) -> Option<bool> {
    let mut found = false;
    for line in { text.lines() }.map(str::trim).filter(|it| !it.is_empty()) {
        if line.starts_with('#') || NFT_LOCK.contains(&without_numbers(line).as_str()) {
            continue;
        }
        found = true;
        // Text of the user's is in quotes, and has none.
        let outside: String = line.split('"').step_by(2).collect::<Vec<_>>().join(" ");
        let mut tokens = outside.split(|it: char| !it.is_ascii_alphanumeric() && it != '_');
        let is_closed = line.matches('"').count() % 2 == 0;
        if !is_closed || line.contains('\\') || tokens.any(|token| token == "include") {
            return None;
        }
    }
    Some(found)
}

/// Without `packets N bytes N`, and CRIU's table without its number, and the priority by its name.
fn without_numbers(line: &str) -> String {
    let mut words = Vec::new();
    let mut rest = line.split(' ');
    while let Some(word) = rest.next() {
        match word {
            "packets" | "bytes" if rest.clone().next().is_some_and(is_number) => drop(rest.next()),
            "0;" if words.last() == Some(&"priority") => words.push("filter;"),
            word if is_table_of_criu(word) => words.push("CRIU"),
            word => words.push(word),
        }
    }
    words.join(" ")
}

fn is_number(word: &str) -> bool {
    !word.is_empty() && word.bytes().all(|it| it.is_ascii_digit())
}

fn is_table_of_criu(word: &str) -> bool {
    let number = word.strip_prefix("CRIU-");
    number.is_some_and(is_number)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As CRIU 4.2 has locked a network by iptables 1.8.13, which is made of nftables.
    const LOCKED: &str = "table ip filter {
\tchain CRIU {
\t\tmeta mark 0x0000c114 counter packets 3 bytes 180 accept
\t\tcounter packets 0 bytes 0 drop
\t}

\tchain INPUT {
\t\ttype filter hook input priority filter; policy accept;
\t\tcounter packets 0 bytes 0 jump CRIU
\t}
}
table inet CRIU-77 {
\tchain output {
\t\ttype filter hook output priority 0; policy drop;
\t\tmeta mark 0x0000c114 accept
\t}
}
";
    const LOCKED_LEGACY: &str = "# Generated by iptables-save v1.8.13 on Sun Nov 29 03:17:20 2026\n*filter\n:INPUT ACCEPT [0:0]\n\
         :FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:CRIU - [0:0]\n-A INPUT -j CRIU\n-A OUTPUT -j CRIU\n\
         -A CRIU -m mark --mark 0xc114 -j ACCEPT\n-A CRIU -j DROP\nCOMMIT\n# Completed\n";

    fn rules(name: &str, text: &str) -> Option<bool> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(name), text).unwrap();
        let external = BTreeSet::from([7]);
        has_rules(dir.path(), &external).ok()
    }

    #[test]
    fn the_lock_of_criu_is_no_rule() {
        assert_eq!(rules("nftables-10.img", ""), Some(false));
        assert_eq!(rules("nftables-10.img", LOCKED), Some(false));
        assert_eq!(rules("iptables-10.img", LOCKED_LEGACY), Some(false));
        assert_eq!(rules("ip6tables-10.img", LOCKED_LEGACY), Some(false));
    }

    #[test]
    fn rules_are_told_from_what_is_none() {
        for rule in [
            "-A INPUT -p tcp -m tcp --dport 99 -m comment --comment \"a/b \\\" c\" -j DROP",
            "-A FORWARD -s 10.0.0.0/255.0.0.0 ! -i eth0 -j MARK --set-xmark 0x1/0xff",
            "-A INPUT -s fe80::/10 -j ACCEPT",
            ":INPUT DROP [0:0]",
            "-A INPUT -m limit --limit 5/min --limit-burst 7 -j ACCEPT",
            "-A INPUT -m hashlimit --hashlimit-upto 512kb/s --hashlimit-name x -j ACCEPT",
        ] {
            let text = format!("*filter\n:INPUT ACCEPT [0:0]\n{rule}\nCOMMIT\n");
            assert_eq!(rules("iptables-1.img", &text), Some(true), "{rule}");
        }
        for forged in [
            "-A INPUT --modprobe=/data/evil -j DROP",
            "-A INPUT --mo /data/evil -j DROP",
            "-A INPUT -M evil -j DROP",
            "-A INPUT -jM evil",
            "-A INPUT \"--modprobe\" evil",
            "-A INPUT -m comment --comment --modprobe=evil",
            "-A INPUT -m comment --comment \"x\"--modprobe=evil -j DROP",
            "-A INPUT -m ../../data/evil -j DROP",
            "-A INPUT -m bpf --object-pinned /sys/fs/bpf/x -j DROP",
            "-A INPUT -m comment --comment \"open",
            "-N evil",
            "-t nat -A INPUT -j DROP",
            "*nat -M evil",
            ":-M evil",
            "COMMIT -M evil",
        ] {
            let text = format!("*filter\n{forged}\nCOMMIT\n");
            assert_eq!(rules("iptables-1.img", &text), None, "{forged}");
        }
        let long = format!("#{}-A INPUT --modprobe=evil", "a".repeat(10_238));
        assert_eq!(rules("iptables-1.img", &long), None);
        let nft = |line: &str| rules("nftables-1.img", &format!("table ip x {{\n{line}\n}}\n"));
        assert_eq!(nft("tcp dport 77 drop comment \"include me\""), Some(true));
        for forged in [
            "include \"/etc/shadow\"",
            "tcp dport 77 drop; include\"/etc/shadow\"",
            "comment \"x\\\" ; include \"/etc/shadow\"",
            "comment \"open",
            "counter packets 0 bytes 0;include\"/etc/shadow\";counter drop",
            "a\0b",
        ] {
            assert_eq!(nft(forged), None, "{forged}");
        }
        let hidden = "counter packets 0 bytes 0;tcp\tdport\t80\tdrop;counter drop";
        assert_eq!(nft(hidden), Some(true));
        // CRIU reads none of a network that it does not make.
        assert_eq!(
            rules("nftables-7.img", "include \"/etc/shadow\""),
            Some(false)
        );
    }
}
