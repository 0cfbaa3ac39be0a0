//! The blobs of an image as they are offered to another node.

use containerd_client::services::v1::Info;
use containerd_client::types::Descriptor;
use transship_checkpoint::wire::Blob;
use transship_containerd::ResolvedImage;
use transship_containerd::labels::{GC_REF_CONTENT, UNCOMPRESSED};
use transship_containerd::{Containerd, ContainerdError};

/// The blobs that this node has, with the labels that tie them together.
///
/// # Errors
/// The answer of containerd.
pub async fn offer_blobs(
    containerd: &Containerd,
    image: &ResolvedImage,
) -> Result<Vec<Blob>, ContainerdError> {
    let mut blobs = Vec::new();
    for descriptor in &image.blobs {
        // Layers may have been discarded after the unpacking: the other node may have them.
        if let Some(info) = containerd.blob(&descriptor.digest).await? {
            blobs.push(offered(descriptor, info));
        }
    }
    Ok(blobs)
}

fn offered(descriptor: &Descriptor, info: Info) -> Blob {
    let is_kept = |label: &String| label.starts_with(GC_REF_CONTENT) || label == UNCOMPRESSED;
    Blob {
        digest: descriptor.digest.clone(),
        size: u64::try_from(info.size).unwrap_or_default(),
        media_type: descriptor.media_type.clone(),
        labels: info
            .labels
            .into_iter()
            .filter(|(label, _)| is_kept(label))
            .collect(),
    }
}
