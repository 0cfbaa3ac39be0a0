//! An image whose blobs are not all there any more (`discard_unpacked_layers`, a name that has moved on and a
//! pruned content store, another compression than the one that was fetched), so that it can be sent.
//!
//! ```text
//!  layer of the manifest is there?  ──yes──────────────────────────────> as it is
//!   else: a blob of the same tar, compressed in another way, is there? > that one
//!   else: the layer's snapshot, compared with its parent  ─────────────> a new tar, another diff id
//!  new manifest; new config when a diff id is new: then the chain id is another one, too
//! ```
//!
//! What is made belongs to a lease of the caller's.

use std::collections::HashMap;

use containerd_client::services::v1::DiffRequest;
use containerd_client::types::Descriptor;
use oci_spec::image::MediaType;
use serde_json::{Value, json};
use transship_digest::oci_digest;

use crate::labels::{GC_REF_CONTENT, UNCOMPRESSED};
use crate::upload::Upload;
use crate::{Containerd, ContainerdError, ResolvedImage, chain_id, unique};

const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// A layer that can be sent.
struct Layer {
    descriptor: Descriptor,
    diff_id: String,
}

impl Containerd {
    /// Whether every blob of the image is in the content store; they stay as long as the lease then, if there is one.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn has_all_blobs(&self, image: &ResolvedImage) -> Result<bool, ContainerdError> {
        for blob in &image.blobs {
            if self.hold_blob(&blob.digest).await?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Makes an image of the layers that `snapshotter` has with the chain id `chain`. `image` is what the
    /// content store still has of theirs.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn rebuild_image(
        &self,
        image: Option<&ResolvedImage>,
        chain: &str,
        snapshotter: &str,
    ) -> Result<ResolvedImage, ContainerdError> {
        let names = match image {
            Some(image) => (1..=image.diff_ids.len())
                .filter_map(|count| chain_id(&image.diff_ids[..count]))
                .collect(),
            None => self.chain_of(chain, snapshotter).await?,
        };
        let mut layers = Vec::new();
        let mut parent = "";
        for (index, name) in names.iter().enumerate() {
            let known = image.map(|image| (&image.layers[index], image.diff_ids[index].as_str()));
            let kept = match known {
                Some((layer, diff_id)) => self.find_layer(layer, diff_id).await?,
                // The lowest snapshot has the name of its layer's tar.
                None if parent.is_empty() => self.find_tar(name).await?,
                None => None,
            };
            layers.push(match kept {
                Some(layer) => layer,
                None => self.layer_of(name, parent, snapshotter).await?,
            });
            parent = name;
        }
        self.write_image(image, layers).await
    }

    /// Names of the snapshots from the lowest to `name`.
    async fn chain_of(
        &self,
        name: &str,
        snapshotter: &str,
    ) -> Result<Vec<String>, ContainerdError> {
        let snapshots = self.snapshotter(snapshotter);
        let mut names = vec![name.to_owned()];
        while let Some(top) = names.last() {
            let parent = snapshots.stat(top).await?.parent;
            if parent.is_empty() {
                break;
            }
            names.push(parent);
        }
        names.reverse();
        Ok(names)
    }

    async fn find_layer(
        &self,
        layer: &Descriptor,
        diff_id: &str,
    ) -> Result<Option<Layer>, ContainerdError> {
        if self.blob(&layer.digest).await?.is_some() {
            return Ok(Some(Layer {
                descriptor: layer.clone(),
                diff_id: diff_id.to_owned(),
            }));
        }
        self.find_tar(diff_id).await
    }

    /// A blob of the tar with this digest, compressed in whatever way.
    async fn find_tar(&self, diff_id: &str) -> Result<Option<Layer>, ContainerdError> {
        let labelled = format!("labels.\"{UNCOMPRESSED}\"=={diff_id}");
        let itself = format!("digest=={diff_id}");
        for blob in self.blobs(&[&itself, &labelled]).await? {
            let begin = self.read_begin(&blob.digest).await?;
            let media_type = if begin.starts_with(GZIP) {
                MediaType::ImageLayerGzip
            } else if begin.starts_with(ZSTD) {
                MediaType::ImageLayerZstd
            } else if blob.digest == diff_id {
                MediaType::ImageLayer
            } else {
                continue;
            };
            return Ok(Some(Layer {
                descriptor: Descriptor {
                    media_type: media_type.to_string(),
                    digest: blob.digest,
                    size: blob.size,
                    ..Descriptor::default()
                },
                diff_id: diff_id.to_owned(),
            }));
        }
        Ok(None)
    }

