//! Calls of the diff service as clients make them that no tree has: what `nerdctl commit` asks for
//! (Debian has no nerdctl), times clamped, leases that are gone, errors by their code.
//!
//! ```text
//! nerdctl commit:  lease ─> View of the parent ─> Diff ─> Apply onto the parent ─> Commit as chain id
//!                        ─> config, manifest ─> image ─> lease deleted; the task stands still meanwhile
//! ```

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use containerd_client::services::v1::DiffRequest;
use containerd_client::tonic::Code;
use containerd_client::types::{Descriptor, Mount};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use transship_containerd::labels::{GC_REF_CONTENT, GC_REF_SNAPSHOT, GC_ROOT, UNCOMPRESSED};
use transship_containerd::{Containerd, ContainerdError, Snapshotter, chain_id};
use transship_testbed::{
    CommandRun as _, ContainerdConfig, Node, NodeOptions, Testbed, Tree, journey, poll_until,
};

use super::{
    CHANGE, PATIENCE, PLAIN, difference, half_content, in_snapshot, list_tree, log_counts,
    restart_stock, start, top_of_image,
};

/// What nerdctl calls the layer, whatever the differ has said.
const DOCKER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
const MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// Keeps a snapshot that no lease does.
const KEPT: &[(&str, &str)] = &[(GC_ROOT, "test")];
/// How long a lease would be kept if the test were killed.
const LEASE_LIFETIME: Duration = Duration::from_secs(3600);
const TRANSSHIP: &str = "transship";

/// A client of a node's containerd.
pub(super) struct Api<'n> {
    node: &'n Node,
    runtime: Runtime,
    containerd: Containerd,
    snapshotter: &'static str,
    has_lease: bool,
}

impl<'n> Api<'n> {
    pub(super) fn of(node: &'n Node) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let socket = node.path_from_outside("/run/containerd/containerd.sock");
        let containerd = runtime.block_on(Containerd::connect(&socket, "default"))?;
        Ok(Self {
            node,
            runtime,
            containerd,
            snapshotter: TRANSSHIP,
            has_lease: false,
        })
    }

    /// What answers on another socket of the node.
    pub(super) fn at(&self, socket: &str) -> anyhow::Result<Containerd> {
        let socket = self.node.path_from_outside(socket);
        Ok(self.run(Containerd::connect(&socket, "default"))?)
    }

    /// From now on snapshots are those of another snapshotter.
    pub(super) fn use_snapshotter(&mut self, snapshotter: &'static str) {
        self.snapshotter = snapshotter;
    }

    fn run<T>(
        &self,
        call: impl Future<Output = Result<T, ContainerdError>>,
    ) -> Result<T, ContainerdError> {
        self.runtime.block_on(call)
    }

