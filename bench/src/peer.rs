//! The Go proxy snapshotter that ours is measured against: Debian's package soci-snapshotter.
//!
//! ```text
//! <cache_dir>/soci-snapshotter/soci-snapshotter-grpc     fetched once; appears by rename
//! ```

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};
use transship_testbed::{CommandRun as _, Node, Settings};

/// Name in the results.
pub(crate) const NAME: &str = "soci-snapshotter-grpc";
const PACKAGE: &str = "soci-snapshotter";
const SUITE: &str = "forky";

/// Puts the peer's program into the node and gives its path there.
///
/// # Errors
/// When the package cannot be fetched: it needs mmdebstrap and a Debian mirror.
pub(crate) fn install(node: &Node, settings: &Settings) -> Result<String> {
    let program = fetch(settings)?;
    let content =
        fs::read(&program).with_context(|| format!("cannot read {}", program.display()))?;
    let inside = format!("/usr/local/bin/{NAME}");
    node.write_file(&inside, content)?;
    node.command("chmod").args(["0755", &inside]).run()?;
    Ok(inside)
}

fn fetch(settings: &Settings) -> Result<PathBuf> {
    let dir = settings.cache_dir.join(PACKAGE);
    let program = dir.join(NAME);
    if program.is_file() {
        return Ok(program);
    }
    eprintln!("fetching Debian's {PACKAGE} into {} (once)", dir.display());
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let tree = dir.join(format!("tree-{}", std::process::id()));
    // "extract" unpacks the package and what it needs, without installing: the one way that works
    // whatever this machine's own suite is. A testing suite's Release file may have run out on a
    // mirror that follows slowly.
    let fetched = Command::new("mmdebstrap")
        .args(["--quiet", "--format=directory", "--variant=extract"])
        .arg(format!("--include={PACKAGE}"))
        .arg("--aptopt=Acquire::Check-Valid-Until \"false\"")
        .arg(SUITE)
        .arg(&tree)
        .run()
        .map_err(anyhow::Error::from)
        .and_then(|()| {
            let from = tree.join("usr/bin").join(NAME);
            fs::rename(&from, &program)
                .with_context(|| format!("cannot move {} into the cache", from.display()))
        });
    let removed = fs::remove_dir_all(&tree);
    fetched?;
    removed.with_context(|| format!("cannot remove {}", tree.display()))?;
    Ok(program)
}
