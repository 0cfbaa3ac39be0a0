//! A checkpoint is consumed once, when its container has run: not by a restore that was cancelled
//! before that, and not again after the checkpoint has been removed. What starts cold says so.

use std::time::{Duration, Instant};

use anyhow::ensure;
use k8s_cri::v1::ContainerState;
use transship_testbed::{
    CommandRun as _, Cri, Node, Pod, PodContainer, PodNamespaces, Testbed, Tree, journey,
    poll_until,
};

use crate::Case;
use crate::pods::{FIRST, reached, start};

/// How many restores are cancelled, each at another moment.
const CANCELLED: u32 = 20;
const PATIENCE: Duration = Duration::from_secs(60);
const RESTORE: [(&str, &str); 1] = [("dev.transship/restore", "web")];

/// The same with so little memory that CRIU restores all of it, and waits for ever for what is not there.
const SMALL: PodContainer<'_> = PodContainer {
    command: &["/usr/bin/counter", "--memory-mb", "1"],
    ..FIRST
};

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let cancelled = Case {
        what: "restore_cancelled",
        tree: Tree::Forky,
        run: a_cancelled_restore_is_made_again,
    };
    let stuck = Case {
        what: "restore_stuck",
        tree: Tree::Forky,
        run: a_restore_without_progress_ends,
    };
    Case::on_all_trees("consumed_outlives", the_record_outlives_the_checkpoint)
        .chain([cancelled, stuck])
}

/// kubelet cancels StartContainer at its deadline, whatever the runtime is doing at that moment:
/// the next attempt is restored, and no process of the cancelled one stays.
fn a_cancelled_restore_is_made_again(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    start(bed, &node, true)?;
    let cri = node.cri()?;
    let before = take_checkpoint(&node, &cri, &FIRST)?;

    // How long an undisturbed restore takes on this machine.
    let pod = cri.run_pod(("shop", "whole"), &RESTORE, PodNamespaces::Usual)?;
    let id = cri.create_container(&pod, &FIRST)?;
    let begun = Instant::now();
    cri.start_container(&id)?;
    let whole = begun.elapsed();
    cri.remove_pod(&pod)?;
    nothing_runs(&node)?;

    for n in 0..CANCELLED {
        // From a tenth of it to a little beyond it, closer together towards its end.
        let part = 1.1 - 1.0 * (f64::from(n) / f64::from(CANCELLED)).powi(2);
        let deadline = whole.mul_f64(part);
        let name = format!("cut-{n}");
        let pod = cri.run_pod(("shop", &name), &RESTORE, PodNamespaces::Usual)?;
        let id = cri.create_container(&pod, &FIRST)?;
        let started = cri.start_container_within(&id, deadline);
        let runs = started.is_ok() || runs_after_cancel(&cri, &id)?;
        // containerd ends a container whose start was done when its caller had gone: that one has run.
        let record = format!("test -e /var/lib/transship/consumed/pod-{}", pod.uid());
        let has_run = node.shell(&record).run().is_ok();
        let last = match runs {
            true => id,
            false => next_attempt(&cri, &pod)?,
        };
        // One that containerd has forgotten may have been made after the call was cancelled.
        let processes = node.shell("pgrep -cf '^/usr/bin/counter' || true").read()?;
        ensure!(
            processes.trim() == "1",
            "{processes} processes of one container"
        );
        let now = reached(&cri, &last)?;
        if now < before {
            let log = node.read_file(&cri.status(&last)?.log_path)?;
            let log = String::from_utf8_lossy(&log);
            ensure!(
                log.contains("not restored, starts cold"),
                "in silence: {log}"
            );
        }
        eprintln!("cancelled after {deadline:?} of {whole:?}: {started:?}, then at {now}");
        ensure!(
            now >= before || has_run,
            "cancelled after {deadline:?} of {whole:?}, the next attempt began cold: {now} < {before}"
        );
        // As kubelet: containerd may still be busy with what it has given up. It must not know a task for
        // ever that its CRI plugin has forgotten (seen with 2.1.9).
        poll_until("the removal of the pod", PATIENCE, || {
            cri.remove_pod(&pod).map_err(|error| error.to_string())
        })?;
        nothing_runs(&node)?;
    }
    journey::check_no_pod_left(&node)
}