    /// Labels of a snapshot that the collector must leave alone.
    fn keep_labels(&self) -> &'static [(&'static str, &'static str)] {
        if self.has_lease { &[] } else { KEPT }
    }

    fn snapshots(&self) -> Snapshotter {
        self.containerd.snapshotter(self.snapshotter)
    }

    pub(super) fn prepare(&self, key: &str, parent: &str) -> anyhow::Result<Vec<Mount>> {
        let (snapshots, labels) = (self.snapshots(), self.keep_labels());
        Ok(self.run(snapshots.prepare(key, parent, labels))?)
    }

    pub(super) fn remove(&self, key: &str) -> anyhow::Result<()> {
        Ok(self.run(self.snapshots().remove(key))?)
    }

    pub(super) fn commit(&self, key: &str, name: &str) -> anyhow::Result<()> {
        let (snapshots, labels) = (self.snapshots(), self.keep_labels());
        Ok(self.run(snapshots.commit(name, key, labels))?)
    }

    pub(super) fn view(&self, key: &str, parent: &str) -> anyhow::Result<Vec<Mount>> {
        let (snapshots, labels) = (self.snapshots(), self.keep_labels());
        Ok(self.run(snapshots.view(key, parent, labels))?)
    }

    /// Diff of an active snapshot against its parent, through a view, as `rootfs.CreateDiff` of
    /// containerd's client makes it.
    fn diff(
        &self,
        key: &str,
        parent: &str,
        media_type: &str,
        epoch: Option<i64>,
    ) -> anyhow::Result<Descriptor> {
        let view = format!("{key}-parent-view");
        let snapshots = self.snapshots();
        let written = self.run(async {
            let mut request = DiffRequest {
                left: snapshots.view(&view, parent, self.keep_labels()).await?,
                right: snapshots.mounts(key).await?,
                media_type: media_type.to_owned(),
                ..DiffRequest::default()
            };
            if let Some(seconds) = epoch {
                request.source_date_epoch.get_or_insert_default().seconds = seconds;
            }
            self.containerd.diff(request).await
        })?;
        self.remove(&view)?;
        Ok(written)
    }

    pub(super) fn apply(&self, layer: &Descriptor, mounts: Vec<Mount>) -> Result<Descriptor, Code> {
        let applied = self.apply_by_containerd(layer, mounts);
        applied.map_err(|error| error.code())
    }

    pub(super) fn apply_by_containerd(
        &self,
        layer: &Descriptor,
        mounts: Vec<Mount>,
    ) -> Result<Descriptor, ContainerdError> {
        self.apply_through(&self.containerd, layer, mounts)
    }

    pub(super) fn apply_through(
        &self,
        differ: &Containerd,
        layer: &Descriptor,
        mounts: Vec<Mount>,
    ) -> Result<Descriptor, ContainerdError> {
        self.run(differ.apply(layer, mounts))
    }

    /// Writes a blob with labels; gives its descriptor.
    pub(super) fn write(
        &self,
        media_type: &str,
        content: &[u8],
        labels: &[(String, String)],
    ) -> anyhow::Result<Descriptor> {
        let digest = digest_of(content);
        let (pieces, queue) = mpsc::channel(1);
        pieces.try_send(content.to_vec())?;
        drop(pieces);
        // Nothing else refers to it, and containerd collects garbage soon after each start.
        let kept = ("containerd.io/gc.root".to_owned(), "test".to_owned());
        let labels = labels.iter().cloned().chain([kept]).collect();
        let size = content.len() as u64;
        self.run(self.containerd.write_blob(&digest, size, labels, queue))?;
        Ok(descriptor(media_type, digest, i64::try_from(size)?))
    }

    fn labels(&self, digest: &str) -> anyhow::Result<HashMap<String, String>> {
        let info = self.run(self.containerd.blob(digest))?;
        Ok(info.context("there is no such blob")?.labels)
    }

    fn read(&self, digest: &str) -> anyhow::Result<Vec<u8>> {
        let get = format!("ctr content get {digest} >/root/blob");
        self.node.shell(&get).run()?;
        Ok(self.node.read_file("/root/blob")?)
    }

    fn read_json(&self, digest: &str) -> anyhow::Result<Value> {
        Ok(serde_json::from_slice(&self.read(digest)?)?)
    }

    /// Ends the lease, with what lies under it, and begins another one.
    pub(super) fn renew_lease(&mut self, id: &str) -> anyhow::Result<()> {
        if self.has_lease {
            self.end_lease()?;
        }
        self.begin_lease(id)
    }

    /// A lease of the client's own; what is asked for next goes under it.
    fn begin_lease(&mut self, id: &str) -> anyhow::Result<()> {
        self.containerd = self.run(self.containerd.with_lease_called(id, LEASE_LIFETIME))?;
        self.has_lease = true;
        Ok(())
    }

    /// Deletes the lease and waits for the garbage collection after it.
    fn end_lease(&mut self) -> anyhow::Result<()> {
        self.run(self.containerd.end_lease_and_collect())?;
        self.containerd = self.containerd.in_namespace("default")?;
        self.has_lease = false;
        Ok(())
    }
}

pub(super) fn digest_of(content: &[u8]) -> String {
    transship_digest::oci_digest(content)
}

fn descriptor(media_type: &str, digest: String, size: i64) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest,
        size,
        ..Descriptor::default()
    }
}

fn as_json(descriptor: &Descriptor) -> Value {
    json!({
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size,
    })
}

