//! What goes wrong around a migration: links that stall, monitors that start what is frozen, networks
//! that do not come along, and callers that ask for the impossible. The source runs on, or the copy does.

use std::time::Duration;

use anyhow::ensure;
use transship_testbed::{CommandRun as _, Node, Testbed, Tree, journey, poll_until};

use crate::Case;
use crate::journey::fails_with;

const PATIENCE: Duration = Duration::from_secs(90);
const LOCKS: &str = "/run/transship/migrations";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [
        Case {
            what: "migration_network",
            tree: Tree::Forky,
            run: a_network_of_its_own_has_loopback,
        },
        Case {
            what: "migration_stalled",
            tree: Tree::Forky,
            run: a_stalled_link_leaves_nothing_frozen,
        },
        Case {
            what: "migration_restart_policy",
            tree: Tree::Trixie,
            run: containerd_makes_no_second_copy,
        },
    ]
    .into_iter()
}

pub(crate) fn run_alone(node: &Node, id: &str) -> anyhow::Result<()> {
    let run = format!("ctr run --detach --snapshotter transship transship.test/counter:1 {id}");
    node.shell(&run).run()?;
    journey::wait_for_count(node, id, 3)?;
    Ok(())
}

/// Runs transship in node a: it fails with `code` and says `message`, and the container counts on.
pub(crate) fn refused(
    a: &Node,
    arguments: &[&str],
    code: i32,
    message: &str,
) -> anyhow::Result<()> {
    fails_with(a, arguments, code, message)?;
    counts_on(a, arguments[1])
}

pub(crate) fn counts_on(node: &Node, id: &str) -> anyhow::Result<()> {
    let reached = journey::read_counts(node, id).map_err(anyhow::Error::msg)?;
    journey::wait_for_count(node, id, reached)?;
    Ok(())
}

fn a_network_of_its_own_has_loopback(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let ssh = bed.ssh(&a, &b)?;
    run_alone(&a, "counter")?;
    let inside = |node: &Node, script: &str| -> anyhow::Result<String> {
        let pid = journey::task_pid(node, "counter")?;
        Ok(node
            .shell(&format!("nsenter -t {pid} -n {script}"))
            .read()?)
    };
    inside(&a, "ip link add v0 type veth peer name v1")?;
    let migrate = ["migrate", "counter", "--to", ssh.as_str()];
    refused(&a, &migrate, 4, "--allow-lost network")?;
    inside(&a, "ip link del v0")?;

    // The command before the restore would take for ever.
    let slow = ["--max-freeze", "2s", "--before-restore", "sleep 1000"];
    refused(&a, &[&migrate[..], &slow].concat(), 1, "--max-freeze")?;

    // There is one container and one node to go to.
    refused(
        &a,
        &["migrate", "counter", "--to", "env"],
        5,
        "is the node that",
    )?;
    let lock = format!("mkdir -p {LOCKS}; exec flock -o {LOCKS}/default:counter sleep 1000");
    a.start_daemon("other", &["sh", "-c", &lock])?;
    poll_until("the other migration", PATIENCE, || {
        let held = a.shell(&format!("! flock --nonblock {LOCKS}/default:counter true"));
        { held }.run().map_err(|error| error.to_string())
    })?;
    refused(&a, &migrate, 4, "another migration")?;
    a.stop_daemon("other", "KILL")?;

    // While it is being moved, nobody else moves it or takes a checkpoint of it.
    let slow = ["--max-freeze", "20s", "--before-restore", "sleep 1000"];
    a.start_daemon("slow", &[&["transship"], &migrate[..], &slow].concat())?;
    poll_until("the freeze", PATIENCE, || {
        let waits = a.shell("pgrep -f '[s]leep 1000'");
        { waits }.run().map_err(|error| error.to_string())
    })?;
    for command in [&migrate[..], &["checkpoint", "counter"]] {
        fails_with(&a, command, 4, "migration of \"counter\" is under way")?;
    }
    a.wait_for_daemon_end("slow")?;
    counts_on(&a, "counter")?;
    a.shell("test -z \"$(ls /run/transship/dumps)\"").run()?;

    a.command("transship").args(migrate).run()?;
    counts_on(&b, "counter")?;
    let link = inside(&b, "ip -o link show lo")?;
    ensure!(link.contains("LOOPBACK,UP"), "{link}");
    // Its image has a name that says what it is; with the name it came by it would be anybody's.
    let images = b.ctr(&["images", "ls", "-q"])?;
    ensure!(images.contains("counter:1@sha256:"), "{images}");
    // And it is an ordinary container, which can move on.
    let back = bed.ssh(&b, &a)?;
    b.command("transship")
        .args(["migrate", "counter", "--to", &back])
        .run()?;
    counts_on(&a, "counter")?;
    let images = a.ctr(&["images", "ls", "-q"])?;
    ensure!(
        !images.contains('@'),
        "the node has a name for it: {images}"
    );
    journey::check_nothing_left(&b)?;
    journey::remove_container(&a, "counter")?;
    journey::check_nothing_left(&a)
}

