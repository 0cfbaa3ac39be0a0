//! The bulk of a migration goes before the freeze and through connections of its own, where that can be.

use anyhow::{Context as _, ensure};
use serde_json::Value;
use transship_testbed::{CommandRun as _, Node, Testbed, Tree, journey};

use crate::Case;
use crate::package_image::PUBLIC_KEY;

const MEMORY_MB: u32 = 48;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    std::iter::once(Case {
        what: "migration_direct",
        tree: Tree::Forky,
        run: data_goes_the_short_way_where_there_is_one,
    })
}

fn data_goes_the_short_way_where_there_is_one(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let ssh = bed.ssh(&a, &b)?;
    let moved = |turn: usize, more: &[&str]| migrate_counter(&a, &b, &ssh, turn, more);
    let usual = moved(1, &[])?;
    ensure!(usual["direct"] == 2, "{usual}");
    let memory = u64::from(MEMORY_MB) << 20;
    let (before, in_freeze) = (bytes_of(&usual, "precopy")?, bytes_of(&usual, "transfer")?);
    ensure!(
        before >= memory && in_freeze < memory / 4,
        "{before} bytes before the freeze, {in_freeze} in it: {usual}"
    );

    let plain = moved(2, &["--data-address", "none", "--max-precopy-rounds", "0"])?;
    ensure!(plain["direct"] == 0, "{plain}");
    ensure!(bytes_of(&plain, "transfer")? >= memory, "{plain}");
    ensure!(bytes_of(&plain, "precopy").is_err(), "{plain}");

    // Memory first, through the command's pipe.
    let by_pipe = moved(3, &["--data-address", "none"])?;
    ensure!(
        by_pipe["direct"] == 0 && bytes_of(&by_pipe, "transfer")? < memory / 4,
        "{by_pipe}"
    );

    // A firewall that lets ssh through alone, and an address that leads nowhere.
    b.shell("iptables -I INPUT -i link+ -p tcp --syn ! --dport 22 -j DROP")
        .run()?;
    let walled = moved(4, &[])?;
    ensure!(walled["direct"] == 0, "{walled}");
    b.shell("iptables -D INPUT -i link+ -p tcp --syn ! --dport 22 -j DROP")
        .run()?;
    // What comes with a migration is signed by nobody.
    let rules = format!("[checkpoints]\nsigned-by = [\"{PUBLIC_KEY}\"]\n");
    b.write_file("/etc/transship/node.toml", rules)?;
    let elsewhere = moved(5, &["--data-address", "192.0.2.1"])?;
    b.shell("rm /etc/transship/node.toml").run()?;
    ensure!(elsewhere["direct"] == 0, "{elsewhere}");
    for node in [&a, &b] {
        journey::check_nothing_left(node)?;
    }
    Ok(())
}

/// Moves a new counter, looks that it is what it was, removes it, and gives what the command has told.
pub(crate) fn migrate_counter(
    a: &Node,
    b: &Node,
    ssh: &str,
    turn: usize,
    more: &[&str],
) -> anyhow::Result<Value> {
    let (here, there, counter) = (
        format!("here-{turn}"),
        format!("there-{turn}"),
        format!("counter-{turn}"),
    );
    journey::run_sandbox(a, &here)?;
    journey::run_counter(a, &counter, &here, MEMORY_MB, &[])?;
    journey::wait_for_count(a, &counter, 3)?;
    journey::run_sandbox(b, &there)?;
    let mut command = a.command("transship");
    command.args([
        "migrate",
        &counter,
        "--to",
        ssh,
        "--sandbox",
        &there,
        "--json",
    ]);
    let told = command.args(more).read()?;
    let reply = journey::ask(b, &journey::sandbox_address(b, &there)?)?;
    ensure!(reply.memory_ok && reply.count >= 3, "{reply:?}");
    for (node, id) in [(a, &here), (b, &counter), (b, &there)] {
        journey::remove_container(node, id)?;
    }
    serde_json::from_str(&told).with_context(|| format!("no answer: {told:?}"))
}

/// What a step of the timeline has moved.
pub(crate) fn bytes_of(told: &Value, name: &str) -> anyhow::Result<u64> {
    let steps = told["timeline"]["steps"].as_array();
    let step = steps
        .into_iter()
        .flatten()
        .find(|step| step["name"] == name);
    let bytes = step.and_then(|step| step["bytes"].as_u64());
    bytes.with_context(|| format!("no step {name:?} with bytes in {told}"))
}
