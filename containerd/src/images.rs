//! Images: from a name to the chain id of its layers, and layers into snapshots.
//!
//! ```text
//!  image record -> index -> manifest -> config {diff_ids} -> chain id = parent of the snapshot
//!                              `-> layers -> Diff.Apply -> committed snapshots
//! ```
//!
//! An index usually names manifests for several platforms; the one that a container uses is the
//! one whose chain id its snapshot has as parent.

use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::{Container, CreateImageRequest, GetImageRequest, Image};
use containerd_client::types::Descriptor;
use data_encoding::HEXLOWER;
use oci_spec::image::{ImageConfiguration, ImageIndex, ImageManifest};
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use crate::labels::GC_REF_SNAPSHOT;
use crate::{Cause, Containerd, ContainerdError, During, Snapshotter, present, unique};

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

/// The chain id of layers: what containerd calls the committed snapshot of the topmost one. See
/// the OCI image specification, "Layer ChainID".
#[must_use]
pub fn chain_id(diff_ids: &[String]) -> Option<String> {
    diff_ids.iter().fold(None, |chain, diff_id| {
        Some(match chain {
            None => diff_id.clone(),
            Some(chain) => {
                let digest = Sha256::digest(format!("{chain} {diff_id}"));
                format!("sha256:{}", HEXLOWER.encode(&digest))
            }
        })
    })
}

impl Containerd {
    /// The image record called `name`.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn image(&self, name: &str) -> Result<Option<Image>, ContainerdError> {
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
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn create_image(
        &self,
        name: &str,
        target: Descriptor,
    ) -> Result<(), ContainerdError> {
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
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn base_of(
        &self,
        record: &Container,
    ) -> Result<(String, Option<Descriptor>), ContainerdError> {
        let snapshots = self.snapshotter(&record.snapshotter);
        let snapshot = snapshots.stat(&record.snapshot_key).await?;
        let image = self.image(&record.image).await?;
        Ok((snapshot.parent, image.and_then(|image| image.target)))
    }

    /// Looks below `target` for the manifest whose layers have the chain id `chain`.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn resolve_image(
        &self,
        target: &Descriptor,
        chain: &str,
    ) -> Result<Option<ResolvedImage>, ContainerdError> {
        let mut ways = vec![vec![target.clone()]];
        while let Some(way) = ways.pop() {
            let Some(here) = way.last() else { continue };
            // An index usually names platforms that were never fetched.
            if self.blob(&here.digest).await?.is_none() || way.len() > 4 {
                continue;
            }
            let document = self.read_document(&here.digest).await?;
            // Only an index has what an index must have.
            let Ok(index) = serde_json::from_slice::<ImageIndex>(&document) else {
                match self.resolve_manifest(&document, &way, chain).await? {
                    None => continue,
                    found => return Ok(found),
                }
            };
            for entry in index.manifests() {
                ways.push(way.iter().cloned().chain([descriptor(entry)]).collect());
            }
        }
        Ok(None)
    }

    async fn resolve_manifest(
        &self,
        document: &[u8],
        way: &[Descriptor],
        chain: &str,
    ) -> Result<Option<ResolvedImage>, ContainerdError> {
        let digest = way.last().map_or("", |manifest| &manifest.digest);
        let manifest: ImageManifest = parse(document, "manifest", digest)?;
        let config = descriptor(manifest.config());
        if self.blob(&config.digest).await?.is_none() {
            return Ok(None);
        }
        let document = self.read_document(&config.digest).await?;
        let parsed: ImageConfiguration = parse(&document, "config", &config.digest)?;
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

    /// Unpacks the image's layers into `snapshotter`, as far as they are not there.
    ///
    /// # Errors
    /// The answer of containerd; or a layer is not what the image's config says.
    pub async fn unpack(
        &self,
        image: &ResolvedImage,
        snapshotter: &str,
    ) -> Result<(), ContainerdError> {
        let snapshots = self.snapshotter(snapshotter);
        let mut parent = String::new();
        for (index, layer) in image.layers.iter().enumerate() {
            let Some(name) = chain_id(&image.diff_ids[..=index]) else {
                continue;
            };
            match snapshots.stat(&name).await {
                Ok(_) => {}
                Err(error) if error.is_not_found() => {
                    let diff_id = &image.diff_ids[index];
                    self.unpack_layer(layer, diff_id, &snapshots, &parent, &name)
                        .await?;
                }
                Err(error) => return Err(error),
            }
            parent = name;
        }
        // Without this label the snapshots are garbage as soon as no lease holds them.
        let label = format!("{GC_REF_SNAPSHOT}{snapshotter}");
        self.label_blob(&image.config, &[(&label, &parent)]).await
    }

    async fn unpack_layer(
        &self,
        layer: &Descriptor,
        diff_id: &str,
        snapshots: &Snapshotter,
        parent: &str,
        name: &str,
    ) -> Result<(), ContainerdError> {
        let key = format!("transship-unpack-{} {name}", unique());
        let mounts = snapshots.prepare(&key, parent, &[]).await?;
        let committed = async {
            let found = self.apply(layer, mounts).await?.digest;
            if found != diff_id {
                let expected = diff_id.to_owned();
                return Err(Cause::Content { found, expected })
                    .during(|| format!("unpack the layer {}", layer.digest));
            }
            snapshots.commit(name, &key, &[]).await
        };
        let Err(error) = committed.await else {
            return Ok(());
        };
        let removed = snapshots.remove_if_exists(&key).await;
        // Somebody else has unpacked the same layer meanwhile.
        if error.is_already_exists() {
            removed
        } else {
            Err(error)
        }
    }

    /// Makes sure that `snapshotter` has the layers with the chain id `chain`; they come out of the image
    /// `name` if need be.
    ///
    /// # Errors
    /// The answer of containerd; or neither snapshotter nor image has the layers.
    pub async fn ensure_unpacked(
        &self,
        name: &str,
        chain: &str,
        snapshotter: &str,
    ) -> Result<(), ContainerdError> {
        match self.snapshotter(snapshotter).stat(chain).await {
            Ok(_) => return Ok(()),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
        let resolved = match self.image(name).await?.and_then(|image| image.target) {
            Some(target) => self.resolve_image(&target, chain).await?,
            None => None,
        };
        let image = name.to_owned();
        let resolved = resolved.ok_or(Cause::OtherImage { image });
        let image = resolved.during(|| format!("unpack the layers with the chain id {chain}"))?;
        self.unpack(&image, snapshotter).await
    }
}

fn parse<T: DeserializeOwned>(
    document: &[u8],
    kind: &'static str,
    digest: &str,
) -> Result<T, ContainerdError> {
    serde_json::from_slice(document)
        .map_err(|source| Cause::Document { kind, source })
        .during(|| format!("read the blob {digest}"))
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
        let two = HEXLOWER.encode(&Sha256::digest(b"sha256:aaa sha256:bbb"));
        let two = format!("sha256:{two}");
        assert_eq!(chain_id(&ids), Some(two));
    }
}
