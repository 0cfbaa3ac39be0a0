//! What kubelet and its users see of a restored pod: which containers are restored, which start cold, which
//! do not run again, and where each of that is told.
//!
//! The snapshotter's overlays are `volatile`: such a one cannot be mounted twice without more ado.

use std::time::Duration;

use anyhow::ensure;
use transship_testbed::{
    CommandRun as _, Cri, Node, Pod, PodContainer, PodNamespaces, Testbed, Tree, journey,
    poll_until,
};

use crate::Case;
use crate::pods::{FIRST, IMAGE, SECOND, import_images, reached, start_containerd};

const PATIENCE: Duration = Duration::from_secs(30);
const RESTORE: (&str, &str) = ("dev.transship/restore", "web");
/// Makes a database, and fails where there is one.
const INIT: &[&str] = &["sh", "-c", "mkdir /work/db && echo made"];

/// Fails.
const JOB: PodContainer<'_> = PodContainer {
    name: "job",
    command: &["sh", "-c", "echo it runs; exit 7"],
    ..FIRST
};

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [Case {
        what: "pod_kubelet",
        tree: Tree::Forky,
        run: what_kubelet_sees,
    }]
    .into_iter()
}

fn what_kubelet_sees(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    node.write_file(
        "/etc/transship/snapshotter.toml",
        "mount_options = [\"volatile\"]\n",
    )?;
    node.start_snapshotter_with(&["--config", "/etc/transship/snapshotter.toml"])?;
    start_containerd(&node, true)?;
    import_images(bed, &node, "transship")?;
    node.start_daemon("events", &["ctr", "events"])?;
    let cri = node.cri()?;

    let dead = cri.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    cri.stop_pod(&dead)?;
    let old = cri.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    let work = volume(&node, &old)?;
    let mounts = [(work.as_str(), "/work")];
    let init = cri.run_container(&old, &init(&mounts))?;
    ended(&cri, &init)?;
    let job = cri.run_container(&old, &JOB)?;
    ensure!(ended(&cri, &job)? == 7, "it fails");
    let id = cri.run_container(&old, &first(&mounts))?;
    cri.exec(&id, &["touch", "/work/db/rows"])?;
    cri.exec(&id, &["sh", "-c", "echo written before >/proc/1/fd/1"])?;
    let written = poll_until("a line in the log", PATIENCE, || {
        let log = log_of(&node, &old, "first").map_err(|error| error.to_string())?;
        match log.ends_with("stdout F written before\n") {
            true => Ok(log),
            false => Err(log),
        }
    })?;
    let before = reached(&cri, &id)?;
    // Two pods of that name are there; one runs.
    let taken = node
        .shell("transship checkpoint --pod shop/web --name web --volumes emptydir")
        .read()?;
    says(&taken, "ended with 0, and do not run again: init")?;
    says(&taken, "had failed, and end so again: job")?;
    cri.remove_pod(&old)?;
    cri.remove_pod(&dead)?;

    let pod = cri.run_pod(("shop", "web"), &[RESTORE], PodNamespaces::Usual)?;
    let work = volume(&node, &pod)?;
    let mounts = [(work.as_str(), "/work")];
    a_sidecar_comes_first(&node, &cri, &pod, &mounts, before)?;
    a_failure_stays_one(&node, &cri, &pod)?;
    let log = log_of(&node, &pod, "first")?;
    ensure!(
        log.starts_with(&written),
        "{log} does not begin with {written}"
    );
    a_lacking_container_is_told_of(&node, &cri, &pod)?;
    cri.remove_pod(&pod)?;
    strangers_are_refused(&node, &cri)?;
    users_of_its_own(&node, &cri)?;
    mptcp_is_off(&node, &cri)?;
    journey::check_no_pod_left(&node)
}

fn init<'a>(mounts: &'a [(&'a str, &'a str)]) -> PodContainer<'a> {
    PodContainer {
        name: "init",
        image: IMAGE,
        command: INIT,
        mounts,
        ..PodContainer::default()
    }
}

