//! The image of a container as it is offered to another node.
//!
//! ```text
//!  image with the layers of the container ──all blobs are here──────────────> offered
//!   none, or blobs are gone ──rebuild (other compression, snapshots)─────────> offered
//!                              `─ other tars: the manifest has both chain ids
//! ```

use std::time::Duration;

use containerd_client::services::v1::Info;
use containerd_client::types::Descriptor;
use transship_checkpoint::manifest::Rebuilt;
use transship_checkpoint::wire::Blob;
use transship_containerd::labels::GC_REF_CONTENT;
use transship_containerd::{Containerd, ContainerdError, ResolvedImage, chain_id};

use crate::source::SourceContainer;

/// How long the garbage collector keeps its hands off what is made, sent or received and nobody of ours has come to end:
/// longer than any migration, a link that is slow takes days.
pub(crate) const LEASE: Duration = Duration::from_secs(7 * 24 * 3600);

/// Makes what is missing of the container's image, so that it can be offered. What was made goes with the
/// lease that is added, also when nobody waits for the end of it.
///
/// # Errors
/// The answer of containerd. The target may have the layers all the same.
pub(crate) async fn complete(
    node: &Containerd,
    source: &mut SourceContainer,
    leases: &mut Vec<Containerd>,
) -> Result<(), ContainerdError> {
    if let Some((_, image)) = &source.image
        && node.has_all_blobs(image).await?
    {
        return Ok(());
    }
    let container = &mut source.container;
    let old = source.image.as_ref().map(|(_, image)| image);
    let (chain, snapshotter) = (container.image.chain_id.clone(), &container.snapshotter);
    let leased = node.with_lease(LEASE).await?;
    leases.push(leased.clone());
    let image = leased.rebuild_image(old, &chain, snapshotter).await?;
    let Some(target) = image.blobs.first().cloned() else {
        return Ok(());
    };
    let rebuilt = chain_id(&image.diff_ids).filter(|rebuilt| *rebuilt != chain);
    container.image.rebuilt = rebuilt.map(|chain_id| Rebuilt {
        digest: target.digest.clone(),
        chain_id,
    });
    source.image = Some((target, image));
    Ok(())
}

/// Makes an image of the layers that `snapshotter` has with the chain id `chain`; `old` is what is left of theirs. What
/// was made goes with the lease that is given back.
///
/// # Errors
/// The answer of containerd.
pub(crate) async fn rebuild(
    node: &Containerd,
    old: Option<&ResolvedImage>,
    chain: &str,
    snapshotter: &str,
) -> Result<(Containerd, ResolvedImage), ContainerdError> {
    let leased = node.with_lease(LEASE).await?;
    match leased.rebuild_image(old, chain, snapshotter).await {
        Ok(image) => Ok((leased, image)),
        Err(error) => {
            // Nobody needs it; it ends by itself.
            drop(leased.end_lease().await);
            Err(error)
        }
    }
}

/// Keeps blobs as long as the lease that is given back: their image may be removed here while they are read.
///
/// # Errors
/// The answer of containerd.
pub(crate) async fn keep<'d>(
    node: &Containerd,
    digests: impl Iterator<Item = &'d str>,
) -> Result<Containerd, ContainerdError> {
    let leased = node.with_lease(LEASE).await?;
    for digest in digests {
        if let Err(error) = leased.hold_blob(digest).await {
            // It ends by itself.
            drop(leased.end_lease().await);
            return Err(error);
        }
    }
    Ok(leased)
}

/// The blobs that this node has, with the labels that tie them together.
///
/// # Errors
/// The answer of containerd.
pub(crate) async fn offer_blobs(
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
    Blob {
        digest: descriptor.digest.clone(),
        size: u64::try_from(info.size).unwrap_or_default(),
        media_type: descriptor.media_type.clone(),
        labels: tying_labels(info.labels),
    }
}

/// Labels that keep the parts of an image together. Others make containerd keep a blob for ever, or say where it comes
/// from; what a layer unpacks to, by which it is found when its image is made again, is known when it has been unpacked.
pub(crate) fn tying_labels<M: FromIterator<(String, String)>>(
    labels: impl IntoIterator<Item = (String, String)>,
) -> M {
    { labels.into_iter() }
        .filter(|(name, _)| name.starts_with(GC_REF_CONTENT))
        .collect()
}
