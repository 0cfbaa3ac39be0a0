//! Migrations of one container to and fro, in each of which something is killed, cut off, filled or restarted at a
//! random moment. Afterwards one copy runs, counts on without a missing or repeated value, and the other node has
//! nothing of it.
//!
//! ```text
//!  migrate, and what breaks in it (`faults`) ─> recover --once on both, until it is decided ─> copies counted
//!      ─> the next one, from where it runs
//! ```

use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use transship_testbed::{
    CommandRun as _, ContainerdConfig, Node, Testbed, Tree, journey, poll_until,
};

use crate::Case;
use crate::faults::{
    FAULTS, Fault, PATIENCE, RECOVER, Random, Way, begin, is_at_work, prepare, said, wait_for_end,
};
use crate::migration_faults::counts_on;
use crate::migration_lazy::IS_LOST;

const ID: &str = "web";
/// The same on both nodes, so that an address can be kept.
const LAN: &str = r#"{"cniVersion":"0.4.0","name":"lan","plugins":[{"type":"bridge","bridge":"lan0",
    "isGateway":true,"ipam":{"type":"host-local","ranges":[[{"subnet":"10.77.0.0/24"}]]}}]}"#;

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

/// How it is moved.
const WAYS: [&[&str]; 6] = [
    &[],
    &["--network", "keep", "--tcp", "established"],
    &["--max-precopy-rounds", "0"],
    &["--data-address", "none"],
    &["--lazy", "--accept-loss"],
    &["--lazy", "--accept-loss", "--max-precopy-rounds", "0"],
];

fn one_copy_whatever_breaks(bed: &Testbed, kinds: &[Fault], times: usize) -> anyhow::Result<()> {
    let mut random = Random::of_environment()?;
    let seed = random.seed;
    let (a, b) = journey::start_nodes(bed)?;
    b.import_image(&journey::counter_image(bed)?, "transship")?;
    for (node, other) in [(&a, &b), (&b, &a)] {
        bed.ssh(node, other)?;
        node.write_file("/etc/cni/net.d/05-lan.conflist", LAN)?;
        prepare(node, other, ID)?;
    }
    start(&a)?;
    let mut way = Way { from: &a, to: &b };
    let began = Instant::now();
    begin(way.from, WAYS[0])?;
    wait_for_end(way.from)?;
    let usual = began.elapsed();
    way.turn();
    counts_on(way.from, ID)?;
    for (run, fault) in random.faults(kinds, times)?.into_iter().enumerate() {
        let arguments = random.one_of(&WAYS);
        let moment = random.moment_of(usual)?;
        let what =
            || format!("seed {seed}, run {run}: {fault:?} after {moment:?} of {arguments:?}");
        let code = { fault.strike(way, moment, arguments, &ContainerdConfig::transship()) }
            .with_context(what)?;
        let ended = settled(way, fault).with_context(|| said(way.from, &code));
        let ended = ended.with_context(what)?;
        fault.heal(way)?;
        eprintln!("{}: {ended:?}", what());
        let Way { from, to } = way;
        match ended {
            Ended::Source => {}
            Ended::Target => way.turn(),
            // containerd kills what has lost its shim.
            Ended::Nowhere | Ended::Lost if matches!(fault, Fault::Shim(_)) => {
                from.shell("rm -f /var/lib/transship/migrations/default:web")
                    .run()?;
                clear(from)?;
                clear(to)?;
                start(from)?;
            }
            // That the memory of a copy came late was accepted.
            Ended::Lost if arguments.contains(&"--accept-loss") => {
                clear(to)?;
                from.shell("transship recover web --source-runs").run()?;
            }
            Ended::Nowhere | Ended::Lost => bail!("no copy runs: {}", what()),
        }
        counts_on(way.from, ID).with_context(what)?;
        // containerd goes on with a call whose caller is gone, and cleans up after it.
        poll_until("the end of all that moved it", PATIENCE, || {
            nothing_is_left(way.to).map_err(|error| error.to_string())
        })
        .with_context(what)?;
        has_no_lock(way.from).with_context(what)?;
    }
    journey::remove_container(way.from, ID)?;
    Ok(())
}

fn start(node: &Node) -> anyhow::Result<()> {
    let run = "ctr run --detach --cni --snapshotter transship transship.test/counter:1 web \
        /usr/bin/counter --memory-mb 16";
    node.shell(run).run()?;
    journey::wait_for_count(node, ID, 3)?;
    Ok(())
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

/// Waits until it is decided and nobody is at work any more.
fn settled(way: Way<'_>, fault: Fault) -> anyhow::Result<Ended> {
    let Way { from, to } = way;
    let mut nowhere = 0;
    let ended = poll_until("one copy", PATIENCE, || {
        let mut said = String::new();
        for node in [from, to] {
            said += &{ node.shell(RECOVER) }
                .read()
                .map_err(|error| error.to_string())?;
        }
        let tasks = |node: &Node| {
            let tasks = node.ctr(&["tasks", "ls"]);
            tasks.map_err(|error| error.to_string())
        };
        let (here, there) = (tasks(from)?, tasks(to)?);
        let runs = |tasks: &str| tasks.contains("RUNNING");
        let busy = is_at_work(&said);
        match (runs(&here), runs(&there)) {
            (true, true) => Ok(None),
            (true, false) if !busy && !there.contains(ID) => Ok(Some(Ended::Source)),
            (false, true) if !busy && !here.contains(ID) => Ok(Some(Ended::Target)),
            (false, false) if matches!(fault, Fault::Shim(_)) && !busy && nowhere > 20 => {
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
