//! `transship container-base ID`: what the runtime front asks before it restores into a container.

use transship_engine::{Context as _, Result, container_log};
use transship_sandbox::admission::container_base::ContainerBase;

use super::connect;
use crate::args::Global;

pub(crate) async fn run(global: &Global, id: &str, expected: Option<&str>) -> Result<()> {
    let node = connect(global).await?;
    let record = node.container(id).await?;
    let snapshots = node.snapshotter(&record.snapshotter);
    let chain_id = snapshots.stat(&record.snapshot_key).await?.parent;
    // Its container stands still: the documents of the image are many questions, and tell only how it is called.
    let image = match expected == Some(chain_id.as_str()) {
        true => None,
        false => node.find_image(&record.image, &chain_id).await?,
    };
    let log = container_log::path(&record, "");
    let base = ContainerBase {
        image: record.image,
        digest: image.map(|(target, _)| target.digest).unwrap_or_default(),
        chain_id,
        log,
    };
    let line = serde_json::to_string(&base).context("cannot write JSON")?;
    super::print_line(&line)
}
