//! What is said of an upperdir: what a layer of it cannot hold, and that nothing is written below a mount that
//! may be in use.

use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use rustix::fs::{XattrFlags, setxattr};
use serde_json::Value;
use transship_testbed::{CommandRun as _, Node, Testbed, Tree, journey};

use crate::Case;
use crate::migration_faults::counts_on;

/// What overlay leaves in the upperdir for `chattr +i` (Linux 5.14).
const PROTECTED: (&str, &[u8]) = ("trusted.overlay.protattr", b"i");

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    std::iter::once(Case {
        what: "upperdir_told",
        tree: Tree::Forky,
        run: losses_and_refusals_are_told,
    })
}

fn losses_and_refusals_are_told(bed: &Testbed) -> anyhow::Result<()> {
    let (a, _) = journey::start_nodes(bed)?;
    journey::run_sandbox(&a, "sandbox")?;
    journey::run_counter(&a, "counter", "sandbox", 8, &[])?;
    journey::wait_for_count(&a, "counter", 3)?;
    losses_are_told(&a)?;
    an_import_needs_to_know(&a)
}

fn losses_are_told(a: &Node) -> anyhow::Result<()> {
    let file = a_file_of_the_upperdir(a)?;
    setxattr(&file, PROTECTED.0, PROTECTED.1, XattrFlags::empty())?;
    let mut checkpoint = a.command("transship");
    checkpoint.args(["checkpoint", "counter", "--name", "lossy", "--json"]);
    let report: Value = serde_json::from_str(&checkpoint.read()?)?;
    let flags = &report["losses"]["counter"]["inode_flags"];
    ensure!(*flags == 1, "not told: {report}");
    let manifest = a.read_file("/var/lib/transship/checkpoints/lossy/transship.json")?;
    let manifest: Value = serde_json::from_slice(&manifest)?;
    let losses = &manifest["containers"][0]["losses"];
    let name = file.file_name().context("a file has a name")?;
    let example = losses["examples"][0].as_str().unwrap_or_default();
    ensure!(
        losses["inode_flags"] == 1 && example.ends_with(&*name.to_string_lossy()),
        "not kept: {manifest}"
    );
    let said = a
        .shell("transship checkpoint counter --name told 2>&1")
        .read()?;
    ensure!(said.contains("flags"), "not said: {said}");
    Ok(())
}

/// A regular file that the counter has written, from outside of the node.
fn a_file_of_the_upperdir(a: &Node) -> anyhow::Result<PathBuf> {
    let mounts = a.ctr(&[
        "snapshots",
        "--snapshotter",
        "transship",
        "mounts",
        "/x",
        "counter",
    ])?;
    let options = mounts.split([',', ' ']);
    let upperdir = { options }.find_map(|option| option.strip_prefix("upperdir="));
    let upperdir = upperdir.with_context(|| format!("no upperdir in {mounts:?}"))?;
    let found = a
        .shell(&format!("find {upperdir} -type f -size +0 | head -n 1"))
        .read()?;
    ensure!(!found.trim().is_empty(), "{upperdir} has no file");
    Ok(a.path_from_outside(found.trim()))
}

/// A shim that does not answer: whether its task runs is not known.
fn an_import_needs_to_know(a: &Node) -> anyhow::Result<()> {
    a.shell("transship snapshot export -o /run/layer.tar counter")
        .run()?;
    let pid = journey::task_pid(a, "counter")?;
    let shim = a.shell(&format!("cut -d' ' -f4 /proc/{pid}/stat")).read()?;
    let shim = shim.trim();
    let import = ["snapshot", "import", "counter", "/run/layer.tar"];
    a.shell(&format!("kill -STOP {shim}")).run()?;
    let answer = a.command("transship").args(import).output();
    a.shell(&format!("kill -CONT {shim}")).run()?;
    let answer = answer?;
    let said = String::from_utf8_lossy(&answer.stderr);
    ensure!(
        answer.status.code() == Some(4) && said.contains("nothing is imported into \"counter\""),
        "{answer:?}"
    );
    counts_on(a, "counter")
}
