//! A pod of three containers beside a pod that has only the largest of them, and both beside what bare `runc` takes of
//! the same containers.

use anyhow::Result;
use transship_testbed::{CommandRun as _, Node, PodNamespaces, Testbed, journey};

use super::{FLOOR, FloorOfSeveral, Took, frozen, medians_of_steps};
use crate::pod_node;
use crate::report::{Better, Goal, Row};
use crate::sizes::Sizes;

/// Of the memory of the largest; so much have the others.
const SHARES: [u32; 3] = [1, 5, 31];

/// Of each container of the pod, the largest first.
pub(super) fn memory_mb(sizes: &Sizes) -> [u32; 3] {
    let largest = sizes.migration_memory_mb.last().copied().unwrap_or(16);
    SHARES.map(|share| largest.div_ceil(share).max(1))
}

pub(super) fn measure(bed: &Testbed, sizes: &Sizes, floor: &FloorOfSeveral) -> Result<Vec<Row>> {
    let nodes = [bed.node("pods-a")?, bed.node("pods-b")?];
    let [a, b] = &nodes;
    bed.link(a, b)?;
    for node in &nodes {
        pod_node::start(bed, node)?;
    }
    let to = bed.ssh(a, b)?;
    let memory = memory_mb(sizes);
    let (mut three, mut one) = (Vec::new(), Vec::new());
    for round in 0..sizes.migrations {
        eprintln!("   pod of {memory:?} MB, round {}", round + 1);
        three.push(migrate([a, b], &to, &memory)?);
        one.push(migrate([a, b], &to, &memory[..1])?);
    }
    let note = {
        let [of_three, of_one] = [&three, &one].map(|all| medians_of_steps(all));
        format!("{of_three}; of one: {of_one}")
    };
    let [three, one] = [&three, &one].map(|all| frozen(all));
    let row = |name: String, ours: &[f64], peer: String, theirs: &[f64]| {
        Row::of_pairs(name, "ms", ours, &peer, theirs, Better::Growth)
    };
    let containers = format!("three containers of {memory:?} MB");
    let name = format!("frozen, a pod of {containers}, memory sent before");
    let largest = memory[0];
    let alone = format!("ours, a pod of {largest} MB");
    let of_bare = format!("{FLOOR}, side by side");
    let growth = row(name.clone(), &three, alone, &one)
        .goal(Goal::RatioAtMost(1.3))
        .note(note);
    let beside_floor = row(
        format!("{name}: beside the floor"),
        &three,
        of_bare,
        &floor.all,
    );
    let of_floor = row(
        format!("{FLOOR}, {containers} side by side"),
        &floor.all,
        format!("{largest} MB alone"),
        &floor.first,
    );
    Ok(vec![growth, beside_floor, of_floor])
}

fn migrate([a, b]: [&Node; 2], to: &str, memory: &[u32]) -> Result<Took> {
    let cri = a.cri()?;
    let pod = cri.run_pod(("bench", "web"), &[], PodNamespaces::Usual)?;
    for (number, memory) in memory.iter().enumerate() {
        journey::run_counter_in_pod(&cri, &pod, number, *memory)?;
    }
    journey::ask(a, &cri.pod_ip(&pod)?)?;
    let mut migrate = a.command("transship");
    migrate.args(["migrate", "--pod", "bench/web", "--to", to, "--json"]);
    migrate.args(["--allow", "unmasked-paths"]);
    let took = Took::read(&migrate.read()?)?;
    let moved = journey::moved_to(b, &pod)?;
    let cri = b.cri()?;
    let reply = journey::ask(b, &cri.pod_ip(&moved)?)?;
    anyhow::ensure!(
        reply.memory_ok,
        "the copy's memory is not what it was: {reply:?}"
    );
    cri.stop_pod(&moved)?;
    cri.remove_pod(&moved)?;
    Ok(took)
}
