//! Pods through the plain CRI: a checkpoint of all containers, restored by one annotation into a new
//! pod on another node.

use anyhow::ensure;
use transship_testbed::{
    CommandRun as _, ContainerdConfig, Cri, Image, Node, Pod, PodContainer, PodNamespaces,
    PodSecurity, Testbed, journey,
};

use crate::Case;

const POD: (&str, &str) = ("shop", "web");
pub(crate) const IMAGE: &str = "transship.test/counter:1";
pub(crate) const FIRST: PodContainer<'static> = PodContainer {
    name: "first",
    attempt: 0,
    image: IMAGE,
    command: &["/usr/bin/counter", "--memory-mb", "32"],
    mounts: &[],
    read_only_mounts: &[],
    security: PodSecurity::NONE,
    tty: false,
    memory_limit: 0,
};
pub(crate) const SECOND: PodContainer<'static> = PodContainer {
    name: "second",
    command: &["/usr/bin/counter", "--memory-mb", "16", "--port", "7001"],
    ..FIRST
};

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    Case::on_all_trees("pod", |bed| a_pod_goes_on_elsewhere(bed, true))
        .chain(Case::on_all_trees("pod_overlayfs", |bed| {
            a_pod_goes_on_elsewhere(bed, false)
        }))
        .chain(Case::on_all_trees(
            "pod_host_network",
            a_host_network_pod_goes_on_elsewhere,
        ))
}

pub(crate) fn a_pod_goes_on_elsewhere(
    bed: &Testbed,
    transship_snapshotter: bool,
) -> anyhow::Result<()> {
    let [a, b] = start_two(bed, transship_snapshotter)?;
    let cri = a.cri()?;
    let pod = cri.run_pod(POD, &[], PodNamespaces::Usual)?;
    let first = cri.run_container(&pod, &FIRST)?;
    let second = cri.run_container(&pod, &SECOND)?;
    let address = cri.pod_ip(&pod)?;
    journey::ask(&a, &address)?;
    let before = [reached(&cri, &first)?, reached(&cri, &second)?];

    a.command("transship")
        .args(["checkpoint", "--pod", "shop/web", "--name", "web"])
        .run()?;
    for (id, before) in [&first, &second].into_iter().zip(before) {
        ensure!(
            cri.runs(id)? && reached(&cri, id)? >= before,
            "a checkpoint stops nothing"
        );
    }
    cri.remove_pod(&pod)?;
    send(bed, &a, &b, "web")?;

    let cri = b.cri()?;
    let annotation = [("dev.transship/restore", "web")];
    let Err(refusal) = cri.run_pod(("bank", "thief"), &annotation, PodNamespaces::Usual) else {
        anyhow::bail!("a pod of another namespace has it");
    };
    ensure!(
        refusal.to_string().contains("may not restore it"),
        "{refusal}"
    );
    let pod = cri.run_pod(("shop", "web-again"), &annotation, PodNamespaces::Usual)?;
    let first = cri.run_container(&pod, &FIRST)?;
    let second = cri.run_container(&pod, &SECOND)?;
    let address = cri.pod_ip(&pod)?;
    let reply = journey::ask(&b, &address)?;
    ensure!(
        reply.count >= before[0] && reply.memory_ok && reply.memory_mb == 32,
        "{reply:?}"
    );
    ensure!(
        reply.local_ip == address && reply.hostname == "web-again",
        "{reply:?}"
    );
    for (id, before) in [&first, &second].into_iter().zip(before) {
        ensure!(cri.runs(id)?, "the restored container runs");
        let now = reached(&cri, id)?;
        ensure!(now >= before, "{now} is not beyond {before}");
    }
    a_checkpoint_is_consumed_once(&cri, &pod, &first)?;
    cri.remove_pod(&pod)?;
    journey::check_no_pod_left(&b)
}

