//! Layers out of an upperdir and into one.
//!
//! ```text
//!  big_image.rs ── ctr images import ──> content store
//!                                          │ Apply (walking | ours)            plugin.rs
//!                                          v
//!                              snapshot of 100 000 files, of 10 000
//!                                          │ changes.rs: changes through a mount
//!                                          v
//!               Diff, `ctr snapshots diff` (walking | ours)                    plugin.rs
//!               export_upperdir | tar | cat, into one sink                     export.rs
//!
//!  an image of ten layers, imported: on the disk when it is said to be there  durable.rs
//! ```
//!
//! The snapshots, their upperdirs and the containerd are the same for both sides; only which differ
//! containerd asks is changed, by a restart.

mod big_image;
mod changes;
mod durable;
mod export;
mod plugin;

use anyhow::{Context as _, Result};
use containerd_client::types::Descriptor;
use tokio::runtime::Runtime;
use transship_containerd::{Containerd as Client, Snapshotter};
use transship_testbed::{CommandRun as _, Containerd, ContainerdConfig, Node, Testbed, poll_until};

use crate::daemon::Process;
use crate::namespace::{KEPT, NAMESPACE};
use crate::report::Row;
use crate::sizes::Sizes;
use big_image::BigImage;
use changes::Changed;

/// On the node's disk, not in its overlay.
const ARCHIVE: &str = "/var/lib/transship/image.tar";
const DIFF_SOCKET: &str = "/run/transship/diff.sock";
const SNAPSHOTTER: &str = "transship";

/// What everything in this part needs.
pub(crate) struct Bench<'a> {
    node: Node,
    sizes: &'a Sizes,
    runtime: Runtime,
    client: Client,
    snapshots: Snapshotter,
}

/// Which differ containerd asks first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Differ {
    /// containerd's own.
    Walking,
    /// The proxy plugin of transship-snapshotter.
    Ours,
}

/// Measures the part.
///
/// # Errors
/// When containerd, the snapshotter or an export fails.
pub(crate) fn measure(bed: &Testbed, sizes: &Sizes) -> Result<Vec<Row>> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("cannot start the client's thread")?;
    let node = bed.node("layers")?;
    node.start_snapshotter_with(&["--log-level", "error"])?;
    let has_plugin = wait_for_plugin(&node);
    let mut containerd = start_containerd(&node, Differ::Walking)?;
    let client = runtime.block_on(connect(&node))?;
    let snapshots = client.snapshotter(SNAPSHOTTER);
    let mut bench = Bench {
        node,
        sizes,
        runtime,
        client,
        snapshots,
    };

    let images = sizes.image_files.map(|files| BigImage { files, layers: 1 });
    let mut layers = Vec::new();
    for image in images {
        layers.push(bench.import(image)?);
    }
    let [large, small] = [&layers[0], &layers[1]];

    eprintln!("   walking: Apply");
    let mut apply = plugin::Applied::default();
    bench.apply(Differ::Walking, large, &mut apply)?;
    bench.unpack(small, "small")?;
    bench.unpack(large, "large")?;
    eprintln!("   changes");
    let changed = Changed::make(&mut bench, images)?;
    eprintln!("   walking: Diff");
    let walking = plugin::measure_diffs(&mut bench, &changed)?;

    let mut ours = None;
    let peak = Process::of_daemon(&bench.node, "snapshotter")?;
    if has_plugin {
        containerd.stop("TERM")?;
        containerd = start_containerd(&bench.node, Differ::Ours)?;
        bench.client = bench.runtime.block_on(connect(&bench.node))?;
        bench.snapshots = bench.client.snapshotter(SNAPSHOTTER);
        peak.reset_peak()?;
        eprintln!("   ours: Apply, Diff");
        bench.apply(Differ::Ours, large, &mut apply)?;
        ours = Some(plugin::measure_diffs(&mut bench, &changed)?);
    }
    let mut rows = plugin::compare(&apply, &walking, ours.as_ref(), images);
    rows.push(plugin::peak_row(
        has_plugin.then(|| peak.peak_bytes()).transpose()?,
    ));
    eprintln!("   export, tar, cat");
    rows.extend(export::measure(&mut bench, &changed)?);
    eprintln!("   durable imports");
    rows.extend(durable::measure(&bench, containerd)?);
    Ok(rows)
}

/// True if the snapshotter serves the diff plugin, too: its sockets appear together.
fn wait_for_plugin(node: &Node) -> bool {
    let look = || {
        node.command("test")
            .args(["-S", DIFF_SOCKET])
            .run()
            .map_err(|error| error.to_string())
    };
    poll_until("the diff socket", std::time::Duration::from_secs(1), look).is_ok()
}

fn start_containerd(node: &Node, differ: Differ) -> Result<Containerd> {
    let config = ContainerdConfig {
        transship_diff: differ == Differ::Ours,
        ..ContainerdConfig::transship()
    };
    Ok(node.start_containerd(&config)?)
}

async fn connect(node: &Node) -> Result<Client> {
    let socket = node.path_from_outside("/run/containerd/containerd.sock");
    Ok(Client::connect(&socket, NAMESPACE).await?)
}

impl Bench<'_> {
    /// Makes an image and brings it into the content store.
    fn import(&self, image: BigImage) -> Result<Descriptor> {
        eprintln!("   image of {} files", image.files);
        let archive = self.node.path_from_outside(ARCHIVE);
        let layer = image.write_archive(&archive)?;
        self.node
            .command("ctr")
            .args(["-n", NAMESPACE, "images", "import", "--no-unpack", ARCHIVE])
            .run()?;
        self.node.command("rm").arg(ARCHIVE).run()?;
        self.sync()?;
        Ok(layer)
    }

    /// Makes a committed snapshot of a layer.
    fn unpack(&mut self, layer: &Descriptor, name: &str) -> Result<()> {
        let key = format!("unpack/{name}");
        self.runtime.block_on(async {
            let mounts = self.snapshots.prepare(&key, "", KEPT).await?;
            self.client.apply(layer, mounts).await?;
            self.snapshots.commit(name, &key, KEPT).await
        })?;
        self.sync()
    }

    /// Writes everything back, so that it is not written back while the next thing is measured.
    fn sync(&self) -> Result<()> {
        Ok(self.node.command("sync").run()?)
    }
}
