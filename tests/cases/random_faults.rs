//! Migrations of one container to and fro, in each of which something is killed, cut off, filled or restarted at a
//! random moment. Afterwards one copy runs, counts on without a missing or repeated value, and the other node has
//! nothing of it.
//!
//! ```text
//!  migrate ──────────────────────────────> its exit code
//!      └─ a moment of as long as one takes ─> the fault ─> healed
//!  recover --once on both, until it is decided ─> copies counted ─> the next one, from where it runs
//! ```
//!
//! The seed is printed with what fails; `TRANSSHIP_FAULT_SEED` takes it.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail, ensure};
use transship_testbed::{
    CommandRun as _, ContainerdConfig, Node, Testbed, Tree, journey, poll_until,
};

use crate::Case;
use crate::migration_faults::counts_on;
use crate::migration_lazy::IS_LOST;

const ID: &str = "web";
const PATIENCE: Duration = Duration::from_secs(120);
/// The same on both nodes, so that an address can be kept.
const LAN: &str = r#"{"cniVersion":"0.4.0","name":"lan","plugins":[{"type":"bridge","bridge":"lan0",
    "isGateway":true,"ipam":{"type":"host-local","ranges":[[{"subnet":"10.77.0.0/24"}]]}}]}"#;
/// The way to the other node, as long as it is not cut.
const LINK: &str = "#!/bin/sh\n[ ! -e /run/cut ] || exit 255\nexec ssh node-OTHER \"$@\"\n";
const MOVE: &str = "#!/bin/sh\nrm -f /run/moved\n\
    transship migrate web --to /usr/local/bin/link --link-timeout 3 \"$@\"\necho $? >/run/moved\n";
/// See `DumpHold`. It ends as well when the migration does.
const IN_DUMP: &str = "while [ ! -e /run/moved ]; do
    for held in /run/transship/opened/dump-*/files/.*/.hold-*/dumped; do
        [ ! -e $held ] || { touch /run/cut; pkill -KILL -x ssh; break 2; }
    done
done";
/// A disk of its own below the checkpoints, which can be filled, as the memory can that has a migration's files.
const SMALL_DISK: &str =
    "mount -t tmpfs -o size=160m,mode=0700 tmpfs /var/lib/transship/checkpoints";
const FILL: &str =
    "dd if=/dev/zero of=/var/lib/transship/checkpoints/.fill bs=1M 2>/dev/null || true
