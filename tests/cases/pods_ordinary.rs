//! A restored container is an ordinary one: whatever kubelet and people do to a container, they do to
//! it, and it does not depend on the pod that it was taken from.

use std::time::Duration;

use anyhow::ensure;
use transship_testbed::{
    CommandRun as _, ContainerdConfig, Cri, Node, Pod, PodContainer, PodNamespaces, Testbed,
    journey, poll_until,
};

use crate::Case;
use crate::pods::{FIRST, reached, start};

const MATES: &str = "transship.test/podmate:1";
const PATIENCE: Duration = Duration::from_secs(30);
const MB: i64 = 1 << 20;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    Case::on_all_trees("pod_ordinary", a_restored_container_is_ordinary)
        .chain(Case::on_all_trees(
            "pod_processes",
            a_pod_shares_its_processes,
        ))
        .chain(Case::on_all_trees("pod_killed_containerd", |bed| {
            containerd_is_killed_in_a_restore(bed)
        }))
}

/// The containers of the pod, by their places in [`run`].
const COUNTER: usize = 0;
const SHARER: usize = 1;
const SERVER: usize = 2;
const SHELL: usize = 3;

fn run(node: &Node, cri: &Cri, pod: &Pod, attempt: u32) -> anyhow::Result<Vec<String>> {
    let uid = pod.uid();
    let work = format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/work");
    node.shell(&format!("mkdir -p {work}")).run()?;
    let mounts = [(work.as_str(), "/work")];
    let mate = |name, command| PodContainer {
        name,
        attempt,
        image: MATES,
        command,
        mounts: &mounts,
        ..PodContainer::default()
    };
    let containers = [
        PodContainer { attempt, ..FIRST },
        mate("sharer", &["/usr/bin/podmate", "sharer"]),
        mate("server", &["/usr/bin/podmate", "server"]),
        PodContainer {
            tty: true,
            ..mate("shell", &["/bin/sh"])
        },
    ];
    let run = |container: &PodContainer<'_>| cri.run_container(pod, container);
    Ok(containers.iter().map(run).collect::<Result<_, _>>()?)
}

