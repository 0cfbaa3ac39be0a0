//! Our socket beside the Go peer's, without containerd between.
//!
//! A second daemon of ours stays empty and takes its turns among the others: what a call costs among
//! many snapshots is set beside what it costs among none in the same minute.

use anyhow::Result;
use tokio::runtime::Runtime;
use transship_testbed::{Node, Testbed};

use super::load::{CALLS, COMMIT, Target, Turns, compare_cycles, order_of_round, take_turns};
use crate::daemon::Process;
use crate::peer;
use crate::report::{Better, Goal, Row};
use crate::sizes::Sizes;
use crate::statistics::{megabytes, spaced};

/// All roots lie on the node's disk: this is the directory that is no overlay there.
const ROOTS: &str = "/var/lib/containerd";
/// With the environment of its systemd unit.
const OURS: [&str; 3] = ["env", "MALLOC_ARENA_MAX=1", "transship-snapshotter"];
const EMPTY: &str = "ours, empty";
/// Each call at the last level beside its value at 0.
const GROWTH: Goal = Goal::RatioAtMost(1.3);
const LIST_MS: Goal = Goal::AtMost(250.0);
const RESIDENT_MB: Goal = Goal::AtMost(15.0);
const RESIDENT_RATIO: Goal = Goal::RatioAtLeast(4.0);

/// The goal for cycles per second.
fn cycles_goal(clients: usize) -> Option<Goal> {
    match clients {
        1 => Some(Goal::RatioAtLeast(1.5)),
        16 => Some(Goal::RatioAtLeast(4.0)),
        _ => None,
    }
}

pub(super) fn measure(bed: &Testbed, sizes: &Sizes, runtime: &Runtime) -> Result<Vec<Row>> {
    let node = bed.node("direct")?;
    let peer_program = peer::install(&node, bed.settings())?;
    let mut ours = start(&node, "ours", &OURS)?;
    let empty = start(&node, "empty", &OURS)?;
    let mut peer = start(&node, "peer", &[&peer_program])?;
    let last = sizes.levels.last().copied().unwrap_or_default();

    let mut rows = compare_durable(&node, &empty, sizes, runtime)?;
    for &level in &sizes.levels {
        if (ours.present..=level).contains(&sizes.memory_level) {
            runtime.block_on(fill([&mut ours, &mut peer], sizes.memory_level))?;
            rows.extend(compare_memory(&ours, &peer)?);
        }
        runtime.block_on(fill([&mut ours, &mut peer], level))?;
        for &clients in &sizes.clients {
            eprintln!("   direct, {} present, {clients} clients", spaced(level));
            let (rounds, length) = (sizes.rounds, sizes.round);
            let case = case(level, clients);
            let turns = take_turns([&ours, &peer], clients, rounds, length);
            let [own, other] = runtime.block_on(turns)?;
            let goal = cycles_goal(clients);
            rows.extend(compare_cycles(
                &format!(", {case}"),
                &own,
                peer::NAME,
                &other,
                goal,
            ));
            if level == last && level > 0 {
                let turns = take_turns([&ours, &empty], clients, rounds, length);
                let [own, none] = runtime.block_on(turns)?;
                rows.extend(compare_growth(&case, &own, &none));
            }
        }
        let reads = compare_reads(level, last, sizes.rounds, [&ours, &peer, &empty]);
        rows.extend(runtime.block_on(reads)?);
    }
    Ok(rows)
}

/// What `durable_commit` costs: the same daemon with it and without.
fn compare_durable(
    node: &Node,
    plain: &Target,
    sizes: &Sizes,
    runtime: &Runtime,
) -> Result<Vec<Row>> {
    let config = "/etc/durable.toml";
    node.write_file(config, "durable_commit = true\n")?;
    let durable = start(
        node,
        "durable",
        &[&OURS[..], &["--config", config]].concat(),
    )?;
    let mut rows = Vec::new();
    for clients in [1, 16] {
        let turns = take_turns([&durable, plain], clients, sizes.rounds, sizes.round);
        let [with, without] = runtime.block_on(turns)?;
        let p50 = |turns: &Turns| turns.each(|turn| turn.calls[COMMIT]);
        let what = format!("Commit p50 with durable_commit, {}", case(0, clients));
        let peer = "ours, without";
        rows.push(Row::of_pairs(
            what,
            "ms",
            &p50(&with),
            peer,
            &p50(&without),
            Better::Less,
        ));
    }
    node.stop_daemon("durable", "TERM")?;
    Ok(rows)
}

