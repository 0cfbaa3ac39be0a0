//! A restore that is cut off leaves nothing: neither what the runtime keeps of it, nor a process, nor its guard.

use std::time::Duration;

use anyhow::ensure;
use transship_testbed::{
    CommandRun as _, Cri, Node, PodNamespaces, Testbed, Tree, journey, poll_until,
};

use crate::Case;
use crate::migration_faults::{counts_on, run_alone};
use crate::pods::{FIRST, reached};
use crate::pods_begun::{POD, RESTORE, start_with_checkpoint, with};
use crate::pods_kubelet::volume;

const PATIENCE: Duration = Duration::from_secs(90);
pub(crate) const ID: &str = "web";
const STATE: &str = "/run/containerd/runc/default/web";
/// How long kubelet waits in the case of a guard that does not end.
const CALL: Duration = Duration::from_secs(5);
const FAILS_LATE: &str = r#"#!/bin/sh
case " $* " in
    *" restore "*)
        /usr/local/lib/runc "$@"
        exit 1
        ;;
esac
exec /usr/local/lib/runc "$@"
"#;
/// Its caller is the guard of the restore.
const STOPS_ITS_GUARD: &str = r#"#!/bin/sh
case " $* " in
    *" restore "*)
        kill -STOP $PPID
        exec sleep 1000
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
    [
        case("restore_failed_late", a_late_failure_leaves_no_state),
        case("restore_of_pod_cut", what_is_cut_in_a_pod_leaves_nothing),
    ]
    .into_iter()
}

/// runc writes its state before its restore has come to its end, and what CRIU holds by the freezer keeps it from removing
/// that again.
fn a_late_failure_leaves_no_state(bed: &Testbed) -> anyhow::Result<()> {
    let node = node_with_checkpoint(bed)?;
    replace_runc(&node, FAILS_LATE)?;
    let mut restore = node.command("transship");
    let failed = restore.args(["restore", "monday"]).read_failure()?;
    ensure!(failed.contains("monday"), "{failed}");
    nothing_is_left(&node)?;
    put_runc_back(&node)?;
    restores(&node)
}

/// In a pod nobody else deletes it: containerd has no task yet of what it could not create.
fn what_is_cut_in_a_pod_leaves_nothing(bed: &Testbed) -> anyhow::Result<()> {
    let (node, cri, before) = start_with_checkpoint(bed)?;
    let pod = cri.run_pod(POD, &[RESTORE], PodNamespaces::Usual)?;
    let work = volume(&node, &pod)?;
    let mounts = [(work.as_str(), "/work")];
    for runc in [FAILS_LATE, STOPS_ITS_GUARD] {
        replace_runc(&node, runc)?;
        let id = cri.create_container(&pod, &with(&FIRST, &mounts))?;
        let started = cri.start_container_within(&id, CALL);
        ensure!(started.is_err(), "it is started");
        nothing_is_left_of(&node, &cri, &id)?;
        cri.remove_container(&id)?;
    }
    put_runc_back(&node)?;
    let id = cri.run_container(&pod, &with(&FIRST, &mounts))?;
    ensure!(reached(&cri, &id)? >= before, "it has begun anew");
    cri.remove_pod(&pod)?;
    node.shell("transship rm web").run()?;
    journey::check_no_pod_left(&node)
}

/// Puts a script in the place of the node's runc, which it finds in `/usr/local/lib`.
pub(crate) fn replace_runc(node: &Node, script: &str) -> anyhow::Result<()> {
    node.shell("test -e /usr/local/lib/runc || cp $(command -v runc) /usr/local/lib/runc")
        .run()?;
    node.write_file("/usr/local/sbin/runc", script)?;
    Ok({ node.shell("chmod +x /usr/local/sbin/runc") }.run()?)
}

pub(crate) fn put_runc_back(node: &Node) -> anyhow::Result<()> {
    Ok({ node.shell("rm /usr/local/sbin/runc /usr/local/lib/runc") }.run()?)
}

fn nothing_is_left_of(node: &Node, cri: &Cri, id: &str) -> anyhow::Result<()> {
    Ok(poll_until(
        "an end of all of the restore",
        PATIENCE,
        || {
            let left = node.shell(&format!(
                "pgrep -af '{AT_WORK}|[s]leep 1000' || true
             ls -d /run/containerd/runc/k8s.io/{id} 2>/dev/null || true
             find /sys/fs/cgroup -name '*{id}*' -type d"
            ));
            let runs = cri.runs(id).map_err(|error| error.to_string())?;
            match { left }.read() {
                Ok(left) if left.is_empty() && !runs => Ok(()),
                Ok(left) => Err(left),
                Err(error) => Err(error.to_string()),
            }
        },
    )?)
}

pub(crate) fn node_with_checkpoint(bed: &Testbed) -> anyhow::Result<Node> {
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

pub(crate) fn restores(node: &Node) -> anyhow::Result<()> {
    node.command("transship")
        .args(["restore", "monday"])
        .run()?;
    counts_on(node, ID)?;
    journey::remove_container(node, ID)?;
    node.shell("transship rm monday").run()?;
    journey::check_nothing_left(node)
}
