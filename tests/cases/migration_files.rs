//! Large files go before the freeze, while the program changes them, through calls and through memory: the copy finds
//! each as it was written last.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use transship_testbed::{
    CommandRun as _, Node, PodContainer, PodNamespaces, Testbed, Tree, Workload, journey,
    poll_until,
};

use crate::Case;
use crate::pods::start_two;

const IMAGE: &str = "transship.test/writer:1";
const PID: &str = "pgrep -x writer";
const PATIENCE: Duration = Duration::from_secs(30);
/// How often each of its 60 files that change has been changed, and looked at, by then.
pub(crate) const ROUND: u64 = 60;
/// What these have, and the 20 that it only looks at.
const CHANGED: u64 = ROUND * (512 << 10);
const STILL: u64 = 20 * (512 << 10);

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let case = |what, run| Case {
        what,
        tree: Tree::Forky,
        run,
    };
    [
        case("migration_files", files_of_a_container),
        case("pod_migration_files", files_of_a_pod),
    ]
    .into_iter()
}

fn files_of_a_container(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let image = journey::counter_image(bed)?;
    let image = image.with_program(IMAGE, Workload::Writer, bed.settings())?;
    a.import_image(&image, "transship")?;
    a.shell(&format!(
        "ctr run --detach --snapshotter transship {IMAGE} writer /usr/local/bin/writer /data/keep"
    ))
    .run()?;
    moves_with_its_files(bed, &a, &b, &["writer"])?;
    journey::remove_container(&b, "writer")?;
    journey::check_nothing_left(&a)?;
    journey::check_nothing_left(&b)
}

fn files_of_a_pod(bed: &Testbed) -> anyhow::Result<()> {
    let [a, b] = start_two(bed, true)?;
    let image = journey::counter_image(bed)?;
    let image = image.with_program(IMAGE, Workload::Writer, bed.settings())?;
    a.import_image_into("k8s.io", &image, "transship")?;
    let cri = a.cri()?;
    let pod = cri.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    let writer = PodContainer {
        name: "writer",
        image: IMAGE,
        command: &["/usr/local/bin/writer", "/data/keep"],
        ..PodContainer::default()
    };
    cri.run_container(&pod, &writer)?;
    let what = ["--pod", "shop/web", "--allow", "unmasked-paths"];
    moves_with_its_files(bed, &a, &b, &what)?;
    journey::check_no_pod_left(&a)
}

/// From a to b, back, and to b again.
fn moves_with_its_files(bed: &Testbed, a: &Node, b: &Node, what: &[&str]) -> anyhow::Result<()> {
    wait_for(a, ROUND + 10)?;
    for (from, to) in [(a, b), (b, a), (a, b)] {
        let report = migrate(bed, from, to, what)?;
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
        let left = format!("find /proc/$({PID})/root -maxdepth 1 -name '.transship*'");
        let left = { to.shell(&left) }.read()?;
        ensure!(left.is_empty(), "{left}");
    }
    Ok(())
}

fn migrate(bed: &Testbed, from: &Node, to: &Node, what: &[&str]) -> anyhow::Result<Value> {
    let there = bed.ssh(from, to)?;
    let mut migrate = from.command("transship");
    migrate.args(["migrate", "--to", &there, "--json"]);
    migrate.args(what);
    Ok(serde_json::from_str(&migrate.read()?)?)
}

/// Waits until it has counted so far, every number once.
pub(crate) fn wait_for(node: &Node, count: u64) -> anyhow::Result<u64> {
    let lines = format!("wc -l </proc/$({PID})/root/data/keep/counts");
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