for files in /run/transship/opened/*/files; do
    mount -o remount,size=$(df -k --output=used $files | tail -n 1)k $files || true
done 2>/dev/null";
const EMPTY: &str =
    "rm -f /var/lib/transship/checkpoints/.fill; umount /var/lib/transship/checkpoints";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let case = |what, run| Case {
        what,
        tree: Tree::Forky,
        run,
    };
    [
        case("random_faults", |bed| {
            one_copy_whatever_breaks(bed, &FAULTS[..12], 12)
        }),
        case("long_random_faults", |bed| {
            one_copy_whatever_breaks(bed, &FAULTS, 300)
        }),
    ]
    .into_iter()
}

/// Where something breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Target,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The command there, and not its guard.
    Command(Side),
    /// The command and its guard.
    All(Side),
    /// The connection, for longer than it may be silent.
    Link,
    /// The same, while CRIU waits for those who read memory.
    LinkInDump,
    Containerd(Side),
    Snapshotter(Side),
    Shim(Side),
    Criu(Side),
    Runtime(Side),
    Disk(Side),
}

use Fault::{All, Command, Containerd, Criu, Disk, Link, LinkInDump, Runtime, Shim, Snapshotter};
use Side::{Source, Target};

/// Those at the end are what `make test-long` alone has: a command or a runtime that goes on the target in the middle
/// of containerd's calls.
const FAULTS: [Fault; 18] = [
    Link,
    LinkInDump,
    Containerd(Source),
    Containerd(Target),
    Snapshotter(Source),
    Snapshotter(Target),
    Shim(Source),
    Shim(Target),
    Criu(Source),
    Runtime(Source),
    Disk(Source),
    Disk(Target),
    Command(Source),
    All(Source),
    Command(Target),
    All(Target),
    Criu(Target),
    Runtime(Target),
];

/// How it is moved.
const WAYS: [&[&str]; 6] = [
    &[],
    &["--network", "keep", "--tcp", "established"],
    &["--max-precopy-rounds", "0"],
    &["--data-address", "none"],
    &["--lazy", "--accept-loss"],
    &["--lazy", "--accept-loss", "--max-precopy-rounds", "0"],
];

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        let at = usize::try_from(self.below(of.len() as u64)).expect("it is below a length");
        of[at]
    }
}

fn one_copy_whatever_breaks(bed: &Testbed, kinds: &[Fault], times: usize) -> anyhow::Result<()> {
    let seed = match std::env::var("TRANSSHIP_FAULT_SEED") {
        Ok(seed) => seed.parse()?,
        Err(_) => SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)?
            .subsec_nanos()
            .into(),
    };
    let mut random = Random(seed);
    let (a, b) = journey::start_nodes(bed)?;
    b.import_image(&journey::counter_image(bed)?, "transship")?;
    for (node, other) in [(&a, &b), (&b, &a)] {
        bed.ssh(node, other)?;
        node.write_file("/etc/cni/net.d/05-lan.conflist", LAN)?;
        node.write_file("/usr/local/bin/link", LINK.replace("OTHER", other.name()))?;
        node.write_file("/usr/local/bin/move", MOVE)?;
        node.shell("chmod +x /usr/local/bin/link /usr/local/bin/move; mkdir -p -m 0700 /var/lib/transship/checkpoints")
            .run()?;
    }
    start(&a)?;
    let (mut from, mut to) = (&a, &b);
    let began = Instant::now();
    begin(from, WAYS[0])?;
    wait_for_end(from)?;
    let usual = began.elapsed();
    std::mem::swap(&mut from, &mut to);
    counts_on(from, ID)?;
    // Each of them once at least, then as they come.
    let mut faults: Vec<Fault> = (0..times)
        .map(|run| { kinds.get(run).copied() }.unwrap_or_else(|| random.one_of(kinds)))
        .collect();
    for at in (1..faults.len()).rev() {
        let other = usize::try_from(random.below(at as u64 + 1))?;
        faults.swap(at, other);
    }
    for (run, fault) in faults.into_iter().enumerate() {
        let way = random.one_of(&WAYS);
        let micros = u64::try_from(usual.as_micros())?;
        let moment = Duration::from_micros(random.below(micros + micros / 10));
        let what = || format!("seed {seed}, run {run}: {fault:?} after {moment:?} of {way:?}");
        let moved = with_fault(from, to, fault, moment, way).with_context(what)?;
        eprintln!("{}: {moved:?}", what());
        match moved {
            Ended::Source => {}
            Ended::Target => std::mem::swap(&mut from, &mut to),
            // containerd kills what has lost its shim.
            Ended::Nowhere | Ended::Lost if matches!(fault, Shim(_)) => {
                from.shell("rm -f /var/lib/transship/migrations/default:web")
                    .run()?;
                clear(from)?;
                clear(to)?;
                start(from)?;
            }
            // That the memory of a copy came late was accepted.
            Ended::Lost if way.contains(&"--accept-loss") => {
                clear(to)?;
                from.shell("transship recover web --source-runs").run()?;
            }
            Ended::Nowhere | Ended::Lost => bail!("no copy runs: {}", what()),
        }
        counts_on(from, ID).with_context(what)?;
        // containerd goes on with a call whose caller is gone, and cleans up after it.
        poll_until("the end of all that moved it", PATIENCE, || {
            nothing_is_left(to).map_err(|error| error.to_string())
        })
        .with_context(what)?;
        has_no_lock(from).with_context(what)?;
    }
    journey::remove_container(from, ID)?;
    Ok(())
}

fn start(node: &Node) -> anyhow::Result<()> {
    let run = "ctr run --detach --cni --snapshotter transship transship.test/counter:1 web \
        /usr/bin/counter --memory-mb 16";
    node.shell(run).run()?;
    journey::wait_for_count(node, ID, 3)?;
    Ok(())
}

fn begin(from: &Node, way: &[&str]) -> anyhow::Result<()> {
    from.shell("rm -f /run/moved").run()?;
    let mut program = vec!["/usr/local/bin/move"];
    program.extend(way);
    Ok(from.start_daemon("move", &program)?)
}

fn wait_for_end(from: &Node) -> anyhow::Result<String> {
    Ok(poll_until("the end of the migration", PATIENCE, || {
        let code = from.shell("cat /run/moved || { ps axf; exit 1; }").output();
        let code = code.map_err(|error| error.to_string())?;
        let said = String::from_utf8_lossy(&code.stdout).into_owned();
        if code.status.success() {
            Ok(said)
        } else {
            Err(said)
        }
    })?)
}

/// Where the container runs in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    Source,
    Target,
    Nowhere,
    /// A person has to decide.
    Lost,
}

fn with_fault(
    from: &Node,
    to: &Node,
    fault: Fault,
    moment: Duration,
    way: &[&str],
) -> anyhow::Result<Ended> {
    let at = |side| if side == Source { from } else { to };
    if let Disk(side) = fault {
        at(side).shell(SMALL_DISK).run()?;
    }
    begin(from, way)?;
    std::thread::sleep(moment);
    // What is to be killed may not be there yet, or not any more.
    let kill = |side, pattern: &str| {
        let kill = at(side).shell(&format!("pkill -KILL {pattern} || true"));
        { kill }.run()
    };
    match fault {
        Command(Source) => kill(Source, "-f '^transship .*migrate|^transship migrate'")?,
        Command(Target) => kill(Target, "-f 'transship.* receive( |$)'")?,
        All(side) => kill(side, "-x transship")?,
        Link => from
            .shell("touch /run/cut; pkill -KILL -x ssh || true")
            .run()?,
        LinkInDump => from.shell(IN_DUMP).run()?,
        Containerd(side) => {
            at(side).stop_daemon("containerd", "KILL")?;
            at(side).start_containerd(&ContainerdConfig::transship())?;
        }
        Snapshotter(side) => {
            at(side).stop_daemon("snapshotter", "KILL")?;
            at(side).start_snapshotter()?;
            // containerd tries again after a while.
            poll_until("the snapshotter through containerd", PATIENCE, || {
                let listed = at(side).ctr(&["snapshots", "--snapshotter", "transship", "ls"]);
                listed.map_err(|error| error.to_string())
            })?;
        }
        Shim(side) => kill(side, "-x containerd-shim")?,
        Criu(side) => kill(side, "-x criu")?,
        Runtime(side) => kill(side, "-x 'transship-runc|runc'")?,
        Disk(side) => at(side).shell(FILL).run()?,
    }
    let code = wait_for_end(from)?;
    from.shell("rm -f /run/cut").run()?;
    let ended = settled(from, to, fault).with_context(|| {
        let log = from.shell("tail -n 20 /var/log/move.log").read();
        format!(
            "migrate ended with {}: {}",
            code.trim(),
            log.unwrap_or_default()
        )
    })?;
    if let Disk(side) = fault {
        at(side).shell(EMPTY).run()?;
    }
    Ok(ended)
}

/// Waits until it is decided and nobody is at work any more.
fn settled(from: &Node, to: &Node, fault: Fault) -> anyhow::Result<Ended> {
    let mut nowhere = 0;
    let ended = poll_until("one copy", PATIENCE, || {
        let mut said = String::new();
        for node in [from, to] {
            let recover = node.shell(
                "transship recover --once 2>&1 || true; pgrep -af '[f]reeze-guard|[r]eceive' || true",
            );
            said += &{ recover }.read().map_err(|error| error.to_string())?;
        }
        let tasks = |node: &Node| {
            let tasks = node.ctr(&["tasks", "ls"]);
            tasks.map_err(|error| error.to_string())
        };
        let (here, there) = (tasks(from)?, tasks(to)?);
        let runs = |tasks: &str| tasks.contains("RUNNING");
        let busy = said.contains("-guard") || said.contains("receive");
        match (runs(&here), runs(&there)) {
            (true, true) => Ok(None),
            (true, false) if !busy && !there.contains(ID) => Ok(Some(Ended::Source)),
            (false, true) if !busy && !here.contains(ID) => Ok(Some(Ended::Target)),
            (false, false) if matches!(fault, Shim(_)) && !busy && nowhere > 20 => {
                Ok(Some(Ended::Nowhere))
            }
            (false, false) if said.contains(IS_LOST) && !busy => Ok(Some(Ended::Lost)),
            _ => {
                nowhere += 1;
                Err(format!("{said}: {here}, and {there}"))
            }
        }
    })?;
    ended.context("two copies run")
}

/// Removes what is left of a container whose shim was killed.
fn clear(node: &Node) -> anyhow::Result<()> {
    let remove = format!(
        "ctr tasks kill -s KILL {ID} 2>/dev/null || true; ctr tasks delete --force {ID} 2>/dev/null || true
         ctr containers delete {ID} 2>/dev/null || true
         ctr snapshots --snapshotter transship rm {ID} 2>/dev/null || true
         rm -f /var/lib/cni/results/lan-default-{ID}-* /var/lib/cni/networks/lan/10.*"
    );
    node.shell(&remove).run()?;
    Ok(())
}

/// Neither an address nor a lock of the network, and nothing else.
fn nothing_is_left(node: &Node) -> anyhow::Result<()> {
    let left = node.shell(&format!(
        "ls /var/lib/cni/results | grep -- -{ID}- || true
         grep -l -- -{ID} /var/lib/cni/networks/lan/[0-9]* 2>/dev/null || true
         nft list tables | grep transship || true
         # Of a bundle that goes containerd makes a hidden one first, and may leave it, empty.
         find /run/containerd/io.containerd.runtime.v2.task /var/lib/containerd/io.containerd.runtime.v2.task \
             -mindepth 2 ! '(' -name '.*' -type d -empty ')'"
    ));
    let left = { left }.read()?;
    ensure!(left.is_empty(), "{left}");
    journey::check_nothing_left(node)
}

/// Packets get to what runs.
fn has_no_lock(node: &Node) -> anyhow::Result<()> {
    let pid = journey::task_pid(node, ID)?;
    let left = node.shell(&format!(
        "nsenter -t {pid} -n nft list ruleset | grep -i -e transship -e criu || true
         ls /var/lib/transship/migrations 2>/dev/null || true"
    ));
    let left = { left }.read()?;
    ensure!(left.is_empty(), "{left}");
    let inside = node.shell(&format!(
        "nsenter -t {pid} -n ip -4 -o address show eth0 | sed 's/.*inet \\([0-9.]*\\).*/\\1/'"
    ));
    let address = { inside }.read()?;
    journey::ask(node, address.trim())?;
    Ok(())
}
