//! Images: from a name to the chain id of its layers, and layers into snapshots.
//!
//! ```text
//!  image record -> index -> manifest -> config {diff_ids} -> chain id = parent of the snapshot
//!                              `-> layers -> Diff.Apply -> committed snapshots
//! ```
//!
//! An index usually names manifests for several platforms; the one that a container uses is the
//! one whose chain id its snapshot has as parent.

use std::collections::HashMap;

use anyhow::{Context, Result, bail};
use containerd_client::services::v1::diff_client::DiffClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::{
    ApplyRequest, Container, CreateImageRequest, GetImageRequest, Image,
};
use containerd_client::types::Descriptor;
use oci_spec::image::{ImageConfiguration, ImageManifest};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use transship_checkpoint::store::hex;
use transship_checkpoint::wire::Blob;

use super::{During, Node, NodeError, present, unique};

/// The manifest of an image whose layers make up a given chain.
#[derive(Debug, Clone)]
pub struct ResolvedImage {
    /// Digest of the config.
    pub config: String,
    /// The layers' descriptors, lowest first.
    pub layers: Vec<Descriptor>,
    /// Digests of the uncompressed layers, lowest first.
    pub diff_ids: Vec<String>,
    /// Every blob from the image's target down to the layers.
    pub blobs: Vec<Descriptor>,
}

/// The few fields that tell an index from a manifest.
#[derive(Deserialize)]
struct IndexOrManifest {
    #[serde(default)]
    manifests: Vec<IndexEntry>,
}

#[derive(Deserialize)]
struct IndexEntry {
    digest: String,
    size: i64,
    #[serde(rename = "mediaType")]
    media_type: String,
}

/// The chain id of layers: what containerd calls the committed snapshot of the topmost one. See
/// the OCI image specification, "Layer ChainID".
pub fn chain_id(diff_ids: &[String]) -> Option<String> {
    diff_ids.iter().fold(None, |chain, diff_id| {
        Some(match chain {
            None => diff_id.clone(),
            Some(chain) => {
                format!(
                    "sha256:{}",
                    hex(&Sha256::digest(format!("{chain} {diff_id}").as_bytes()))
                )
            }
        })
    })
}

impl Node {
    /// The image record called `name`.
    pub async fn image(&self, name: &str) -> Result<Option<Image>, NodeError> {
        let act = || format!("read the image {name:?}");
        let request = GetImageRequest {
            name: name.to_owned(),
        };
        match ImagesClient::new(self.channel())
            .get(self.request(request))
            .await
            .during(act)
        {
            Err(error) if error.is_not_found() => Ok(None),
            answer => present(answer?.into_inner().image, "image", act).map(Some),
        }
    }

    /// Makes an image record; one that exists already is fine, whatever it names.
    pub async fn create_image(&self, name: &str, target: Descriptor) -> Result<(), NodeError> {
        let image = Image {
            name: name.to_owned(),
            target: Some(target),
            ..Image::default()
        };
        let request = CreateImageRequest {
            image: Some(image),
            ..CreateImageRequest::default()
        };
        let created = ImagesClient::new(self.channel())
            .create(self.request(request))
            .await
            .during(|| format!("make the image {name:?}"));
        match created {
            Err(error) if !error.is_already_exists() => Err(error),
            _ => Ok(()),
        }
    }

    /// What a container is made of: the chain id below its snapshot, and its image's target if the
    /// image is still there.
    pub async fn base_of(
        &self,
        record: &Container,
    ) -> Result<(String, Option<Descriptor>), NodeError> {
        let snapshot = self
            .snapshot(&record.snapshotter, &record.snapshot_key)
            .await?;
        let image = self.image(&record.image).await?;
        Ok((snapshot.parent, image.and_then(|image| image.target)))
    }

    /// Looks below `target` for the manifest whose layers have the chain id `chain`.
    pub async fn resolve_image(
        &self,
        target: &Descriptor,
        chain: &str,
    ) -> Result<Option<ResolvedImage>> {
        let mut ways = vec![vec![target.clone()]];
        while let Some(way) = ways.pop() {
            let Some(here) = way.last() else { continue };
            // An index usually names platforms that were never fetched.
            if self.blob(&here.digest).await?.is_none() || way.len() > 4 {
                continue;
            }
            let document = self.read_document(&here.digest).await?;
            let parsed: IndexOrManifest = serde_json::from_slice(&document)
                .with_context(|| format!("the blob {} is no image", here.digest))?;
            if parsed.manifests.is_empty()
                && let Some(image) = self.resolve_manifest(&document, &way, chain).await?
            {
                return Ok(Some(image));
            }
            for entry in parsed.manifests {
                let below = Descriptor {
                    media_type: entry.media_type,
                    digest: entry.digest,
                    size: entry.size,
                    ..Descriptor::default()
                };
                ways.push(way.iter().cloned().chain([below]).collect());
            }
        }
        Ok(None)
    }

    async fn resolve_manifest(
        &self,
        document: &[u8],
        way: &[Descriptor],
        chain: &str,
    ) -> Result<Option<ResolvedImage>> {
        let manifest: ImageManifest =
            serde_json::from_slice(document).context("a manifest of the image cannot be parsed")?;
        let config = descriptor(manifest.config());
        if self.blob(&config.digest).await?.is_none() {
            return Ok(None);
        }
        let parsed: ImageConfiguration =
            serde_json::from_slice(&self.read_document(&config.digest).await?)
                .context("the config of the image cannot be parsed")?;
        let diff_ids = parsed.rootfs().diff_ids().clone();
        if chain_id(&diff_ids).as_deref() != Some(chain) {
            return Ok(None);
        }
        let layers: Vec<_> = manifest.layers().iter().map(descriptor).collect();
        let digest = config.digest.clone();
        let blobs = way
            .iter()
            .cloned()
            .chain([config])
            .chain(layers.iter().cloned())
            .collect();
        Ok(Some(ResolvedImage {
            config: digest,
            layers,
            diff_ids,
            blobs,
        }))
    }

