//! Images of somebody else on the node, whose indexes cost much or make no sense: who looks among all images for the
//! one below a container is not held up.
//!
//! ```text
//!  a ──300 times──> b ──300 times──> c ──300 times──> d       27 million ways, four documents
//!  e ──> "no digest"
//! ```

use std::time::Duration;

use anyhow::{Context as _, ensure};
use containerd_client::types::Descriptor;
use serde_json::json;
use transship_containerd::Containerd;
use transship_testbed::{CommandRun as _, Node, Testbed, Tree, journey};

use crate::Case;

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// As much as a slow machine takes for a checkpoint and more.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [Case {
        what: "image_documents",
        tree: Tree::Forky,
        run: an_image_of_somebody_holds_nobody_up,
    }]
    .into_iter()
}

fn an_image_of_somebody_holds_nobody_up(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    journey::start_services(&node)?;
    node.import_image(&journey::counter_image(bed)?, "transship")?;
    let run = "ctr run --detach --snapshotter transship transship.test/counter:1 web";
    node.shell(run).run()?;
    journey::wait_for_count(&node, "web", 2)?;
    // The name of its image is gone, so that all others are looked at; the hostile ones come first.
    node.shell(
        "ctr images tag transship.test/counter:1 z.test/counter:1 >/dev/null
         ctr images rm transship.test/counter:1 >/dev/null",
    )
    .run()?;
    let mut below = put_document(&node, "{}")?;
    for _ in 0..3 {
        below = put_document(&node, &index_of(&below, 300))?;
    }
    name_image(&node, "a.test/deep:1", &below)?;
    let odd = put_document(&node, &index_of("no digest", 1))?;
    name_image(&node, "a.test/odd:1", &odd)?;

    let seconds = PATIENCE.as_secs();
    let timed = |script: &str| node.shell(&format!("timeout {seconds} {script}")).read();
    timed("transship checkpoint web --name web").context("a checkpoint")?;
    journey::remove_container(&node, "web")?;
    timed("transship export web /root/web.tar --format podman").context("an export")?;
    let imported = timed("transship import /root/web.tar --name again").context("an import")?;
    ensure!(imported.contains("an archive of podman"), "{imported}");
    node.shell("transship rm web; transship rm again; rm /root/web.tar")
        .run()?;
    Ok(())
}

fn index_of(digest: &str, times: usize) -> String {
    let entry = json!({"mediaType": INDEX, "digest": digest, "size": 1});
    json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": vec![entry; times]}).to_string()
}

/// Puts a document into the content store; gives its digest.
fn put_document(node: &Node, document: &str) -> anyhow::Result<String> {
    let digest = transship_digest::sha256_hex(document);
    let path = format!("/root/{digest}");
    node.write_file(&path, document)?;
    // Until it has its label it is garbage, which may be collected just then.
    node.shell(&format!(
        "put() {{
             ctr content ingest --expected-digest sha256:{digest} --expected-size {} {digest} <{path}
             ctr content label sha256:{digest} containerd.io/gc.root=test >/dev/null
         }}
         put || put || put",
        document.len()
    ))
    .run()?;
    Ok(format!("sha256:{digest}"))
}

fn name_image(node: &Node, name: &str, digest: &str) -> anyhow::Result<()> {
    let socket = node.path_from_outside("/run/containerd/containerd.sock");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let target = Descriptor {
        media_type: INDEX.to_owned(),
        digest: digest.to_owned(),
        size: 1,
        ..Descriptor::default()
    };
    runtime.block_on(async {
        let containerd = Containerd::connect(&socket, "default").await?;
        containerd.create_image(name, target).await
    })?;
    Ok(())
}