    /// What the snapshot `name` adds to `parent`, as a layer.
    async fn layer_of(
        &self,
        name: &str,
        parent: &str,
        snapshotter: &str,
    ) -> Result<Layer, ContainerdError> {
        let snapshots = self.snapshotter(snapshotter);
        let key = |which: &str| format!("transship-rebuild-{which}-{}", unique());
        let (below, above) = (key("below"), key("above"));
        let compared = async {
            let left = snapshots.view(&below, parent, &[]).await?;
            let right = snapshots.view(&above, name, &[]).await?;
            self.diff(DiffRequest {
                left,
                right,
                // Its digest is the diff id.
                media_type: MediaType::ImageLayer.to_string(),
                r#ref: key("layer"),
                ..DiffRequest::default()
            })
            .await
        };
        let compared = compared.await;
        let removed = snapshots.remove_if_exists(&above).await;
        let removed = removed.and(snapshots.remove_if_exists(&below).await);
        let descriptor = compared?;
        removed?;
        let diff_id = descriptor.digest.clone();
        Ok(Layer {
            descriptor,
            diff_id,
        })
    }

    async fn write_image(
        &self,
        old: Option<&ResolvedImage>,
        layers: Vec<Layer>,
    ) -> Result<ResolvedImage, ContainerdError> {
        let diff_ids: Vec<String> = layers.iter().map(|layer| layer.diff_id.clone()).collect();
        let config = match old.filter(|old| old.diff_ids == diff_ids) {
            Some(old) => { old.blobs.iter() }
                .find(|blob| blob.digest == old.config)
                .cloned()
                .unwrap_or_default(),
            None => {
                let old = match old {
                    Some(old) => Some(self.read_document(&old.config).await?),
                    None => None,
                };
                let document = config_document(old.as_deref(), &diff_ids);
                self.write_document(&document, MediaType::ImageConfig, HashMap::new())
                    .await?
            }
        };
        let layers: Vec<Descriptor> = layers.into_iter().map(|layer| layer.descriptor).collect();
        let document = json!({
            "schemaVersion": 2,
            "mediaType": MediaType::ImageManifest.to_string(),
            "config": link(&config),
            "layers": layers.iter().map(link).collect::<Vec<_>>(),
        });
        let refs = [(".config".to_owned(), &config)].into_iter();
        let refs = refs.chain({ layers.iter().enumerate() }.map(|(n, it)| (format!(".l.{n}"), it)));
        let labels = refs.map(|(name, it)| (format!("{GC_REF_CONTENT}{name}"), it.digest.clone()));
        let manifest = self
            .write_document(&document, MediaType::ImageManifest, labels.collect())
            .await?;
        let blobs = [manifest, config.clone()].into_iter();
        Ok(ResolvedImage {
            config: config.digest,
            blobs: blobs.chain(layers.iter().cloned()).collect(),
            layers,
            diff_ids,
        })
    }

    async fn write_document(
        &self,
        document: &Value,
        media_type: MediaType,
        labels: HashMap<String, String>,
    ) -> Result<Descriptor, ContainerdError> {
        let bytes = document.to_string().into_bytes();
        let digest = oci_digest(&bytes);
        let size = bytes.len();
        // Another may write the same at this moment; the first one who is done has written it.
        let reference = format!("transship-{digest}-{}", unique());
        let mut upload = Upload::begin(self.clone(), reference).await?;
        let written = async {
            upload.write(bytes).await?;
            upload.commit(&digest, size as u64, &labels).await
        };
        let written = written.await;
        if written.is_err() {
            // The first error says more.
            drop(upload.abort().await);
        }
        written?;
        Ok(Descriptor {
            media_type: media_type.to_string(),
            digest,
            size: i64::try_from(size).unwrap_or(i64::MAX),
            ..Descriptor::default()
        })
    }
}

fn link(descriptor: &Descriptor) -> Value {
    json!({
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size,
    })
}

/// The config with other layers. Its history is that of the old ones.
fn config_document(old: Option<&[u8]>, diff_ids: &[String]) -> Value {
    let old = old.and_then(|json| serde_json::from_slice::<Value>(json).ok());
    let mut config = old.filter(Value::is_object).unwrap_or_else(|| json!({}));
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    for (key, value) in [("architecture", architecture), ("os", "linux")] {
        if !config[key].is_string() {
            config[key] = json!(value);
        }
    }
    config["rootfs"] = json!({ "type": "layers", "diff_ids": diff_ids });
    if let Some(config) = config.as_object_mut() {
        config.remove("history");
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_keeps_all_but_its_layers() {
        let ids = ["sha256:new".to_owned()];
        let old = br#"{"os":"linux","config":{"Env":["A=b"]},"history":[{}],"rootfs":{"diff_ids":["x"]}}"#;
        let config = config_document(Some(old), &ids);
        assert_eq!(config["rootfs"]["diff_ids"], json!(ids));
        assert_eq!(config["config"]["Env"], json!(["A=b"]));
        assert!(config.get("history").is_none() && config["architecture"].is_string());
        assert_eq!(config_document(None, &ids)["os"], "linux");
        assert_eq!(config_document(Some(b"[]"), &ids)["os"], "linux");
    }
}
