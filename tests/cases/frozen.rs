//! Nobody stands still for ever: a dump that hangs is given up, and a command that is killed in the
//! middle of a freeze leaves a container that runs.

use std::time::Duration;

use anyhow::{bail, ensure};
use transship_testbed::{CommandRun as _, Node, Testbed, TestbedError, Tree, journey, poll_until};

use crate::Case;
use crate::migration_faults::{counts_on, run_alone};
use crate::moments::paced_front;

const PATIENCE: Duration = Duration::from_secs(40);
const TRIES: u32 = 5;
const RESUMED: &str = "ctr tasks ls | grep -q 'counter .*PAUSED' \
                       && runc --root /run/containerd/runc/default resume counter";
/// As a runtime leaves it that is killed in the middle of a pause: its shim takes it for running.
const FROZEN: &str = "ctr tasks ls | grep -q 'counter .*PAUSED' && ctr tasks resume counter \
                      && runc --root /run/containerd/runc/default pause counter";
const CHECKPOINT: &str = r#"    *" checkpoint --image-path "*) stop_at checkpoint ;;"#;
/// What is told from other runtimes by its name.
const PACED_FRONT: &str = "/usr/local/lib/paced/transship-runc";
/// What the guard looks for CRIU's lock with.
const SLOW_LOOK: &str = "#!/bin/sh
touch /run/at-look
while [ -e /run/stop-at-look ]; do sleep 0.02; done
exec /usr/sbin/iptables-save \"$@\"
";
const DRAFT: &str = "/var/lib/transship/checkpoints/.new-*";
/// Where a migration has one.
const IN_MEMORY: &str = "/run/transship/opened/dump-*/files/.new-*";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    Case::on_all_trees("frozen_runs_again", a_frozen_container_runs_again).chain([Case {
        what: "frozen_late_dump",
        tree: Tree::Forky,
        run: a_late_dump_leaves_nothing_frozen,
    }])
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

/// A runtime whose caller is killed goes on. CRIU freezes again what was frozen when it began, also when the guard has let
/// it run meanwhile.
fn a_late_dump_leaves_nothing_frozen(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let to_b = bed.ssh(&a, &b)?;
    a.shell("mkdir /usr/local/lib/paced").run()?;
    for (path, script) in [
        (PACED_FRONT, paced_front(CHECKPOINT)),
        ("/usr/local/sbin/iptables-save", SLOW_LOOK.to_owned()),
    ] {
        a.write_file(path, script)?;
        a.shell(&format!("chmod +x {path}")).run()?;
    }
    a.shell(&format!(
        "ctr run --detach --snapshotter transship --runc-binary {PACED_FRONT} \
             transship.test/counter:1 counter /usr/bin/counter --memory-mb 400
         touch /run/stop-at-checkpoint /run/stop-at-look",
    ))
    .run()?;
    journey::wait_for_count(&a, "counter", 5)?;
    let holds = |what: &str, command: &str| {
        poll_until(what, PATIENCE, || {
            a.shell(command).run().map_err(|error| error.to_string())
        })
    };
    // Before the freeze there is nothing to let run, and CRIU finds nobody who waits for it.
    let migrate = ["transship", "migrate", "counter", "--to", to_b.as_str()];
    a.start_daemon("migrate", &migrate)?;
    holds("the runtime", "test -e /run/at-checkpoint")?;
    a.shell("pkill -KILL -x transship").run()?;
    // What the runtime has been told stays as long as it lives, whoever cleans up.
    let recover = || a.command("transship").args(["recover", "--once"]).run();
    recover()?;
    let told = format!("ls -d {IN_MEMORY}/counter/work/criu.conf");
    a.shell(&told).run()?;
    a.shell("rm /run/stop-at-checkpoint /run/at-checkpoint")
        .run()?;
    holds(
        "its end",
        "! pgrep -f 'checkpoint --image-pat[h]|criu swr[k]'",
    )?;
    recover()?;
    a.shell("! ls -d /run/transship/opened/dump-*").run()?;
    counts_on(&a, "counter")?;

    // The guard lets the container run meanwhile, and removes the draft when the runtime has ended.
    let checkpoint = ["transship", "checkpoint", "counter", "--ghost-limit", "4M"];
    a.shell("touch /run/stop-at-checkpoint; rm /run/stop-at-look")
        .run()?;
    a.start_daemon("checkpoint", &checkpoint)?;
    holds("the runtime", "test -e /run/at-checkpoint")?;
    a.shell("pkill -KILL -x transship").run()?;
    counts_on(&a, "counter")?;
    a.shell(&format!("ls -d {DRAFT}/counter/work/criu.conf"))
        .run()?;
    a.shell("rm /run/stop-at-checkpoint /run/at-checkpoint")
        .run()?;
    holds("the end of the guard", "! pgrep -f '[f]reeze-guard'")?;
    a.shell(&format!("! ls -d {DRAFT}")).run()?;
    counts_on(&a, "counter")?;

    // Its dump is one that containerd does not know of.
    a.shell("touch /run/stop-at-checkpoint /run/stop-at-look; rm -f /run/at-look")
        .run()?;
    a.start_daemon("checkpoint", &checkpoint)?;
    holds("the runtime", "test -e /run/at-checkpoint")?;
    a.shell("pkill -KILL -x transship").run()?;
    holds("the guard, which sees no CRIU", "test -e /run/at-look")?;
    a.shell(&format!(
        "rm /run/stop-at-checkpoint
         until ls {DRAFT}/counter/checkpoint/core-*.img >/dev/null 2>&1; do :; done
         pkill -STOP -x criu
         rm /run/stop-at-look
         for tenth in $(seq 30); do ctr tasks ls | grep -q RUNNING && break; sleep 0.1; done
         pkill -CONT -x criu"
    ))
    .run()?;
    poll_until("the end of CRIU", PATIENCE, || {
        let ended = a.shell("! pgrep -x criu").run();
        ended.map_err(|error| error.to_string())
    })?;
    poll_until("the end of the guard", PATIENCE, || {
        let ended = a.shell("! pgrep -f '[f]reeze-guard'").run();
        ended.map_err(|error| error.to_string())
    })?;
    counts_on(&a, "counter")?;
    journey::remove_container(&a, "counter")?;
    journey::check_nothing_left(&a)
}

