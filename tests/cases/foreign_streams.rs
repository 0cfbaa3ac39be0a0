//! A stream of unknown origin on the stdin of `transship receive`: its sender chooses every byte, and
//! gets what the operator of the node lets him have.
//!
//! ```text
//!  "transship stream 1\n" frames made here  -->  transship receive
//! ```

use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};
use transship_checkpoint::wire::PROTOCOL;
use transship_testbed::{CommandRun as _, Node, Testbed, Tree, journey};

use twox_hash::XxHash3_128;

use crate::Case;
use crate::foreign_checkpoints::Forgery;

const STREAM: &str = "/root/stream";
const STORE: &str = "/var/lib/transship/checkpoints";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [Case {
        what: "foreign_stream",
        tree: Tree::Forky,
        run: a_stream_decides_nothing_on_this_node,
    }]
    .into_iter()
}

fn a_stream_decides_nothing_on_this_node(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    journey::start_services(&node)?;
    node.import_image(&journey::counter_image(bed)?, "transship")?;
    let good = Forgery::prepare(&node)?;
    a_runtime_of_the_sender_is_not_run(&node, &good)?;
    a_name_of_an_image_is_not_taken(&node, &good)?;
    what_was_checked_is_what_is_used(&node, &good)?;
    an_honest_stream_is_restored(&node, &good)?;
    a_flood_ends(&node)?;
    a_blob_that_stops_is_not_waited_for(&node, &good)?;
    all_reasons_are_told_at_once(&node, &good)?;
    sums_do_not_overflow(&node, &good)?;
    no_control_characters_reach_the_terminal(&node)?;
    node.shell("transship rm good").run()?;
    journey::check_nothing_left(&node)
}

/// A stream that is written without waiting for an answer.
struct Stream(Vec<u8>);

impl Stream {
    fn begin() -> Self {
        Self(b"transship stream 1\n".to_vec())
    }

    fn frame(mut self, kind: u8, payload: &[u8]) -> Self {
        self.0.push(kind);
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        self.0.extend(length.to_le_bytes());
        self.0.extend(payload);
        self
    }

    fn message(self, message: &Value) -> Self {
        let json = message.to_string();
        self.frame(b'm', json.as_bytes())
    }

    /// The files of the checkpoint `evil` as a migration brings them: a check after each, and a manifest
    /// without digests.
    fn files(mut self, node: &Node, manifest: &Value) -> anyhow::Result<Self> {
        let mut manifest = manifest.clone();
        self = self.message(&json!({"message": "begin", "name": "evil"}));
        let files = manifest["containers"][0]["files"].as_array_mut();
        for file in files.context("no files")? {
            let path = file["path"].as_str().unwrap_or_default();
            self = self.message(&json!({"message": "file", "path": format!("web/{path}")}));
            let content = node.read_file(&format!("{STORE}/evil/web/{path}"))?;
            for piece in content.chunks(1 << 20) {
                self = self.frame(b'd', piece);
            }
            let xxh3 = format!("{:032x}", XxHash3_128::oneshot(&content));
            self = self.message(&json!({"message": "file-end", "xxh3": xxh3}));
            file["sha256"] = json!("");
        }
        Ok(self.message(&json!({"message": "end", "manifest": manifest})))
    }

    /// Feeds it to `transship receive` and gives what that says, and its exit code.
    fn receive(self, node: &Node, arguments: &str) -> anyhow::Result<(Option<i32>, String)> {
        node.write_file(STREAM, &self.0)?;
        let script = format!("timeout 60 transship receive {arguments} <{STREAM} >/dev/null");
        let output = node.shell(&script).output()?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok((output.status.code(), error))
    }
}

fn offer(good: &Forgery, target: &Value) -> Value {
    let mut container = good.manifest["containers"][0].clone();
    container["files"] = json!([]);
    json!({
        "message": "offer", "protocol": PROTOCOL, "migration": migration_name(),
        "containers": [{"container": container, "spec": good.spec.to_string(), "blobs": []}],
        "architecture": std::env::consts::ARCH, "target": target, "estimate": 1000,
    })
}

