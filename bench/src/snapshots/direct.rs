//! Our socket beside the Go peer's, without containerd between.
//!
//! A second daemon of ours stays empty and takes its turns among the others: what a call costs among
//! many snapshots is set beside what it costs among none in the same minute.

use anyhow::Result;
use tokio::runtime::Runtime;
use transship_testbed::{Node, Testbed};

use super::load::{CALLS, COMMIT, Target, Turns};
use crate::daemon::{Process, path_from_outside};
use crate::peer;
use crate::report::{Better, Goal, Row};
use crate::sizes::Sizes;
use crate::statistics::{median_millis, megabytes, spaced};

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
            let (mut own, mut other, mut none) = Default::default();
            for _ in 0..sizes.rounds {
                take_turn(&mut own, &ours, clients, sizes, runtime)?;
                take_turn(&mut other, &peer, clients, sizes, runtime)?;
                if level > 0 {
                    take_turn(&mut none, &empty, clients, sizes, runtime)?;
                }
            }
            rows.extend(compare_cycles(level, clients, &own, &other));
            if level == last && level > 0 {
                rows.extend(compare_growth(level, clients, &own, &none));
            }
        }
        rows.extend(runtime.block_on(compare_reads(level, last, [&ours, &peer, &empty]))?);
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
        let (mut with, mut without) = (Turns::default(), Turns::default());
        for _ in 0..sizes.rounds {
            take_turn(&mut with, &durable, clients, sizes, runtime)?;
            take_turn(&mut without, plain, clients, sizes, runtime)?;
        }
        let p50 = |turns: &Turns| turns.median(|turn| turn.calls[COMMIT]);
        let what = format!("Commit p50 with durable_commit, {}", case(0, clients));
        let row = Row::new(what, "ms", p50(&with));
        rows.push(row.beside("ours, without", p50(&without), Better::Less));
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
        socket: path_from_outside(node, &socket),
        snapshotter: name.to_owned(),
        process: Process::of_daemon(node, name)?,
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

fn take_turn(
    turns: &mut Turns,
    target: &Target,
    clients: usize,
    sizes: &Sizes,
    runtime: &Runtime,
) -> Result<()> {
    turns
        .0
        .push(runtime.block_on(target.run(clients, sizes.round))?);
    Ok(())
}

fn case(level: usize, clients: usize) -> String {
    let plural = if clients == 1 { "" } else { "s" };
    format!("{clients} client{plural}, {} present", spaced(level))
}

fn compare_cycles(level: usize, clients: usize, own: &Turns, other: &Turns) -> Vec<Row> {
    let case = case(level, clients);
    let cycles = Row::new(
        format!("cycles, {case}"),
        "1/s",
        own.median(|turn| turn.cycles),
    )
    .beside(peer::NAME, other.median(|turn| turn.cycles), Better::More)
    .goal_if(cycles_goal(clients));
    // A goal's row says where the time went.
    let cycles = match cycles_goal(clients) {
        Some(_) => cycles.note(own.profile()),
        None => cycles,
    };
    let calls = CALLS.iter().enumerate().map(|(i, call)| {
        Row::new(
            format!("{call} p50, {case}"),
            "ms",
            own.median(|turn| turn.calls[i]),
        )
        .beside(peer::NAME, other.median(|turn| turn.calls[i]), Better::Less)
    });
    std::iter::once(cycles).chain(calls).collect()
}

fn compare_growth(level: usize, clients: usize, own: &Turns, none: &Turns) -> Vec<Row> {
    let case = case(level, clients);
    let calls = CALLS.iter().enumerate().map(|(i, call)| {
        Row::new(
            format!("{call} p50 beside 0 present, {case}"),
            "ms",
            own.median(|turn| turn.calls[i]),
        )
        .beside(EMPTY, none.median(|turn| turn.calls[i]), Better::Growth)
        .goal(GROWTH)
    });
    calls.collect()
}

async fn compare_reads(
    level: usize,
    last: usize,
    [ours, peer, empty]: [&Target; 3],
) -> Result<Vec<Row>> {
    let case = case(level, 1);
    let stat = median_millis(&ours.run_stats().await?);
    let mut rows = vec![Row::new(format!("Stat p50, {case}"), "ms", stat).beside(
        peer::NAME,
        median_millis(&peer.run_stats().await?),
        Better::Less,
    )];
    if level == last && level > 0 {
        rows.push(
            Row::new(format!("Stat p50 beside 0 present, {case}"), "ms", stat)
                .beside(
                    EMPTY,
                    median_millis(&empty.run_stats().await?),
                    Better::Growth,
                )
                .goal(GROWTH),
        );
    }
    let list = Row::new(
        format!("List of {}", spaced(level)),
        "ms",
        median_millis(&ours.run_lists().await?),
    )
    .beside(
        peer::NAME,
        median_millis(&peer.run_lists().await?),
        Better::Less,
    );
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