/// Removes the differ's leases and lets containerd collect.
fn remove_leases_of_differ(node: &Node) -> anyhow::Result<()> {
    let remove = "ctr leases ls -q | grep transship-diff | xargs ctr leases rm --sync";
    Ok(node.shell(remove).run()?)
}

pub(super) fn clients_get_what_containerd_promises(bed: &Testbed) -> anyhow::Result<()> {
    let (node, containerd, image) = start(bed, &NodeOptions::default())?;
    let mut api = Api::of(&node)?;
    let top = top_of_image(&node, TRANSSHIP)?;
    commit_as_nerdctl(&mut api, image.reference(), &top)?;
    clamp_times(&api, &top)?;
    lose_leases(&api, &top)?;
    refuse_other_content(&api)?;
    ensure!(log_counts(&node, "WARN")? == 0);
    // Whichever differ it is, a client sees the same code.
    let ours = apply_damaged(&mut api, &top, "ours")?;
    restart_stock(&node, containerd)?;
    let mut api = Api::of(&node)?;
    let walking = apply_damaged(&mut api, &top, "walking")?;
    ensure!(
        ours == walking && !ours.is_empty(),
        "{ours:?}, containerd's own {walking:?}"
    );
    let (layers, truth) = diff_by_walking(&mut api, &top)?;
    node.stop_daemon("containerd", "TERM")?;
    node.start_containerd(&ContainerdConfig::transship())?;
    let (api, applied) = (Api::of(&node)?, log_counts(&node, "layer applied")?);
    for (at, layer) in layers.iter().enumerate() {
        let tree = apply_and_list(&api, layer, &format!("ours-{at}"), &top)?;
        ensure!(tree == truth, "{layer:?}:\n{}", difference(&truth, &tree));
    }
    ensure!(log_counts(&node, "layer applied")? == applied + layers.len());
    Ok(())
}

/// Layers of one snapshot as containerd's own differ makes them in every compression that it knows,
/// and what its own Apply makes of them.
fn diff_by_walking(api: &mut Api<'_>, parent: &str) -> anyhow::Result<(Vec<Descriptor>, String)> {
    api.begin_lease("walking")?;
    api.prepare("walked", parent)?;
    in_snapshot(api.node, TRANSSHIP, "walked", CHANGE)?;
    let suffixes: &[&str] = if api.node.tree() == Tree::Forky {
        &["", "+gzip", "+zstd"]
    } else {
        // The walking differ of 1.7 knows no zstd.
        &["", "+gzip"]
    };
    let layers = suffixes.iter().map(|suffix| {
        let media_type = format!("{PLAIN}{suffix}");
        api.diff("walked", parent, &media_type, None)
    });
    let layers = layers.collect::<anyhow::Result<Vec<_>>>()?;
    let truth = apply_and_list(api, &layers[0], "truth", parent)?;
    Ok((layers, truth))
}

fn apply_and_list(
    api: &Api<'_>,
    layer: &Descriptor,
    key: &str,
    parent: &str,
) -> anyhow::Result<String> {
    let mounts = api.prepare(key, parent)?;
    let applied = api.apply(layer, mounts);
    applied.map_err(|code| anyhow::anyhow!("Apply: {code}"))?;
    in_snapshot(api.node, TRANSSHIP, key, &list_tree(true))
}