/// With `restartPolicy: Never` kubelet makes it this once; with any other policy it makes it once more, which runs.
fn a_failure_stays_one(node: &Node, cri: &Cri, pod: &Pod) -> anyhow::Result<()> {
    let again = cri.run_container(pod, &JOB)?;
    let status = ended(cri, &again)?;
    ensure!(status == 7, "the failed container ended with {status}");
    let log = log_of(node, pod, "job")?;
    says(&log, "transship: not run again: it had ended with 7")?;
    ensure!(!log.contains("it runs"), "it has run: {log}");
    cri.remove_container(&again)?;
    let restarted = cri.run_container(pod, &JOB)?;
    let status = ended(cri, &restarted)?;
    ensure!(status == 7, "the restarted container ended with {status}");
    says(&log_of(node, pod, "job")?, "it runs")
}

fn first<'a>(mounts: &'a [(&'a str, &'a str)]) -> PodContainer<'a> {
    PodContainer { mounts, ..FIRST }
}

/// The restored container fills the volume before the init container begins, as a sidecar does that stands
/// before it.
fn a_sidecar_comes_first(
    node: &Node,
    cri: &Cri,
    pod: &Pod,
    mounts: &[(&str, &str)],
    before: u64,
) -> anyhow::Result<()> {
    let id = cri.run_container(pod, &first(mounts))?;
    ensure!(reached(cri, &id)? >= before, "it is restored");
    let again = cri.run_container(pod, &init(mounts))?;
    let status = ended(cri, &again)?;
    ensure!(status == 0, "the init container ended with {status}");
    let log = log_of(node, pod, "init")?;
    says(&log, "transship: not run again: it had ended with 0")?;
    ensure!(!log.contains("made"), "it has run: {log}");
    let rows = cri.exec(&id, &["ls", "/work/db"])?;
    ensure!(rows.stdout == b"rows\n", "the volume came along: {rows:?}");

    says(
        &log_of(node, pod, "first")?,
        "transship: restored from the checkpoint \"web\"",
    )?;
    event(node, "/transship/restored", &id)?;
    event(node, "/transship/not-run-again", &again)?;
    let list = node.shell("transship ls").read()?;
    ensure!(
        list.contains("RESTORED") && list.lines().any(|line| line.contains(" once ")),
        "{list}"
    );
    // The life of the pod has gone on: what comes next runs.
    let next = PodContainer {
        attempt: 1,
        ..init(mounts)
    };
    let next = cri.run_container(pod, &next)?;
    ensure!(ended(cri, &next)? == 1, "it finds its database");
    Ok(())
}

/// Beside a container that was restored another one may start cold, and not in silence.
fn a_lacking_container_is_told_of(node: &Node, cri: &Cri, pod: &Pod) -> anyhow::Result<()> {
    let id = cri.run_container(pod, &SECOND)?;
    ensure!(cri.runs(&id)?, "it runs");
    let said = "the checkpoint \"web\" has no container \"second\"";
    says(&log_of(node, pod, "second")?, said)?;
    let log = String::from_utf8(node.read_file("/var/log/transship/restores.log")?)?;
    says(&log, &format!("container={id} outcome=started-cold {said}"))?;
    event(node, "/transship/started-cold", &id)
}

/// A pod of whose containers the checkpoint has none is not the one that was meant.
fn strangers_are_refused(node: &Node, cri: &Cri) -> anyhow::Result<()> {
    let stranger = PodContainer {
        name: "stranger",
        ..SECOND
    };
    for (value, said) in [
        (None, "no other container of this pod has been restored"),
        (Some("refuse"), "has no container \"stranger\""),
        (Some("start"), ""),
    ] {
        let annotation = value.map(|value| ("dev.transship/cold-containers", value));
        let annotations: Vec<_> = [RESTORE].into_iter().chain(annotation).collect();
        let pod = cri.run_pod(("shop", "strange"), &annotations, PodNamespaces::Usual)?;
        match cri.run_container(&pod, &stranger) {
            Ok(id) => ensure!(said.is_empty() && cri.runs(&id)?, "{value:?}"),
            Err(error) => says(&error.to_string(), said)?,
        }
        cri.remove_pod(&pod)?;
    }
    journey::check_no_pod_left(node)
}

