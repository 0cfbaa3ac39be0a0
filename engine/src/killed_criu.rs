//! What a CRIU that is killed in the middle of a dump (by the kernel, for memory) leaves in a container.
//!
//! ```text
//!  its rules                  `CRIU-...` tables of nftables, or the chain `CRIU` of iptables (criu/netfilter.c)
//!    in the node's network    only those of this dump, and of its connections: nodes_network
//!  names of files             `link_remap.N` beside a file that has lost its name: left_links
//!  TCP sockets in repair      whoever reads from one hears "Operation not permitted" (soccr/soccr.c)
//!  a parasite                 it hears that its connection has ended, and goes by itself (criu/pie/parasite.c)
//! ```

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::socket::sockopt::TcpRepair;
use nix::sys::socket::{getsockopt, setsockopt};
use procfs::process::{FDTarget, Process, all_processes};
use transship_program_output::output_within;
use transship_sandbox::{DescriptorsOf, read_proc};

use crate::network_namespace::within;

mod left_links;
mod nodes_network;

/// How long a program may take to make rules, at most; it is one of the container's own if it takes longer.
const MAKES_RULES: Duration = Duration::from_secs(2);
/// How long one may take to list rules, or to take them away.
const TAKES_RULES_AWAY: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// What tells the rules of iptables, and what changes them.
const IPTABLES: [(&str, &str); 2] = [
    ("iptables-save", "iptables-restore"),
    ("ip6tables-save", "ip6tables-restore"),
];

/// Takes away what it has left of a dump into `draft` in the containers with these first processes, which stand still.
/// What cannot be looked at has nothing of it.
pub(crate) fn clean_up(draft: &Path, roots: &[u32]) {
    for &root in roots {
        end_repair(root);
    }
    let network = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let of_node = network("self");
    let (mut done, mut in_nodes) = (Vec::new(), Vec::new());
    for root in roots {
        let network = network(&root.to_string());
        if network.is_some() && network == of_node {
            in_nodes.push(*root);
        } else if network.is_some() && !done.contains(&network) {
            unlock_network(*root);
            done.push(network);
        }
    }
    if !in_nodes.is_empty() {
        nodes_network::unlock(draft, &in_nodes);
    }
    for &root in roots {
        left_links::take_away(root);
    }
}

/// Takes the sockets of a container out of the repair of TCP; the peer is sent a window probe then.
fn end_repair(root: u32) {
    let cgroups = |pid: i32| read_proc(format!("/proc/{pid}/cgroup")).ok();
    let Some(of_root) = cgroups(root.cast_signed()) else {
        return;
    };
    let processes = all_processes().into_iter().flatten().flatten();
    for process in processes {
        if cgroups(process.pid).is_some_and(|it| are_below(&it, &of_root)) {
            each_socket(&process, |socket| {
                // Of another protocol's there is no such option.
                if matches!(getsockopt(&socket, TcpRepair), Ok(state) if state != 0) {
                    let _ = setsockopt(&socket, TcpRepair, &0);
                }
            });
        }
    }
}

