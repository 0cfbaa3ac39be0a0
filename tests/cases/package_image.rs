//! A pod whose checkpoint is in a registry: fetched in the background when the node allows it, restored once, and
//! taken away.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use transship_testbed::{
    CommandRun as _, Cri, Node, PodContainer, PodNamespaces, journey, poll_until,
};

use crate::package_foreign::{FIRST, POD};
use crate::pods::reached;

const REPOSITORY: &str = "127.0.0.1:5000/shop/web";
/// A key of Debian's minisign, and its public half.
pub(crate) const SECRET_KEY: &[u8] = include_bytes!("../../package/tests/fixtures/minisign.key");
pub(crate) const PUBLIC_KEY: &str = "RWThgSI8U3mWXyR4obbFHrJWAiO5hyezKvOkATr62ipuRZ473CZ9VTE8";
pub(crate) const NODE_CONFIG: &str = "/etc/transship/node.toml";
const PATIENCE: Duration = Duration::from_secs(60);

/// The checkpoint `ours` of the pod, of which nothing runs, is in the registry alone.
pub(crate) fn from_a_registry(node: &Node, cri: &Cri, before: u64) -> anyhow::Result<()> {
    node.write_file("/root/minisign.key", SECRET_KEY)?;
    let push = format!(
        "transship push ours {REPOSITORY}:ours --plain-http --sign /root/minisign.key --json"
    );
    let pushed: Value = serde_json::from_str(&node.shell(&push).read()?)?;
    let digest = pushed["digest"].as_str().context("no digest")?;
    let reference = format!("{REPOSITORY}@{digest}");
    node.shell("transship rm ours").run()?;
    starts_cold(node, cri)?;

    let wants = [
        ("dev.transship/restore-image", reference.as_str()),
        ("dev.transship/once", "true"),
    ];
    let ask = || {
        let asked = cri.run_pod(POD, &wants, PodNamespaces::Usual);
        asked.map_err(|error| format!("{:#}", anyhow::Error::from(error)))
    };
    let refused = |said: &str| match ask() {
        Err(error) if error.contains(said) => Ok(()),
        other => Err(anyhow::anyhow!("{other:?} instead of {said:?}")),
    };
    refused("from where this node takes none")?;
    let registries =
        "[images]\nregistries = [\"127.0.0.1:5000\"]\nplain-http = [\"127.0.0.1:5000\"]\n";
    node.write_file(NODE_CONFIG, registries)?;
    refused("signed-by under [checkpoints]")?;
    let rules = format!("{registries}[checkpoints]\nsigned-by = [\"{PUBLIC_KEY}\"]\n");
    node.write_file(NODE_CONFIG, rules)?;
    refused("transship serve does not run")?;
    node.start_daemon("transship-serve", &["transship", "serve"])?;
    let pod = poll_until("the pod's checkpoint", PATIENCE, || {
        ask().inspect_err(|error| assert!(said_that_it_comes(error), "{error}"))
    })?;
    let id = cri.run_container(&pod, &FIRST)?;
    let now = reached(cri, &id)?;
    ensure!(now >= before, "{now}, and {before} before");
    journey::ask(node, &cri.pod_ip(&pod)?)?;
    let left = { node.shell("ls -A /var/lib/transship/checkpoints | xargs") }.read()?;
    ensure!(left.trim() == "theirs", "it was to be taken away: {left}");
    cri.remove_pod(&pod)?;

    // Whoever has it fetched again is not the one who has had it.
    poll_until("a refusal", PATIENCE, || match ask() {
        Err(error) if error.contains("it was to be restored once") => Ok(()),
        Err(error) if said_that_it_comes(&error) => Err(error),
        other => panic!("{other:?}"),
    })?;
    // What lay there before signatures were asked for has none.
    let theirs = [("dev.transship/restore", "theirs")];
    let unsigned = cri.run_pod(POD, &theirs, PodNamespaces::Usual);
    let unsigned = unsigned.map_err(|error| format!("{:#}", anyhow::Error::from(error)));
    ensure!(
        matches!(&unsigned, Err(error) if error.contains("is not signed")),
        "{unsigned:?}"
    );
    node.stop_daemon("transship-serve", "TERM")?;
    let tidy = format!("rm {NODE_CONFIG} /root/minisign.key; transship prune --max-age 1000days");
    node.shell(&tidy).run()?;
    let left = { node.shell("ls -A /var/lib/transship/checkpoints | xargs") }.read()?;
    ensure!(left.trim() == "theirs", "{left}");
    Ok(())
}

/// The CRI makes an ordinary container of the image. Of one that has the annotations of checkpoints it would not.
fn starts_cold(node: &Node, cri: &Cri) -> anyhow::Result<()> {
    let image = format!("{REPOSITORY}:ours");
    node.shell(&format!(
        "ctr -n k8s.io images pull --plain-http {image} >/dev/null"
    ))
    .run()?;
    let pod = cri.run_pod(POD, &[], PodNamespaces::Usual)?;
    let cold = PodContainer {
        image: &image,
        command: &["/bin/tail", "-f", "/data/made/note"],
        ..FIRST
    };
    let id = cri.run_container(&pod, &cold)?;
    let note = cri.exec(&id, &["cat", "/data/made/note"])?;
    ensure!(note.stdout == b"made at the start\n", "{note:?}");
    cri.remove_pod(&pod)?;
    node.shell(&format!("ctr -n k8s.io images rm {image} >/dev/null"))
        .run()?;
    Ok(())
}

pub(crate) fn said_that_it_comes(error: &str) -> bool {
    // The daemon takes a moment to begin.
    error.contains("pulling, ") || error.contains("transship serve does not run")
}
