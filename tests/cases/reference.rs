//! The snapshotter's own conformance tests against containerd's built-in overlayfs, as the
//! reference, and against ours through the same containerd.

use std::fs;
use std::path::PathBuf;
use std::time::SystemTime;

use anyhow::{Context as _, ensure};
use transship_testbed::{CommandRun as _, Settings, Testbed, journey};

use crate::Case;

/// The compiled `snapshotter/tests/behaviours.rs`, which takes its server from the environment.
const PROGRAM: &str = "behaviours";
const CONTAINERD: &str = "/run/containerd/containerd.sock";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    Case::on_all_trees("behaviours_of_overlayfs", |bed| {
        same_behaviours(bed, "overlayfs")
    })
    .chain(Case::on_all_trees("behaviours_of_ours", |bed| {
        same_behaviours(bed, "transship")
    }))
}

fn same_behaviours(bed: &Testbed, snapshotter: &str) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    journey::start_services(&node)?;
    let program = newest_test(bed.settings())?;
    node.write_file("/tmp/behaviours", fs::read(&program)?)?;
    let output = node
        .shell(&format!(
            "chmod +x /tmp/behaviours
             SNAPSHOTS_SOCKET={CONTAINERD} SNAPSHOTS_NAME={snapshotter} \\
             /tmp/behaviours --test-threads 1 2>&1"
        ))
        .read()?;
    ensure!(
        output.contains("test result: ok. 21 passed; 0 failed"),
        "{output}"
    );
    Ok(())
}

/// cargo names test programs by a hash; the newest is the one of this build.
fn newest_test(settings: &Settings) -> anyhow::Result<PathBuf> {
    let dir = settings.binaries_dir.join("deps");
    let built = |path: &PathBuf| fs::metadata(path).and_then(|m| m.modified());
    fs::read_dir(&dir)?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            name.starts_with(&format!("{PROGRAM}-")) && !name.contains('.')
        })
        .max_by_key(|path| built(path).unwrap_or(SystemTime::UNIX_EPOCH))
        .with_context(|| format!("no {PROGRAM} in {}: build all tests first", dir.display()))
}
