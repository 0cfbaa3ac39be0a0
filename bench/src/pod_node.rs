//! A node whose containerd runs pods under the runtime front.

use anyhow::Result;
use transship_testbed::{ContainerdConfig, Image, Node, Testbed, journey};

/// Starts the snapshotter and containerd in `node`, with the images of the counter and the sandbox.
///
/// # Errors
/// When one of them does not come up.
pub(crate) fn start(bed: &Testbed, node: &Node) -> Result<()> {
    node.start_snapshotter()?;
    node.start_containerd(&ContainerdConfig {
        transship_diff: false,
        ..ContainerdConfig::transship()
    })?;
    for image in [Image::pause(bed.settings())?, journey::counter_image(bed)?] {
        node.import_image_into("k8s.io", &image, "transship")?;
    }
    Ok(())
}
