//! The failure that the project exists for: containerd's own restore of a container whose sandbox
//! is gone, with stock parts and with the runtime front.

use anyhow::ensure;
use transship_testbed::{CommandRun as _, Node, Testbed, journey};

use crate::Case;

const CHECKPOINT: &str = "transship.test/checkpoint:1";
const JOIN: &str = "dev.transship/sandbox=sandbox";
const NEW: &str = "dev.transship/missing-namespaces=new";
const SANDBOX_KEY: &str = "sandbox";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    Case::on_all_trees("stock_restore_needs_the_old_sandbox", stock_restore_fails)
        .chain(Case::on_all_trees(
            "front_joins_the_named_sandbox",
            front_joins_the_named_sandbox,
        ))
        .chain(Case::on_all_trees(
            "front_names_the_choices",
            front_names_the_choices,
        ))
        .chain(Case::on_all_trees(
            "front_makes_new_namespaces",
            front_makes_new_namespaces,
        ))
}

/// A counter in a sandbox, checkpointed by ctr; then both are gone.
fn checkpoint_and_remove(
    bed: &Testbed,
    front: bool,
    annotation: Option<&str>,
) -> anyhow::Result<Node> {
    let node = bed.node("a")?;
    journey::start_services(&node)?;
    node.import_image(
        &transship_testbed::Image::pause(bed.settings())?,
        "transship",
    )?;
    node.import_image(&journey::counter_image(bed)?, "transship")?;
    journey::run_sandbox(&node, SANDBOX_KEY)?;
    let mut more = Vec::new();
    if front {
        more.extend(["--runc-binary", journey::FRONT]);
    }
    if let Some(annotation) = annotation {
        more.extend(["--annotation", annotation]);
    }
    journey::run_counter(&node, "counter", SANDBOX_KEY, 16, &more)?;
    journey::wait_for_count(&node, "counter", 5)?;
    node.ctr(&[
        "containers",
        "checkpoint",
        "--rw",
        "--task",
        "counter",
        CHECKPOINT,
    ])?;
    for id in ["counter", SANDBOX_KEY] {
        journey::remove_container(&node, id)?;
    }
    // ctr of containerd 1.6 gives the address of a deleted task back to nobody.
    node.shell("rm -f /var/lib/cni/networks/transship-test/10.*")
        .run()?;
    Ok(node)
}

fn restore(node: &Node) -> std::process::Command {
    let mut command = node.command("ctr");
    command.args([
        "containers",
        "restore",
        "--live",
        "--rw",
        "counter",
        CHECKPOINT,
    ]);
    command
}

fn stock_restore_fails(bed: &Testbed) -> anyhow::Result<()> {
    let node = checkpoint_and_remove(bed, false, None)?;
    let error = restore(&node).read_failure()?;
    ensure!(error.contains("Requested network namespace"), "{error}");
    ensure!(error.contains("does not exist"), "{error}");
    Ok(())
}

fn front_joins_the_named_sandbox(bed: &Testbed) -> anyhow::Result<()> {
    let node = checkpoint_and_remove(bed, true, Some(JOIN))?;
    journey::run_sandbox(&node, SANDBOX_KEY)?;
    restore(&node).run()?;
    let address = journey::sandbox_address(&node, SANDBOX_KEY)?;
    let reply = journey::ask(&node, &address)?;
    ensure!(
        reply.memory_ok && reply.local_ip == address && reply.count >= 5,
        "{reply:?}"
    );
    journey::wait_for_count(&node, "counter", reply.count)?;
    Ok(())
}

fn front_names_the_choices(bed: &Testbed) -> anyhow::Result<()> {
    let node = checkpoint_and_remove(bed, true, None)?;
    let error = restore(&node).read_failure()?;
    for choice in ["dev.transship/sandbox=<id>", NEW] {
        ensure!(error.contains(choice), "{error} does not name {choice}");
    }
    ensure!(
        error.trim().lines().count() == 1,
        "more than one line: {error}"
    );
    Ok(())
}

fn front_makes_new_namespaces(bed: &Testbed) -> anyhow::Result<()> {
    let node = checkpoint_and_remove(bed, true, Some(NEW))?;
    restore(&node).run()?;
    let reached = journey::read_counts(&node, "counter").map_err(anyhow::Error::msg)?;
    journey::wait_for_count(&node, "counter", reached)?;
    let pid = journey::task_pid(&node, "counter")?;
    let links = node
        .shell(&format!("readlink /proc/{pid}/ns/net /proc/1/ns/net"))
        .read()?;
    let distinct: std::collections::HashSet<_> = links.lines().collect();
    ensure!(distinct.len() == 2, "it shares the node's network: {links}");
    journey::remove_container(&node, "counter")?;
    journey::check_nothing_left(&node)
}
