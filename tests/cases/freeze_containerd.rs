//! containerd is restarted, or does not come back, while a container is frozen for a checkpoint: it
//! runs again all the same, and nothing of the checkpoint is left.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use transship_testbed::{CommandRun as _, Node, PodNamespaces, Testbed, journey, poll_until};

use crate::Case;
use crate::pods::{FIRST, start};

const PATIENCE: Duration = Duration::from_secs(60);
/// More than one look of containerd's restart monitor.
const TICKS: Duration = Duration::from_secs(12);
const DRAFT: &str = "/var/lib/transship/checkpoints/.new-*";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    Case::on_all_trees("freeze_container", a_container_runs_again)
        .chain(Case::on_all_trees("freeze_pod", a_pod_runs_again))
        .chain(Case::on_all_trees(
            "freeze_monitor",
            the_monitor_starts_nothing_beside_it,
        ))
}

fn a_container_runs_again(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    journey::start_services(&node)?;
    node.import_image(&journey::counter_image(bed)?, "transship")?;
    node.ctr(&[
        "run",
        "--detach",
        "--snapshotter",
        "transship",
        "--runc-binary",
        journey::FRONT,
        "transship.test/counter:1",
        "counter",
        "/usr/bin/counter",
        "--memory-mb",
        "400",
    ])?;
    journey::wait_for_count(&node, "counter", 5)?;
    let pid = journey::task_pid(&node, "counter")?;
    let checkpoint = ["transship", "checkpoint", "counter", "--name", "cut"];
    for signal in ["TERM", "KILL"] {
        cut_off(&node, &checkpoint, signal)?;
        restart_containerd(&node)?;
        goes_on(&node, pid).with_context(|| format!("containerd restarted with SIG{signal}"))?;
    }
    cut_off(&node, &checkpoint, "KILL")?;
    counts_on(&node, pid).context("containerd does not come back")?;
    restart_containerd(&node)?;
    goes_on(&node, pid).context("containerd came back late")?;
    // containerd, too, says that it runs, and works with it.
    poll_until("a task that runs", PATIENCE, || {
        let tasks = node.ctr(&["tasks", "ls"]);
        let tasks = tasks.map_err(|error| error.to_string())?;
        match tasks.contains("RUNNING") {
            true => Ok(()),
            false => Err(tasks),
        }
    })?;
    node.command("transship")
        .args(["checkpoint", "counter", "--name", "whole"])
        .run()?;
    node.shell("transship rm whole").run()?;
    journey::remove_container(&node, "counter")?;
    journey::check_nothing_left(&node)
}

/// containerd before 2.0 takes a paused container for one that has ended, and starts it again every ten seconds.
fn the_monitor_starts_nothing_beside_it(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    journey::start_services(&node)?;
    node.import_image(&journey::counter_image(bed)?, "transship")?;
    node.shell(
        "ctr run --detach --snapshotter transship --label containerd.io/restart.status=running \
         transship.test/counter:1 web",
    )
    .run()?;
    journey::wait_for_count(&node, "web", 5)?;
    let pid = journey::task_pid(&node, "web")?;
    node.shell("transship checkpoint web --name first").run()?;
    let shown = "\"containerd.io/restart.status\": \"running\"";
    let info = node.ctr(&["containers", "info", "web"])?;
    ensure!(info.contains(shown), "{info}");
    let said = node.shell("transship checkpoint web --name second --leave-paused 2>&1");
    let said = { said }.read()?;
    ensure!(
        said.contains("hidden from containerd's restart monitor"),
        "{said}"
    );
    thread::sleep(TICKS);
    let tasks = node.ctr(&["tasks", "ls"])?;
    ensure!(
        tasks.contains("PAUSED") && journey::task_pid(&node, "web")? == pid,
        "{tasks}"
    );
    node.shell(
        "ctr tasks resume web; ctr containers label web containerd.io/restart.status=running; \
         transship rm first second",
    )
    .run()?;
    let count = journey::read_counts(&node, "web").map_err(anyhow::Error::msg)?;
    journey::wait_for_count(&node, "web", count)?;
    node.shell("ctr containers label web containerd.io/restart.status=")
        .run()?;
    journey::remove_container(&node, "web")?;
    journey::check_nothing_left(&node)
}

fn a_pod_runs_again(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    start(bed, &node, true)?;
    let cri = node.cri()?;
    let pod = cri.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    cri.run_container(&pod, &FIRST)?;
    journey::ask(&node, &cri.pod_ip(&pod)?)?;
    let pid = node.shell("pgrep -x counter").read()?.trim().parse()?;
    let checkpoint = [
        "transship",
        "checkpoint",
        "--pod",
        "shop/web",
        "--name",
        "cut",
    ];
    for signal in ["TERM", "KILL"] {
        cut_off(&node, &checkpoint, signal)?;
        restart_containerd(&node)?;
        goes_on(&node, pid).with_context(|| format!("containerd restarted with SIG{signal}"))?;
    }
    let cri = node.cri()?;
    cri.remove_pod(&pod)?;
    journey::check_nothing_left(&node)
}

/// Ends containerd in the middle of a dump.
fn cut_off(node: &Node, checkpoint: &[&str], signal: &str) -> anyhow::Result<()> {
    node.start_daemon("checkpoint", checkpoint)?;
    let dumping = format!("until ls {DRAFT}/*/checkpoint/pages-*.img >/dev/null 2>&1; do :; done");
    node.command("timeout")
        .args(["60", "sh", "-c", &dumping])
        .run()
        .context("the dump does not begin")?;
    node.stop_daemon("containerd", signal)?;
    Ok(())
}

fn restart_containerd(node: &Node) -> anyhow::Result<()> {
    node.start_daemon("containerd", &["containerd"])?;
    node.wait_for_daemon("containerd", &["ctr", "version"])?;
    Ok(())
}

/// It counts, and neither the command, nor the guard, nor the draft is left.
fn goes_on(node: &Node, pid: u32) -> anyhow::Result<()> {
    counts_on(node, pid)?;
    poll_until("the end of the checkpoint", PATIENCE, || {
        let left = node.shell(&format!(
            "set +e; pgrep -fl '[t]ransship checkpoint|[f]reeze-guard'; ls -d {DRAFT} 2>/dev/null; true"
        ));
        let left = { left }.read().map_err(|error| error.to_string())?;
        match left.trim() {
            "" => Ok(()),
            left => Err(left.to_owned()),
        }
    })?;
    // One that had been dumped when containerd went may have become a checkpoint.
    node.shell("transship rm cut 2>/dev/null || true").run()?;
    counts_on(node, pid)
}

/// Reads the counter's file without containerd.
fn counts_on(node: &Node, pid: u32) -> anyhow::Result<()> {
    let lines = || {
        let mut lines = node.command("wc");
        lines.args(["-l", &format!("/proc/{pid}/root/data/counts")]);
        let text = lines.read().map_err(|error| error.to_string())?;
        let number = text.split_whitespace().next().unwrap_or_default();
        number.parse::<u64>().map_err(|error| error.to_string())
    };
    let before = lines().map_err(anyhow::Error::msg)?;
    // More than what it may have written between our look and a freeze.
    poll_until("the counter to count on", PATIENCE, || match lines()? {
        now if now > before + 5 => Ok(()),
        now => Err(format!("it stands at {now}")),
    })?;
    Ok(())
}
