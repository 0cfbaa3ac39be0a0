//! Containers whose image is not what it was when they started: its name means another one, its blobs are
//! gone, are compressed in another way, or its documents say no more than they must. They move all the same, also in a pod.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use transship_testbed::{CommandRun as _, Node, PodNamespaces, Testbed, Tree, journey, poll_until};

use crate::Case;
use crate::pods::start_two;

const NAME: &str = "transship.test/counter:1";
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let case = |what, run| Case {
        what,
        tree: Tree::Forky,
        run,
    };
    [
        case(
            "images_incomplete",
            containers_move_without_their_image as fn(&Testbed) -> anyhow::Result<()>,
        ),
        case("pod_image_incomplete", a_pod_moves_without_its_layers),
    ]
    .into_iter()
}

fn containers_move_without_their_image(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let to_b = bed.ssh(&a, &b)?;

    // The name has moved on, and nothing else keeps the old manifest.
    run(&a, NAME, "moved")?;
    let counter = journey::counter_image(bed)?;
    let newer = counter.clone().with_layer(NAME, layer("newer")?);
    a.import_image(&newer, "transship")?;
    // It fails when containerd collects one of the blobs that it has listed.
    poll_until("the end of what nothing refers to", PATIENCE, || {
        let pruned = a.ctr(&["content", "prune", "references"]);
        pruned.map_err(|error| error.to_string())
    })?;
    let digest = a.shell(&format!(
        "ctr images ls | awk '$1 == \"{NAME}\" {{print $3}}'"
    ));
    let digest = { digest }.read()?;
    let take = "transship checkpoint moved --name moved; transship inspect moved";
    let inspected = a.shell(take).read()?;
    ensure!(
        !inspected.contains(digest.trim()),
        "it is not of {digest}: {inspected}"
    );
    a.shell("transship rm moved").run()?;
    moves(&a, &to_b, &b, "moved")?;
    let images = b.ctr(&["images", "ls", "-q"])?;
    ensure!(
        images.contains("transship/rebuilt@sha256:") && !images.contains(NAME),
        "{images}"
    );
    // It is an ordinary container on an ordinary image there.
    moves(&b, &bed.ssh(&b, &a)?, &a, "moved")?;
    journey::remove_container(&a, "moved")?;

    // Another name has the image, and the blobs of its layers have been discarded.
    let kept = counter
        .clone()
        .with_layer("transship.test/kept:1", layer("kept")?);
    a.import_image(&kept, "transship")?;
    a.ctr(&[
        "images",
        "tag",
        "transship.test/kept:1",
        "transship.test/also:1",
    ])?;
    run(&a, "transship.test/kept:1", "thin")?;
    a.ctr(&["images", "rm", "--sync", "transship.test/kept:1"])?;
    a.shell(&format!(
        "ctr content rm {}",
        top_layer(&a, "default", "transship.test/also:1")?
    ))
    .run()?;
    moves(&a, &to_b, &b, "thin")?;

    // The compressed form of the layer is gone, the plain one is there.
    let top = layer("forms")?;
    let plain = counter
        .clone()
        .with_layer("transship.test/plain:1", top.clone());
    a.write_file("/root/top", &top)?;
    a.shell("gzip -k /root/top").run()?;
    let gzip = ("+gzip", a.read_file("/root/top.gz")?);
    let zipped = counter
        .clone()
        .with_compressed_layer("transship.test/zipped:1", &top, gzip);
    a.import_image(&plain, "transship")?;
    a.import_image(&zipped, "transship")?;
    run(&a, "transship.test/zipped:1", "form")?;
    a.shell(&format!(
        "ctr content rm {}",
        top_layer(&a, "default", "transship.test/zipped:1")?
    ))
    .run()?;
    moves(&a, &to_b, &b, "form")?;
    let images = b.ctr(&["images", "ls", "-q"])?;
    ensure!(
        images.contains("transship.test/zipped:1@sha256:"),
        "the same layers have the same name: {images}"
    );

    let sparse = counter.with_sparse_documents("transship.test/sparse:1");
    a.import_image(&sparse, "transship")?;
    run(&a, "transship.test/sparse:1", "sparse")?;
    moves(&a, &to_b, &b, "sparse")?;

    for node in [&a, &b] {
        let leases = node.ctr(&["leases", "ls", "-q"])?;
        // The differ keeps its own for an hour.
        let left = leases.lines().find(|id| !id.starts_with("transship-diff-"));
        ensure!(left.is_none(), "{leases}");
        let views = node.shell("ctr snapshots --snapshotter transship ls | grep rebuild || true");
        let views = { views }.read()?;
        ensure!(views.is_empty(), "{views}");
    }
    Ok(())
}