/// Whether each cgroup is one of the container's, or below it. Both as in `/proc/PID/cgroup`: one line per hierarchy.
fn are_below(cgroups: &str, of_root: &str) -> bool {
    let is_below = |(it, root): (&str, &str)| {
        let rest = it.strip_prefix(root);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let both = || cgroups.lines().zip(of_root.lines());
    cgroups.lines().count() == of_root.lines().count() && both().all(is_below)
}

/// One after the other: a process may have more of them than this one may have descriptors.
fn each_socket(process: &Process, act: impl Fn(OwnedFd)) {
    let Ok(descriptors) = DescriptorsOf::process(process.pid) else {
        return;
    };
    for open in process.fd().into_iter().flatten().flatten() {
        if matches!(open.target, FDTarget::Socket(_))
            && let Ok(socket) = descriptors.get(open.fd)
        {
            act(socket);
        }
    }
}

/// Takes away the lock of a network. A program that the killed CRIU has told to make it may still be at it.
fn unlock_network(root: u32) {
    wait_for_rules(root, MAKES_RULES);
    let unlock = || {
        for name in tables_of_criu(&output("nft", &["list", "tables"])) {
            output("nft", &["delete", "table", "inet", name]);
        }
        for (save, restore) in IPTABLES {
            if let Some(rules) = without_lock(&output(save, &["-t", "filter"])) {
                feed(restore, rules)?;
            }
        }
        io::Result::Ok(())
    };
    // A container that has ended has no network, and a node without these tools no lock.
    drop(within(root, unlock));
}

/// The tables that are CRIU's, by what `nft list tables` says. A container can give one any name, and nft takes its words for a
/// script: only names as CRIU makes them are said to it.
fn tables_of_criu(listed: &str) -> impl Iterator<Item = &str> {
    let names = listed
        .lines()
        .filter_map(|line| line.strip_prefix("table inet "));
    names.filter(|name| {
        // The number of the first process, or the id of a run (CRIU 4.2).
        let run = name.strip_prefix("CRIU-").unwrap_or_default();
        !run.is_empty() && run.bytes().all(|it| it.is_ascii_hexdigit() || it == b'-')
    })
}

/// What `iptables-restore` is told to take the lock away from what `iptables-save` has said. CRIU takes its jumps away
/// first, and the chain then.
fn without_lock(saved: &str) -> Option<String> {
    if !saved.lines().any(|line| line.starts_with(":CRIU ")) {
        return None;
    }
    // Others may stand there, with comments that a container has written.
    let jumps = ["INPUT", "OUTPUT"].map(|chain| format!("{chain} -j CRIU"));
    let jumps = jumps.iter().flat_map(|jump| {
        let made = saved
            .lines()
            .filter(move |line| line.strip_prefix("-A ") == Some(jump));
        made.map(move |_| format!("-D {jump}\n"))
    });
    Some(format!(
        "*filter\n:CRIU - [0:0]\n{}-X CRIU\nCOMMIT\n",
        jumps.collect::<String>()
    ))
}

/// Waits until no program makes rules in the network of this process any more.
fn wait_for_rules(root: u32, patience: Duration) {
    let deadline = Instant::now() + patience;
    while makes_rules(root) && Instant::now() < deadline {
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// Whether a program that makes rules is at work in the network of this process.
fn makes_rules(root: u32) -> bool {
    let network = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let Some(of_root) = network(root.cast_signed()) else {
        return false;
    };
    let processes = all_processes().into_iter().flatten().flatten();
    processes
        .filter(|process| {
            let name = process.stat().map(|stat| stat.comm).unwrap_or_default();
            ["iptables", "ip6tables", "nft"]
                .iter()
                .any(|rules| name.starts_with(rules))
        })
        .any(|process| network(process.pid) == Some(of_root.clone()))
}

/// What a program says, as far as it is worth reading; nothing of one that hangs: the container stands still meanwhile.
fn output(program: &str, args: &[&str]) -> String {
    let said = run(program, args, Stdio::piped(), String::new());
    String::from_utf8_lossy(&said.unwrap_or_default()).into_owned()
}

fn feed(program: &str, text: String) -> io::Result<()> {
    run(program, &["-w", "--noflush"], Stdio::null(), text).map(drop)
}

fn run(program: &str, args: &[&str], stdout: Stdio, input: String) -> io::Result<Vec<u8>> {
    let child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(stdout)
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()?;
    let output = output_within(TAKES_RULES_AWAY, child, input)?;
    Ok(output.map(|output| output.stdout).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd as _;

    use nix::fcntl::{FcntlArg, FdFlag, fcntl};

    use super::*;

    #[test]
    fn a_lock_goes_whole_or_half() {
        let rules = "*filter\n:INPUT ACCEPT [0:0]\n:CRIU - [0:0]\n";
        let whole =
            format!("{rules}-A INPUT -j CRIU\n-A INPUT -p tcp -j DROP\n-A CRIU -j DROP\nCOMMIT\n");
        let (begin, end) = ("*filter\n:CRIU - [0:0]\n", "-X CRIU\nCOMMIT\n");
        assert_eq!(
            without_lock(&whole),
            Some(format!("{begin}-D INPUT -j CRIU\n{end}"))
        );
        assert_eq!(
            without_lock(&format!("{rules}COMMIT\n")),
            Some(format!("{begin}{end}"))
        );
        assert_eq!(without_lock("*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n"), None);
        // What a container has written is said to no program.
        let comment = "-A INPUT -m comment --comment \"--modprobe=/x -A\" -j CRIU\n";
        assert_eq!(
            without_lock(&format!("{rules}{comment}COMMIT\n")),
            Some(format!("{begin}{end}"))
        );
    }

    #[test]
    fn only_tables_of_criu_are_named_to_nft() {
        let listed = "table inet CRIU-17\ntable inet CRIU-5c0e-b1\ntable ip CRIU-1\ntable inet CRIU-1;include \"/x\"\ntable inet CRIU-\n\
                      table inet filter\ntable inet CRIU-2 \n";
        assert_eq!(
            tables_of_criu(listed).collect::<Vec<_>>(),
            ["CRIU-17", "CRIU-5c0e-b1"]
        );
    }

    #[test]
    fn a_container_is_its_cgroups() {
        let root = "1:freezer:/default/web\n0::/\n";
        assert!(are_below(root, root));
        assert!(are_below("1:freezer:/default/web/inner\n0::/\n", root));
        for other in [
            "1:freezer:/default/web2\n0::/\n",
            "1:freezer:/\n0::/\n",
            "0::/\n",
            "",
        ] {
            assert!(!are_below(other, root), "{other}");
        }
    }

    #[test]
    fn root_a_socket_is_taken_out_of_repair() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (there, _) = listener.accept().unwrap();
        setsockopt(&there, TcpRepair, &1).unwrap();
        fcntl(&there, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        // It has the socket as well.
        let mut sleep = Command::new("sleep").arg("1000").spawn().unwrap();
        end_repair(sleep.id());
        assert_eq!(
            getsockopt(&there, TcpRepair),
            Ok(0),
            "{}",
            there.as_raw_fd()
        );
        here.write_all(b"on").unwrap();
        sleep.kill().unwrap();
        sleep.wait().unwrap();
    }
}