/// A pod whose sandbox is made again after `transship rm` starts: it has had its restore.
fn the_record_outlives_the_checkpoint(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    start(bed, &node, true)?;
    let cri = node.cri()?;
    let before = take_checkpoint(&node, &cri, &FIRST)?;
    let pod = cri.run_pod(("shop", "web"), &RESTORE, PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &FIRST)?;
    ensure!(reached(&cri, &id)? >= before, "it is restored");
    // A container that the checkpoint lacks has started cold, and does so again.
    let more = PodContainer {
        name: "more",
        command: &["/usr/bin/counter", "--memory-mb", "1", "--port", "7002"],
        ..FIRST
    };
    cri.run_container(&pod, &more)?;
    node.shell("transship rm web").run()?;

    cri.stop_pod(&pod)?;
    let again = cri.run_pod_again(&pod)?;
    for container in [&FIRST, &more] {
        let container = PodContainer {
            attempt: 1,
            ..container.clone()
        };
        let id = cri.run_container(&again, &container)?;
        let count = reached(&cri, &id)?;
        ensure!(count < 40, "{} began at {count}", container.name);
    }
    cri.remove_pod(&again)?;
    cri.remove_pod(&pod)?;

    let Err(error) = cri.run_pod(("shop", "other"), &RESTORE, PodNamespaces::Usual) else {
        anyhow::bail!("another pod is restored from what is gone");
    };
    let said = error.to_string();
    ensure!(said.contains("there is no checkpoint"), "{said}");
    journey::check_no_pod_left(&node)
}

/// Memory that is shorter than the images say makes CRIU try again for ever.
fn a_restore_without_progress_ends(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    start(bed, &node, true)?;
    let cri = node.cri()?;
    take_checkpoint(&node, &cri, &SMALL)?;
    node.write_file("/etc/transship/node.toml", "restore_patience_seconds = 3\n")?;
    node.shell(
        "cd /var/lib/transship/checkpoints/web
         truncate -s 4096 first/checkpoint/pages-1.img
         jq '(.containers[].files[] | select(.path == \"checkpoint/pages-1.img\") | .size) = 4096' \
             transship.json >new
         mv new transship.json",
    )
    .run()?;
    let pod = cri.run_pod(("shop", "stuck"), &RESTORE, PodNamespaces::Usual)?;
    let id = cri.create_container(&pod, &SMALL)?;
    let Err(error) = cri.start_container_within(&id, PATIENCE) else {
        anyhow::bail!("memory that is not there is restored");
    };
    let said = error.to_string();
    ensure!(
        said.contains("made no progress for 3 s and was killed"),
        "{said}"
    );
    nothing_runs(&node)?;
    cri.remove_pod(&pod)?;
    journey::check_no_pod_left(&node)
}

fn take_checkpoint(node: &Node, cri: &Cri, container: &PodContainer<'_>) -> anyhow::Result<u64> {
    let pod = cri.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, container)?;
    let before = poll_until("a count", PATIENCE, || match reached(cri, &id) {
        Ok(count) if count >= 50 => Ok(count),
        other => Err(format!("{other:?}")),
    })?;
    node.shell("transship checkpoint --pod shop/web --name web")
        .run()?;
    cri.remove_pod(&pod)?;
    Ok(before)
}

/// As kubelet makes them: the cancelled one may still be at work.
fn next_attempt(cri: &Cri, pod: &Pod) -> anyhow::Result<String> {
    let mut attempt = 0;
    Ok(poll_until("the next attempt", PATIENCE, || {
        attempt += 1;
        let container = PodContainer { attempt, ..FIRST };
        cri.run_container(pod, &container)
            .map_err(|error| error.to_string())
    })?)
}

/// Whether the container runs although its caller has given up: the start was done when the deadline
/// passed, and kubelet finds it running. Else it has ended, and kubelet makes the next attempt.
fn runs_after_cancel(cri: &Cri, id: &str) -> anyhow::Result<bool> {
    let what = "the end of the cancelled attempt";
    let runs = poll_until(what, PATIENCE, || match cri.status(id) {
        Ok(status) if status.state() == ContainerState::ContainerRunning => Ok(true),
        Ok(status) if status.state() == ContainerState::ContainerExited => Ok(false),
        other => Err(format!("{other:?}")),
    })?;
    Ok(runs)
}

/// No process of a container: stopped ones count too.
fn nothing_runs(node: &Node) -> anyhow::Result<()> {
    let gone = poll_until("the end of all containers' processes", PATIENCE, || {
        let list =
            node.shell("ps -eo pid,ppid,stat,args | grep -E '[/]usr/bin/counter|[c]riu' || true");
        match { list }.read() {
            Ok(left) if left.is_empty() => Ok(()),
            Ok(left) => Err(left),
            Err(error) => Err(error.to_string()),
        }
    });
    Ok(gone?)
}