/// `nerdctl commit` of a running container, call by call (its pkg/imgutil/commit); then the image runs,
/// after all leases have gone.
fn commit_as_nerdctl(api: &mut Api<'_>, reference: &str, parent: &str) -> anyhow::Result<()> {
    let node = api.node;
    let change = "rm /data/delete-me; echo committed >/data/committed; sleep 1000000";
    let run = ["run", "--detach", "--snapshotter", TRANSSHIP, reference];
    node.ctr(&[&run[..], &["web", "sh", "-c", change]].concat())?;
    poll_until(
        "the container's change",
        PATIENCE,
        || match journey::read_in_container(node, "web", "/data/committed")? {
            text if text == "committed\n" => Ok(()),
            text => Err(text),
        },
    )?;
    node.ctr(&["tasks", "pause", "web"])?;
    api.begin_lease("commit")?;
    let written = log_counts(node, "layer written")?;
    let layer = api.diff("web", parent, "", None)?;
    ensure!(log_counts(node, "layer written")? == written + 1);
    ensure!(layer.media_type == format!("{PLAIN}+gzip"), "{layer:?}");
    let labels = api.labels(&layer.digest)?;
    let diff_id = labels.get(UNCOMPRESSED).context("no uncompressed digest")?;
    let layer = Descriptor {
        media_type: DOCKER_GZIP.to_owned(),
        ..layer
    };

    let chain = chain_id(&[parent.to_owned(), diff_id.clone()]).context("no layers")?;
    let mounts = api.prepare("commit-layer", parent)?;
    let applied = api.apply(&layer, mounts);
    let applied = applied.map_err(|code| anyhow::anyhow!("Apply: {code}"))?;
    ensure!(applied.digest == *diff_id, "{applied:?}");
    api.run(api.snapshots().commit(&chain, "commit-layer", &[]))?;

    let name = "transship.test/committed:1";
    let base = api.run(api.containerd.image(reference))?;
    let base = base.and_then(|image| image.target);
    let base = api.read_json(&base.context("the image has no target")?.digest)?;
    let digest = base["config"]["digest"].as_str().context("no config")?;
    let mut config = api.read_json(digest)?;
    let diff_ids = config["rootfs"]["diff_ids"].as_array_mut();
    diff_ids.context("no layers")?.push(json!(diff_id));
    let snapshot = (format!("{GC_REF_SNAPSHOT}{TRANSSHIP}"), chain.clone());
    let config = api.write(CONFIG, config.to_string().as_bytes(), &[snapshot])?;
    let mut layers = base["layers"].as_array().context("no layers")?.clone();
    layers.push(as_json(&layer));
    let mut kept = vec![(format!("{GC_REF_CONTENT}.0"), config.digest.clone())];
    for (at, layer) in layers.iter().enumerate() {
        let digest = layer["digest"].as_str().unwrap_or_default().to_owned();
        kept.push((format!("{GC_REF_CONTENT}.{}", at + 1), digest));
    }
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "config": as_json(&config), "layers": layers,
    });
    let manifest = api.write(MANIFEST, manifest.to_string().as_bytes(), &kept)?;
    api.run(api.containerd.create_image(name, manifest))?;
    node.ctr(&["tasks", "resume", "web"])?;
    api.end_lease()?;
    remove_leases_of_differ(node)?;

    // Where it was committed, and unpacked anew from the blobs for another snapshotter.
    for snapshotter in [TRANSSHIP, "overlayfs"] {
        let check = "cat /data/committed; test ! -e /data/delete-me || echo there";
        let said = node
            .shell(&format!(
                "ctr run --rm --snapshotter {snapshotter} {name} check-{snapshotter} sh -c '{check}'"
            ))
            .read()?;
        ensure!(said == "committed\n", "{snapshotter}: {said}");
    }
    Ok(journey::remove_container(node, "web")?)
}

/// `source_date_epoch`: later times become that one, so that two containers that did the same at
/// different times give the same layer.
fn clamp_times(api: &Api<'_>, parent: &str) -> anyhow::Result<()> {
    // 2001-09-09 01:46:40
    const EPOCH: i64 = 1_000_000_000;
    let change = "mkdir -p made/dir; echo same >made/dir/file; ln -s dir made/link; rm -r data/keep
        : >made/old; touch -d '2001-02-03 04:05:06.789 UTC' made/old; chmod 700 tmp";
    let mut layers = Vec::new();
    for key in ["clamped-1", "clamped-2"] {
        api.prepare(key, parent)?;
        in_snapshot(api.node, TRANSSHIP, key, change)?;
        let clamped = api.diff(key, parent, PLAIN, Some(EPOCH))?;
        layers.push((clamped.digest, api.diff(key, parent, PLAIN, None)?.digest));
        api.remove(key)?;
    }
    ensure!(layers[0].0 == layers[1].0, "{layers:?}");
    ensure!(layers[0].1 != layers[1].1, "{layers:?}");
    let list = format!(
        "ctr content get {} | tar --list --verbose --full-time --utc",
        layers[0].0
    );
    let list = api.node.shell(&list).read()?;
    for line in list.lines() {
        let time = match line.rsplit('/').next() {
            Some("old") => "2001-02-03 04:05:06",
            // A mark has no time.
            Some(name) if name.starts_with(".wh.") => "1970-01-01 00:00:00",
            _ => "2001-09-09 01:46:40",
        };
        ensure!(line.contains(time), "{list}");
    }
    ensure!(list.contains("made/old") && list.contains("data/.wh.keep"));
    Ok(())
}

