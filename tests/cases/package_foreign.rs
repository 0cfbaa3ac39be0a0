//! Archives of other engines, with containerd 2.1.9 as the other one: what its CRI writes for kubelet is
//! restored into a pod by us, and what we write is restored by its CreateContainer.
//!
//! ```text
//!  CheckpointContainer ──> tar ──> transship import ──> pod with dev.transship/restore
//!  transship checkpoint --pod ──> export --format containerd ──> tar ──> CreateContainer, image: the tar
//! ```

use anyhow::ensure;
use transship_testbed::{
    CommandRun as _, ContainerdConfig, Cri, DebianProgram, Node, PodContainer, PodNamespaces,
    Testbed, Tree, journey,
};

use crate::Case;
use crate::journey::fails_with;
use crate::package_image::from_a_registry;
use crate::package_registry::start_registry;
use crate::pods::{self, IMAGE as BUILT, import_images, reached};

const IMAGE: &str = "127.0.0.1:5000/counter:1";
pub(crate) const FIRST: PodContainer<'static> = PodContainer {
    image: IMAGE,
    ..pods::FIRST
};

const KUBELETS: &str =
    "/var/lib/kubelet/checkpoints/checkpoint-web_shop-first-2026-11-26T09:27:01Z.tar";
pub(crate) const POD: (&str, &str) = ("shop", "web");

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    std::iter::once(Case {
        what: "package_pod",
        tree: Tree::Forky,
        run: archives_and_registries_of_pods,
    })
}

fn start(bed: &Testbed) -> anyhow::Result<Node> {
    let node = bed.node("a")?;
    node.start_snapshotter()?;
    node.start_containerd(&ContainerdConfig {
        transship_diff: false,
        ..ContainerdConfig::transship()
    })?;
    import_images(bed, &node, "transship")?;
    // containerd 2.1 pulls the image by its digest, whether it is there or not.
    start_registry(&node, "registry", 5000, "", "")?;
    node.shell(&format!(
        "ctr -n k8s.io images tag {BUILT} {IMAGE} >/dev/null
         ctr -n k8s.io images push --plain-http {IMAGE} >/dev/null"
    ))
    .run()?;
    Ok(node)
}

fn archives_and_registries_of_pods(bed: &Testbed) -> anyhow::Result<()> {
    let node = start(bed)?;
    let cri = node.cri()?;
    let before = from_containerd(&node, &cri)?;
    let program = DebianProgram::CHECKPOINTCTL.fetch(bed.settings())?;
    node.write_file("/usr/local/bin/checkpointctl", std::fs::read(program)?)?;
    node.shell("chmod 755 /usr/local/bin/checkpointctl").run()?;
    to_containerd(&node, &cri, before)?;
    to_crio(&node)?;
    the_latest_is_restored_once(&node, &cri)?;
    from_a_registry(&node, &cri, before)?;
    node.shell("transship rm theirs; rm -r /var/lib/kubelet/checkpoints")
        .run()?;
    journey::check_no_pod_left(&node)
}

/// Gives the count that the checkpoint `ours` has at least.
fn from_containerd(node: &Node, cri: &Cri) -> anyhow::Result<u64> {
    let pod = cri.run_pod(POD, &[], PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &FIRST)?;
    journey::ask(node, &cri.pod_ip(&pod)?)?;
    node.shell("mkdir -p /var/lib/kubelet/checkpoints").run()?;
    let before = reached(cri, &id)?;
    cri.checkpoint_container(&id, KUBELETS)?;
    cri.remove_pod(&pod)?;

    let imported = { node.shell(&format!("transship import {KUBELETS} --name theirs")) }.read()?;
    ensure!(imported.contains("an archive of containerd"), "{imported}");
    let text = { node.shell("transship inspect theirs --verify") }.read()?;
    ensure!(
        text.contains("shop/web") && text.contains("container first"),
        "{text}"
    );
    let pod = cri.run_pod(
        POD,
        &[("dev.transship/restore", "theirs")],
        PodNamespaces::Usual,
    )?;
    let id = cri.run_container(&pod, &FIRST)?;
    let reply = journey::ask(node, &cri.pod_ip(&pod)?)?;
    ensure!(
        reply.memory_ok && reply.count >= before,
        "{reply:?}, {before} before"
    );
    ensure!(reached(cri, &id)? >= before, "a count is missing");

    // The same pod once more, for the way back.
    node.command("transship")
        .args(["checkpoint", "--pod", "shop/web", "--name", "ours"])
        .run()?;
    cri.remove_pod(&pod)?;
    // A name that is taken, an archive that is cut off, one of another image.
    fails_with(
        node,
        &["import", KUBELETS, "--name", "theirs"],
        1,
        "exists already",
    )?;
    node.shell(&format!("head -c 300000 {KUBELETS} >/root/cut.tar"))
        .run()?;
    fails_with(node, &["import", "/root/cut.tar"], 1, "package")?;
    node.shell(
        "mkdir /root/t; cd /root/t; tar -xf /var/lib/kubelet/checkpoints/*.tar
         sed -i 's/sha256:[0-9a-f]*/sha256:0000000000000000000000000000000000000000000000000000000000000000/' config.dump
         tar -cf /root/other.tar *; cd /; rm -r /root/t",
    )
    .run()?;
    fails_with(node, &["import", "/root/other.tar"], 4, "images pull")?;
    let left = { node.shell("ls -A /var/lib/transship/checkpoints | xargs") }.read()?;
    ensure!(left.trim() == "ours theirs", "{left}");
    Ok(before)
}

