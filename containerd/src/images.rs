//! Images: from a name to the chain id of its layers, and layers into snapshots.
//!
//! ```text
//!  image record -> index -> manifest -> config {diff_ids} -> chain id = parent of the snapshot
//!                              `-> layers -> Diff.Apply -> committed snapshots
//! ```
//!
//! An index usually names manifests for several platforms; the one that a container uses is the
//! one whose chain id its snapshot has as parent. Other entries are skipped, whatever they are: attestations,
//! artifacts, platforms that were never fetched. Of each document only those fields are looked at that name
//! the next one; many tools leave others out that the specification wants.
//!
//! A name may mean another image by now: what a container is made of is found by its chain id under every name.

use std::collections::{HashSet, VecDeque};

use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::{
    Container, CreateImageRequest, GetImageRequest, Image, ListImagesRequest,
};
use containerd_client::types::Descriptor;
use serde::Deserialize;
use transship_digest::oci_digest;

use crate::labels::{GC_REF_SNAPSHOT, UNCOMPRESSED};
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

/// What a manifest makes a container of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageBase {
    /// Digest of the manifest.
    pub manifest: String,
    /// Digest of its config.
    pub config: String,
    /// Its architecture, as Go calls it.
    pub architecture: String,
    /// The chain id of its layers.
    pub chain_id: String,
}

/// What is looked at in an index or a manifest.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Document {
    manifests: Option<Vec<serde_json::Value>>,
    config: Option<Link>,
    layers: Option<Vec<Link>>,
}

/// Documents below the target of an image that are looked at: an index has one for each platform, and its author may
/// write as many as he likes.
const MOST_DOCUMENTS: usize = 1024;
/// Documents on the way to the last one: indexes, and a manifest.
const LONGEST_WAY: usize = 4;

/// A descriptor.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Link {
    media_type: String,
    digest: String,
    size: i64,
}

/// What is looked at in a config.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Config {
    architecture: String,
    rootfs: Option<RootFs>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RootFs {
    diff_ids: Option<Vec<String>>,
}