/// Somebody removes the lease that the layers of this hour lie under: the next ones get another.
fn lose_leases(api: &Api<'_>, parent: &str) -> anyhow::Result<()> {
    let leases = || -> anyhow::Result<Vec<String>> {
        let list = api.node.ctr(&["leases", "ls", "-q"])?;
        let ours = list
            .lines()
            .filter(|lease| lease.starts_with("transship-diff"));
        Ok(ours.map(str::to_owned).collect())
    };
    for media_type in [PLAIN, ""] {
        let key = format!("leased{}", media_type.len());
        api.prepare(&key, parent)?;
        let mut before = Vec::new();
        for round in 0..2 {
            // A layer that containerd does not have yet, and one that it has.
            in_snapshot(api.node, TRANSSHIP, &key, &format!("echo {round} >file"))?;
            let first = api.diff(&key, parent, media_type, None)?;
            let again = api.diff(&key, parent, media_type, None)?;
            ensure!(first == again);
            let now = leases()?;
            ensure!(now.len() == 1 && now != before, "{now:?}, {before:?}");
            ensure!(api.labels(&first.digest)?.contains_key(UNCOMPRESSED));
            remove_leases_of_differ(api.node)?;
            ensure!(
                api.labels(&first.digest).is_err(),
                "kept by nothing, and there"
            );
            before = now;
        }
        api.remove(&key)?;
    }
    let half = half_content(api.node).map_err(anyhow::Error::msg)?;
    ensure!(half.is_empty(), "{half}");
    Ok(())
}

/// Content that is not what its digest says is refused, and nothing of it stays.
fn refuse_other_content(api: &Api<'_>) -> anyhow::Result<()> {
    let (digest, other) = (digest_of(b"content"), b"another");
    for size in [other.len(), 3 << 20] {
        let (pieces, queue) = mpsc::channel(2);
        pieces.try_send(other.to_vec())?;
        drop(pieces);
        let write = api
            .containerd
            .write_blob(&digest, size as u64, HashMap::new(), queue);
        ensure!(api.run(write).is_err(), "{size} bytes");
        let half = half_content(api.node).map_err(anyhow::Error::msg)?;
        ensure!(half.is_empty(), "{half}");
    }
    ensure!(api.run(api.containerd.blob(&digest))?.is_none());
    Ok(())
}

/// Layers that are none, and what Apply answers.
fn apply_damaged(api: &mut Api<'_>, parent: &str, differ: &str) -> anyhow::Result<Vec<Code>> {
    // Nothing else keeps what containerd's own differ has written.
    api.begin_lease("damaged")?;
    api.prepare("whole", parent)?;
    in_snapshot(
        api.node,
        TRANSSHIP,
        "whole",
        "head -c 100000 /dev/urandom >f",
    )?;
    let whole = api.diff("whole", parent, "", None)?;
    let gzip = api.read(&whole.digest)?;
    api.remove("whole")?;
    let gzip_type = format!("{PLAIN}+gzip");
    let mut codes = Vec::new();
    for (media_type, damaged) in [
        (gzip_type.as_str(), gzip[..gzip.len() / 2].to_vec()),
        (
            PLAIN,
            format!("{differ} gets no tar").repeat(512).into_bytes(),
        ),
    ] {
        let layer = api.write(media_type, &damaged, &[])?;
        let mounts = api.prepare("damaged", parent)?;
        let Err(code) = api.apply(&layer, mounts) else {
            anyhow::bail!("{media_type}: a damaged layer was applied");
        };
        codes.push(code);
        api.remove("damaged")?;
    }
    api.end_lease()?;
    Ok(codes)
}
