//! `transship container-base ID`: what the runtime front asks before it restores into a container.

use transship_engine::{Context as _, Result, container_log};
use transship_sandbox::admission::container_base::ContainerBase;

use super::connect;
use crate::args::Global;

pub(crate) async fn run(global: &Global, id: &str) -> Result<()> {
    let node = connect(global).await?;
    let record = node.container(id).await?;
    let (chain_id, image) = node.base_of(&record).await?;
    let log = container_log::path(&record, "");
    let base = ContainerBase {
        image: record.image,
        digest: image.map(|(target, _)| target.digest).unwrap_or_default(),
        chain_id,
        log,
    };
    let line = serde_json::to_string(&base).context("cannot write JSON")?;
    println!("{line}");
    Ok(())
}
