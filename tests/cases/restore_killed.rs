//! A restore whose command is killed (SIGKILL) leaves nothing of the copy, and can be made again.

use std::time::Duration;

use transship_testbed::{CommandRun as _, Node, Testbed, Tree, journey, poll_until};

use crate::Case;
use crate::restore_cut::{ID, node_with_checkpoint, put_runc_back, replace_runc, restores};

const PATIENCE: Duration = Duration::from_secs(90);
const BEGUN: &str = "/tmp/restoring";
const GOES_ON: &str = "/tmp/go";
/// Waits in a restore until it is told to go on.
const WAITS: &str = r#"#!/bin/sh
case " $* " in
    *" restore "*)
        touch /tmp/restoring
        while [ ! -e /tmp/go ]; do sleep 0.05; done
        ;;
esac
exec /usr/local/lib/runc "$@"
"#;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let case = |what, run| Case {
        what,
        tree: Tree::Forky,
        run,
    };
    [
        case("restore_killed", a_killed_restore_leaves_nothing),
        case("trial_killed", a_killed_trial_leaves_nothing),
    ]
    .into_iter()
}

fn a_killed_restore_leaves_nothing(bed: &Testbed) -> anyhow::Result<()> {
    let node = node_with_checkpoint(bed)?;
    replace_runc(&node, WAITS)?;
    let restore = "transship restore monday";

    begin(&node, restore)?;
    node.shell("kill -KILL $(cat /tmp/command)").run()?;
    only_is_left(&node, "")?;

    begin(&node, restore)?;
    // It comes no further than the copy that is held.
    node.shell(&format!("kill -STOP $(cat /tmp/command); touch {GOES_ON}"))
        .run()?;
    poll_until("a copy that is held", PATIENCE, || {
        let tasks = node.ctr(&["tasks", "ls"]);
        match tasks.map_err(|error| error.to_string())? {
            tasks if tasks.contains("CREATED") => Ok(()),
            tasks => Err(tasks),
        }
    })?;
    node.shell("kill -KILL $(cat /tmp/command)").run()?;
    only_is_left(&node, "")?;

    put_runc_back(&node)?;
    restores(&node)
}

fn a_killed_trial_leaves_nothing(bed: &Testbed) -> anyhow::Result<()> {
    let node = node_with_checkpoint(bed)?;
    node.command("transship")
        .args(["restore", "monday"])
        .run()?;
    replace_runc(&node, WAITS)?;
    begin(
        &node,
        &format!("transship checkpoint {ID} --name tried --verify-restore"),
    )?;
    node.shell("kill -KILL $(cat /tmp/command)").run()?;
    only_is_left(&node, ID)?;
    put_runc_back(&node)?;
    let again = format!("transship checkpoint {ID} --name again --verify-restore");
    node.shell(&again).run()?;
    journey::remove_container(&node, ID)?;
    node.shell("transship rm tried && transship rm again && transship rm monday")
        .run()?;
    journey::check_nothing_left(&node)
}

/// Starts a command, and comes back when the runtime restores for it.
fn begin(node: &Node, command: &str) -> anyhow::Result<()> {
    node.shell(&format!(
        "rm -f {BEGUN} {GOES_ON}
         {command} >/tmp/said 2>&1 </dev/null & echo $! >/tmp/command"
    ))
    .run()?;
    poll_until("the restore", PATIENCE, || {
        let begun = node.shell(&format!("ls {BEGUN} 2>&1 || cat /tmp/said"));
        let begun = { begun }.read().map_err(|error| error.to_string())?;
        if begun.trim() == BEGUN {
            Ok(())
        } else {
            Err(begun)
        }
    })?;
    Ok(())
}

/// Waits until nothing is there but this container, or none.
fn only_is_left(node: &Node, id: &str) -> anyhow::Result<()> {
    Ok(poll_until("the end of the copy", PATIENCE, || {
        let left = node.shell(&format!(
            "set +e
             {{ ctr containers ls -q; ctr tasks ls -q
               ctr snapshots --snapshotter transship ls | awk 'NR > 1 && $NF != \"Committed\" {{print $1}}'
               ls /run/containerd/runc/default /run/containerd/io.containerd.runtime.v2.task/default
             }} 2>/dev/null | grep -vx '.*:\\|\\|{id}'
             ls -d /run/transship/pods/* /var/lib/transship/checkpoints/*/*/.staged-* 2>/dev/null
             ctr leases ls -q | grep -v '^transship-diff-'
             pgrep -af 'transship-restore-[g]uard|transship-hold-[w]atch|[c]riu swrk|[c]opy-guard'
             true"
        ));
        match { left }.read() {
            Ok(left) if left.is_empty() => Ok(()),
            Ok(left) => Err(left),
            Err(error) => Err(error.to_string()),
        }
    })?)
}
