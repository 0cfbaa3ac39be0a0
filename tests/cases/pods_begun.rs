//! What a pod begins with was said when its sandbox was made, and what had ended before the checkpoint is no run of it.

use anyhow::ensure;
use transship_testbed::{
    CommandRun as _, Cri, Node, PodContainer, PodNamespaces, Testbed, Tree, journey,
};

use crate::Case;
use crate::pods::{FIRST, SECOND, reached, start};
use crate::pods_kubelet::{ended, log_of, volume};

pub(crate) const POD: (&str, &str) = ("shop", "web");
pub(crate) const RESTORE: (&str, &str) = ("dev.transship/restore", "web");
const LATEST: (&str, &str) = ("dev.transship/restore-latest", "true");
const SAID: &str = "not run again: it had ended with 0";

/// An init container, or a sidecar between two runs.
const INIT: PodContainer<'_> = PodContainer {
    name: "init",
    command: &["sh", "-c", "echo it runs"],
    ..FIRST
};

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let run = |what, run| Case {
        what,
        tree: Tree::Forky,
        run,
    };
    [
        run("pod_begun_with_ended", what_had_ended_has_not_run),
        run("pod_begun_before_annotated", what_is_annotated_late_waits),
    ]
    .into_iter()
}

/// Takes the checkpoint `web` of a pod with an emptyDir and an init container that has ended; and how far it had counted.
pub(crate) fn start_with_checkpoint(bed: &Testbed) -> anyhow::Result<(Node, Cri, u64)> {
    let node = bed.node("a")?;
    start(bed, &node, true)?;
    let cri = node.cri()?;
    let old = cri.run_pod(POD, &[], PodNamespaces::Usual)?;
    let work = volume(&node, &old)?;
    let mounts = [(work.as_str(), "/work")];
    let init = cri.run_container(&old, &INIT)?;
    ensure!(ended(&cri, &init)? == 0, "it makes what it makes");
    let first = cri.run_container(&old, &with(&FIRST, &mounts))?;
    cri.exec(&first, &["touch", "/work/of-the-checkpoint"])?;
    journey::ask(&node, &cri.pod_ip(&old)?)?;
    let before = reached(&cri, &first)?;
    node.shell("transship checkpoint --pod shop/web --name web --volumes emptydir")
        .run()?;
    cri.remove_pod(&old)?;
    Ok((node, cri, before))
}

pub(crate) fn with<'a>(
    container: &PodContainer<'a>,
    mounts: &'a [(&'a str, &'a str)],
) -> PodContainer<'a> {
    PodContainer {
        mounts,
        ..container.clone()
    }
}

fn what_had_ended_has_not_run(bed: &Testbed) -> anyhow::Result<()> {
    let (node, cri, before) = start_with_checkpoint(bed)?;
    // Nothing of it comes to run but what had ended.
    let pod = cri.run_pod(POD, &[LATEST], PodNamespaces::Usual)?;
    let init = cri.run_container(&pod, &INIT)?;
    ensure!(ended(&cri, &init)? == 0, "it has ended so again");
    let log = log_of(&node, &pod, "init")?;
    ensure!(log.contains(SAID) && !log.contains("it runs"), "{log}");
    cri.remove_pod(&pod)?;

    // The next pod of this name has what the first one was to have.
    let pod = cri.run_pod(POD, &[LATEST], PodNamespaces::Usual)?;
    let init = cri.run_container(&pod, &INIT)?;
    ensure!(ended(&cri, &init)? == 0, "it has ended so again");
    let log = log_of(&node, &pod, "init")?;
    ensure!(log.contains(SAID) && !log.contains("it runs"), "{log}");
    // kubelet makes again what is to run always; it would end for ever, and nothing after it would come up.
    cri.remove_container(&init)?;
    let init = cri.run_container(&pod, &INIT)?;
    ensure!(ended(&cri, &init)? == 0, "it runs, and ends");
    let log = log_of(&node, &pod, "init")?;
    ensure!(log.contains("it runs"), "{log}");
    let work = volume(&node, &pod)?;
    let mounts = [(work.as_str(), "/work")];
    let first = cri.run_container(&pod, &with(&FIRST, &mounts))?;
    ensure!(reached(&cri, &first)? >= before, "it has begun anew");
    cri.remove_pod(&pod)?;
    node.shell("transship rm web").run()?;
    journey::check_no_pod_left(&node)
}

/// kubelet hands on the annotations that a pod has now, also to the next container of one that runs.
fn what_is_annotated_late_waits(bed: &Testbed) -> anyhow::Result<()> {
    let (node, cri, before) = start_with_checkpoint(bed)?;
    let pod = cri.run_pod(POD, &[], PodNamespaces::Usual)?;
    let work = volume(&node, &pod)?;
    let mounts = [(work.as_str(), "/work")];
    let beside = cri.run_container(&pod, &with(&SECOND, &mounts))?;
    cri.exec(
        &beside,
        &["touch", "/work/of-this-life", "/dev/shm/of-this-life"],
    )?;
    let annotated = pod.annotated(&[RESTORE]);
    cri.run_container(&annotated, &with(&FIRST, &mounts))?;
    let log = log_of(&node, &pod, "first")?;
    ensure!(
        log.contains("starts cold: its pod ran already when it was annotated"),
        "{log}"
    );
    ensure!(!log.contains("restored from"), "{log}");
    let files = cri.exec(&beside, &["ls", "/work", "/dev/shm"])?;
    let files = String::from_utf8(files.stdout)?;
    ensure!(
        files.matches("of-this-life").count() == 2 && !files.contains("of-the-checkpoint"),
        "{files}"
    );
    cri.stop_pod(&pod)?;

    // It counts for the next sandbox, and so does what it was told then.
    let next = cri.run_pod_again(&annotated)?;
    let edited = [("dev.transship/restore", "another")];
    let edited = next.annotated(&edited);
    let again = PodContainer {
        attempt: 1,
        ..with(&FIRST, &mounts)
    };
    let first = cri.run_container(&edited, &again)?;
    ensure!(reached(&cri, &first)? >= before, "it has begun anew");
    cri.remove_pod(&next)?;
    cri.remove_pod(&pod)?;
    node.shell("transship rm web").run()?;
    journey::check_no_pod_left(&node)
}