/// `hostUsers: false`: what was dumped has other ids, and the layers are mounted in a way that is gone.
fn users_of_its_own(node: &Node, cri: &Cri) -> anyhow::Result<()> {
    let run = |annotations: &[(&str, &str)]| -> anyhow::Result<_> {
        let pod = cri.run_pod(("shop", "users"), annotations, PodNamespaces::WithUsers)?;
        let work = volume(node, &pod)?;
        let id = cri.run_container(&pod, &first(&[(&work, "/work")]));
        Ok((pod, id))
    };
    let (pod, Err(error)) = run(&[RESTORE])? else {
        anyhow::bail!("restored with other ids");
    };
    says(&error.to_string(), "user")?;
    cri.remove_pod(&pod)?;
    let (pod, id) = run(&[RESTORE, ("dev.transship/on-failure", "cold-start")])?;
    let id = id?;
    ensure!(cri.runs(&id)?, "it runs");
    let said = "transship: not restored, starts cold: ";
    says(&log_of(node, &pod, "first")?, said)?;
    let mut take = node.command("transship");
    take.args(["checkpoint", "--pod", "shop/users", "--name", "users"]);
    says(&take.read_failure()?, "user namespace")?;
    ensure!(cri.runs(&id)?, "it was not paused");
    cri.remove_pod(&pod)?;
    journey::check_no_pod_left(node)
}

/// Sockets of MPTCP cannot be dumped; in a pod that is to move they are sockets of TCP.
fn mptcp_is_off(node: &Node, cri: &Cri) -> anyhow::Result<()> {
    const SYSCTL: &str = "/proc/sys/net/mptcp/enabled";
    if node.command("test").args(["-e", SYSCTL]).run().is_err() {
        return Ok(());
    }
    let ours = [("dev.transship/tcp", "close")];
    let on = [("dev.transship/mptcp", "true")];
    let own: &[(&str, &str)] = &[("net.mptcp.enabled", "1")];
    for (annotations, sysctls, enabled) in [
        (&[][..], &[][..], "1"),
        (&ours, &[], "0"),
        (&on, &[], "1"),
        (&ours, own, "1"),
    ] {
        let name = ("shop", "paths");
        let pod = cri.run_pod_with_sysctls(name, annotations, PodNamespaces::Usual, sysctls)?;
        let id = cri.run_container(&pod, &FIRST)?;
        let found = cri.exec(&id, &["cat", SYSCTL])?.stdout;
        let found = String::from_utf8(found)?;
        ensure!(
            found.trim() == enabled,
            "{annotations:?} {sysctls:?}: {found}"
        );
        cri.remove_pod(&pod)?;
    }
    Ok(())
}

/// An emptyDir of the pod.
pub(crate) fn volume(node: &Node, pod: &Pod) -> anyhow::Result<String> {
    let uid = pod.uid();
    let path = format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/work");
    node.shell(&format!("mkdir -p {path}")).run()?;
    Ok(path)
}

/// The exit code of a container that ends.
pub(crate) fn ended(cri: &Cri, id: &str) -> anyhow::Result<i32> {
    Ok(poll_until(
        "the end of a container",
        PATIENCE,
        || match cri.status(id) {
            Ok(status) if status.finished_at > 0 => Ok(status.exit_code),
            other => Err(format!("{other:?}")),
        },
    )?)
}

pub(crate) fn log_of(node: &Node, pod: &Pod, container: &str) -> anyhow::Result<String> {
    let text = node.shell(&format!("cat {}/{container}/0.log", pod.log_directory()));
    Ok({ text }.read()?)
}

/// Waits for an event of this topic about this container.
fn event(node: &Node, topic: &str, id: &str) -> anyhow::Result<()> {
    Ok(poll_until(topic, PATIENCE, || {
        let all = node.read_file("/var/log/events.log");
        let all = String::from_utf8_lossy(&all.map_err(|error| error.to_string())?).into_owned();
        let found = all
            .lines()
            .any(|line| line.contains(topic) && line.contains(id) && line.contains("web"));
        if found { Ok(()) } else { Err(all) }
    })?)
}

fn says(text: &str, said: &str) -> anyhow::Result<()> {
    ensure!(
        text.replace('\\', "").contains(said),
        "{text:?} does not say {said:?}"
    );
    Ok(())
}