/// A name that no migration has had on the node.
fn migration_name() -> String {
    static LAST: AtomicU64 = AtomicU64::new(0);
    format!("{:032x}", LAST.fetch_add(1, Ordering::Relaxed))
}

fn a_runtime_of_the_sender_is_not_run(node: &Node, good: &Forgery) -> anyhow::Result<()> {
    node.shell("printf '#!/bin/sh\\ntouch /run/pwned\\n' >/root/x.sh; chmod +x /root/x.sh")
        .run()?;
    let target = json!({"runtime_binary": "/root/x.sh", "log_uri": "file:///etc/cron.d/x",
                        "namespace": "k8s.io"});
    Stream::begin()
        .message(&offer(good, &target))
        .receive(node, "")?;
    node.shell("! test -e /run/pwned")
        .run()
        .context("a runtime was run")?;
    Ok(())
}

fn a_name_of_an_image_is_not_taken(node: &Node, good: &Forgery) -> anyhow::Result<()> {
    let target = node
        .shell("ctr images ls | awk '/counter/ {print $3}'")
        .read()?;
    let mut offered = offer(good, &json!({}));
    offered["containers"][0]["container"]["image"] = json!({
        "name": "registry.k8s.io/pause:3.10", "digest": "", "chain_id": "sha256:0",
    });
    offered["containers"][0]["blobs"] = json!([{
        "digest": target.trim(), "size": 1000, "labels": {"containerd.io/gc.root": "1"},
        "media_type": "application/vnd.oci.image.manifest.v1+json",
    }]);
    let end = json!({"message": "image-end"});
    let stream = Stream::begin().message(&offered).message(&end);
    let (code, error) = stream.receive(node, "")?;
    ensure!(code != Some(0), "it has nothing to restore");
    let images = node.ctr(&["images", "ls", "-q"])?;
    ensure!(!images.contains("pause"), "{images}, {error}");
    Ok(())
}

/// The offer is the honest one, the spec that comes is not.
fn what_was_checked_is_what_is_used(node: &Node, good: &Forgery) -> anyhow::Result<()> {
    let mut evil = Forgery {
        manifest: good.manifest.clone(),
        spec: good.spec.clone(),
    };
    evil.spec["hooks"] =
        json!({"createRuntime": [{"path": "/bin/touch", "args": ["touch", "/run/pwned"]}]});
    let manifest = evil.write(node)?;
    let (code, error) = migration(node, good, &manifest)?;
    node.shell("! test -e /run/pwned")
        .run()
        .context("a hook was run")?;
    ensure!(code != Some(0) && error.contains("spec.dump"), "{error}");

    // Another container in the manifest: its options are not those that were checked.
    evil.spec = good.spec.clone();
    evil.manifest["containers"][0]["criu"]["lsm_profile"] = json!("apparmor:unconfined");
    let manifest = evil.write(node)?;
    let (code, error) = migration(node, good, &manifest)?;
    ensure!(code != Some(0) && error.contains("offered"), "{error}");
    Ok(())
}

fn migration(
    node: &Node,
    offered: &Forgery,
    manifest: &Value,
) -> anyhow::Result<(Option<i32>, String)> {
    let mut stream = Stream::begin()
        .message(&offer(offered, &json!({})))
        .message(&json!({"message": "image-end"}))
        .files(node, manifest)?;
    for message in ["restore", "commit"] {
        stream = stream.message(&json!({ "message": message }));
    }
    stream.receive(node, "")
}

/// The same stream without a forgery is a migration.
fn an_honest_stream_is_restored(node: &Node, good: &Forgery) -> anyhow::Result<()> {
    let manifest = good.write(node)?;
    let (code, error) = migration(node, good, &manifest)?;
    ensure!(code == Some(0), "{error}");
    let reached = journey::read_counts(node, "web").map_err(anyhow::Error::msg)?;
    journey::wait_for_count(node, "web", reached)?;
    journey::remove_container(node, "web")?;
    node.shell("transship rm evil").run()?;
    Ok(())
}

fn a_flood_ends(node: &Node) -> anyhow::Result<()> {
    let mut stream = Stream::begin()
        .message(&json!({"message": "begin", "name": "flood"}))
        .message(&json!({"message": "file", "path": "c/x"}));
    for _ in 0..64 {
        stream = stream.frame(b'd', &vec![0; 1 << 20]);
    }
    let (code, error) = stream.receive(node, "--max-size 16M")?;
    ensure!(code == Some(1) && error.contains("--max-size"), "{error}");
    Ok(())
}

