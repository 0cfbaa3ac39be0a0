//! Ctrl-C at moments at which a migration has more to do than to give up: before it talks with the other node, and when the
//! copy runs already. And what a local command that leads there takes with it, when it is ended with all below it.

use std::time::Duration;

use anyhow::ensure;
use transship_testbed::{CommandRun as _, Node, Testbed, Tree, journey, poll_until};

use crate::Case;
use crate::migration_cut::{begin_of, go_on, nobody_is_left, paced_nodes, wait_for_end};
use crate::migration_faults::{counts_on, run_alone};

const PATIENCE: Duration = Duration::from_secs(90);
const INTERRUPT: &str = "pkill -INT -x transship";
/// Ends `transship receive` with all below it, as the source does with a command that it has cut short.
const END_ALL: &str = r#"below() {
    for child in $(pgrep -P $1); do
        below $child
        echo $child
    done
}
all=$(for root in $(pgrep -x transship); do below $root; echo $root; done)
kill -KILL $all"#;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let case = |what, run| Case {
        what,
        tree: Tree::Forky,
        run,
    };
    [
        case(
            "migration_interrupted_early",
            who_waits_for_containerd_can_give_up,
        ),
        case(
            "migration_interrupted_late",
            a_copy_that_runs_is_brought_to_its_end,
        ),
        case(
            "migration_killed_below",
            a_guard_is_below_nobody_who_is_ended,
        ),
    ]
    .into_iter()
}

fn who_waits_for_containerd_can_give_up(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = paced_nodes(bed)?;
    run_alone(&a, "web")?;
    let listen = "IO::Socket::UNIX->new(Local => '/run/silent', Listen => 8); sleep";
    let listen = format!("my $silent = {listen}");
    a.start_daemon("silent", &["perl", "-MIO::Socket::UNIX", "-e", &listen])?;
    a.shell("rm -f /run/moved; while [ ! -e /run/silent ]; do sleep 0.1; done")
        .run()?;
    let migrate = "transship -a /run/silent migrate web --to /usr/local/bin/link";
    let migrate = format!("{migrate}; echo $? >/run/moved");
    a.start_daemon("move", &["sh", "-c", &migrate])?;
    poll_until("the command", PATIENCE, || {
        // It takes signals before it asks containerd.
        let waits = a.shell("grep -q 'SigCgt:.*[2367abef]$' /proc/$(pgrep -x transship)/status");
        { waits }.run().map_err(|error| error.to_string())
    })?;
    a.shell(INTERRUPT).run()?;
    let code = wait_for_end(&a)?;
    ensure!(code == "1", "exit code {code}");
    a.stop_daemon("silent", "KILL")?;
    a.shell("rm /run/silent").run()?;
    counts_on(&a, "web")?;
    journey::remove_container(&a, "web")?;
    journey::check_nothing_left(&a)?;
    journey::check_nothing_left(&b)
}

fn a_copy_that_runs_is_brought_to_its_end(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = paced_nodes(bed)?;
    let lazily = ["late", "--lazy", "--accept-loss"];
    for what in [&["web"][..], &lazily] {
        run_alone(&a, what[0])?;
        begin_of(&a, &b, "running", what)?;
        a.shell(INTERRUPT).run()?;
        go_on(&a, &b)?;
        let code = wait_for_end(&a)?;
        ensure!(code == "0", "{what:?}: exit code {code}");
        counts_on(&b, what[0])?;
        journey::remove_container(&b, what[0])?;
        nothing_is_left(&a, &b)?;
    }
    Ok(())
}

/// A local command that leads to the other node has `transship receive` there among its children.
fn a_guard_is_below_nobody_who_is_ended(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = paced_nodes(bed)?;
    run_alone(&a, "web")?;
    begin_of(&a, &b, "held", &["web"])?;
    b.shell(END_ALL).run()?;
    go_on(&a, &b)?;
    let code = wait_for_end(&a)?;
    ensure!(code == "5", "exit code {code}");
    counts_on(&a, "web")?;
    poll_until("the end of all that moved it", PATIENCE, || {
        nobody_is_left(&a, &b)
    })?;
    journey::check_nothing_left(&b)?;
    a.command("/usr/local/bin/move").arg("web").run()?;
    counts_on(&b, "web")?;
    journey::remove_container(&b, "web")?;
    nothing_is_left(&a, &b)
}

fn nothing_is_left(a: &Node, b: &Node) -> anyhow::Result<()> {
    poll_until("the end of all that moved it", PATIENCE, || {
        nobody_is_left(a, b)
    })?;
    journey::check_nothing_left(a)?;
    journey::check_nothing_left(b)
}