fn a_restored_container_is_ordinary(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    start(bed, &node, true)?;
    let cri = node.cri()?;
    let old = cri.run_pod(("shop", "plain"), &[], PodNamespaces::Usual)?;
    let before = run(&node, &cri, &old, 0)?;
    let mut shell = cri.attach(&node, &before[SHELL], true)?;
    shell.send(0, "x=41; echo set $((x+1))\n")?;
    shell.wait_for(1, "set 42")?;

    a_message_queue_is_refused(&node, &cri, &before, &mut shell)?;
    node.command("transship")
        .args(["checkpoint", "--pod", "shop/plain", "--name", "plain"])
        .args(["--volumes", "emptydir"])
        .run()?;
    a_missing_volume_is_refused(&node, &cri)?;

    // On the same node, beside the pod that it was taken from, which then goes.
    let annotation = [("dev.transship/restore", "plain")];
    let pod = cri.run_pod(("shop", "plain-again"), &annotation, PodNamespaces::Usual)?;
    let containers = run(&node, &cri, &pod, 0)?;
    drop(shell);
    let reached_by_old = reached(&cri, &before[COUNTER])?;
    cri.remove_pod(&old)?;
    for id in &containers {
        ensure!(cri.runs(id)?, "{id} outlives the old pod");
    }
    poll_until("the counter to count on", PATIENCE, || {
        match reached(&cri, &containers[COUNTER]) {
            Ok(count) if count > reached_by_old => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })?;

    // People look into it.
    let mut terminal = cri.exec_tty(&node, &containers[COUNTER], &["/bin/sh"])?;
    terminal.send(0, "test -t 0 && echo tty $((40+2))\n")?;
    terminal.wait_for(1, "tty 42")?;
    drop(terminal);
    let mut shell = cri.attach(&node, &containers[SHELL], true)?;
    shell.send(0, "echo kept $((x+2))\n")?;
    shell.wait_for(1, "kept 43")?;
    drop(shell);
    cri.attach(&node, &containers[SHARER], false)?
        .wait_for(1, " sysv=")?;
    let mut port = cri.port_forward(&node, &pod, 7000)?;
    port.send(0, "hello\n")?;
    port.wait_for(0, "\"memory_ok\":true")?;
    drop(port);

    // kubelet looks after it.
    let usage = cri.memory_usage(&containers[COUNTER])?;
    ensure!(usage > 32 << 20, "{usage} bytes of memory by its stats");
    cri.limit_memory(&containers[SERVER], 64 * MB)?;
    cri.exec(&containers[SERVER], &["kill", "-USR1", "1"])?;
    let status = ended(&cri, &containers[SERVER])?;
    ensure!(status == (137, "OOMKilled".to_owned()), "{status:?}");
    cri.stop_container(&containers[SHARER], 30)?;
    let status = ended(&cri, &containers[SHARER])?;
    ensure!(status.0 == 7, "SIGTERM ends it as it wants: {status:?}");
    the_next_sandbox_starts_cold(&node, &cri, &pod, &containers)
}

fn ended(cri: &Cri, id: &str) -> anyhow::Result<(i32, String)> {
    Ok(poll_until(
        "the end of a container",
        PATIENCE,
        || match cri.status(id) {
            Ok(status) if status.finished_at > 0 => Ok((status.exit_code, status.reason)),
            other => Err(format!("{other:?}")),
        },
    )?)
}

/// CRIU cannot dump it; nothing is paused for finding that out.
fn a_message_queue_is_refused(
    node: &Node,
    cri: &Cri,
    containers: &[String],
    shell: &mut transship_testbed::CriStream,
) -> anyhow::Result<()> {
    let refused = |queue: &str| -> anyhow::Result<()> {
        let mut command = node.command("transship");
        command.args(["checkpoint", "--pod", "shop/plain", "--name", "plain"]);
        let error = command.read_failure()?;
        ensure!(
            error.contains("POSIX message queues")
                && error.contains(queue)
                && error.contains(" of the pod \"shop/plain\""),
            "{error}"
        );
        ensure!(cri.runs(&containers[COUNTER])?, "it was not paused");
        Ok(())
    };
    cri.exec(&containers[COUNTER], &["touch", "/dev/mqueue/orders"])?;
    refused("/orders")?;
    shell.send(
        0,
        "exec 3<>/dev/mqueue/orders; rm /dev/mqueue/orders; echo op''en\n",
    )?;
    shell.wait_for(1, "open")?;
    refused("/orders")?;
    shell.send(0, "exec 3>&-; echo clo''sed\n")?;
    shell.wait_for(1, "closed")?;
    Ok(())
}

fn a_missing_volume_is_refused(node: &Node, cri: &Cri) -> anyhow::Result<()> {
    let annotation = [("dev.transship/restore", "plain")];
    let pod = cri.run_pod(("shop", "without"), &annotation, PodNamespaces::Usual)?;
    node.shell("mkdir -p /srv/elsewhere").run()?;
    let sharer = PodContainer {
        name: "sharer",
        image: MATES,
        command: &["/usr/bin/podmate", "sharer"],
        mounts: &[("/srv/elsewhere", "/work")],
        ..PodContainer::default()
    };
    let Err(error) = cri.run_container(&pod, &sharer) else {
        anyhow::bail!("it runs without its volume");
    };
    let error = error.to_string();
    ensure!(
        error.contains("emptyDir volume") && error.contains("work"),
        "{error}"
    );
    cri.remove_pod(&pod)?;
    Ok(())
}

/// The pause process is killed; kubelet ends the containers and makes the sandbox and them again.
fn the_next_sandbox_starts_cold(
    node: &Node,
    cri: &Cri,
    pod: &Pod,
    containers: &[String],
) -> anyhow::Result<()> {
    let id = &pod.id;
    node.shell(&format!("ctr -n k8s.io tasks kill -s KILL {id}"))
        .run()?;
    poll_until("the end of the sandbox", PATIENCE, || {
        match cri.pod_runs(pod) {
            Ok(false) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })?;
    for container in containers {
        cri.stop_container(container, 0)?;
    }
    let again = cri.run_pod_again(pod)?;
    let uid = pod.uid();
    let work = format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/work");
    node.shell(&format!("rm -f {work}/mate.sock; echo kept >{work}/kept"))
        .run()?;
    let cold = run(node, cri, &again, 1)?;
    for id in &cold {
        ensure!(cri.runs(id)?, "{id} runs");
    }
    let count = reached(cri, &cold[COUNTER])?;
    ensure!(count < 60, "it was not restored again: it is at {count}");
    let kept = cri.exec(&cold[SHARER], &["cat", "/work/kept"])?;
    ensure!(kept.stdout == b"kept\n", "the volume goes on: {kept:?}");
    cri.remove_pod(pod)?;
    cri.remove_pod(&again)?;
    journey::check_no_pod_left(node)
}

/// `shareProcessNamespace`: the containers are restored with their pids into the new sandbox's.
fn a_pod_shares_its_processes(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    start(bed, &node, true)?;
    let cri = node.cri()?;
    let second = PodContainer {
        name: "second",
        command: &["/usr/bin/counter", "--memory-mb", "16", "--port", "7001"],
        ..FIRST
    };
    let old = cri.run_pod(("shop", "open"), &[], PodNamespaces::WithProcesses)?;
    let ids = [
        cri.run_container(&old, &FIRST)?,
        cri.run_container(&old, &second)?,
    ];
    let pids = |id: &str| -> anyhow::Result<String> {
        let list = cri.exec(id, &["sh", "-c", "grep -l counter /proc/[0-9]*/comm"])?;
        Ok(String::from_utf8(list.stdout)?)
    };
    let before = pids(&ids[0])?;
    ensure!(before.lines().count() == 2, "both are seen: {before}");
    let counts = [reached(&cri, &ids[0])?, reached(&cri, &ids[1])?];
    node.command("transship")
        .args(["checkpoint", "--pod", "shop/open", "--name", "open"])
        .run()?;
    cri.remove_pod(&old)?;
    let annotation = [("dev.transship/restore", "open")];
    let pod = cri.run_pod(
        ("shop", "open-again"),
        &annotation,
        PodNamespaces::WithProcesses,
    )?;
    let ids = [
        cri.run_container(&pod, &FIRST)?,
        cri.run_container(&pod, &second)?,
    ];
    for (id, count) in ids.iter().zip(counts) {
        ensure!(cri.runs(id)?, "{id} runs");
        ensure!(reached(&cri, id)? >= count, "it was restored");
    }
    ensure!(pids(&ids[1])? == before, "they have the pids that they had");
    cri.remove_pod(&pod)?;

    // Somebody who comes first takes the pid away.
    let pod = cri.run_pod(
        ("shop", "open-late"),
        &annotation,
        PodNamespaces::WithProcesses,
    )?;
    let ids = before
        .split('/')
        .filter_map(|part| part.parse::<u32>().ok());
    let last = ids.min().unwrap_or_default() - 1;
    let id = &pod.id;
    node.shell(&format!(
        "pause=$(ctr -n k8s.io tasks ls | awk '$1 == \"{id}\" {{print $2}}')
         nsenter --target $pause --pid sh -c 'echo {last} >/proc/sys/kernel/ns_last_pid'
         nsenter --target $pause --pid tail -f /dev/null </dev/null >/dev/null 2>&1 &
         until pidof tail; do :; done"
    ))
    .run()?;
    let Err(error) = cri.run_container(&pod, &FIRST) else {
        anyhow::bail!("it has the pid of another");
    };
    let error = error.to_string();
    ensure!(
        error.contains("process id") && error.contains("tail"),
        "{error}"
    );
    cri.remove_pod(&pod)?;
    journey::check_no_pod_left(&node)
}

/// Whatever is half made then goes with the pod, and the checkpoint can be restored again.
fn containerd_is_killed_in_a_restore(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    start(bed, &node, true)?;
    let cri = node.cri()?;
    let old = cri.run_pod(("shop", "cut"), &[], PodNamespaces::Usual)?;
    let id = cri.run_container(&old, &FIRST)?;
    let before = reached(&cri, &id)?;
    node.command("transship")
        .args(["checkpoint", "--pod", "shop/cut", "--name", "cut"])
        .run()?;
    cri.remove_pod(&old)?;
    let annotation = [("dev.transship/restore", "cut")];
    let pod = cri.run_pod(("shop", "cut-off"), &annotation, PodNamespaces::Usual)?;
    let id = cri.create_container(&pod, &FIRST)?;
    let killer = node
        .shell("until pidof criu >/dev/null; do :; done; kill -9 $(pidof containerd)")
        .spawn()?;
    let started = cri.start_container(&id);
    ensure!({ killer }.wait()?.success(), "containerd was killed");
    ensure!(started.is_err(), "it was killed in the middle");
    drop(cri);
    node.start_containerd(&ContainerdConfig {
        transship_diff: false,
        ..ContainerdConfig::transship()
    })?;
    let cri = node.cri()?;
    // The CRI of 1.6 answers later than containerd.
    let status = poll_until("the CRI", PATIENCE, || {
        cri.status(&id).map_err(|error| error.to_string())
    })?;
    poll_until("the end of the pod", PATIENCE, || {
        cri.remove_pod(&pod)
            .map_err(|error| format!("{error}; {status:?}"))
    })?;
    journey::check_no_pod_left(&node)?;
    let pod = cri.run_pod(("shop", "cut-again"), &annotation, PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &FIRST)?;
    ensure!(reached(&cri, &id)? >= before, "it is restored");
    cri.remove_pod(&pod)?;
    journey::check_no_pod_left(&node)
}
