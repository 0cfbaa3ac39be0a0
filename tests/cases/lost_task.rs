//! A source whose end is cut off: containerd loses it from its list, or the command is killed. The copy runs, and nothing
//! of the source is left, neither its shim, nor its bundle, nor what the runtime keeps.
//!
//! ```text
//!  frozen ── CRIU stands still, and holds all processes as it does until the last page has gone
//!      commit: SIGKILL ── the first process is a zombie, of which the shim has not heard: "running"
//!      containerd comes back, and finds no process; or the command is killed ── CRIU goes on
//! ```

use std::time::Duration;

use anyhow::ensure;
use transship_testbed::{CommandRun as _, ContainerdConfig, Testbed, Tree, journey, poll_until};

use crate::Case;
use crate::migration_faults::{counts_on, run_alone};
use crate::moments::{paced_front, tells_how_it_ended};

const PATIENCE: Duration = Duration::from_secs(90);
const ID: &str = "web";
const MOVE: &str = "#!/bin/sh
transship migrate web --to \"$1\" --lazy --accept-loss --before-restore ";

const STARTED: &str = r#"    *" start "*)
        /usr/local/bin/transship-runc "$@" || exit
        stop_at running
        exit
        ;;"#;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let case = |what, run| Case {
        what,
        tree: Tree::Forky,
        run,
    };
    [
        case("migration_lost_task", |bed| {
            nothing_is_left(bed, Cut::Containerd)
        }),
        case("migration_killed_at_end", |bed| {
            nothing_is_left(bed, Cut::Command)
        }),
        case(
            "task_started_unseen",
            what_the_shim_has_not_seen_start_is_deleted,
        ),
    ]
    .into_iter()
}

/// What is killed on the source before its processes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// It comes back before the shim has heard of their end.
    Containerd,
    /// As soon as they have been killed.
    Command,
}

fn nothing_is_left(bed: &Testbed, cut: Cut) -> anyhow::Result<()> {
    let (b, a) = journey::start_nodes(bed)?;
    let (to_b, to_a) = (bed.ssh(&a, &b)?, bed.ssh(&b, &a)?);
    run_alone(&b, ID)?;
    // The runtime front keeps something of what has been restored.
    b.command("transship")
        .args(["migrate", ID, "--to", &to_a])
        .args(["--runtime-binary", journey::FRONT])
        .run()?;
    counts_on(&a, ID)?;
    let pid = journey::task_pid(&a, ID)?;

    a.write_file("/usr/local/bin/move", tells_how_it_ended(MOVE))?;
    a.shell("chmod +x /usr/local/bin/move; touch /run/stop-at-frozen")
        .run()?;
    a.start_daemon("move", &["/usr/local/bin/move", &to_b])?;
    let holds = |what: &str, command: String| {
        poll_until(what, PATIENCE, || {
            a.shell(&command).run().map_err(|error| error.to_string())
        })
    };
    holds("the freeze", "test -e /run/at-frozen".into())?;
    a.shell("pkill -STOP -x criu").run()?;
    if cut == Cut::Containerd {
        a.stop_daemon("containerd", "KILL")?;
    }
    a.shell("rm /run/stop-at-frozen").run()?;
    // SIGKILL. As long as one of its threads is traced, it has not ended.
    holds(
        "the end of the source",
        format!("grep -q '^ShdPnd:.0*100$' /proc/{pid}/status"),
    )?;
    match cut {
        Cut::Containerd => drop(a.start_containerd(&ContainerdConfig::transship())?),
        Cut::Command => {
            a.shell(
                "pkill -KILL -f '^transship migrate'; timeout -k 1 5 transship recover --once || true",
            )
            .run()?;
        }
    }
    a.shell("pkill -CONT -x criu").run()?;

    holds("the end of the migration", "cat /run/moved".into())?;
    counts_on(&b, ID)?;
    poll_until("an end of all that the source was", PATIENCE, || {
        let recover = a.shell("transship recover --once; ctr tasks ls; cat /var/log/move.log");
        let said = { recover }.read().map_err(|error| error.to_string())?;
        let left = a.shell(
            "pgrep -a containerd-shim || true
             ls -d /run/containerd/io.containerd.runtime.v2.task/default/* /run/containerd/runc/default/* \
                 /var/lib/containerd/io.containerd.runtime.v2.task/default/* 2>/dev/null || true",
        );
        match { left }.read() {
            Ok(left) if left.is_empty() => Ok(()),
            Ok(left) => Err(format!("{left}{said}")),
            Err(error) => Err(error.to_string()),
        }
    })?;
    journey::check_nothing_left(&a)?;
    journey::remove_container(&b, ID)?;
    journey::check_nothing_left(&b)
}

/// The runtime is killed when it has started a container, and before its shim knows.
fn what_the_shim_has_not_seen_start_is_deleted(bed: &Testbed) -> anyhow::Result<()> {
    let (a, _b) = journey::start_nodes(bed)?;
    a.write_file("/usr/local/bin/paced-front", paced_front(STARTED))?;
    a.shell("chmod +x /usr/local/bin/paced-front; touch /run/stop-at-running")
        .run()?;
    let run = "exec ctr run --detach --snapshotter transship --runc-binary /usr/local/bin/paced-front \
        transship.test/counter:1 web";
    a.start_daemon("run", &["sh", "-c", run])?;
    poll_until("the start", PATIENCE, || {
        let reached = a.shell("test -e /run/at-running").run();
        reached.map_err(|error| error.to_string())
    })?;
    a.shell("pkill -KILL -f '[p]aced-front'").run()?;
    a.wait_for_daemon_end("run")?;
    let tasks = a.ctr(&["tasks", "ls"])?;
    ensure!(tasks.contains("CREATED"), "{tasks}");
    a.shell("transship delete-task web").run()?;
    let tasks = a.ctr(&["tasks", "ls", "-q"])?;
    ensure!(tasks.is_empty(), "{tasks}");
    a.ctr(&["containers", "delete", ID])?;
    journey::check_nothing_left(&a)
}
