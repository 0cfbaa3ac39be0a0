//! A checkpoint into a registry, with an image of each container that starts cold.
//!
//! ```text
//!  checkpoint ── chain id of the image ──> containerd: an image with these layers, or snapshots of them
//!             ── files ────────────────┐                   │ config, layers (read as they are sent)
//!                                      └─ transship_package::oci::push ──> registry
//! ```

use std::collections::HashMap;
use std::io::{self, Read};

use tokio::runtime::Handle;
use tokio::sync::mpsc;
use transship_checkpoint::manifest::{self, ROOTFS_DIFF_FILE};
use transship_checkpoint::store::Checkpoint;
use transship_containerd::labels::DISTRIBUTION_SOURCE;
use transship_containerd::{Containerd, ContainerdError, ResolvedImage};
use transship_package::encryption::Recipients;
use transship_package::export::ExportOptions;
use transship_package::oci::{
    self, Base, BaseLayer, Bases, Descriptor, Pushed, Reference, Registry, StoreOptions,
    config_of_spec,
};

use crate::error::{Context as _, Error, Result};
use crate::image_blobs::{LEASE, rebuild};
use crate::import::pull_command;
use crate::progress::Progress;

/// Pieces of a blob that wait to be sent.
const WAITING: usize = 2;

/// What is put into a registry.
#[derive(Debug)]
pub enum Form {
    /// The checkpoint, and an image of each container; this node has those that they were made of.
    WithImages(Containerd),
    /// The checkpoint alone.
    Alone,
    /// The checkpoint alone, and only these can read it.
    EncryptedTo(Recipients),
}

/// Puts the checkpoint into the registry under the tag of `reference`.
///
/// # Errors
/// This node does not have such an image, or the registry does not take something.
pub async fn push(
    form: Form,
    checkpoint: Checkpoint,
    mut options: StoreOptions,
    registry: Registry,
    reference: &Reference,
    progress: &dyn Progress,
) -> Result<Pushed> {
    let mut found = Found::default();
    for container in &checkpoint.manifest.containers {
        if let Form::WithImages(node) = &form {
            let node = node.in_namespace(&container.namespace)?;
            let added = found
                .add(&node, &checkpoint, container, &reference.host)
                .await;
            if let Err(error) = added {
                found.end_leases().await;
                return Err(error);
            }
        }
    }
    let total = checkpoint.manifest.size() + found.bytes(&checkpoint);
    progress.bytes("push", total);
    let (tag, mut count) = (reference.tag.clone(), progress.counter());
    let (images, nodes) = (std::mem::take(&mut found.images), found.nodes.clone());
    let runtime = Handle::current();
    let pushing = tokio::task::spawn_blocking(move || {
        let alone = match form {
            Form::WithImages(_) => None,
            Form::Alone => Some(oci::store(
                &checkpoint,
                &options,
                &registry,
                &tag,
                &mut *count,
            )?),
            Form::EncryptedTo(recipients) => {
                let options = ExportOptions {
                    level: Some(options.level),
                    recipients,
                    signer: options.signer.take(),
                };
                Some(oci::store_encrypted(
                    &checkpoint,
                    &options,
                    &registry,
                    &tag,
                    &mut *count,
                )?)
            }
        };
        if let Some(stored) = alone {
            return Ok(Pushed {
                artifact: stored.digest.clone(),
                stored,
                images: Vec::new(),
            });
        }
        let open = |digest: &str| -> io::Result<Box<dyn Read + Send>> {
            let node = nodes.get(digest).ok_or(io::ErrorKind::NotFound)?;
            Ok(Box::new(BlobReader::open(&runtime, node, digest)))
        };
        let bases = Bases {
            images,
            open: &open,
        };
        oci::push(&checkpoint, &options, &bases, &registry, &tag, &mut *count)
    });
    let pushed = pushing.await;
    found.end_leases().await;
    Ok(pushed.context("the push was given up")??)
}

/// What the images consist of, and who has it.
#[derive(Default)]
struct Found {
    images: Vec<Base>,
    /// By the digests of layers.
    nodes: HashMap<String, Containerd>,
    /// Of what is sent.
    leases: Vec<Containerd>,
}

impl Found {
    async fn add(
        &mut self,
        node: &Containerd,
        checkpoint: &Checkpoint,
        container: &manifest::Container,
        host: &str,
    ) -> Result<()> {
        let (image, has_config) = self.image_of(node, container).await?;
        let repositories = repositories(node, &image, host, &container.image.name).await?;
        let mut layers = Vec::new();
        for (layer, diff_id) in image.layers.iter().zip(&image.diff_ids) {
            self.nodes.insert(layer.digest.clone(), node.clone());
            layers.push(BaseLayer {
                descriptor: Descriptor {
                    media_type: layer.media_type.clone(),
                    digest: layer.digest.clone(),
                    size: u64::try_from(layer.size).unwrap_or_default(),
                    ..Descriptor::default()
                },
                diff_id: diff_id.clone(),
                repositories: repositories.clone(),
            });
        }
        self.images.push(Base {
            container: container.name.clone(),
            config: match has_config {
                true => node.read_document(&image.config).await?,
                false => config_of_spec(&checkpoint.read_spec(container)?)?,
            },
            layers,
        });
        Ok(())
    }

