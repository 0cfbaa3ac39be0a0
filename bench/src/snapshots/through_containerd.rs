//! The same cycles through one containerd: our proxy plugin beside the built-in overlayfs.

use anyhow::Result;
use tokio::runtime::Runtime;
use transship_testbed::{ContainerdConfig, Testbed};

use super::load::{Target, compare_cycles, take_turns};
use crate::daemon::Process;
use crate::report::{Goal, Row};
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
        socket: node.path_from_outside("/run/containerd/containerd.sock"),
        snapshotter: snapshotter.to_owned(),
        process: process.clone(),
        disk: node.path_from_outside("/var/lib/containerd"),
        present: 0,
    });
    let mut rows = Vec::new();
    for &clients in &sizes.clients {
        eprintln!("   through containerd, {clients} clients");
        let turns = take_turns(
            [&ours, &built_in],
            clients,
            sizes.rounds,
            sizes.containerd_round,
        );
        let [own, other] = runtime.block_on(turns)?;
        let plural = if clients == 1 { "" } else { "s" };
        let case = format!(" through containerd, {clients} client{plural}");
        rows.extend(compare_cycles(&case, &own, BUILT_IN, &other, Some(CYCLES)));
    }
    Ok(rows)
}
