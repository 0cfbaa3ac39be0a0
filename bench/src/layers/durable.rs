//! What it costs to have layers on the disk when an image is said to be there.
//!
//! ```text
//!  ctr images import, ten layers ─┬─> ours: Commit syncs | it does not | it does not, and one sync in the end
//!                                 └─> overlayfs, walking: as it is | --sync-fs
//! ```

use std::time::Duration;

use anyhow::Result;
use transship_testbed::{CommandRun as _, Containerd};

use super::big_image::BigImage;
use super::{ARCHIVE, Bench, Differ, start_containerd};
use crate::namespace::NAMESPACE;
use crate::node_clock::time_in_node;
use crate::report::{Better, Row};
use crate::statistics::{median_millis, spaced};

const LAYERS: u32 = 10;
const CONFIG: &str = "/root/durable.toml";

/// One way to import.
#[derive(Debug, Clone, Copy)]
struct Way {
    differ: Differ,
    snapshotter: &'static str,
    /// `durable_commit` of our snapshotter.
    is_durable: bool,
    /// More arguments of ctr.
    arguments: &'static str,
    /// What is done in the end, as part of the time.
    and_then: &'static str,
}

const OURS: Way = Way {
    differ: Differ::Ours,
    snapshotter: super::SNAPSHOTTER,
    is_durable: true,
    arguments: "",
    and_then: "true",
};
const STOCK: Way = Way {
    differ: Differ::Walking,
    snapshotter: "overlayfs",
    ..OURS
};
/// Ours first.
const WAYS: [Way; 5] = [
    OURS,
    Way {
        is_durable: false,
        ..OURS
    },
    Way {
        is_durable: false,
        and_then: "sync -f /var/lib/containerd",
        ..OURS
    },
    STOCK,
    Way {
        arguments: "--sync-fs",
        ..STOCK
    },
];

/// Measures all ways in turns.
pub(super) fn measure(bench: &Bench<'_>, mut containerd: Containerd) -> Result<Vec<Row>> {
    let image = BigImage {
        files: bench.sizes.image_files[1],
        layers: LAYERS,
    };
    image.write_archive(&bench.node.path_from_outside(ARCHIVE))?;
    let mut times = WAYS.map(|_| Vec::new());
    for _ in 0..bench.sizes.slow_rounds {
        for (way, times) in WAYS.iter().zip(&mut times) {
            containerd.stop("TERM")?;
            bench.node.stop_daemon("snapshotter", "TERM")?;
            let settings = format!("durable_commit = {}\n", way.is_durable);
            bench.node.write_file(CONFIG, settings)?;
            let arguments = ["--log-level", "error", "--config", CONFIG];
            bench.node.start_snapshotter_with(&arguments)?;
            containerd = start_containerd(&bench.node, way.differ)?;
            times.extend(import(bench, way, image)?);
        }
    }
    bench.node.command("rm").arg(ARCHIVE).run()?;
    containerd.stop("TERM")?;
    let [ours, lazy, at_end, stock, synced] = times.map(|times| median_millis(&times));
    let files = spaced(image.files as usize);
    let name = format!("`ctr images import`, {LAYERS} layers, {files} files, durable");
    let row = |peer: &str, time| Row::new(&name, "ms", ours).beside(peer, time, Better::Less);
    Ok(vec![
        row("without durable_commit", lazy),
        row("without, and one sync in the end", at_end),
        row("overlayfs, walking, not durable", stock),
        row("overlayfs, walking, --sync-fs", synced),
    ])
}

fn import(bench: &Bench<'_>, way: &Way, image: BigImage) -> Result<Vec<Duration>> {
    bench.sync()?;
    let (snapshotter, arguments, and_then) = (way.snapshotter, way.arguments, way.and_then);
    let (ctr, image) = (format!("ctr -n {NAMESPACE}"), image.reference());
    let script = format!(
        "import() {{
           {ctr} images import --local --snapshotter {snapshotter} {arguments} {ARCHIVE}
           {and_then}
         }}
         timed import
         {ctr} images rm --sync {image} >/dev/null
         sync"
    );
    time_in_node(&bench.node, &script)
}