/// The digest of a layer that the node has not.
fn layer() -> String {
    format!("sha256:{}", "7".repeat(64))
}

fn offer_of_a_layer(good: &Forgery, size: u64) -> Value {
    let mut offered = offer(good, &json!({}));
    offered["containers"][0]["container"]["image"] = json!({
        "name": "registry.k8s.io/pause:3.10", "digest": "", "chain_id": "sha256:0",
    });
    offered["containers"][0]["blobs"] = json!([{
        "digest": layer(), "size": size, "labels": {},
        "media_type": "application/vnd.oci.image.layer.v1.tar",
    }]);
    offered
}

/// What the node has against the images, and against pages that come late, is told with all else.
fn all_reasons_are_told_at_once(node: &Node, good: &Forgery) -> anyhow::Result<()> {
    let mut offered = offer_of_a_layer(good, 1 << 60);
    offered["architecture"] = json!("pdp11");
    offered["lazy"] = json!(true);
    let (code, error) = Stream::begin().message(&offered).receive(node, "")?;
    ensure!(code == Some(4), "{code:?}: {error}");
    for reason in ["pdp11", "not enough room below", "listens nowhere"] {
        ensure!(error.contains(reason), "{reason:?} is not in {error}");
    }
    Ok(())
}

/// The link says nothing any more, and nobody closes it.
fn a_blob_that_stops_is_not_waited_for(node: &Node, good: &Forgery) -> anyhow::Result<()> {
    let stream = Stream::begin()
        .message(&offer_of_a_layer(good, 1000))
        .message(&json!({"message": "blob", "digest": layer(), "size": 1000}))
        .frame(b'd', &[7; 10]);
    node.write_file(STREAM, &stream.0)?;
    let script = format!(
        "rm -f /run/silent; mkfifo /run/silent; exec 3<>/run/silent; cat {STREAM} >&3
         timeout 30 transship receive --link-timeout 3 <&3 >/dev/null"
    );
    let output = node.shell(&script).output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(error.contains("has been silent for 3 s"), "{error}");
    ensure!(output.status.code() != Some(124), "it waits for ever");
    Ok(())
}

fn sums_do_not_overflow(node: &Node, good: &Forgery) -> anyhow::Result<()> {
    let mut offered = offer(good, &json!({}));
    offered["estimate"] = json!(u64::MAX);
    let (code, error) = Stream::begin().message(&offered).receive(node, "")?;
    ensure!(
        code == Some(4) && error.contains("not enough room"),
        "{error}"
    );
    let mut manifest = good.manifest.clone();
    let files = manifest["containers"][0]["files"].as_array_mut();
    for file in files.context("no files")? {
        file["size"] = json!(u64::MAX);
    }
    node.shell(&format!("cp -a {STORE}/good {STORE}/evil"))
        .run()?;
    let path = format!("{STORE}/evil/transship.json");
    node.write_file(&path, serde_json::to_vec(&manifest)?)?;
    let listed = node.shell("transship ls").read()?;
    ensure!(listed.contains("evil"), "{listed}");
    // Whoever looks into it is told of the first file that is not what the manifest says.
    let Err(refused) = node.shell("transship inspect evil").read() else {
        bail!("it was looked into");
    };
    let refused = refused.to_string();
    ensure!(
        refused.contains("status: 1:") && refused.contains("is damaged"),
        "{refused}"
    );
    node.shell("rm -r /var/lib/transship/checkpoints/evil")
        .run()?;
    Ok(())
}

fn no_control_characters_reach_the_terminal(node: &Node) -> anyhow::Result<()> {
    let failed = json!({"message": "failed", "reason": "\u{1b}]0;title\u{7} \r gone"});
    let (code, error) = Stream::begin().message(&failed).receive(node, "")?;
    ensure!(code != Some(0), "{error}");
    ensure!(!error.contains(['\u{1b}', '\r', '\u{7}']), "{error:?}");
    Ok(())
}
