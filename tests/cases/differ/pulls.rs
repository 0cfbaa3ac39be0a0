//! Images pulled and imported in each way that containerd has, from Debian's docker-registry in the node: with
//! the shipped samples our differ applies every layer, or hands it on, as its metric tells.
//!
//! ```text
//! ctr images pull, import, both with and without --local; PullImage of the CRI, as kubelet calls it
//! ```

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use containerd_client::connect;
use containerd_client::tonic::Code;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::{ImageSpec, PullImageRequest};
use transship_testbed::{
    CommandRun as _, ContainerdConfig, Image, Node, NodeOptions, Testbed, journey, poll_until,
};

use super::api::Api;
use super::{PATIENCE, PLAIN, difference, list_image};

/// The differs of the shipped samples.
const BOTH_DIFFERS: &str = "default = [\"transship-diff\", \"walking\"]";
pub(super) const REGISTRY: &str = "127.0.0.1:5000";
const REGISTRY_CONFIG: &str = "version: 0.1
storage: {filesystem: {rootdirectory: /var/lib/registry}, delete: {enabled: true}}
http: {addr: '127.0.0.1:5000'}
";

pub(super) fn every_pull_reaches_our_differ(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node_with("a", &NodeOptions::default())?;
    start_registry(&node)?;
    let settings = "metrics_address = \"127.0.0.1:9257\"\n";
    node.write_file("/root/snapshotter.toml", settings)?;
    node.start_snapshotter_with(&["--config", "/root/snapshotter.toml", "--log-level", "debug"])?;
    node.start_containerd(&ContainerdConfig::transship())?;

    let plain = journey::counter_image(bed)?;
    // containerd makes the directory that it means; to us it is a hard link to what is not there.
    let layer = aufs_layer().context("no tar")?;
    let name = format!("{REGISTRY}/odd:1");
    let odd = plain.clone().with_layer(&name, layer);
    node.write_file("/root/odd.tar", odd.to_archive()?)?;
    push(&node, &odd)?;

    let reference = odd.reference();
    let pull = "ctr images pull --plain-http --snapshotter transship";
    let import = "ctr images import --snapshotter transship";
    let mut trees = Vec::new();
    for way in [
        format!("{pull} {reference}"),
        format!("{pull} --local=true {reference}"),
        format!("{pull} --local=false {reference}"),
        format!("{import} /root/odd.tar"),
        format!("{import} --local=true /root/odd.tar"),
        format!("{import} --local=false /root/odd.tar"),
    ] {
        // The transfer service of 1.7 knows no registry without TLS.
        if way.contains("pull") && way.contains("local=false") && !node.tree().has_containerd_2() {
            continue;
        }
        let before = applied(&node)?;
        node.shell(&way).run()?;
        expect_layers(&node, &way, &before, odd.layers())?;
        // containerd gives the directory that it makes the time of the unpacking.
        let tree = list_image(&node, odd.reference(), "transship", true)?;
        let tree = tree
            .lines()
            .filter(|line| !line.starts_with("./.wh..wh.plnk d"));
        trees.push((way, tree.collect::<Vec<_>>().join("\n")));
        forget(&node, "default", reference)?;
    }
    let before = applied(&node)?;
    pull_through_cri(&node, reference)?;
    expect_layers(&node, "PullImage", &before, odd.layers())?;
    let snapshots = node.ctr(&[
        "-n",
        "k8s.io",
        "snapshots",
        "--snapshotter",
        "transship",
        "ls",
    ])?;
    ensure!(
        snapshots.matches("Committed").count() == odd.layers(),
        "{snapshots}"
    );

    for (way, tree) in &trees {
        ensure!(
            tree == &trees[0].1,
            "{way}:\n{}",
            difference(&trees[0].1, tree)
        );
        ensure!(tree.contains("./of-aufs f"), "{way}: {tree}");
    }
    let check = node.shell("transship check || true").read()?;
    for line in [
        "ok       diff service transship-diff, walking",
        "ok       transfer     transship by transship-diff",
    ] {
        ensure!(check.contains(line), "{check}");
    }
    check_tells(&node)?;
    nothing_stays_of_what_nobody_takes(&node)
}

