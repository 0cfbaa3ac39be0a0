//! What a killed CRIU leaves of its locks in the node's network, where others have theirs.
//!
//! A container in a network of its own is locked as a whole. Of one in the node's each connection is, beside the locks of
//! all other dumps that go on at this moment; so only what is known to be of this dump is taken away
//! (criu/netfilter.c):
//!
//! ```text
//!  nftables   a table inet CRIU-PID      of the first process (CRIU before 4.1)
//!                          CRIU-UUID     of the run, which the beginning of its log names: (00.000000) CRIU run id = UUID;
//!                                        cut to 21 characters, as `inet CRIU-UUID` must fit into 32 bytes there
//!  iptables   two rules for a connection, in no chain of CRIU's:
//!             -A INPUT -s PEER -d HERE -p tcp -m mark ! --mark 0xc114 -m tcp --sport N --dport N -j DROP
//! ```

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use procfs::process::{FDTarget, Process};
use transship_checkpoint::manifest::DUMP_LOG_FILE;
use transship_sandbox::tree_with_parents;

use super::{IPTABLES, MAKES_RULES, feed, output, tables_of_criu, wait_for_rules};

/// How often rules are looked at: others may change theirs between a look and an act.
const LOOKS: usize = 3;
/// Bytes of a log of CRIU that are read: it names its run before anything else.
const LOG_BEGIN: u64 = 64 << 10;

/// How much of a run's UUID is in the name of a table at least.
const LEFT_OF_UUID: usize = 21;

/// This end and the other one.
type Connection = (SocketAddr, SocketAddr);

/// Takes away what the dumps into `draft` have left, of containers with these first processes in the network that the
/// caller is in.
pub(super) fn unlock(draft: &Path, roots: &[u32]) {
    if let Some(root) = roots.first() {
        wait_for_rules(*root, MAKES_RULES);
    }
    delete_tables(draft, roots);
    let connections: BTreeSet<Connection> = { roots.iter() }.flat_map(|it| of_tree(*it)).collect();
    if connections.is_empty() {
        return;
    }
    for (save, restore) in IPTABLES {
        for _ in 0..LOOKS {
            let Some(away) = without_locks(&output(save, &["-t", "filter"]), &connections) else {
                break;
            };
            if let Err(error) = feed(restore, away) {
                tracing::warn!("a lock that a killed CRIU has left may stay: {restore}: {error}");
                break;
            }
        }
    }
}

fn delete_tables(draft: &Path, roots: &[u32]) {
    let listed = output("nft", &["list", "tables"]);
    let runs = runs_below(draft);
    let names: Vec<&str> = tables_of_criu(&listed).collect();
    for name in { names.iter() }.filter(|name| is_of_dump(name, &runs, roots)) {
        output("nft", &["delete", "table", "inet", name]);
    }
    let others: Vec<&str> = { names.into_iter() }.filter(|it| is_of_run(it)).collect();
    if runs.is_empty() && !others.is_empty() {
        // One of them may be of the dump that was killed.
        let others = others.join(", ");
        tracing::warn!(
            "CRIU has not said in its log which lock of the network is its own, and these stay: {others}"
        );
    }
}

fn is_of_dump(table: &str, runs: &BTreeSet<String>, roots: &[u32]) -> bool {
    let of = table.strip_prefix("CRIU-").unwrap_or_default();
    let is_of = |run: &String| of.len() >= LEFT_OF_UUID && run.starts_with(of);
    runs.iter().any(is_of) || roots.iter().any(|root| of == root.to_string())
}

/// Whether it is called by a run, and not by a process.
fn is_of_run(table: &str) -> bool {
    { table.strip_prefix("CRIU-") }.is_some_and(|of| of.len() >= LEFT_OF_UUID)
}

/// The runs of CRIU that have dumped into a draft, by their logs.
fn runs_below(draft: &Path) -> BTreeSet<String> {
    let containers = fs::read_dir(draft).into_iter().flatten().flatten();
    let logs = containers.flat_map(|container| {
        let dir = container.path();
        [
            dir.join("work").join(DUMP_LOG_FILE),
            dir.join(DUMP_LOG_FILE),
        ]
    });
    let begins = logs.filter_map(|log| begin_of(&log).ok());
    begins
        .flat_map(|log| runs_of(&log).map(str::to_owned).collect::<Vec<_>>())
        .collect()
}