    /// The image's blobs as they are offered to another node, with the labels that keep them.
    pub async fn offer_blobs(&self, image: &ResolvedImage) -> Result<Vec<Blob>> {
        let mut blobs = Vec::new();
        for descriptor in &image.blobs {
            // Layers may have been discarded after the unpacking: the other node may have them.
            let Some(info) = self.blob(&descriptor.digest).await? else {
                continue;
            };
            let kept = |label: &String| {
                label.starts_with("containerd.io/gc.ref.content")
                    || label == "containerd.io/uncompressed"
            };
            blobs.push(Blob {
                digest: descriptor.digest.clone(),
                size: u64::try_from(info.size).unwrap_or_default(),
                media_type: descriptor.media_type.clone(),
                labels: info
                    .labels
                    .into_iter()
                    .filter(|(label, _)| kept(label))
                    .collect(),
            });
        }
        Ok(blobs)
    }

    /// Unpacks the image's layers into `snapshotter`, as far as they are not there.
    pub async fn unpack(&self, image: &ResolvedImage, snapshotter: &str) -> Result<()> {
        let mut parent = String::new();
        for (index, layer) in image.layers.iter().enumerate() {
            let Some(name) = chain_id(&image.diff_ids[..=index]) else {
                continue;
            };
            match self.snapshot(snapshotter, &name).await {
                Ok(_) => {}
                Err(error) if error.is_not_found() => {
                    let diff_id = &image.diff_ids[index];
                    self.unpack_layer(layer, diff_id, snapshotter, &parent, &name)
                        .await
                        .with_context(|| format!("the layer {} was not unpacked", layer.digest))?;
                }
                Err(error) => return Err(error.into()),
            }
            parent = name;
        }
        // Without this label the snapshots are garbage as soon as no lease holds them.
        let label = format!("containerd.io/gc.ref.snapshot.{snapshotter}");
        self.label_blob(&image.config, &label, &parent).await?;
        Ok(())
    }

    async fn unpack_layer(
        &self,
        layer: &Descriptor,
        diff_id: &str,
        snapshotter: &str,
        parent: &str,
        name: &str,
    ) -> Result<()> {
        let key = format!("transship-unpack-{} {name}", unique());
        let mounts = self
            .prepare(snapshotter, &key, parent, HashMap::new())
            .await?;
        let applied = self.apply(layer, mounts).await;
        let committed = match applied {
            Ok(found) if found == diff_id => match self.commit(snapshotter, name, &key).await {
                // Somebody else unpacked the same layer meanwhile.
                Err(error) if error.is_already_exists() => Err(None),
                other => other.map_err(|error| Some(error.into())),
            },
            Ok(found) => Err(Some(anyhow::anyhow!(
                "its content has the digest {found}, not {diff_id}"
            ))),
            Err(error) => Err(Some(error.into())),
        };
        match committed {
            Ok(()) => Ok(()),
            Err(error) => {
                self.remove_snapshot(snapshotter, &key).await?;
                error.map_or(Ok(()), Err)
            }
        }
    }

    /// Applies a layer to mounts and returns the digest of its uncompressed content.
    async fn apply(
        &self,
        layer: &Descriptor,
        mounts: Vec<containerd_client::types::Mount>,
    ) -> Result<String, NodeError> {
        let act = || format!("apply the layer {}", layer.digest);
        let request = ApplyRequest {
            diff: Some(layer.clone()),
            mounts,
            ..ApplyRequest::default()
        };
        let answer = DiffClient::new(self.channel())
            .apply(self.request(request))
            .await
            .during(act)?;
        Ok(present(answer.into_inner().applied, "descriptor", act)?.digest)
    }

    /// Makes sure that `snapshotter` has the layers of the image with the chain id `chain`.
    pub async fn ensure_unpacked(&self, name: &str, chain: &str, snapshotter: &str) -> Result<()> {
        match self.snapshot(snapshotter, chain).await {
            Ok(_) => return Ok(()),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error.into()),
        }
        let resolved = match self.image(name).await?.and_then(|image| image.target) {
            Some(target) => self.resolve_image(&target, chain).await?,
            None => None,
        };
        let Some(image) = resolved else {
            bail!(
                "the layers that the checkpoint was taken on ({chain}) are not on this node, and \
                 the image {name:?} here is not the one that has them"
            );
        };
        self.unpack(&image, snapshotter).await
    }
}

fn descriptor(from: &oci_spec::image::Descriptor) -> Descriptor {
    Descriptor {
        media_type: from.media_type().to_string(),
        digest: from.digest().to_string(),
        size: i64::try_from(from.size()).unwrap_or(i64::MAX),
        ..Descriptor::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_ids_follow_the_image_specification() {
        let ids = ["sha256:aaa".to_owned(), "sha256:bbb".to_owned()];
        assert_eq!(chain_id(&[]), None);
        assert_eq!(chain_id(&ids[..1]).as_deref(), Some("sha256:aaa"));
        let two = format!("sha256:{}", hex(&Sha256::digest(b"sha256:aaa sha256:bbb")));
        assert_eq!(chain_id(&ids), Some(two));
    }
}