/// What `transship check` says of a configuration that sends layers elsewhere.
fn check_tells(node: &Node) -> anyhow::Result<()> {
    let root = "io.containerd.snapshotter.v1.transship";
    restart_with(
        node,
        &[
            (BOTH_DIFFERS, "default = [\"walking\"]"),
            ("differ = \"transship-diff\"", "differ = \"walking\""),
            (
                &format!("root = \"/var/lib/containerd/{root}\""),
                "root = \"/elsewhere\"",
            ),
        ],
    )?;
    node.ctr(&[
        "snapshots",
        "--snapshotter",
        "transship",
        "prepare",
        "active",
        "",
    ])?;
    let check = node.shell("transship check || true").read()?;
    for line in [
        "walking is asked first: layers do not reach transship-diff",
        "the layers that it pulls go to walking, not to transship-diff",
        "and containerd believes in /elsewhere",
    ] {
        ensure!(check.contains(line), "{check}");
    }
    Ok(())
}

/// Restarts containerd with some of its settings replaced.
fn restart_with(node: &Node, settings: &[(&str, &str)]) -> anyhow::Result<()> {
    node.stop_daemon("containerd", "TERM")?;
    let mut config = ContainerdConfig::transship().to_toml(node.tree());
    for (ours, other) in settings {
        ensure!(config.contains(ours), "{config}");
        config = config.replace(ours, other);
    }
    node.write_file("/root/config.toml", config)?;
    node.start_daemon("containerd", &["containerd", "--config=/root/config.toml"])?;
    Ok(node.wait_for_daemon("containerd", &["ctr", "version"])?)
}

/// Where no other differ is asked, what ours cannot do fails, and the directory is as it was before.
fn nothing_stays_of_what_nobody_takes(node: &Node) -> anyhow::Result<()> {
    restart_with(node, &[(BOTH_DIFFERS, "default = [\"transship-diff\"]")])?;
    let api = Api::of(node)?;
    let base = layer_of(&[("a", b'0', ""), ("d/", b'5', ""), ("d/x", b'0', "")]);
    let base = api.write(PLAIN, &base.context("no tar")?, &[])?;
    let applied = api.apply(&base, api.prepare("base-active", "")?);
    applied.map_err(|code| anyhow::anyhow!("Apply: {code}"))?;
    api.commit("base-active", "base")?;

    let odd = layer_of(&[
        (".wh.a", b'0', ""),
        (".wh..wh..opq", b'0', ""),
        ("d/", b'5', ""),
        ("d/.wh..wh..opq", b'0', ""),
        ("d/e/f", b'0', ""),
        ("link", b'2', "d"),
        ("link/through", b'0', ""),
        ("further", b'1', "d/e/f"),
        ("pipe", b'6', ""),
        ("odd", b'1', "nowhere"),
    ]);
    let odd = api.write(PLAIN, &odd.context("no tar")?, &[])?;
    let mounts = api.prepare("odd", "base")?;
    let mut options = mounts.iter().flat_map(|mount| &mount.options);
    let upperdir = options.find_map(|option| option.strip_prefix("upperdir="));
    let upperdir = upperdir.context("no upperdir")?.to_owned();
    let state = || -> anyhow::Result<(String, usize)> {
        let list = format!("find {upperdir} -printf '%P %y %m %U:%G %n\\n'");
        let outside = node.path_from_outside(&upperdir);
        let mut names = [0_u8; 4096];
        Ok((
            node.shell(&list).read()?,
            rustix::fs::listxattr(outside, &mut names[..])?,
        ))
    };
    let before = state()?;
    ensure!(before.0.lines().count() == 1, "{before:?}");
    let refused = api.apply(&odd, mounts);
    ensure!(refused == Err(Code::Unimplemented), "{refused:?}");
    ensure!(state()? == before, "{before:?}, then {:?}", state()?);
    Ok(())
}

/// Entries of a name, a type and the name that they link to.
fn layer_of(entries: &[(&str, u8, &str)]) -> Option<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, entry_type, link) in entries {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::new(*entry_type));
        header.set_size(0);
        header.set_mode(0o755);
        if !link.is_empty() {
            header.set_link_name(link).ok()?;
        }
        tar.append_data(&mut header, path, &b""[..]).ok()?;
    }
    tar.into_inner().ok()
}