    /// An image of the layers below the container's files, all of which this node has; false: nothing is left of its own
    /// config.
    async fn image_of(
        &mut self,
        node: &Containerd,
        container: &manifest::Container,
    ) -> Result<(ResolvedImage, bool)> {
        let image = &container.image;
        let rebuilt = image.rebuilt.iter().map(|it| &it.chain_id);
        let mut reason = None;
        for chain in [&image.chain_id].into_iter().chain(rebuilt) {
            let found = node.find_image(&image.name, chain).await?;
            let found = found.map(|(_, image)| image);
            if let Some(found) = &found {
                // The image may be removed here while its layers are read.
                let leased = node.with_lease(LEASE).await?;
                let has_all = leased.has_all_blobs(found).await;
                self.leases.push(leased);
                if has_all? {
                    return Ok((found.clone(), true));
                }
            }
            let Some(snapshotter) = snapshotter_with(node, chain, &container.snapshotter).await?
            else {
                continue;
            };
            match rebuild(node, found.as_ref(), chain, &snapshotter).await {
                Ok((leased, image)) => {
                    self.leases.push(leased);
                    return Ok((image, found.is_some()));
                }
                Err(error) => reason = Some(error),
            }
        }
        let (name, namespace) = (&image.name, node.namespace());
        let message = format!(
            "the namespace {namespace:?} of this node does not have the image {name} of {}, which the image that is \
             pushed with the checkpoint builds on",
            container.name
        );
        let refused = Error::refused(message);
        let refused = match reason {
            Some(reason) => refused.because(reason),
            None => refused,
        };
        Err(refused
            .hint(pull_command(namespace, name))
            .hint("--artifact-only pushes the checkpoint without an image that starts"))
    }

    /// Bytes that are read beside those of the artifact.
    fn bytes(&self, checkpoint: &Checkpoint) -> u64 {
        let layers = self.images.iter().flat_map(|it| &it.layers);
        let layers: u64 = layers.map(|it| it.descriptor.size).sum();
        let containers = checkpoint.manifest.containers.iter();
        let files = containers
            .filter(|_| !self.images.is_empty())
            .flat_map(|it| &it.files);
        let tops = files.filter(|it| it.path == ROOTFS_DIFF_FILE);
        layers + tops.map(|it| it.size).sum::<u64>()
    }

    async fn end_leases(&mut self) {
        for leased in self.leases.drain(..) {
            // It ends by itself.
            drop(leased.end_lease().await);
        }
    }
}

/// A snapshotter that has the layers with the chain id `chain`; `preferred` before others.
async fn snapshotter_with(
    node: &Containerd,
    chain: &str,
    preferred: &str,
) -> Result<Option<String>> {
    let mut names = node.snapshotters().await?;
    names.sort_by_key(|name| name != preferred);
    for name in names {
        // One that cannot be asked has nothing to give.
        if !chain.is_empty() && node.snapshotter(&name).stat(chain).await.is_ok() {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// Repositories of the registry `host` that may have the image: containerd labels what it fetches with where it comes
/// from, of layers that it has already only the manifest and the config.
async fn repositories(
    node: &Containerd,
    image: &ResolvedImage,
    host: &str,
    name: &str,
) -> Result<Vec<String>, ContainerdError> {
    let label = format!("{DISTRIBUTION_SOURCE}{}", without_port(host));
    let mut repositories = Vec::new();
    let mut add = |name: &str| {
        if !name.is_empty() && !repositories.iter().any(|it| it == name) {
            repositories.push(name.to_owned());
        }
    };
    let named = name.parse::<Reference>().ok();
    if let Some(named) = named.filter(|it| it.host == host) {
        add(&named.name);
    }
    for blob in &image.blobs {
        let labels = node.blob(&blob.digest).await?.unwrap_or_default().labels;
        let names = labels.get(&label).map(String::as_str);
        names.unwrap_or_default().split(',').for_each(&mut add);
    }
    Ok(repositories)
}

/// What containerd has in its label: Go's `URL.Hostname`.
fn without_port(host: &str) -> &str {
    let is_port = |text: &str| text.bytes().all(|it| it.is_ascii_digit());
    let host = match host.rsplit_once(':') {
        Some((host, port)) if is_port(port) => host,
        _ => host,
    };
    host.trim_start_matches('[').trim_end_matches(']')
}

/// A blob of containerd for those who wait for its bytes in a thread.
struct BlobReader {
    pieces: mpsc::Receiver<Result<Vec<u8>, ContainerdError>>,
    piece: io::Cursor<Vec<u8>>,
}

impl BlobReader {
    fn open(runtime: &Handle, node: &Containerd, digest: &str) -> Self {
        let (sender, pieces) = mpsc::channel(WAITING);
        let (node, digest) = (node.clone(), digest.to_owned());
        runtime.spawn(async move {
            let sent = async {
                let mut blob = node.read_blob(&digest).await?;
                while let Some(piece) = blob.next().await? {
                    if sender.send(Ok(piece)).await.is_err() {
                        break;
                    }
                }
                Ok(())
            };
            if let Err(error) = sent.await {
                // Who has gone away need not know.
                drop(sender.send(Err(error)).await);
            }
        });
        Self {
            pieces,
            piece: io::Cursor::default(),
        }
    }
}

impl Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.piece.read(buffer)? {
                0 if !buffer.is_empty() => match self.pieces.blocking_recv() {
                    Some(piece) => self.piece = io::Cursor::new(piece.map_err(io::Error::other)?),
                    None => return Ok(0),
                },
                read => return Ok(read),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_have_hosts_without_ports() {
        for (host, label) in [
            ("docker.io", "docker.io"),
            ("127.0.0.1:5000", "127.0.0.1"),
            ("[::1]:5000", "::1"),
            ("[::1]", "::1"),
        ] {
            assert_eq!(without_port(host), label);
        }
    }
}