/// The chain id of layers: what containerd calls the committed snapshot of the topmost one. See
/// the OCI image specification, "Layer ChainID".
#[must_use]
pub fn chain_id(diff_ids: &[String]) -> Option<String> {
    diff_ids.iter().fold(None, |chain, diff_id| {
        Some(match chain {
            None => diff_id.clone(),
            Some(chain) => oci_digest(format!("{chain} {diff_id}")),
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

    /// All image records.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn images(&self) -> Result<Vec<Image>, ContainerdError> {
        let request = self.request(ListImagesRequest::default());
        let answer = ImagesClient::new(self.channel()).list(request).await;
        let answer = answer.during(|| "list the images".to_owned())?;
        Ok(answer.into_inner().images)
    }

    /// What a container is made of: the chain id below its snapshot, and the target of an image with these
    /// layers if the node still has one: that of the container's own name, or another one when that name has
    /// moved on.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn base_of(
        &self,
        record: &Container,
    ) -> Result<(String, Option<(Descriptor, ResolvedImage)>), ContainerdError> {
        let snapshots = self.snapshotter(&record.snapshotter);
        let snapshot = snapshots.stat(&record.snapshot_key).await?;
        let image = self.find_image(&record.image, &snapshot.parent).await?;
        Ok((snapshot.parent, image))
    }

    /// Looks for an image whose layers have the chain id `chain`: `name` first, then all others.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn find_image(
        &self,
        name: &str,
        chain: &str,
    ) -> Result<Option<(Descriptor, ResolvedImage)>, ContainerdError> {
        let named = self.image(name).await?;
        let mut seen = Vec::new();
        if let Some(target) = named.and_then(|image| image.target) {
            if let Some(resolved) = self.resolve_image(&target, chain).await? {
                return Ok(Some((target, resolved)));
            }
            seen.push(target.digest);
        }
        for target in self.images().await?.into_iter().filter_map(|it| it.target) {
            if seen.contains(&target.digest) {
                continue;
            }
            // One that cannot be read is not the one that is looked for.
            if let Ok(Some(resolved)) = self.resolve_image(&target, chain).await {
                return Ok(Some((target, resolved)));
            }
            seen.push(target.digest);
        }
        Ok(None)
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
        for (document, way) in self.documents(target).await? {
            if let Some(found) = self.resolve_manifest(document, &way, chain).await? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// What is at and below `target`, each with the way there, as far as the node has it.
    async fn documents(
        &self,
        target: &Descriptor,
    ) -> Result<Vec<(Document, Vec<Descriptor>)>, ContainerdError> {
        let mut walk = DocumentWalk::from(target);
        let mut found = Vec::new();
        while let Some(way) = walk.next() {
            let Some(here) = way.last() else { continue };
            // An index usually names platforms that were never fetched.
            if self.blob(&here.digest).await?.is_none() {
                continue;
            }
            if let Ok(document) = parse::<Document>(&self.read_document(&here.digest).await?) {
                walk.go_below(&way, &document);
                found.push((document, way));
            }
        }
        Ok(found)
    }

    /// What the manifests at and below `target` make a container of, as far as the node has them.
    ///
    /// # Errors
    /// The answer of containerd.
    pub async fn image_bases(
        &self,
        target: &Descriptor,
    ) -> Result<Vec<ImageBase>, ContainerdError> {
        let mut bases = Vec::new();
        for (document, way) in self.documents(target).await? {
            let (Some(config), Some(manifest)) = (document.config, way.last()) else {
                continue;
            };
            if self.blob(&config.digest).await?.is_none() {
                continue;
            }
            let Ok(parsed) = parse::<Config>(&self.read_document(&config.digest).await?) else {
                continue;
            };
            let diff_ids = parsed.rootfs.and_then(|it| it.diff_ids).unwrap_or_default();
            if let Some(chain_id) = chain_id(&diff_ids) {
                bases.push(ImageBase {
                    manifest: manifest.digest.clone(),
                    config: config.digest,
                    architecture: parsed.architecture,
                    chain_id,
                });
            }
        }
        Ok(bases)
    }

    async fn resolve_manifest(
        &self,
        manifest: Document,
        way: &[Descriptor],
        chain: &str,
    ) -> Result<Option<ResolvedImage>, ContainerdError> {
        let (Some(config), Some(layers)) = (manifest.config, manifest.layers) else {
            return Ok(None);
        };
        let config = Descriptor::from(config);
        if self.blob(&config.digest).await?.is_none() {
            return Ok(None);
        }
        let parsed = parse::<Config>(&self.read_document(&config.digest).await?).ok();
        let rootfs = parsed.and_then(|config| config.rootfs);
        let diff_ids = rootfs.and_then(|it| it.diff_ids).unwrap_or_default();
        if chain_id(&diff_ids).as_deref() != Some(chain) || layers.len() != diff_ids.len() {
            return Ok(None);
        }
        let layers: Vec<Descriptor> = layers.into_iter().map(Descriptor::from).collect();
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
            if !snapshots.hold(&name).await? {
                let diff_id = &image.diff_ids[index];
                self.unpack_layer(layer, diff_id, &snapshots, &parent, &name)
                    .await?;
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
            if layer.digest != found {
                // As containerd does when it unpacks.
                let label = (UNCOMPRESSED, found.as_str());
                self.label_blob(&layer.digest, &[label]).await?;
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
        if self.snapshotter(snapshotter).hold(chain).await? {
            return Ok(());
        }
        let resolved = self.find_image(name, chain).await?.map(|(_, image)| image);
        let image = name.to_owned();
        let resolved = resolved.ok_or(Cause::OtherImage { image });
        let image = resolved.during(|| format!("unpack the layers with the chain id {chain}"))?;
        self.unpack(&image, snapshotter).await
    }
}

/// The documents of an image, each with the way to it from the image's target. The shortest way to each counts, and each
/// comes once: an index that has another one a thousand times, which has a third one a thousand times, is three documents.
struct DocumentWalk {
    ways: VecDeque<Vec<Descriptor>>,
    seen: HashSet<String>,
}

impl DocumentWalk {
    fn from(target: &Descriptor) -> Self {
        Self {
            ways: VecDeque::from([vec![target.clone()]]),
            seen: HashSet::from([target.digest.clone()]),
        }
    }

    fn next(&mut self) -> Option<Vec<Descriptor>> {
        self.ways.pop_front()
    }

    /// Goes on with what the document at the end of `way` names.
    fn go_below(&mut self, way: &[Descriptor], document: &Document) {
        if way.len() == LONGEST_WAY {
            return;
        }
        let entries = document.manifests.iter().flatten();
        for entry in entries.filter_map(|entry| Link::deserialize(entry).ok()) {
            if self.seen.len() < MOST_DOCUMENTS && self.seen.insert(entry.digest.clone()) {
                let next = way.iter().cloned().chain([entry.into()]);
                self.ways.push_back(next.collect());
            }
        }
    }
}

fn parse<'de, T: Deserialize<'de>>(document: &'de [u8]) -> Result<T, serde_json::Error> {
    serde_json::from_slice(document)
}

impl From<Link> for Descriptor {
    fn from(link: Link) -> Self {
        Self {
            media_type: link.media_type,
            digest: link.digest,
            size: link.size,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;

    /// What is found below the document `top` of these, and how often one was asked for.
    fn found_below(top: &str, all: &[(&str, Vec<String>)]) -> (Vec<String>, usize) {
        let document = |entries: &Vec<String>| {
            let link = |digest| json!({"mediaType": "x", "digest": digest, "size": 1});
            let entries: Vec<_> = entries.iter().map(link).collect();
            json!({ "manifests": entries }).to_string().into_bytes()
        };
        let all: BTreeMap<_, _> = all.iter().map(|(name, of)| (*name, document(of))).collect();
        let target = Descriptor {
            digest: top.to_owned(),
            ..Descriptor::default()
        };
        let (mut walk, mut found, mut asked) = (DocumentWalk::from(&target), Vec::new(), 0);
        while let Some(way) = walk.next() {
            asked += 1;
            assert!(asked < 1_000_000, "it is asked for ever");
            if let Some(document) = all.get(&*way.last().unwrap().digest) {
                walk.go_below(&way, &parse(document).unwrap());
                found.push(way);
            }
        }
        let last = |way: &[Descriptor]| way.last().unwrap().digest.clone();
        let mut names: Vec<_> = found.iter().map(|way| last(way)).collect();
        names.sort_unstable();
        (names, asked)
    }

    #[test]
    fn an_index_costs_no_more_than_what_it_has() {
        let many = |name: &str| vec![name.to_owned(); 1000];
        let nested = [
            ("a", many("b")),
            ("b", many("c")),
            ("c", many("d")),
            ("d", Vec::new()),
        ];
        let (found, asked) = found_below("a", &nested);
        assert_eq!(found, ["a", "b", "c", "d"]);
        assert_eq!(asked, 4);
        let wide: Vec<_> = (0..100_000).map(|nth| format!("absent {nth}")).collect();
        let (_, asked) = found_below("a", &[("a", wide)]);
        assert!(asked <= MOST_DOCUMENTS, "{asked}");
        // The shorter way counts, whichever is seen first.
        let two_ways = [
            ("a", vec!["b".to_owned(), "d".to_owned()]),
            ("b", vec!["c".to_owned()]),
            ("c", vec!["d".to_owned()]),
            ("d", vec!["e".to_owned()]),
            ("e", Vec::new()),
        ];
        assert_eq!(found_below("a", &two_ways).0, ["a", "b", "c", "d", "e"]);
    }

    #[test]
    fn chain_ids_follow_the_image_specification() {
        let ids = ["sha256:aaa".to_owned(), "sha256:bbb".to_owned()];
        assert_eq!(chain_id(&[]), None);
        assert_eq!(chain_id(&ids[..1]).as_deref(), Some("sha256:aaa"));
        let two = transship_digest::sha256_hex(b"sha256:aaa sha256:bbb");
        let two = format!("sha256:{two}");
        assert_eq!(chain_id(&ids), Some(two));
    }
}