/// A layer of the Docker of 2014: its storage driver's own files, and a hard link to one of them.
fn aufs_layer() -> Option<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(4);
    header.set_mode(0o644);
    tar.append_data(&mut header, ".wh..wh.plnk/5.6", &b"data"[..])
        .ok()?;
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Link);
    header.set_size(0);
    header.set_mode(0o644);
    tar.append_link(&mut header, "of-aufs", ".wh..wh.plnk/5.6")
        .ok()?;
    tar.into_inner().ok()
}

/// Starts Debian's registry in the node.
pub(super) fn start_registry(node: &Node) -> anyhow::Result<()> {
    let program =
        std::fs::read("/usr/bin/docker-registry").context("apt install docker-registry")?;
    node.write_file("/usr/local/bin/docker-registry", program)?;
    node.write_file("/root/registry.yml", REGISTRY_CONFIG)?;
    node.shell("chmod 755 /usr/local/bin/docker-registry")
        .run()?;
    node.start_daemon(
        "registry",
        &["docker-registry", "serve", "/root/registry.yml"],
    )?;
    let probe = [
        "busybox",
        "wget",
        "-q",
        "-O",
        "-",
        "http://127.0.0.1:5000/v2/",
    ];
    Ok(node.wait_for_daemon("registry", &probe)?)
}

/// Puts an image into the registry, and leaves nothing of it in containerd.
fn push(node: &Node, image: &Image) -> anyhow::Result<()> {
    node.shell(&format!(
        "ctr images import --local --no-unpack /root/odd.tar
         ctr images push --local --plain-http {}",
        image.reference()
    ))
    .run()?;
    forget(node, "default", image.reference())
}

/// Removes an image with all that it consists of.
fn forget(node: &Node, namespace: &str, reference: &str) -> anyhow::Result<()> {
    node.ctr(&["-n", namespace, "images", "rm", "--sync", reference])?;
    poll_until("the end of the snapshots", PATIENCE, || {
        node.shell(&format!(
            "for lease in $(ctr -n {namespace} leases ls -q); do ctr -n {namespace} leases rm --sync $lease; done
             ctr -n {namespace} leases create --id sweep >/dev/null; ctr -n {namespace} leases rm --sync sweep"
        ))
        .run()
        .map_err(|error| error.to_string())?;
        let list = node.ctr(&[
            "-n",
            namespace,
            "snapshots",
            "--snapshotter",
            "transship",
            "ls",
        ]);
        let list = list.map_err(|error| error.to_string())?;
        match list.lines().count() {
            1 => Ok(()),
            _ => Err(list),
        }
    })?;
    Ok(())
}

/// Layers that were applied, by whom.
fn applied(node: &Node) -> anyhow::Result<BTreeMap<String, usize>> {
    let metrics = node
        .shell("busybox wget -q -O - http://127.0.0.1:9257/metrics")
        .read()?;
    let prefix = "transship_snapshotter_layers_applied_total{by=\"";
    let lines = metrics.lines().filter_map(|line| line.strip_prefix(prefix));
    lines
        .map(|line| {
            let (by, count) = line.split_once("\"} ").context("no count")?;
            Ok((by.to_owned(), count.parse()?))
        })
        .collect()
}

/// All layers but the odd one are ours, and that one was handed on.
fn expect_layers(
    node: &Node,
    way: &str,
    before: &BTreeMap<String, usize>,
    layers: usize,
) -> anyhow::Result<()> {
    let after = applied(node)?;
    let of = |by: &str| {
        let count = |all: &BTreeMap<String, usize>| all.get(by).copied().unwrap_or(0);
        count(&after) - count(before)
    };
    let found = (of("this_differ"), of("next_differ"));
    ensure!(
        found == (layers - 1, 1),
        "{way}: {found:?} of {layers} layers"
    );
    Ok(())
}

fn pull_through_cri(node: &Node, reference: &str) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let socket = node.path_from_outside("/run/containerd/containerd.sock");
    runtime.block_on(async {
        let mut images = ImageServiceClient::new(connect(socket).await?);
        let image = ImageSpec {
            image: reference.to_owned(),
            ..ImageSpec::default()
        };
        let request = PullImageRequest {
            image: Some(image),
            ..PullImageRequest::default()
        };
        images.pull_image(request).await?;
        Ok(())
    })
}
