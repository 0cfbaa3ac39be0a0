//! Nobody stands still for ever: a dump that hangs is given up, and a command that is killed in the
//! middle of a freeze leaves a container that runs.

use std::time::Duration;

use anyhow::ensure;
use transship_testbed::{CommandRun as _, Node, Testbed, TestbedError, journey, poll_until};

use crate::Case;
use crate::migration_faults::{counts_on, run_alone};

const PATIENCE: Duration = Duration::from_secs(40);
const RESUMED: &str = "ctr tasks ls | grep -q 'counter .*PAUSED' \
                       && runc --root /run/containerd/runc/default resume counter";
/// As a runtime leaves it that is killed in the middle of a pause: its shim takes it for running.
const FROZEN: &str = "ctr tasks ls | grep -q 'counter .*PAUSED' && ctr tasks resume counter \
                      && runc --root /run/containerd/runc/default pause counter";
const DRAFT: &str = "/var/lib/transship/checkpoints/.new-*";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    Case::on_all_trees("frozen_runs_again", a_frozen_container_runs_again)
}

fn a_frozen_container_runs_again(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    journey::run_sandbox(&a, "sandbox")?;
    journey::run_counter(
        &a,
        "counter",
        "sandbox",
        96,
        &["--runc-binary", journey::FRONT],
    )?;
    journey::wait_for_count(&a, "counter", 5)?;
    a_dump_that_hangs_is_given_up(&a)?;
    a_killed_criu_leaves_no_lock(&a)?;
    // Each moment is known by what is there then.
    for (moment, there) in [
        ("paused", "ctr tasks ls | grep -q 'counter .*PAUSED'"),
        // As a runtime leaves it that is killed when it has let it go: its shim takes it for paused.
        ("resumed", RESUMED),
        ("CRIU runs", &format!("ls {DRAFT}/counter/work/dump.log")),
        (
            "memory",
            &format!("ls {DRAFT}/counter/checkpoint/pages-*.img"),
        ),
        (
            "dumped",
            &format!("ls {DRAFT}/counter/checkpoint/inventory.img"),
        ),
    ] {
        let program = ["transship", "checkpoint", "counter", "--name", "killed"];
        killed_at(&a, moment, there, &program)?;
    }
    a.shell("transship rm killed 2>/dev/null || true").run()?;
    // A draft of one that was killed after the freeze is the next one's to remove.
    a.shell("transship checkpoint counter --name whole; transship rm whole")
        .run()?;
    let ssh = bed.ssh(&a, &b)?;
    journey::run_sandbox(&b, "sandbox-b")?;
    let command = "touch /run/here; while kill -0 $PPID; do sleep 0.1; done";
    let program = [
        "transship",
        "migrate",
        "counter",
        "--to",
        &ssh,
        "--sandbox",
        "sandbox-b",
        "--before-restore",
        command,
    ];
    // When CRIU has ended, which cannot while the container is frozen.
    let frozen = format!("ls /run/here && ! pgrep -x criu && {FROZEN}");
    killed_at(&a, "before the restore", &frozen, &program)?;
    poll_until("the end of the other side", PATIENCE, || {
        let left = b.ctr(&["containers", "ls", "-q"]);
        let left = left.map_err(|error| error.to_string())?;
        match left.trim() {
            "sandbox-b" => Ok(()),
            left => Err(left.to_owned()),
        }
    })?;
    for (node, ids) in [
        (&a, ["counter", "sandbox"].as_slice()),
        (&b, &["sandbox-b"]),
    ] {
        for id in ids {
            journey::remove_container(node, id)?;
        }
        journey::check_nothing_left(node)?;
    }
    Ok(())
}

/// CRIU waits for a stopped task as long as the cgroup v1 freezer holds it; with cgroup v2 it dumps one.
fn a_dump_that_hangs_is_given_up(node: &Node) -> anyhow::Result<()> {
    let hangs = node.shell("test -d /sys/fs/cgroup/freezer").run().is_ok();
    let pid = journey::task_pid(node, "counter")?;
    node.shell(&format!("kill -STOP {pid}")).run()?;
    let mut command = node.command("transship");
    command.args(["checkpoint", "counter", "--name", "stopped"]);
    if hangs {
        let error = command.arg("--dump-timeout=3").read_failure()?;
        for said in [
            "wrote nothing for 3 s",
            &format!("{pid} (counter)"),
            "SIGCONT",
        ] {
            ensure!(error.contains(said), "{error}");
        }
    } else {
        command.run()?;
        node.shell("transship rm stopped").run()?;
    }
    node.shell(&format!("kill -CONT {pid}")).run()?;
    goes_on(node)
}