/// As in the template of a StatefulSet: the name is always the same, and so is the annotation.
fn the_latest_is_restored_once(node: &Node, cri: &Cri) -> anyhow::Result<()> {
    let latest = [("dev.transship/restore-latest", "true")];
    let run = || -> anyhow::Result<u64> {
        let pod = cri.run_pod(POD, &latest, PodNamespaces::Usual)?;
        let id = cri.run_container(&pod, &FIRST)?;
        journey::ask(node, &cri.pod_ip(&pod)?)?;
        let count = reached(cri, &id)?;
        cri.remove_pod(&pod)?;
        Ok(count)
    };
    let listed = {
        node.shell("transship ls --json | jq -r '.[] | .name + \" \" + (.restored | tostring)'")
    }
    .read()?;
    ensure!(listed.trim() == "ours 0\ntheirs 1", "{listed}");
    let before = { node.shell("transship inspect ours --json | jq .manifest.created") }.read()?;
    let restored = run()?;
    // What its container writes first thing is in the checkpoint already.
    let listed = { node.shell("transship ls --json | jq '.[0].restored'") }.read()?;
    ensure!(
        listed.trim() == "1" && restored > 0,
        "{listed}, {restored}, of {before}"
    );
    let cold = run()?;
    ensure!(cold < restored, "{cold} is not cold: {restored} before");
    let log = { node.shell("tail -1 /var/log/transship/restores.log") }.read()?;
    ensure!(
        log.contains("started-cold") && log.contains("wants its latest"),
        "{log}"
    );
    Ok(())
}

fn to_containerd(node: &Node, cri: &Cri, before: u64) -> anyhow::Result<()> {
    let export = "transship export ours /root/ours.tar --format containerd";
    node.shell(export).run()?;
    checkpointctl_reads(node, "/root/ours.tar", "containerd")?;
    let pod = cri.run_pod(POD, &[], PodNamespaces::Usual)?;
    let restored = PodContainer {
        image: "/root/ours.tar",
        ..FIRST
    };
    let id = cri.run_container(&pod, &restored)?;
    let reply = journey::ask(node, &cri.pod_ip(&pod)?)?;
    ensure!(
        reply.memory_ok && reply.count >= before,
        "{reply:?}, {before} before"
    );
    let files = cri.exec(&id, &["cat", "/data/made/note"])?;
    ensure!(files.stdout == b"made at the start\n", "{files:?}");
    cri.remove_pod(&pod)?;
    Ok(())
}

/// CRI-O is not to be had: its archive has what it reads, and comes back.
fn to_crio(node: &Node) -> anyhow::Result<()> {
    let list = {
        node.shell("transship export ours /root/crio.tar --format crio; tar -tf /root/crio.tar")
    };
    let list = { list }.read()?;
    for member in [
        "checkpoint/inventory.img",
        "config.dump",
        "spec.dump",
        "stats-dump",
        "dump.log",
        "bind.mounts",
        "rootfs-diff.tar",
        "deleted.files",
    ] {
        ensure!(
            list.lines().any(|line| line == member),
            "no {member} in\n{list}"
        );
    }
    checkpointctl_reads(node, "/root/crio.tar", "CRI-O")?;
    let deleted = { node.shell("tar -xOf /root/crio.tar deleted.files") }.read()?;
    ensure!(deleted.contains("\"/data/delete-me\""), "{deleted}");
    let back =
        { node.shell("transship import /root/crio.tar --name back; transship inspect back --all") };
    let back = { back }.read()?;
    ensure!(
        back.contains("an archive of CRI-O") && back.contains("deleted  /data/delete-me"),
        "{back}"
    );
    Ok(node.shell("transship rm back").run()?)
}

/// Every section that the usual reader has.
fn checkpointctl_reads(node: &Node, archive: &str, engine: &str) -> anyhow::Result<()> {
    let shown = {
        node.shell(&format!(
            "checkpointctl show {archive}; checkpointctl inspect --all {archive}"
        ))
    };
    let shown = { shown }.read()?;
    for section in [
        "first",
        engine,
        "Checkpoint size",
        "Root FS diff size",
        "CRIU dump statistics",
        "Process tree",
        "counter",
        "Open files",
        "Open sockets",
        "Overview of mounts",
    ] {
        ensure!(shown.contains(section), "no {section:?} in\n{shown}");
    }
    Ok(())
}
