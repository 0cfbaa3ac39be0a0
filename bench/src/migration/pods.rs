//! A pod of three containers beside a pod that has only the largest of them.

use anyhow::Result;
use transship_testbed::{CommandRun as _, Node, PodNamespaces, Testbed, journey};

use super::{Took, frozen, medians_of_steps};
use crate::pod_node;
use crate::report::{Better, Goal, Row};
use crate::sizes::Sizes;

/// Of the memory of the largest; so much have the others.
const SHARES: [u32; 3] = [1, 5, 31];

pub(super) fn measure(bed: &Testbed, sizes: &Sizes) -> Result<Row> {
    let nodes = [bed.node("pods-a")?, bed.node("pods-b")?];
    let [a, b] = &nodes;
    bed.link(a, b)?;
    for node in &nodes {
        pod_node::start(bed, node)?;
    }
    let to = bed.ssh(a, b)?;
    let largest = sizes.migration_memory_mb.last().copied().unwrap_or(16);
    let memory = SHARES.map(|share| largest.div_ceil(share).max(1));
    let (mut three, mut one) = (Vec::new(), Vec::new());
    for round in 0..sizes.migrations {
        eprintln!("   pod of {memory:?} MB, round {}", round + 1);
        three.push(migrate([a, b], &to, &memory)?);
        one.push(migrate([a, b], &to, &memory[..1])?);
    }
    let [of_three, of_one] = [&three, &one].map(|all| medians_of_steps(all));
    let note = format!("{of_three}; of one: {of_one}");
    let name = format!("frozen, a pod of three containers of {memory:?} MB, memory sent before");
    let peer = format!("ours, a pod of {largest} MB");
    let row = Row::of_pairs(
        name,
        "ms",
        &frozen(&three),
        &peer,
        &frozen(&one),
        Better::Growth,
    );
    Ok(row.goal(Goal::RatioAtMost(1.3)).note(note))
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
