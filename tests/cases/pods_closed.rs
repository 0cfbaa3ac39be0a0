//! What the author of a pod may not choose: options that loosen what confines a container, and a
//! configuration of CRIU, which runs as root.

use anyhow::ensure;
use transship_testbed::{
    CommandRun as _, ContainerdConfig, Cri, Image, Node, PodNamespaces, Testbed, Tree, journey,
};

use crate::Case;
use crate::pods::{FIRST, IMAGE, start};

const NODE_CONFIG: &str = "/etc/transship/node.toml";
/// How it is allowed.
const ALLOWED: &str = "allow-options = [\"ext-unix-sk\"] under [pods] in /etc/transship/node.toml";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let criu_config = Case {
        what: "pod_criu_config",
        tree: Tree::Forky,
        run: a_pod_names_no_configuration_of_criu,
    };
    Case::on_all_trees("pod_closed_options", options_that_loosen_are_refused)
        .chain(std::iter::once(criu_config))
}

fn options_that_loosen_are_refused(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    start(bed, &node, true)?;
    let cri = node.cri()?;
    let pod = cri.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &FIRST)?;
    journey::ask(&node, &cri.pod_ip(&pod)?)?;
    node.shell("transship checkpoint --pod shop/web --name web")
        .run()?;
    // No checkpoint is taken that nothing could restore.
    let sockets = "transship checkpoint --pod shop/web --name sockets --ext-unix-sk";
    let refusal = node.shell(sockets).read_failure()?;
    ensure!(
        refusal.contains(ALLOWED) && !refusal.trim().contains('\n'),
        "{refusal}"
    );
    node.write_file(NODE_CONFIG, "[pods]\nallow-options = [\"ext-unix-sk\"]\n")?;
    node.shell(&format!("{sockets}; rm {NODE_CONFIG}")).run()?;
    cri.remove_pod(&pod)?;
    drop(id);

    for (option, value) in [
        ("lsm-profile", "apparmor:unconfined"),
        ("lsm-mount-context", "system_u:object_r:x:s0"),
        ("manage-cgroups-mode", "full"),
        ("manage-cgroups-mode", "strict"),
        ("shell-job", "true"),
        ("lazy-pages", "true"),
        ("rootfs", "filled"),
    ] {
        let annotation = format!("dev.transship/{option}");
        refused(&node, &cri, "web", &[(&annotation, value)], option)?;
    }
    refused(&node, &cri, "sockets", &[], "ext-unix-sk")?;

    node.write_file(NODE_CONFIG, "[pods]\nallow-options = [\"ext-unix-sk\"]\n")?;
    let restore = ("dev.transship/restore", "sockets");
    let soft = ("dev.transship/manage-cgroups-mode", "soft");
    let pod = cri.run_pod(("shop", "allowed"), &[restore, soft], PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &FIRST)?;
    ensure!(cri.runs(&id)?, "its operator allows it");
    cri.remove_pod(&pod)?;
    journey::check_no_pod_left(&node)
}

fn refused(
    node: &Node,
    cri: &Cri,
    checkpoint: &str,
    more: &[(&str, &str)],
    option: &str,
) -> anyhow::Result<()> {
    let cold = ("dev.transship/on-failure", "cold-start");
    let restore = ("dev.transship/restore", checkpoint);
    let annotations = [&[restore, cold], more].concat();
    let Err(error) = cri.run_pod(("shop", "refused"), &annotations, PodNamespaces::Usual) else {
        anyhow::bail!("a pod chooses {more:?}");
    };
    let text = error.to_string().replace('\\', "");
    let said = format!("allow-options = [\"{option}\"] under [pods]");
    ensure!(text.contains(&said), "{text:?} does not say {said:?}");
    journey::check_no_pod_left(node)
}

/// containerd hands annotations with other prefixes on, too, where its configuration says so.
fn a_pod_names_no_configuration_of_criu(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    node.start_snapshotter()?;
    let config = ContainerdConfig {
        transship_diff: false,
        more_annotations: &["org.criu.*"],
        ..ContainerdConfig::transship()
    };
    node.start_containerd(&config)?;
    for image in [Image::pause(bed.settings())?, journey::counter_image(bed)?] {
        node.import_image_into("k8s.io", &image, "transship")?;
    }
    ensure!(IMAGE == FIRST.image, "the image is there");
    // As in an emptyDir of the pod.
    node.shell(
        "mkdir -p /var/lib/pod-files
         printf '#!/bin/sh\\ntouch /pwned-by-criu\\n' >/var/lib/pod-files/script
         chmod 755 /var/lib/pod-files/script
         echo 'action-script /var/lib/pod-files/script' >/var/lib/pod-files/c.conf",
    )
    .run()?;
    let named = ("org.criu.config", "/var/lib/pod-files/c.conf");
    let cri = node.cri()?;

    let pod = cri.run_pod(("shop", "web"), &[named], PodNamespaces::Usual)?;
    cri.run_container(&pod, &FIRST)?;
    let refusal = node
        .shell("transship checkpoint --pod shop/web --name web")
        .run();
    let Err(refusal) = refusal else {
        anyhow::bail!("CRIU dumps by the configuration of a pod");
    };
    let refusal = refusal.to_string();
    ensure!(refusal.contains("only files below /etc/criu"), "{refusal}");
    cri.remove_pod(&pod)?;
    not_executed(&node)?;

    // With an annotation of ours it is taken out before the runtime keeps it.
    let ours = ("dev.transship/tcp", "close");
    let pod = cri.run_pod(("shop", "web"), &[named, ours], PodNamespaces::Usual)?;
    cri.run_container(&pod, &FIRST)?;
    node.shell("transship checkpoint --pod shop/web --name web")
        .run()?;
    cri.remove_pod(&pod)?;
    not_executed(&node)?;
    let restore = ("dev.transship/restore", "web");
    let pod = cri.run_pod(("shop", "web"), &[named, restore], PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &FIRST)?;
    ensure!(cri.runs(&id)?, "it is restored");
    node.shell("transship checkpoint --pod shop/web --name again")
        .run()?;
    cri.remove_pod(&pod)?;
    not_executed(&node)?;
    journey::check_no_pod_left(&node)
}

fn not_executed(node: &Node) -> anyhow::Result<()> {
    let found = node.shell("ls /pwned-by-criu 2>/dev/null || true").read()?;
    ensure!(found.is_empty(), "CRIU has executed what a pod named");
    Ok(())
}
