//! What stock containerd, runc and CRIU do in a node: the ground truth for everything of ours.

use std::time::Duration;

use anyhow::ensure;
use transship_testbed::{ContainerdConfig, Image, Node, Testbed, poll_until};

use crate::Case;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    Case::on_all_trees(
        "stock_restores_its_own_checkpoint",
        stock_restores_its_own_checkpoint,
    )
}

/// A container in namespaces of its own, with a listening socket, goes through `ctr containers
/// checkpoint` and `restore` and counts on: CRIU works in a node, in the node's cgroups.
fn stock_restores_its_own_checkpoint(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    node.start_containerd(&ContainerdConfig::default())?;
    let image = Image::counter(bed.settings(), &bed.tree_dir().join("bin/busybox"))?;
    node.import_image(&image, "overlayfs")?;
    node.ctr(&[
        "run",
        "--detach",
        image.reference(),
        "web",
        "/usr/bin/counter",
        "--memory-mb",
        "16",
    ])?;
    wait_for_count(&node, 5)?;
    let checkpoint = "transship.test/checkpoint:1";
    node.ctr(&[
        "containers",
        "checkpoint",
        "--rw",
        "--task",
        "web",
        checkpoint,
    ])?;
    let counts = read_counts(&node).map_err(anyhow::Error::msg)?;
    node.ctr(&["task", "kill", "--signal", "KILL", "web"])?;
    poll_until("end of the task", Duration::from_secs(20), || {
        node.ctr(&["task", "delete", "web"])
            .map_err(|error| error.to_string())
    })?;
    node.ctr(&["containers", "delete", "web"])?;
    node.ctr(&["containers", "restore", "--live", "--rw", "web", checkpoint])?;
    wait_for_count(&node, counts.len() + 5)
}

fn wait_for_count(node: &Node, count: usize) -> anyhow::Result<()> {
    let counts = poll_until("counting in the container", Duration::from_secs(20), || {
        let counts = read_counts(node)?;
        if counts.len() >= count {
            Ok(counts)
        } else {
            Err(format!("{} lines", counts.len()))
        }
    })?;
    let wanted: Vec<u64> = (1..).take(counts.len()).collect();
    ensure!(
        counts == wanted,
        "a value is missing or repeated in {counts:?}"
    );
    Ok(())
}

fn read_counts(node: &Node) -> Result<Vec<u64>, String> {
    let exec = [
        "task",
        "exec",
        "--exec-id",
        "read",
        "web",
        "cat",
        "/data/counts",
    ];
    let text = node.ctr(&exec).map_err(|error| error.to_string())?;
    let lines = text
        .lines()
        .map(|line| line.parse::<u64>().map_err(|error| error.to_string()));
    lines.collect()
}