fn begin_of(log: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(log)?.take(LOG_BEGIN).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The runs whose log this is: a CRIU that a runtime has started gives itself a second one, which counts. Before 4.1 they
/// are numbers, and name no table.
fn runs_of(log: &str) -> impl Iterator<Item = &str> {
    let runs = log.lines().filter_map(|line| {
        let (time, run) = line.strip_prefix('(')?.split_once(") CRIU run id = ")?;
        { time.bytes() }
            .all(|it| it.is_ascii_digit() || it == b'.')
            .then_some(run)
    });
    runs.filter(|run| is_uuid(run))
}

fn is_uuid(text: &str) -> bool {
    let lengths = text.split('-').map(str::len);
    lengths.eq([8, 4, 4, 4, 12]) && text.bytes().all(|it| it.is_ascii_hexdigit() || it == b'-')
}

/// The TCP connections of a process and all below it.
fn of_tree(root: u32) -> Vec<Connection> {
    let mut sockets = BTreeSet::new();
    for (pid, _) in tree_with_parents(root.cast_signed()).unwrap_or_default() {
        let open = Process::new(pid).and_then(|it| it.fd());
        let open = open.into_iter().flatten().flatten();
        sockets.extend(open.filter_map(|it| match it.target {
            FDTarget::Socket(inode) => Some(inode),
            _ => None,
        }));
    }
    let Ok(process) = Process::new(root.cast_signed()) else {
        return Vec::new();
    };
    let tables = [process.tcp(), process.tcp6()];
    let entries = tables.into_iter().flatten().flatten();
    let ours = entries.filter(|entry| entry.remote_address.port() != 0);
    ours.filter(|entry| sockets.contains(&entry.inode))
        .map(|entry| (plain(entry.local_address), plain(entry.remote_address)))
        .collect()
}

/// Addresses of IPv4 as such, whatever the socket is.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// What `iptables-restore` is told to take the locks of these connections away from what `iptables-save` has said. A rule
/// may be there more than once, of earlier dumps.
fn without_locks(saved: &str, connections: &BTreeSet<Connection>) -> Option<String> {
    let locks: BTreeSet<String> = connections.iter().flat_map(locks_of).collect();
    let rules = saved.lines().filter_map(|line| line.strip_prefix("-A "));
    let away: String = rules
        .filter(|rule| locks.contains(*rule))
        .map(|rule| format!("-D {rule}\n"))
        .collect();
    (!away.is_empty()).then(|| format!("*filter\n{away}COMMIT\n"))
}

/// The rules of CRIU that lock a connection, in the words of `iptables-save`.
fn locks_of((here, there): &Connection) -> [String; 2] {
    let rule = |chain: &str, from: &SocketAddr, to: &SocketAddr| {
        format!(
            "{chain} -s {} -d {} -p tcp -m mark ! --mark 0xc114 -m tcp --sport {} --dport {} -j DROP",
            whole(from.ip()),
            whole(to.ip()),
            from.port(),
            to.port()
        )
    };
    [rule("INPUT", there, here), rule("OUTPUT", here, there)]
}

fn whole(address: IpAddr) -> String {
    let bits = if address.is_ipv4() { 32 } else { 128 };
    format!("{address}/{bits}")
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    const RUN: &str = "5c0e63b1-27f4-4c0c-9d3a-0b6f4b7a9e11";

    fn connection(here: &str, there: &str) -> Connection {
        (here.parse().unwrap(), there.parse().unwrap())
    }

    #[test]
    fn only_rules_of_these_connections_go() {
        let ours = BTreeSet::from([
            connection("10.0.0.2:5000", "10.0.0.1:80"),
            connection("[fd00::2]:5000", "[fd00::1]:80"),
        ]);
        let end = "-p tcp -m mark ! --mark 0xc114 -m tcp";
        let input =
            format!("INPUT -s 10.0.0.1/32 -d 10.0.0.2/32 {end} --sport 80 --dport 5000 -j DROP\n");
        let output =
            format!("OUTPUT -s 10.0.0.2/32 -d 10.0.0.1/32 {end} --sport 5000 --dport 80 -j DROP\n");
        let of_ipv6 =
            format!("INPUT -s fd00::1/128 -d fd00::2/128 {end} --sport 80 --dport 5000 -j DROP\n");
        let others = [
            // The other end of it, which another container has.
            "INPUT -s 10.0.0.2/32 -d 10.0.0.1/32 -p tcp -m mark ! --mark 0xc114 -m tcp --sport 5000 --dport 80 -j DROP",
            "INPUT -s 10.0.0.1/32 -d 10.0.0.2/32 -p tcp -m mark ! --mark 0xc114 -m tcp --sport 80 --dport 5001 -j DROP",
            "INPUT -s 10.0.0.1/32 -d 10.0.0.2/32 -p tcp -m mark ! --mark 0xc115 -m tcp --sport 80 --dport 5000 -j DROP",
            "INPUT -s 10.0.0.1/32 -d 10.0.0.2/32 -p tcp -m mark --mark 0xc114 -m tcp --sport 80 --dport 5000 -j DROP",
            "INPUT -s 10.0.0.0/24 -d 10.0.0.2/32 -p tcp -m mark ! --mark 0xc114 -m tcp --sport 80 --dport 5000 -j DROP",
            "INPUT -s 10.0.0.1/32 -d 10.0.0.2/32 -p tcp -m tcp --sport 80 --dport 5000 -j DROP",
            "FORWARD -s 10.0.0.1/32 -d 10.0.0.2/32 -p tcp -m mark ! --mark 0xc114 -m tcp --sport 80 --dport 5000 -j DROP",
        ];
        let others: String = others.map(|it| format!("-A {it}\n")).concat();
        let begin = "*filter\n:INPUT ACCEPT [0:0]\n";
        let saved = format!("{begin}-A {input}-A {input}{others}-A {output}-A {of_ipv6}COMMIT\n");
        assert_eq!(
            without_locks(&saved, &ours),
            Some(format!(
                "*filter\n-D {input}-D {input}-D {output}-D {of_ipv6}COMMIT\n"
            ))
        );
        assert_eq!(
            without_locks(&format!("{begin}{others}COMMIT\n"), &ours),
            None
        );
        assert_eq!(without_locks(&saved, &BTreeSet::new()), None);
    }

    #[test]
    fn a_table_is_known_by_its_run_or_process() {
        let runs = BTreeSet::from([RUN.to_owned()]);
        for (table, is_ours) in [
            (format!("CRIU-{RUN}"), true),
            // CRIU 4.2.
            (format!("CRIU-{}", &RUN[..21]), true),
            (format!("CRIU-{}", &RUN[..20]), false),
            ("CRIU-17".to_owned(), true),
            ("CRIU-1".to_owned(), false),
            ("CRIU-171".to_owned(), false),
            (format!("CRIU-{}", RUN.replace("5c0e", "5c0f")), false),
        ] {
            assert_eq!(is_of_dump(&table, &runs, &[17, 18]), is_ours, "{table}");
        }
        assert!(is_of_run(&format!("CRIU-{}", &RUN[..21])));
        assert!(!is_of_run("CRIU-17"));
    }

    #[test]
    fn a_log_names_its_run() {
        let log = |run: &str| {
            format!(
                "(00.000000) Version: 4.2\n(00.000000) CRIU run id = {run}\n(00.000031) Running on x\n"
            )
        };
        let runs = |log: &str| runs_of(log).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(runs(&log(RUN)), [RUN]);
        // As a runtime starts it.
        let second = RUN.replace("5c0e", "5c0f");
        assert_eq!(runs(&(log(RUN) + &log(&second))), [RUN, &second]);
        // CRIU 4.0.
        for none in [log("0x7d8f00000f2a"), log(""), String::new()] {
            assert!(runs(&none).is_empty(), "{none}");
        }
        assert!(runs(&format!("(x) CRIU run id = {RUN}\n")).is_empty());
    }

    #[test]
    fn the_logs_of_a_draft_are_read() {
        let draft = tempfile::tempdir().unwrap();
        let work = draft.path().join("web/work");
        fs::create_dir_all(&work).unwrap();
        fs::create_dir(draft.path().join("other")).unwrap();
        assert!(runs_below(draft.path()).is_empty());
        let log = format!("(00.000000) CRIU run id = {RUN}\n");
        fs::write(work.join(DUMP_LOG_FILE), log).unwrap();
        assert_eq!(runs_below(draft.path()), BTreeSet::from([RUN.to_owned()]));
        assert!(runs_below(&draft.path().join("none")).is_empty());
    }

    #[test]
    fn the_connections_of_a_process_are_known() {
        // Of both families where the kernel has both.
        let any = TcpListener::bind("[::]:0").or_else(|_| TcpListener::bind("0.0.0.0:0"));
        let listener = any.unwrap();
        let port = listener.local_addr().unwrap().port();
        let here = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (there, _) = listener.accept().unwrap();
        let found = of_tree(std::process::id());
        for end in [&here, &there] {
            let ends = (end.local_addr().unwrap(), end.peer_addr().unwrap());
            let ends = (plain(ends.0), plain(ends.1));
            assert!(ends.0.is_ipv4() && found.contains(&ends), "{ends:?}");
        }
        assert!(found.iter().all(|(_, there)| there.port() != 0));
    }
}