/// Starts a daemon on a root and a socket of its own; ours and the peer take the same flags, Go's
/// with one dash or two.
fn start(node: &Node, name: &str, program: &[&str]) -> Result<Target> {
    let (root, socket) = (format!("{ROOTS}/{name}"), format!("/run/{name}.sock"));
    let arguments = [
        "--root",
        &root,
        "--address",
        &socket,
        "--log-level",
        "error",
    ];
    node.start_daemon(name, &[program, &arguments[..]].concat())?;
    node.wait_for_daemon(name, &["test", "-S", &socket])?;
    Ok(Target {
        socket: node.path_from_outside(&socket),
        snapshotter: name.to_owned(),
        process: Process::of_daemon(node, name)?,
        disk: node.path_from_outside(ROOTS),
        present: 0,
    })
}

async fn fill(targets: [&mut Target; 2], count: usize) -> Result<()> {
    for target in targets {
        target.fill(count).await?;
        target.process.settle()?;
    }
    Ok(())
}

fn case(level: usize, clients: usize) -> String {
    let plural = if clients == 1 { "" } else { "s" };
    format!("{clients} client{plural}, {} present", spaced(level))
}

fn compare_growth(case: &str, own: &Turns, none: &Turns) -> Vec<Row> {
    let calls = CALLS.iter().enumerate().map(|(i, call)| {
        Row::of_pairs(
            format!("{call} p50 beside 0 present, {case}"),
            "ms",
            &own.each(|turn| turn.calls[i]),
            EMPTY,
            &none.each(|turn| turn.calls[i]),
            Better::Growth,
        )
        .goal(GROWTH)
    });
    calls.collect()
}

async fn compare_reads(
    level: usize,
    last: usize,
    rounds: usize,
    sides: [&Target; 3],
) -> Result<Vec<Row>> {
    let case = case(level, 1);
    let (mut stats, mut lists) = (<[Vec<f64>; 3]>::default(), <[Vec<f64>; 2]>::default());
    for round in 0..rounds {
        for n in order_of_round(round, sides.len()) {
            stats[n].push(sides[n].run_stats(round).await?);
        }
        for n in order_of_round(round, lists.len()) {
            lists[n].push(sides[n].run_list().await?);
        }
    }
    let [stat, peers, emptys] = &stats;
    let name = format!("Stat p50, {case}");
    let mut rows = vec![Row::of_pairs(
        name,
        "ms",
        stat,
        peer::NAME,
        peers,
        Better::Less,
    )];
    if level == last && level > 0 {
        let name = format!("Stat p50 beside 0 present, {case}");
        let row = Row::of_pairs(name, "ms", stat, EMPTY, emptys, Better::Growth);
        rows.push(row.goal(GROWTH));
    }
    let [list, peers] = &lists;
    let name = format!("List of {}", spaced(level));
    let list = Row::of_pairs(name, "ms", list, peer::NAME, peers, Better::Less);
    rows.push(list.goal_if((level == last).then_some(LIST_MS)));
    Ok(rows)
}

fn compare_memory(ours: &Target, peer: &Target) -> Result<Vec<Row>> {
    let own = megabytes(ours.process.resident_bytes()?);
    let other = megabytes(peer.process.resident_bytes()?);
    let level = spaced(ours.present);
    let row = |what: &str| {
        Row::new(format!("{what}, {level} present"), "MB", own).beside(
            peer::NAME,
            other,
            Better::Less,
        )
    };
    Ok(vec![
        row("resident memory").goal(RESIDENT_MB),
        row("resident memory beside the peer's").goal(RESIDENT_RATIO),
    ])
}