/// CRIU waits for a stopped task as long as the cgroup v1 freezer holds it; with cgroup v2 it dumps one.
fn a_dump_that_hangs_is_given_up(node: &Node) -> anyhow::Result<()> {
    let by_freezer = node.shell("test -d /sys/fs/cgroup/freezer").run().is_ok();
    let pid = journey::task_pid(node, "counter")?;
    node.shell(&format!("kill -STOP {pid}")).run()?;
    let mut command = node.command("transship");
    command.args(["checkpoint", "counter", "--name", "stopped"]);
    if by_freezer {
        // Before anything is frozen.
        let refused = command.read_failure()?;
        for said in [&format!("{pid} (counter)"), "kill -CONT"] {
            ensure!(refused.contains(said), "{refused}");
        }
    } else {
        command.run()?;
        node.shell("transship rm stopped").run()?;
    }
    node.shell(&format!("kill -CONT {pid}")).run()?;
    goes_on(node)?;

    // One that CRIU has left its parasite in is never dumped again: "POKEDATA failed".
    run_alone(node, "held")?;
    let begun = format!("ls {DRAFT}/held/work/dump.log 2>/dev/null");
    let error = checkpoint_with_criu(node, "STOP", &begun, &["held", "--dump-timeout=3"])?;
    ensure!(error.contains("wrote nothing for 3 s"), "{error}");
    let remove = "ctr tasks delete --force held && ctr containers delete held";
    Ok(node.shell(remove).run()?)
}

/// CRIU drops all packets of the container during the dump. One that is killed while it changes the registers of a process
/// takes that with it: then there is no network to look at, and it is tried again.
fn a_killed_criu_leaves_no_lock(node: &Node) -> anyhow::Result<()> {
    for _ in 0..TRIES {
        run_alone(node, "alone")?;
        let pid = journey::task_pid(node, "alone")?;
        let locks = format!(
            "nsenter -t {pid} -n sh -c 'iptables-save; ip6tables-save; nft list tables' 2>/dev/null | grep CRIU"
        );
        checkpoint_with_criu(node, "KILL", &locks, &["alone", "--dump-timeout=30"])?;
        let has_ended = node.ctr(&["tasks", "ls"])?.contains("STOPPED");
        if !has_ended {
            let left = node.shell(&format!("{locks} || true")).read()?;
            ensure!(left.is_empty(), "{left}");
            counts_on(node, "alone")?;
            return Ok(journey::remove_container(node, "alone")?);
        }
        journey::delete_ended_task(node, "alone")?;
        node.ctr(&["containers", "delete", "alone"])?;
    }
    bail!("the process has ended {TRIES} times");
}

/// Sends a signal to the CRIU of a checkpoint as soon as the command `there` succeeds, and gives the error.
pub(crate) fn checkpoint_with_criu(
    node: &Node,
    signal: &str,
    there: &str,
    arguments: &[&str],
) -> anyhow::Result<String> {
    let hit = format!("until {there} >/dev/null; do :; done; pkill -{signal} -x criu");
    let mut checkpoint = node.command("transship");
    checkpoint
        .args(["checkpoint", "--name", "hit"])
        .args(arguments);
    // One that was quicker than the look is made again.
    Ok(poll_until("CRIU to be hit", PATIENCE, || {
        let failed = |error: TestbedError| error.to_string();
        { node.start_daemon("hit", &["sh", "-c", &hit]) }.map_err(failed)?;
        match checkpoint.read_failure() {
            Ok(error) => Ok(error),
            Err(_) => {
                node.stop_daemon("hit", "KILL").map_err(failed)?;
                { node.shell("transship rm hit") }.run().map_err(failed)?;
                Err("the checkpoint was taken".to_owned())
            }
        }
    })?)
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