fn a_stalled_link_leaves_nothing_frozen(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let ssh = bed.ssh(&a, &b)?;
    run_alone(&a, "counter")?;
    let migrate = ["migrate", "counter", "--to", &ssh, "--link-timeout", "3"];
    // After the checkpoint has arrived; before that the command would never be reached.
    let stop = "pkill -STOP -x ssh";
    let stalled = [&migrate[..], &["--before-restore", stop]].concat();
    refused(&a, &stalled, 5, "silent for 3 s")?;
    poll_until("the other side to give up", PATIENCE, || {
        let left = b.ctr(&["containers", "ls", "-q"]);
        let left = left.map_err(|error| error.to_string())?;
        let running = b.shell("! pgrep -f '[t]ransship.*receive'");
        match ({ running }.run(), left.is_empty()) {
            (Ok(()), true) => Ok(()),
            (running, _) => Err(format!("{running:?} {left}")),
        }
    })?;
    journey::check_nothing_left(&b)?;
    // The same link works again.
    a.command("transship").args(migrate).run()?;
    counts_on(&b, "counter")?;
    journey::remove_container(&b, "counter")?;
    journey::check_nothing_left(&a)?;
    journey::check_nothing_left(&b)
}

fn containerd_makes_no_second_copy(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let ssh = bed.ssh(&a, &b)?;
    run_alone(&a, "counter")?;
    let policy = "containerd.io/restart.status=running containerd.io/restart.policy=on-failure:3";
    a.shell(&format!("ctr containers label counter {policy}"))
        .run()?;
    let migrate = ["migrate", "counter", "--to", &ssh, "--before-restore"];
    // containerd 1.7 looks every ten seconds, and takes a paused container for one that has ended.
    let command = "ctr containers info counter >/run/frozen; sleep 15; exit 7";
    refused(&a, &[&migrate[..], &[command]].concat(), 1, "exit 7")?;
    let frozen = String::from_utf8(a.read_file("/run/frozen")?)?;
    ensure!(
        !frozen.contains("\"containerd.io/restart.status\""),
        "{frozen}"
    );
    let info = a.ctr(&["containers", "info", "counter"])?;
    ensure!(
        info.contains("\"containerd.io/restart.status\": \"running\""),
        "{info}"
    );

    let kept = [&migrate[..], &["true", "--keep-source"]].concat();
    a.command("transship").args(kept).run()?;
    counts_on(&b, "counter")?;
    a.shell("sleep 25").run()?;
    let tasks = a.ctr(&["tasks", "ls", "-q"])?;
    ensure!(tasks.is_empty(), "a second copy: {tasks}");
    let info = b.ctr(&["containers", "info", "counter"])?;
    // Of the two only the copy is started again.
    for label in [
        "\"containerd.io/restart.status\": \"running\"",
        "\"containerd.io/restart.policy\": \"on-failure:3\"",
    ] {
        ensure!(info.contains(label), "{info}");
    }
    ensure!(!info.contains("suspended"), "{info}");
    b.ctr(&[
        "containers",
        "label",
        "counter",
        "containerd.io/restart.status=",
    ])?;
    what_a_power_cut_has_hidden_is_shown(&a)?;
    a.ctr(&["containers", "delete", "counter"])?;
    journey::remove_container(&b, "counter")?;
    journey::check_nothing_left(&a)?;
    journey::check_nothing_left(&b)
}

/// The counter was kept, and stays hidden, unless a power cut has come before anything was written down.
fn what_a_power_cut_has_hidden_is_shown(a: &Node) -> anyhow::Result<()> {
    let labels = || a.ctr(&["containers", "info", "counter"]);
    let kept = labels()?;
    let hidden = "\"dev.transship/suspended-restart.status\": \"running\"";
    ensure!(
        kept.contains(hidden) && !kept.contains("suspended-in"),
        "{kept}"
    );
    a.shell("transship recover").run()?;
    ensure!(labels()?.contains(hidden), "{}", labels()?);
    a.shell("ctr containers label counter dev.transship/suspended-in=an-earlier-boot; transship recover")
        .run()?;
    let shown = labels()?;
    ensure!(
        shown.contains("\"containerd.io/restart.status\": \"running\"")
            && !shown.contains("suspended"),
        "{shown}"
    );
    a.ctr(&[
        "containers",
        "label",
        "counter",
        "containerd.io/restart.status=",
    ])?;
    Ok(())
}
