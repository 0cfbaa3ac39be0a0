//! `transship publish WHAT ID`: what has become of a container, told to whoever listens to containerd's
//! events. The runtime front starts it and goes on.

use transship_engine::Result;

use super::connect;
use crate::args::{Global, PublishArgs};

/// Labels of kubelet, by which its users know a container.
const KUBERNETES: &str = "io.kubernetes.";

pub(crate) async fn run(global: &Global, args: PublishArgs) -> Result<()> {
    let node = connect(global).await?;
    let record = node.container(&args.id).await?;
    let labels = record.labels.into_iter();
    let ours = [("checkpoint", args.checkpoint), ("reason", args.reason)];
    let ours = ours
        .into_iter()
        .filter_map(|(name, value)| Some((format!("dev.transship/{name}"), value?)));
    let labels = labels
        .filter(|(name, _)| name.starts_with(KUBERNETES))
        .chain(ours)
        .collect();
    let topic = format!("/transship/{}", args.what);
    Ok({ node.publish(&topic, &record.id, &record.image, labels) }.await?)
}
