//! The labels of a record are what an image says, where the CRI has not made it: they name neither the
//! directory of the dump nor the pod that the checkpoint belongs to.

use anyhow::ensure;
use transship_testbed::{CommandRun as _, Node, Testbed, journey};

use crate::Case;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    Case::on_all_trees("image_labels", labels_name_nothing)
}

fn labels_name_nothing(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    journey::start_services(&node)?;
    let image = journey::counter_image(bed)?;
    for namespace in ["default", "k8s.io"] {
        node.import_image_into(namespace, &image, "transship")?;
    }
    node.shell(
        "mkdir -p /srv/trap/work
         echo precious >/srv/victim; ln -s /srv/victim /srv/trap/rootfs-diff.tar
         printf '#!/bin/sh\\ntouch /srv/ran\\n' >/srv/act; chmod +x /srv/act",
    )
    .run()?;
    let path = "io.kubernetes.container.name=/srv/trap";
    let option = "io.kubernetes.container.name=x\naction-script /srv/act\n#";
    let pod = [
        "io.kubernetes.pod.name=a",
        "io.kubernetes.pod.namespace=shop",
    ];
    for (id, label) in [("path", path), ("option", option)] {
        run(&node, "default", id, &[label, pod[0], pod[1]])?;
        let mut command = node.command("transship");
        command.args(["checkpoint", id, "--name", id, "--link-remap"]);
        command.run()?;
        names_nothing(&node, id)?;
        journey::remove_container(&node, id)?;
    }
    let left = node.shell("cat /srv/victim; ls /srv /srv/trap").read()?;
    ensure!(
        left.split_whitespace().collect::<Vec<_>>()
            == [
                "precious",
                "/srv:",
                "act",
                "trap",
                "victim",
                "/srv/trap:",
                "rootfs-diff.tar",
                "work"
            ],
        "{left}"
    );
    // Nor does one in the CRI's namespace, beside pods, that says it is the CRI's.
    let kinds = ["container", "sandbox"].map(|kind| format!("io.cri-containerd.kind={kind}"));
    for (kind, name) in [
        (&kinds[0], "../../../../srv/out"),
        (&kinds[0], ".hidden"),
        (&kinds[0], "app"),
        (&kinds[1], "app"),
    ] {
        let label = format!("io.kubernetes.container.name={name}");
        run(
            &node,
            "k8s.io",
            "cri",
            &[kind, &label, pod[0], pod[1], "io.kubernetes.pod.uid=u"],
        )?;
        let named = node.shell("transship checkpoint --pod shop/a --name pod");
        ensure!({ named }.run().is_err(), "{kind} {name:?} is a pod");
        node.command("transship")
            .args(["-n", "k8s.io", "checkpoint", "cri", "--name", "cri"])
            .run()?;
        names_nothing(&node, "cri")?;
        node.shell(
            "ctr -n k8s.io tasks kill -s KILL cri; until ctr -n k8s.io tasks delete cri; do sleep 0.1; done
             ctr -n k8s.io containers delete cri",
        )
        .run()?;
    }
    let made = node.shell("ls -A /var/lib/transship/checkpoints").read()?;
    ensure!(made.trim().is_empty(), "{made}");
    journey::check_nothing_left(&node)
}

/// Removes a checkpoint that has the name of its container, and no pod.
fn names_nothing(node: &Node, name: &str) -> anyhow::Result<()> {
    let manifest = format!("cat /var/lib/transship/checkpoints/{name}/transship.json");
    let manifest: serde_json::Value = serde_json::from_str(&{ node.shell(&manifest) }.read()?)?;
    ensure!(
        manifest["containers"][0]["name"] == name && manifest["pod"].is_null(),
        "{manifest}"
    );
    Ok({ node.shell(&format!("transship rm {name}")) }.run()?)
}

fn run(node: &Node, namespace: &str, id: &str, labels: &[&str]) -> anyhow::Result<()> {
    let mut arguments = vec![
        "-n",
        namespace,
        "run",
        "--detach",
        "--snapshotter",
        "transship",
    ];
    for label in labels {
        arguments.extend(["--label", label]);
    }
    let program = ["/usr/bin/counter", "--memory-mb", "1"];
    arguments.extend(["transship.test/counter:1", id]);
    arguments.extend(program);
    node.ctr(&arguments)?;
    Ok(())
}
