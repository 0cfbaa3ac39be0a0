//! A container keeps its address, and a client outside streams numbers to it at full speed and reads them back while
//! it moves there and back: no number is lost, none comes twice, over IPv4 and IPv6.
//!
//! ```text
//!  node a: lan0 10.77.0.1, fd77::1 ─ client        node b: lan0
//!            │ └──────────────── wire ────────────────┘  │
//!        container, 10.77.0.x, fd77::x ── migrate ──> container
//! ```

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, anyhow, ensure};
use nix::sched::{CloneFlags, setns};
use transship_testbed::{CommandRun as _, Image, Node, Testbed, Tree, journey, poll_until};

use crate::Case;

/// The nodes are on one network of layer 2, whose only other host is the client.
const LAN: &str = r#"{"cniVersion":"0.4.0","name":"lan","plugins":[{"type":"bridge","bridge":"lan0","ipam":{"type":"host-local",
    "ranges":[[{"subnet":"10.77.0.0/24","rangeStart":"10.77.0.10"}],[{"subnet":"fd77::/64","rangeStart":"fd77::10"}]]}}]}"#;
const CONTAINER: &str = "talker";
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of a number.
const NUMBER: usize = size_of::<u64>();
/// Numbers that are written at once.
const BLOCK: usize = 1024;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let case = |what, run| Case {
        what,
        tree: Tree::Forky,
        run,
    };
    [
        case("tcp_journeys", |bed| streams_go_on(bed, 1)),
        case("long_tcp_journeys", |bed| streams_go_on(bed, 25)),
    ]
    .into_iter()
}

fn streams_go_on(bed: &Testbed, times: usize) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let (to_b, to_a) = (bed.ssh(&a, &b)?, bed.ssh(&b, &a)?);
    let [one, other] = [&a, &b].map(|node| node.pid().to_string());
    Command::new("ip")
        .args(["link", "add", "wire", "netns", &one, "type", "veth"])
        .args(["peer", "name", "wire", "netns", &other])
        .run()?;
    for node in [&a, &b] {
        node.write_file("/etc/cni/net.d/05-lan.conflist", LAN)?;
        node.shell(
            "ip link add lan0 type bridge; ip link set wire master lan0; ip link set wire up; ip link set lan0 up",
        )
        .run()?;
    }
    a.shell("ip address add 10.77.0.1/24 dev lan0; ip address add fd77::1/64 dev lan0 nodad")
        .run()?;
    let holder = Image::holder(bed.settings(), &bed.tree_dir().join("bin/busybox"))?;
    a.import_image(&holder, "transship")?;
    let run = ["run", "--detach", "--cni", "--snapshotter", "transship"];
    let program = [
        "/usr/bin/holder",
        "echo=0.0.0.0:7001",
        "echo=[::]:7002",
        "echo=0.0.0.0:7003",
    ];
    a.ctr(&[&run[..], &["transship.test/holder:1", CONTAINER], &program].concat())?;
    let streams = addresses(&a)?
        .into_iter()
        .map(|address| Stream::begin(&a, address))
        .collect::<anyhow::Result<Vec<_>>>()?;
    ensure!(streams.len() == 2, "{streams:?}");
    a_copy_that_is_taken_back_ends_no_connection((&a, &b), &to_b, &streams)?;
    // The other node has no address in this network.
    a_client_tells_how_long_it_waited(&a, &to_b)?;
    b.command("transship")
        .args(["migrate", CONTAINER, "--to", &to_a])
        .args(["--network", "keep", "--tcp", "established"])
        .run()?;
    for journey in 1..=times {
        // Back with all memory in the freeze.
        for (from, to, rounds) in [(&a, &to_b, "8"), (&b, &to_a, "0")] {
            from.command("transship")
                .args(["migrate", CONTAINER, "--to", to])
                .args(["--network", "keep", "--tcp", "established"])
                .args(["--max-precopy-rounds", rounds])
                .run()?;
            for stream in &streams {
                { stream.goes_on() }.with_context(|| format!("journey {journey}"))?;
            }
        }
    }
    for stream in streams {
        stream.end()?;
    }
    no_rule_is_left(&a, Some(journey::task_pid(&a, CONTAINER)?))?;
    journey::remove_container(&a, CONTAINER)?;
    no_rule_is_left(&a, None)?;
    no_rule_is_left(&b, None)
}

/// Whoever asks anew finds the copy at the same address; what has no answer at all costs no freeze.
fn a_client_tells_how_long_it_waited(a: &Node, to_b: &str) -> anyhow::Result<()> {
    let migrate = |probe: &str| {
        let mut migrate = a.command("transship");
        migrate.args(["--json", "migrate", CONTAINER, "--to", to_b]);
        migrate.args([
            "--network",
            "keep",
            "--tcp",
            "established",
            "--probe",
            probe,
        ]);
        migrate
    };
    let said = migrate("exit 1").read_failure()?;
    ensure!(
        said.contains("has no answer before anything is moved"),
        "{said}"
    );
    let listens = addresses(a)?;
    let address = listens.iter().find(|it| it.is_ipv4());
    let address = address.context("no address")?.ip();
    let ask = format!(
        "bash -c 'exec 3<>/dev/tcp/{address}/7003; echo hello >&3; read -r answer <&3; [ $answer = hello ]'"
    );
    let told: serde_json::Value = serde_json::from_str(&migrate(&ask).read()?)?;
    let seconds = |told: &serde_json::Value| told.as_f64().context(told.to_string());
    let wait = seconds(&told["probe"]["longest_wait_seconds"])?;
    let frozen = seconds(&told["timeline"]["frozen_seconds"])?;
    // The listener accepts and does not answer while it stands still.
    ensure!(wait > frozen / 2.0, "{told}");
    ensure!(told["probe"]["at_the_end"] == true, "{told}");
    Ok(())
}

