//! Images that go around: what our differ has written goes to Debian's registry, is changed there by other
//! builders, and comes back through our differ and through containerd's own, as the same tree.
//!
//! ```text
//!  ours: Diff ─> ctr push ─> docker-registry ─┬─> buildah: from, mount, commit ─────────────┐
//!                                             ├─> podman: pull, create, mount, commit, push ─┤
//!                                             └─> skopeo ─> umoci: unpack, repack ─> skopeo ─┴─> docker-registry
//!  docker-registry ─┬─> ctr pull: transship, our differ ─────> tree ─┐
//!                   └─> ctr pull: overlayfs, walking ────────> tree ─┴─ equal?
//! ```
//!
//! Docker is in docker.rs.

use std::process::Command;

use anyhow::ensure;
use transship_testbed::{CommandRun as _, Image, Node, NodeOptions, Testbed};

use super::pulls::{REGISTRY, start_registry};
use super::{CHANGE, PLAIN, difference, in_snapshot, list_image, log_counts, start, top_of_image};

/// What each builder does on top of [`CHANGE`].
const SECOND_CHANGE: &str = "
    rm -r data/keep; mkdir data/keep; echo 3 >data/keep/3; ln data/keep/3 data/linked
    rm -r new/deep; rm new/hardlink
    echo more >>etc/group; chmod 2755 bin/box; chown 5:6 data
    rm 'new/sym link'; mkdir 'new/sym link'; : >'new/sym link/file'";

/// In the network of the node, in a directory of its own.
const BUILD: &str = "
    dir=$(mktemp --directory)
    trap 'rm -rf $dir' EXIT
    cd $dir
    at=docker://127.0.0.1:5000
    store() { echo --root $PWD/$1 --runroot $PWD/$1-run --storage-driver vfs; }

    b=\"buildah $(store buildah)\"
    container=$($b from --quiet --tls-verify=false 127.0.0.1:5000/ours:1)
    (cd $($b mount $container); sh -euc \"$CHANGE\")
    $b umount $container >/dev/null
    $b commit --quiet --tls-verify=false --format oci $container $at/buildah:1

    p=\"podman $(store podman)\"
    $p pull --quiet --tls-verify=false 127.0.0.1:5000/ours:1 >/dev/null
    container=$($p create 127.0.0.1:5000/ours:1 sh)
    (cd $($p mount $container); sh -euc \"$CHANGE\")
    $p umount $container >/dev/null
    $p commit --quiet --format oci $container 127.0.0.1:5000/podman:1 >/dev/null
    $p push --quiet --tls-verify=false 127.0.0.1:5000/podman:1

    skopeo copy --quiet --src-tls-verify=false $at/ours:1 oci:image:ours
    umoci unpack --image image:ours bundle
    (cd bundle/rootfs; sh -euc \"$CHANGE\")
    umoci repack --image image:umoci bundle
    skopeo copy --quiet --dest-tls-verify=false oci:image:umoci $at/umoci:1";

pub(super) fn images_of_other_builders_are_what_stock_makes_of_them(
    bed: &Testbed,
) -> anyhow::Result<()> {
    let (node, _containerd, image) = start(bed, &NodeOptions::default())?;
    start_registry(&node)?;
    push_changed(&node, &image)?;
    let network = format!("--net=/proc/{}/ns/net", node.pid());
    Command::new("nsenter")
        .args([&network, "timeout", "240", "sh", "-euc", BUILD])
        .env("CHANGE", SECOND_CHANGE)
        .run()?;
    let applied = log_counts(&node, "layer applied")?;
    for builder in ["buildah", "podman", "umoci"] {
        let reference = format!("{REGISTRY}/{builder}:1");
        let theirs = pull(&node, &reference, "overlayfs")?;
        let ours = pull(&node, &reference, "transship")?;
        ensure!(ours.contains("./data/keep/3 f"), "{builder}: {ours}");
        ensure!(ours == theirs, "{builder}:\n{}", difference(&theirs, &ours));
    }
    ensure!(log_counts(&node, "layer applied")? > applied);
    ensure!(log_counts(&node, "WARN")? == 0);
    Ok(())
}

/// Puts the image with [`CHANGE`] on top, as our differ writes it, into the registry: `ours:1`.
pub(super) fn push_changed(node: &Node, image: &Image) -> anyhow::Result<()> {
    let top = top_of_image(node, "transship")?;
    node.ctr(&[
        "snapshots",
        "--snapshotter",
        "transship",
        "prepare",
        "active",
        &top,
    ])?;
    in_snapshot(node, "transship", "active", CHANGE)?;
    node.shell(&format!(
        "ctr snapshots --snapshotter transship diff --media-type {PLAIN} active >/root/layer"
    ))
    .run()?;
    let ours = format!("{REGISTRY}/ours:1");
    let image = image
        .clone()
        .with_layer(&ours, node.read_file("/root/layer")?);
    node.write_file("/root/ours.tar", image.to_archive()?)?;
    Ok(node
        .shell(&format!(
            "ctr images import --local --no-unpack /root/ours.tar
             ctr images push --local --plain-http {ours}"
        ))
        .run()?)
}

/// The tree of an image of the registry.
pub(super) fn pull(node: &Node, reference: &str, snapshotter: &str) -> anyhow::Result<String> {
    node.ctr(&[
        "images",
        "pull",
        "--plain-http",
        "--snapshotter",
        snapshotter,
        reference,
    ])?;
    let tree = list_image(node, reference, snapshotter, false)?;
    // containerd gives a directory that no entry names the time of the unpacking.
    let without_time = |line: &str| {
        let is_directory = line.contains(" d ");
        let end = line.rfind(' ').filter(|_| is_directory);
        line[..end.unwrap_or(line.len())].to_owned()
    };
    let lines: Vec<_> = tree.lines().map(without_time).collect();
    Ok(lines.join("\n"))
}