/// `hostNetwork`: neither the network nor the host name is the sandbox's, so there is nothing of them
/// to join, and what listened on the one node listens on the other.
fn a_host_network_pod_goes_on_elsewhere(bed: &Testbed) -> anyhow::Result<()> {
    let [a, b] = start_two(bed, true)?;
    let cri = a.cri()?;
    let pod = cri.run_pod(POD, &[], PodNamespaces::HostNetwork)?;
    let id = cri.run_container(&pod, &FIRST)?;
    let before = journey::ask(&a, "127.0.0.1")?;
    ensure!(before.hostname == hostname(&a)?, "{before:?}");
    a.command("transship")
        .args(["checkpoint", "--pod", "shop/web", "--name", "web"])
        .run()?;
    ensure!(cri.runs(&id)?, "a checkpoint stops nothing");
    cri.remove_pod(&pod)?;
    send(bed, &a, &b, "web")?;

    let cri = b.cri()?;
    let annotation = [("dev.transship/restore", "web")];
    let pod = cri.run_pod(POD, &annotation, PodNamespaces::HostNetwork)?;
    let id = cri.run_container(&pod, &FIRST)?;
    let reply = journey::ask(&b, "127.0.0.1")?;
    ensure!(
        reply.count >= before.count && reply.memory_ok && reply.memory_mb == 32,
        "{reply:?}"
    );
    ensure!(
        reply.hostname == hostname(&b)?,
        "{reply:?}: not that of the node"
    );
    ensure!(reached(&cri, &id)? >= before.count, "no count is missing");
    cri.remove_pod(&pod)?;
    journey::check_no_pod_left(&b)
}

fn hostname(node: &Node) -> anyhow::Result<String> {
    Ok({ node.shell("cat /proc/sys/kernel/hostname") }
        .read()?
        .trim()
        .to_owned())
}

/// The next attempt starts from the image, as kubelet expects.
fn a_checkpoint_is_consumed_once(cri: &Cri, pod: &Pod, first: &str) -> anyhow::Result<()> {
    cri.stop_container(first, 0)?;
    ensure!(cri.status(first)?.exit_code == 137, "killed by SIGKILL");
    cri.remove_container(first)?;
    let again = cri.run_container(
        pod,
        &PodContainer {
            attempt: 1,
            ..FIRST
        },
    )?;
    ensure!(cri.runs(&again)?, "the second attempt runs");
    let count = reached(cri, &again)?;
    ensure!(count < 40, "the second attempt began at {count}");
    Ok(())
}

/// Two linked nodes, ready for pods.
pub(crate) fn start_two(bed: &Testbed, transship_snapshotter: bool) -> anyhow::Result<[Node; 2]> {
    let nodes = [bed.node("a")?, bed.node("b")?];
    let [a, b] = &nodes;
    bed.link(a, b)?;
    for node in &nodes {
        start(bed, node, transship_snapshotter)?;
    }
    Ok(nodes)
}

/// Copies a checkpoint from one node to the other.
pub(crate) fn send(bed: &Testbed, from: &Node, to: &Node, name: &str) -> anyhow::Result<()> {
    let ssh = bed.ssh(from, to)?;
    let send = format!("transship send {name} | {ssh} transship receive");
    Ok({ from.shell(&send) }.run()?)
}

pub(crate) fn start(bed: &Testbed, node: &Node, transship_snapshotter: bool) -> anyhow::Result<()> {
    if transship_snapshotter {
        node.start_snapshotter()?;
    }
    start_containerd(node, transship_snapshotter)?;
    let snapshotter = if transship_snapshotter {
        "transship"
    } else {
        "overlayfs"
    };
    import_images(bed, node, snapshotter)
}

/// A containerd whose CRI has the runtime front.
pub(crate) fn start_containerd(node: &Node, transship_snapshotter: bool) -> anyhow::Result<()> {
    node.start_containerd(&ContainerdConfig {
        transship_snapshotter,
        transship_diff: false,
        ..ContainerdConfig::transship()
    })?;
    Ok(())
}

/// The images of the tests' pods.
pub(crate) fn import_images(bed: &Testbed, node: &Node, snapshotter: &str) -> anyhow::Result<()> {
    let busybox = bed.tree_dir().join("bin/busybox");
    for image in [
        Image::pause(bed.settings())?,
        journey::counter_image(bed)?,
        Image::podmate(bed.settings(), &busybox)?,
    ] {
        node.import_image_into("k8s.io", &image, snapshotter)?;
    }
    Ok(())
}

/// How far a counter has counted; every value once.
pub(crate) fn reached(cri: &Cri, id: &str) -> anyhow::Result<u64> {
    let answer = cri.exec(id, &["cat", "/data/counts"])?;
    let text = String::from_utf8(answer.stdout)?;
    let mut last = 0;
    for line in text.lines() {
        let value: u64 = line.parse()?;
        ensure!(value == last + 1, "{value} follows {last}");
        last = value;
    }
    Ok(last)
}
