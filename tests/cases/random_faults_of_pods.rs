//! The same as `random_faults` with a pod of three containers that share memory and connections: all of them run in
//! the end, on one node, each without a missing or repeated step.

use std::time::Instant;

use anyhow::Context as _;
use transship_testbed::{
    CommandRun as _, ContainerdConfig, Node, Pod, PodNamespaces, Testbed, Tree, journey, poll_until,
};

use crate::Case;
use crate::faults::{
    FAULTS, Fault, PATIENCE, RECOVER, Random, Side, Way, begin, is_at_work, prepare, said,
    wait_for_end,
};
use crate::pods::start_two;
use crate::pods_migrated::{goes_on_from, one_copy, runs_only, runs_only_with, slots};
use crate::pods_shared::{Lines, fill_scratch, run_mates, wait_for};

const POD: (&str, &str) = ("shop", "mates");
const WHAT: &str = "--pod shop/mates --volumes emptydir --tcp established --allow unmasked-paths";
/// What is said of a pod of which a container has ended meanwhile.
const HAS_ENDED: &str = "has not gone on as before";
const WAYS: [&[&str]; 3] = [
    &[],
    &["--max-precopy-rounds", "0"],
    &["--data-address", "none"],
];

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let case = |what, run| Case {
        what,
        tree: Tree::Forky,
        run,
    };
    [
        case("pod_random_faults", |bed| {
            one_pod_whatever_breaks(bed, &kinds()[..10], 10)
        }),
        case("long_pod_random_faults", |bed| {
            one_pod_whatever_breaks(bed, &kinds(), 100)
        }),
    ]
    .into_iter()
}

/// containerd ends a pod whose shim is killed: then no copy runs, and that is right.
fn kinds() -> Vec<Fault> {
    let kinds = FAULTS.iter().copied();
    kinds
        .filter(|kind| !matches!(kind, Fault::Shim(_)))
        .collect()
}

fn one_pod_whatever_breaks(bed: &Testbed, kinds: &[Fault], times: usize) -> anyhow::Result<()> {
    let mut random = Random::of_environment()?;
    let seed = random.seed;
    let config = ContainerdConfig {
        transship_diff: false,
        ..ContainerdConfig::transship()
    };
    let [a, b] = start_two(bed, true)?;
    for (node, other) in [(&a, &b), (&b, &a)] {
        bed.ssh(node, other)?;
        prepare(node, other, WHAT)?;
    }
    let mut pod = start(&a)?;
    let mut way = Way { from: &a, to: &b };
    let began = Instant::now();
    begin(way.from, WAYS[0])?;
    wait_for_end(way.from)?;
    let usual = began.elapsed();
    way.turn();
    runs_only(way.from, way.to, &pod)?;
    for (run, fault) in random.faults(kinds, times)?.into_iter().enumerate() {
        let arguments = random.one_of(&WAYS);
        let moment = random.moment_of(usual)?;
        let what =
            || format!("seed {seed}, run {run}: {fault:?} after {moment:?} of {arguments:?}");
        let remembered = slots(way.from, way.to).map_err(anyhow::Error::msg)?;
        let code = { fault.strike(way, moment, arguments, &config) }.with_context(what)?;
        if fault == Fault::Criu(Side::Source) && said(way.from, &code).contains(HAS_ENDED) {
            let (from, to) = (way.from, way.to);
            // Its connections were under repair; see `killed_criu`.
            // Since it was started, it may have moved, and be another sandbox.
            from.cri()?.remove_all_pods()?;
            journey::check_no_pod_left(to).with_context(what)?;
            pod = start(from)?;
            continue;
        }
        let ended = settled(way).with_context(|| said(way.from, &code));
        let ended = ended.with_context(what)?;
        fault.heal(way)?;
        eprintln!("{}: {ended:?}", what());
        if ended == Side::Target {
            way.turn();
        }
        goes_on_from(&remembered, way.from, way.to).with_context(what)?;
        nothing_is_left(way).with_context(what)?;
        match (runs_only(way.from, way.to, &pod), fault) {
            // A line that containerd had read from the container when it was killed is in no log.
            (Err(gap), Fault::Containerd(_)) => {
                eprintln!("{}: {gap:#}", what());
                let lines = Lines::MayBeLost;
                runs_only_with(lines, way.from, way.to, &pod).with_context(what)?;
                way.from.cri()?.remove_all_pods()?;
                pod = start(way.from)?;
            }
            (counted, _) => counted.with_context(what)?,
        }
    }
    Ok(())
}

fn start(node: &Node) -> anyhow::Result<Pod> {
    let cri = node.cri()?;
    let pod = cri.run_pod(POD, &[], PodNamespaces::Usual)?;
    run_mates(node, &cri, &pod)?;
    fill_scratch(node, &pod)?;
    wait_for(node, &pod, [20; 3])?;
    Ok(pod)
}

/// Waits until it is decided and nobody is at work any more: where all of it runs.
fn settled(way: Way<'_>) -> anyhow::Result<Side> {
    let Way { from, to } = way;
    Ok(poll_until("one copy", PATIENCE, || {
        let mut at_work = String::new();
        for node in [from, to] {
            at_work += &{ node.shell(RECOVER) }
                .read()
                .map_err(|error| error.to_string())?;
        }
        let busy = is_at_work(&at_work);
        match (one_copy(from, to), one_copy(to, from)) {
            (Ok(()), _) if !busy => Ok(Side::Source),
            (_, Ok(())) if !busy => Ok(Side::Target),
            (here, there) => Err(format!("{at_work}: {here:?}, {there:?}")),
        }
    })?)
}

/// Of the pod on the node where it does not run, and of its migration on both.
fn nothing_is_left(way: Way<'_>) -> anyhow::Result<()> {
    journey::check_no_pod_left(way.to)?;
    let of_migration = "find /var/lib/transship/migrations /var/lib/transship/checkpoints /var/lib/transship/moved \
         /run/transship/opened -mindepth 1 2>/dev/null || true; find /var/lib/kubelet -name '.transship*'";
    for node in [way.from, way.to] {
        poll_until("the end of all that moved it", PATIENCE, || {
            match node.shell(of_migration).read() {
                Ok(left) if left.is_empty() => Ok(()),
                Ok(left) => Err(format!("left on node {}: {left}", node.name())),
                Err(error) => Err(error.to_string()),
            }
        })?;
    }
    Ok(())
}