/// The copy is held, with its sockets, when the source finds that it cannot write its record.
fn a_copy_that_is_taken_back_ends_no_connection(
    (a, b): (&Node, &Node),
    to_b: &str,
    streams: &[Stream],
) -> anyhow::Result<()> {
    let records = "/var/lib/transship/migrations";
    let full = format!("mount -t tmpfs -o ro none {records}");
    let refused = a
        .command("transship")
        .args(["migrate", CONTAINER, "--to", to_b])
        .args(["--network", "keep", "--tcp", "established"])
        .args(["--before-restore", &full])
        .output()?;
    a.shell(&format!("umount {records}")).run()?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(
        !refused.status.success() && said.contains("Read-only file system"),
        "{said}"
    );
    for stream in streams {
        stream.goes_on().with_context(|| said.clone())?;
    }
    Ok(poll_until("the end of the copy", PATIENCE, || {
        let left = b.ctr(&["containers", "ls", "-q"]);
        match left.map_err(|error| error.to_string())? {
            left if left.is_empty() => Ok(()),
            left => Err(left),
        }
    })?)
}

/// Where the container listens.
fn addresses(node: &Node) -> anyhow::Result<Vec<SocketAddr>> {
    let pid = journey::task_pid(node, CONTAINER)?;
    let show = format!("nsenter -t {pid} -n ip -o address show dev eth0 scope global");
    let text = { node.shell(&show) }.read()?;
    let prefixes = text
        .lines()
        .filter_map(|line| line.split_whitespace().nth(3));
    { prefixes.filter_map(|prefix| prefix.split('/').next()) }
        .map(|address| match address.contains(':') {
            true => Ok(format!("[{address}]:7002").parse()?),
            false => Ok(format!("{address}:7001").parse()?),
        })
        .collect()
}

/// Neither in the node's network nor in that of its container.
fn no_rule_is_left(node: &Node, pid: Option<u32>) -> anyhow::Result<()> {
    let mut list = "nft list ruleset".to_owned();
    if let Some(pid) = pid {
        list += &format!("; nsenter -t {pid} -n nft list ruleset");
    }
    // CRIU's iptables leaves tables without rules.
    let rules = { node.shell(&list) }.read()?;
    let is_one = |word: &str| rules.contains(word);
    let left = ["drop", "CRIU", "transship"].into_iter().any(is_one);
    ensure!(!left, "left on the node: {rules}");
    Ok(())
}

/// Numbers that a client in a node's network sends and reads back.
#[derive(Debug)]
struct Stream {
    address: SocketAddr,
    /// How many have come back.
    came: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    sending: JoinHandle<io::Result<u64>>,
    reading: JoinHandle<anyhow::Result<u64>>,
}

impl Stream {
    fn begin(node: &Node, address: SocketAddr) -> anyhow::Result<Self> {
        let namespace = File::open(format!("/proc/{}/ns/net", node.pid()))?;
        // A thread that has changed its namespace cannot be used again.
        let connecting = thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            io::Result::Ok(poll_until("a connection", PATIENCE, || {
                TcpStream::connect(address).map_err(|error| error.to_string())
            }))
        });
        let connection = connecting
            .join()
            .map_err(|_| anyhow!("connecting panicked"))???;
        let (came, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let mut to = connection.try_clone()?;
        let ends = Arc::clone(&stop);
        let sending = thread::spawn(move || {
            let mut next = 0;
            while !ends.load(Ordering::Relaxed) {
                let block: Vec<u8> = { (next..).take(BLOCK) }
                    .flat_map(u64::to_le_bytes)
                    .collect();
                to.write_all(&block)?;
                next += BLOCK as u64;
            }
            to.shutdown(Shutdown::Write)?;
            Ok(next)
        });
        let counted = Arc::clone(&came);
        let reading = thread::spawn(move || read_back(connection, &counted));
        Ok(Self {
            address,
            came,
            stop,
            sending,
            reading,
        })
    }

    /// Waits until more has come back than could have been on its way.
    fn goes_on(&self) -> anyhow::Result<()> {
        let before = self.came.load(Ordering::Relaxed);
        let what = format!("the stream of {} to go on", self.address);
        Ok(poll_until(&what, PATIENCE, || {
            let now = self.came.load(Ordering::Relaxed);
            match now > before + 4_000_000 {
                true => Ok(()),
                false => Err(format!("{before} numbers had come, now {now}")),
            }
        })?)
    }

    /// Everything that was sent has come back.
    fn end(self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self
            .sending
            .join()
            .map_err(|_| anyhow!("sending panicked"))??;
        let came = self
            .reading
            .join()
            .map_err(|_| anyhow!("reading panicked"))??;
        ensure!(sent == came && sent > 0, "{sent} sent, {came} came back");
        Ok(())
    }
}

/// Reads to the end; each number follows the one before.
fn read_back(mut from: TcpStream, came: &AtomicU64) -> anyhow::Result<u64> {
    let (mut expected, mut bytes, mut kept) = (0_u64, vec![0; BLOCK * NUMBER], 0);
    loop {
        let read = from.read(&mut bytes[kept..])?;
        if read == 0 {
            ensure!(kept == 0, "{kept} bytes of a number");
            return Ok(expected);
        }
        let whole = (kept + read) / NUMBER * NUMBER;
        for number in bytes[..whole].chunks_exact(NUMBER) {
            let number = u64::from_le_bytes(number.try_into()?);
            ensure!(number == expected, "{number} instead of {expected}");
            expected += 1;
        }
        bytes.copy_within(whole..kept + read, 0);
        kept = kept + read - whole;
        came.store(expected, Ordering::Relaxed);
    }
}
