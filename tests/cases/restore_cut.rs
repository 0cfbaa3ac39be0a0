//! A restore that is cut off leaves nothing: neither what the runtime keeps of it, nor a process, nor its guard.

use std::time::Duration;

use anyhow::ensure;
use transship_testbed::{CommandRun as _, Node, Testbed, Tree, journey, poll_until};

use crate::Case;
use crate::migration_faults::{counts_on, run_alone};

const PATIENCE: Duration = Duration::from_secs(90);
const ID: &str = "web";
const STATE: &str = "/run/containerd/runc/default/web";
const FAILS_LATE: &str = r#"#!/bin/sh
case " $* " in
    *" restore "*)
        /usr/local/lib/runc "$@"
        exit 1
        ;;
esac
exec /usr/local/lib/runc "$@"
"#;
/// What is there while one restores, by its command line.
const AT_WORK: &str =
    "transship-restore-[g]uard|transship-hold-[w]atch|[c]riu swrk|/usr/bin/[c]ounter";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let case = |what, run| Case {
        what,
        tree: Tree::Forky,
        run,
    };
    [case("restore_failed_late", a_late_failure_leaves_no_state)].into_iter()
}

/// runc writes its state before its restore has come to its end, and what CRIU holds by the freezer keeps it from removing
/// that again.
fn a_late_failure_leaves_no_state(bed: &Testbed) -> anyhow::Result<()> {
    let node = node_with_checkpoint(bed)?;
    node.shell("cp $(command -v runc) /usr/local/lib/runc")
        .run()?;
    node.write_file("/usr/local/sbin/runc", FAILS_LATE)?;
    node.shell("chmod +x /usr/local/sbin/runc").run()?;
    let mut restore = node.command("transship");
    let failed = restore.args(["restore", "monday"]).read_failure()?;
    ensure!(failed.contains("monday"), "{failed}");
    nothing_is_left(&node)?;
    node.shell("rm /usr/local/sbin/runc /usr/local/lib/runc")
        .run()?;
    restores(&node)
}

fn node_with_checkpoint(bed: &Testbed) -> anyhow::Result<Node> {
    let (node, _) = journey::start_nodes(bed)?;
    run_alone(&node, ID)?;
    node.command("transship")
        .args(["checkpoint", ID, "--name", "monday"])
        .run()?;
    journey::remove_container(&node, ID)?;
    Ok(node)
}

fn nothing_is_left(node: &Node) -> anyhow::Result<()> {
    Ok(poll_until(
        "an end of all of the restore",
        PATIENCE,
        || {
            let left = node.shell(&format!(
                "pgrep -af '{AT_WORK}' || true
             ls -d {STATE} /run/containerd/io.containerd.runtime.v2.task/default/* \
                /var/lib/containerd/io.containerd.runtime.v2.task/default/* 2>/dev/null || true
             find /sys/fs/cgroup -name {ID} -type d"
            ));
            match { left }.read() {
                Ok(left) if left.is_empty() => Ok(()),
                Ok(left) => Err(left),
                Err(error) => Err(error.to_string()),
            }
        },
    )?)
}

fn restores(node: &Node) -> anyhow::Result<()> {
    node.command("transship")
        .args(["restore", "monday"])
        .run()?;
    counts_on(node, ID)?;
    journey::remove_container(node, ID)?;
    node.shell("transship rm monday").run()?;
    journey::check_nothing_left(node)
}