/// CRIU drops all packets of the container during the dump.
fn a_killed_criu_leaves_no_lock(node: &Node) -> anyhow::Result<()> {
    run_alone(node, "alone")?;
    let pid = journey::task_pid(node, "alone")?;
    let locks = format!(
        "nsenter -t {pid} -n sh -c 'iptables-save; ip6tables-save; nft list tables' 2>/dev/null | grep CRIU"
    );
    let kill = format!("until {locks} >/dev/null; do :; done; pkill -KILL -x criu");
    let mut checkpoint = node.command("transship");
    checkpoint.args(["checkpoint", "alone", "--name", "alone"]);
    // One that was quicker than the look is made again.
    poll_until("CRIU to be killed with its lock", PATIENCE, || {
        let failed = |error: TestbedError| error.to_string();
        { node.start_daemon("kill", &["sh", "-c", &kill]) }.map_err(failed)?;
        match checkpoint.read_failure() {
            Ok(_) => Ok(()),
            Err(_) => {
                node.stop_daemon("kill", "KILL").map_err(failed)?;
                { node.shell("transship rm alone") }.run().map_err(failed)?;
                Err("the checkpoint was taken".to_owned())
            }
        }
    })?;
    let left = node.shell(&format!("{locks} || true")).read()?;
    ensure!(left.is_empty(), "{left}");
    counts_on(node, "alone")?;
    Ok(journey::remove_container(node, "alone")?)
}

/// Kills `program` when the command `there` succeeds in the node; where the program has been
/// quicker than the look, it runs again.
fn killed_at(node: &Node, moment: &str, there: &str, program: &[&str]) -> anyhow::Result<()> {
    let failed = |error: TestbedError| error.to_string();
    // Some moments last for milliseconds: looked for in the node, without a pause.
    let watch = format!(
        "until {there} >/dev/null 2>&1; do kill -0 \"$(cat /run/killed.pid)\" || exit 1; done"
    );
    poll_until(&format!("the moment: {moment}"), PATIENCE, || {
        // Of one that has run to its end.
        node.shell("transship rm killed 2>/dev/null || true")
            .run()
            .map_err(failed)?;
        node.start_daemon("killed", program).map_err(failed)?;
        node.shell(&watch).run().map_err(failed)?;
        node.stop_daemon("killed", "KILL").map_err(failed)
    })?;
    goes_on(node).map_err(|error| error.context(format!("killed at: {moment}")))
}

/// It runs and counts, and its network is open.
fn goes_on(node: &Node) -> anyhow::Result<()> {
    poll_until("a container that runs", PATIENCE, || {
        let tasks = node
            .ctr(&["tasks", "ls"])
            .map_err(|error| error.to_string())?;
        let line = tasks.lines().find(|line| line.starts_with("counter "));
        match line.is_some_and(|line| line.contains("RUNNING")) {
            true => Ok(()),
            false => Err(tasks),
        }
    })?;
    let count = journey::read_counts(node, "counter").map_err(anyhow::Error::msg)?;
    journey::wait_for_count(node, "counter", count)?;
    poll_until("the end of the guard", PATIENCE, || {
        let left = node.shell("pgrep -fl '[f]reeze-guard' || true");
        let left = { left }.read().map_err(|error| error.to_string())?;
        match left.is_empty() {
            true => Ok(()),
            false => Err(left),
        }
    })?;
    let pid = journey::task_pid(node, "counter")?;
    let locks = node.shell(&format!(
        "set +e; nsenter -t {pid} -n sh -c 'iptables-save; nft list tables' 2>/dev/null | grep CRIU; true"
    ));
    let locks = { locks }.read()?;
    ensure!(locks.is_empty(), "{locks}");
    let address = journey::sandbox_address(node, "sandbox")?;
    let reply = journey::ask(node, &address)?;
    ensure!(reply.memory_ok, "{reply:?}");
    Ok(())
}
