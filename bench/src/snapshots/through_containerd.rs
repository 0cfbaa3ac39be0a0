//! The same cycles through one containerd: our proxy plugin beside the built-in overlayfs.

use anyhow::Result;
use tokio::runtime::Runtime;
use transship_testbed::{ContainerdConfig, Testbed};

use super::load::{CALLS, Target, Turns};
use crate::daemon::{Process, path_from_outside};
use crate::report::{Better, Goal, Row};
use crate::sizes::Sizes;

const BUILT_IN: &str = "built-in overlayfs";
const CYCLES: Goal = Goal::RatioAtLeast(1.0);

pub(super) fn measure(bed: &Testbed, sizes: &Sizes, runtime: &Runtime) -> Result<Vec<Row>> {
    let node = bed.node("through")?;
    node.start_snapshotter_with(&["--log-level", "error"])?;
    let config = ContainerdConfig {
        transship_diff: false,
        ..ContainerdConfig::transship()
    };
    node.start_containerd(&config)?;
    let process = Process::of_daemon(&node, "containerd")?;
    let [ours, built_in] = ["transship", "overlayfs"].map(|snapshotter| Target {
        socket: path_from_outside(&node, "/run/containerd/containerd.sock"),
        snapshotter: snapshotter.to_owned(),
        process: process.clone(),
        present: 0,
    });
    let mut rows = Vec::new();
    for &clients in &sizes.clients {
        eprintln!("   through containerd, {clients} clients");
        let (mut own, mut other) = (Turns::default(), Turns::default());
        for round in 0..sizes.rounds {
            // Who begins changes: containerd removes after the turn what was removed in it.
            let mut sides = [(&mut own, &ours), (&mut other, &built_in)];
            if round % 2 == 1 {
                sides.reverse();
            }
            for (turns, target) in sides {
                let turn = runtime.block_on(target.run(clients, sizes.containerd_round))?;
                turns.0.push(turn);
            }
        }
        let plural = if clients == 1 { "" } else { "s" };
        let case = format!("through containerd, {clients} client{plural}");
        rows.push(
            Row::new(
                format!("cycles {case}"),
                "1/s",
                own.median(|turn| turn.cycles),
            )
            .beside(BUILT_IN, other.median(|turn| turn.cycles), Better::More)
            .goal(CYCLES),
        );
        rows.extend(CALLS.iter().enumerate().map(|(i, call)| {
            Row::new(
                format!("{call} p50 {case}"),
                "ms",
                own.median(|turn| turn.calls[i]),
            )
            .beside(BUILT_IN, other.median(|turn| turn.calls[i]), Better::Less)
        }));
    }
    Ok(rows)
}
