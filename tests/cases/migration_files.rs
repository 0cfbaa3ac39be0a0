//! Large files go before the freeze, while the program changes them, through calls and through memory: the copy finds
//! each as it was written last.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use transship_testbed::{CommandRun as _, Node, Testbed, Tree, Workload, journey, poll_until};

use crate::Case;

const IMAGE: &str = "transship.test/writer:1";
const PATIENCE: Duration = Duration::from_secs(30);
/// How often each of its 60 files that change has been changed, and looked at, by then.
const ROUND: u64 = 60;
/// What these have, and the 20 that it only looks at.
const CHANGED: u64 = ROUND * (512 << 10);
const STILL: u64 = 20 * (512 << 10);

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    std::iter::once(Case {
        what: "migration_files",
        tree: Tree::Forky,
        run: files_are_as_they_were_written_last,
    })
}

fn files_are_as_they_were_written_last(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let image = journey::counter_image(bed)?;
    let image = image.with_program(IMAGE, Workload::Writer, bed.settings())?;
    a.import_image(&image, "transship")?;
    a.shell(&format!(
        "ctr run --detach --snapshotter transship {IMAGE} writer /usr/local/bin/writer /data/keep"
    ))
    .run()?;
    wait_for(&a, ROUND + 10)?;
    for (from, to) in [(&a, &b), (&b, &a), (&a, &b)] {
        let report = migrate(bed, from, to)?;
        let sent = |name: &str| {
            let steps = report["timeline"]["steps"].as_array();
            let step = steps.into_iter().flatten().find(|it| it["name"] == name);
            step.and_then(|it| it["bytes"].as_u64())
                .with_context(|| format!("no {name} in {report}"))
        };
        // What rests is sent before, and is in no layer; of the others as much as the machine is fast.
        ensure!(sent("files")? >= STILL, "{report}");
        ensure!(sent("upperdir")? < CHANGED + STILL / 2, "{report}");
        // From now on, however long the migration took: the next one finds files that have rested.
        let reached = wait_for(to, 1)?;
        wait_for(to, reached + ROUND + 1)?;
        let left = format!(
            "find /proc/{}/root -maxdepth 1 -name '.transship*'",
            journey::task_pid(to, "writer")?
        );
        let left = { to.shell(&left) }.read()?;
        ensure!(left.is_empty(), "{left}");
    }
    journey::remove_container(&b, "writer")?;
    journey::check_nothing_left(&a)?;
    journey::check_nothing_left(&b)
}

fn migrate(bed: &Testbed, from: &Node, to: &Node) -> anyhow::Result<Value> {
    let there = bed.ssh(from, to)?;
    let mut migrate = from.command("transship");
    migrate.args(["migrate", "writer", "--to", &there, "--json"]);
    Ok(serde_json::from_str(&migrate.read()?)?)
}

/// Waits until it has counted so far, every number once.
fn wait_for(node: &Node, count: u64) -> anyhow::Result<u64> {
    let pid = journey::task_pid(node, "writer")?;
    let lines = format!("wc -l </proc/{pid}/root/data/keep/counts");
    Ok(poll_until("the writer to count on", PATIENCE, || {
        let lines = node
            .shell(&lines)
            .read()
            .map_err(|error| error.to_string())?;
        match lines.trim().parse() {
            Ok(lines) if lines >= count => Ok(lines),
            _ => Err(format!("{lines} lines")),
        }
    })?)
}