/// From a CRI that discards layers when it has unpacked them (`discard_unpacked_layers`), and to one that has them below
/// those of another image.
fn a_pod_moves_without_its_layers(bed: &Testbed) -> anyhow::Result<()> {
    let [a, b] = start_two(bed, true)?;
    let image = journey::counter_image(bed)?.with_layer(NAME, layer("own")?);
    let derived = image
        .clone()
        .with_layer("transship.test/derived:1", layer("more")?);
    a.import_image_into("k8s.io", &image, "transship")?;
    b.import_image_into("k8s.io", &derived, "transship")?;
    let to_b = bed.ssh(&a, &b)?;
    pod_moves(&a, &to_b, &b).context("to a node with its layers in another image")?;

    let images = "export CONTAINERD_NAMESPACE=k8s.io; ctr images rm --sync $(ctr images ls -q | grep -v pause)";
    b.shell(images).run()?;
    a.shell(&format!(
        "ctr -n k8s.io content rm {}",
        top_layer(&a, "k8s.io", NAME)?
    ))
    .run()?;
    pod_moves(&a, &to_b, &b).context("from a node without the blobs of its layers")
}

fn pod_moves(from: &Node, ssh: &str, to: &Node) -> anyhow::Result<()> {
    let cri = from.cri()?;
    let pod = cri.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    journey::run_counter_in_pod(&cri, &pod, 0, 1)?;
    let migrate = ["migrate", "--pod", "shop/web", "--to", ssh];
    let allow = ["--allow", "unmasked-paths"];
    from.command("transship").args(migrate).args(allow).run()?;
    let moved = journey::moved_to(to, &pod)?;
    let cri = to.cri()?;
    let reply = journey::ask(to, &cri.pod_ip(&moved)?)?;
    ensure!(reply.memory_ok, "{reply:?}");
    cri.stop_pod(&moved)?;
    cri.remove_pod(&moved)?;
    Ok(())
}

fn run(node: &Node, image: &str, id: &str) -> anyhow::Result<()> {
    let program = "/usr/bin/counter --memory-mb 1";
    node.shell(&format!(
        "ctr run --detach --snapshotter transship {image} {id} {program}"
    ))
    .run()?;
    journey::wait_for_count(node, id, 3)?;
    Ok(())
}

fn moves(from: &Node, ssh: &str, to: &Node, id: &str) -> anyhow::Result<()> {
    let before = journey::read_counts(from, id).map_err(anyhow::Error::msg)?;
    from.command("transship")
        .args(["migrate", id, "--to", ssh])
        .run()?;
    journey::wait_for_count(to, id, before)?;
    Ok(())
}

/// Digest of the topmost layer of an image whose target is a manifest.
fn top_layer(node: &Node, namespace: &str, image: &str) -> anyhow::Result<String> {
    let digest = node.shell(&format!(
        "export CONTAINERD_NAMESPACE={namespace}
         manifest=$(ctr images ls | awk '$1 == \"{image}\" {{print $3}}')
         ctr content get $manifest | jq -r '.layers[-1].digest'"
    ));
    Ok({ digest }.read()?.trim().to_owned())
}

/// A layer with one file.
pub(crate) fn layer(name: &str) -> anyhow::Result<Vec<u8>> {
    let mut layer = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(name.len() as u64);
    header.set_mode(0o644);
    layer.append_data(&mut header, format!("data/{name}"), name.as_bytes())?;
    Ok(layer.into_inner()?)
}
