//! The testbed itself: nodes start, know each other, and run containers with stock parts.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use transship_testbed::{
    CommandRun as _, ContainerdConfig, Image, NodeOptions, Storage, Testbed, Tree, poll_until,
};

use crate::Case;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let run: [(_, fn(&Testbed) -> _); 2] = [
        ("disk_fills_up_at_its_size", disk_fills_up_at_its_size),
        ("runs_crun", runs_crun),
    ];
    Case::on_all_trees("starts", nodes_start_and_run_a_container).chain(run.map(|(what, run)| {
        Case {
            what,
            tree: Tree::Trixie,
            run,
        }
    }))
}

fn nodes_start_and_run_a_container(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = (bed.node("a")?, bed.node("b")?);
    bed.link(&a, &b)?;
    a.command("ping")
        .args(["-c", "1", "-W", "5", "node-b"])
        .run()?;
    b.command("ping")
        .args(["-c", "1", "-W", "5", "node-a"])
        .run()?;
    let image = Image::counter(bed.settings(), &bed.tree_dir().join("bin/busybox"))?;
    for node in [&a, &b] {
        let containerd = node.start_containerd(&ContainerdConfig::default())?;
        ensure!(containerd.version()? == bed.tree().containerd_version());
        node.import_image(&image, "overlayfs")?;
        let run = [
            "run",
            "--detach",
            "--cni",
            "--snapshotter",
            "overlayfs",
            image.reference(),
        ];
        node.ctr(&[&run[..], &["web", "/usr/bin/counter", "--memory-mb", "16"]].concat())?;
    }
    // The same container id on both nodes, each with its own cgroup.
    let address = |node: &transship_testbed::Node| {
        let exec = [
            "task",
            "exec",
            "--exec-id",
            "ip",
            "web",
            "ip",
            "-4",
            "-o",
            "addr",
            "show",
            "eth0",
        ];
        let text = node.ctr(&exec)?;
        let address = text
            .split_whitespace()
            .nth(3)
            .and_then(|net| net.split('/').next());
        address
            .map(str::to_owned)
            .with_context(|| format!("no address in {text:?}"))
    };
    let address_of_b = address(&b)?;
    let reply = poll_until(
        "answer of b's counter to a",
        Duration::from_secs(20),
        || a.ask_counter(&format!("{address_of_b}:7000")),
    )?;
    ensure!(reply.memory_ok && reply.memory_mb == 16 && reply.local_ip == address_of_b);
    ensure!(bed.ssh(&a, &b)? == "ssh node-b");
    ensure!(a.shell("ssh node-b hostname").read()? == "node-b\n");
    Ok(())
}

fn disk_fills_up_at_its_size(bed: &Testbed) -> anyhow::Result<()> {
    let options = NodeOptions {
        storage: Storage::Tmpfs("32m".to_owned()),
        ..Default::default()
    };
    let node = bed.node_with("a", &options)?;
    for dir in ["/var/lib/containerd", "/var/lib/transship", "/root"] {
        let fill = format!("head -c 64M /dev/zero >{dir}/full");
        let error = node.shell(&fill).read_failure()?;
        ensure!(error.contains("No space left on device"), "{dir}: {error}");
        node.shell(&format!("rm {dir}/full")).run()?;
    }
    Ok(())
}

fn runs_crun(bed: &Testbed) -> anyhow::Result<()> {
    let options = NodeOptions {
        without_unified_cgroup: true,
        ..Default::default()
    };
    let node = bed.node_with("a", &options)?;
    node.start_containerd(&ContainerdConfig::default())?;
    let image = Image::counter(bed.settings(), &bed.tree_dir().join("bin/busybox"))?;
    node.import_image(&image, "overlayfs")?;
    let run = [
        "run",
        "--rm",
        "--runc-binary",
        "crun",
        image.reference(),
        "one",
        "echo",
        "done",
    ];
    ensure!(node.ctr(&run)? == "done\n");
    Ok(())
}
