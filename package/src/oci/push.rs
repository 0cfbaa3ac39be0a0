//! A checkpoint into a registry: an index of an image that starts cold and of the artifact with the whole checkpoint.
//!
//! ```text
//! TAG ──> index  application/vnd.oci.image.index.v1+json
//!           manifests  an image for each container (image.rs), in the order of the checkpoint; with a platform
//!                      the artifact; without one, so that who fetches for a platform fetches it, too
//!
//! artifact ── subject ──> the image of the first container
//! ```
//!
//! Tools that want an image take the first one with their platform. The tag is set last: whoever sees it sees all.

use std::io::{self, Read};

use transship_checkpoint::manifest::ROOTFS_DIFF_FILE;
use transship_checkpoint::store::Checkpoint;
use transship_layer::{LeftOut, NotInImages};

use super::annotations::annotations_of;
use super::artifact::{ARTIFACT, Figures, StoreOptions, Stored, put, store_blobs, to_bytes};
use super::blobs::Blobs as _;
use super::digests::digest_of;
use super::document::{Descriptor, INDEX, Index, MANIFEST};
use super::image::{Base, Config, IMAGE_CONFIG, manifest_of};
use super::image_layer::ImageLayer;
use super::registry::{Registry, Streamed};
use super::transfers::in_threads;
use crate::error::PackageError;

/// Opens a blob of a base by its digest.
pub type OpenBlob<'a> = dyn Fn(&str) -> io::Result<Box<dyn Read + Send>> + Sync + 'a;

/// The images that the containers of a checkpoint were made of.
pub struct Bases<'a> {
    /// One for each container, in the order of the checkpoint.
    pub images: Vec<Base>,
    /// Gives their layers.
    pub open: &'a OpenBlob<'a>,
}

impl std::fmt::Debug for Bases<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bases({:?})", self.images)
    }
}

/// What is in the registry now.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Pushed {
    /// All of it; its digest is that of the index.
    #[serde(flatten)]
    pub stored: Stored,
    /// Digest of the artifact's manifest.
    pub artifact: String,
    /// The images, in the order of the checkpoint.
    pub images: Vec<PushedImage>,
}

/// The image of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct PushedImage {
    /// Name of the container.
    pub container: String,
    /// Digest of the image's manifest.
    pub digest: String,
    /// What the artifact alone has of the changed files, the first thousand.
    pub left_out: Vec<OnlyInArtifact>,
    /// How much that is.
    pub left_out_count: u64,
}

/// Something that an image cannot say.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct OnlyInArtifact {
    /// The file, from the root of the container.
    pub path: String,
    /// What of it, and why.
    pub reason: String,
}

impl From<&LeftOut> for OnlyInArtifact {
    fn from(left_out: &LeftOut) -> Self {
        let reason = match &left_out.what {
            NotInImages::Name => {
                "a name that begins with \".wh.\" is a deletion in an image".to_owned()
            }
            NotInImages::Deletion => {
                "an image cannot say that a name that begins with \".wh.\" is deleted".to_owned()
            }
            NotInImages::Attribute(name) => format!("an image does not carry its attribute {name}"),
            other => format!("an image cannot say it ({other:?})"),
        };
        Self {
            path: format!("/{}", left_out.path.display()),
            reason,
        }
    }
}

/// A layer on its way.
enum Layer<'a> {
    Base(&'a super::BaseLayer),
    Top(&'a ImageLayer),
}

impl Layer<'_> {
    fn descriptor(&self) -> &Descriptor {
        match self {
            Self::Base(layer) => &layer.descriptor,
            Self::Top(layer) => &layer.descriptor,
        }
    }
}

/// Puts a checkpoint and an image of each of its containers into a registry, under the tag `tag`. What is there
/// already is left alone. `progress` gets the bytes.
///
/// # Errors
/// A file is damaged, a base cannot be read, or the registry does not take something: the tag is as it was then.
pub fn push(
    checkpoint: &Checkpoint,
    options: &StoreOptions,
    bases: &Bases<'_>,
    registry: &Registry,
    tag: &str,
    progress: &mut dyn FnMut(u64),
) -> Result<Pushed, PackageError> {
    let figures = Figures::default();
    let mut artifact = store_blobs(checkpoint, options, registry, &figures, progress)?;
    let tops = measure_tops(checkpoint, bases, progress)?;
    put_layers(bases, &tops, registry, &figures, progress)?;
    let (mut images, mut descriptors, mut image_ids) = (Vec::new(), Vec::new(), Vec::new());
    for (base, top) in bases.images.iter().zip(&tops) {
        let config = Config::with_layer(base, top.as_ref(), &checkpoint.manifest)?;
        let described = put(registry, IMAGE_CONFIG, &config.json, &figures)?;
        image_ids.push(digest_of(&base.config));
        let manifest = manifest_of(base, top.as_ref(), described, &checkpoint.manifest);
        let json = to_bytes(&manifest)?;
        registry.put_manifest(MANIFEST, &json, None)?;
        let rewritten = top.as_ref().map(|it| &it.rewritten);
        images.push(PushedImage {
            container: base.container.clone(),
            digest: digest_of(&json),
            left_out: rewritten.map_or_else(Vec::new, |it| {
                it.left_out.iter().map(OnlyInArtifact::from).collect()
            }),
            left_out_count: rewritten.map_or(0, |it| it.left_out_count),
        });
        descriptors.push(Descriptor {
            platform: Some(config.platform),
            annotations: manifest.annotations,
            ..Descriptor::new(MANIFEST, &json)
        });
    }
    artifact.annotations = annotations_of(&checkpoint.manifest, &image_ids);
    artifact.subject = descriptors.first().map(|it| Descriptor {
        media_type: it.media_type.clone(),
        digest: it.digest.clone(),
        size: it.size,
        ..Descriptor::default()
    });
    let json = to_bytes(&artifact)?;
    let described = Descriptor {
        artifact_type: Some(ARTIFACT.to_owned()),
        annotations: artifact.annotations,
        ..Descriptor::new(MANIFEST, &json)
    };
    registry.put_referrer(&json, &described, artifact.subject.as_ref())?;
    let index = Index {
        manifests: { descriptors.into_iter() }
            .chain([described.clone()])
            .collect(),
        ..Index::default()
    };
    let json = index.to_json();
    registry.put_manifest(INDEX, &json, Some(tag))?;
    Ok(Pushed {
        stored: Stored {
            digest: digest_of(&json),
            ..figures.stored()
        },
        artifact: described.digest,
        images,
    })
}

/// The changed files of each container, as the topmost layer of its image; none: it has no layer.
fn measure_tops(
    checkpoint: &Checkpoint,
    bases: &Bases<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<Option<ImageLayer>>, PackageError> {
    let mut tops = Vec::new();
    for base in &bases.images {
        let container = checkpoint.manifest.container(Some(&base.container))?;
        let file = container
            .files
            .iter()
            .find(|it| it.path == ROOTFS_DIFF_FILE);
        let Some(file) = file else {
            tops.push(None);
            continue;
        };
        let layer = checkpoint.open_file(&container.name, ROOTFS_DIFF_FILE)?;
        let top = ImageLayer::measure(layer).map_err(|source| PackageError::ImageLayer {
            container: container.name.clone(),
            source,
        })?;
        progress(file.size);
        tops.push(Some(top));
    }
    Ok(tops)
}

fn put_layers(
    bases: &Bases<'_>,
    tops: &[Option<ImageLayer>],
    registry: &Registry,
    figures: &Figures,
    progress: &mut dyn FnMut(u64),
) -> Result<(), PackageError> {
    let of_bases = bases.images.iter().flat_map(|it| &it.layers);
    let of_tops = tops.iter().flatten().map(Layer::Top);
    let mut layers: Vec<_> = of_bases.map(Layer::Base).chain(of_tops).collect();
    // Containers of a pod may have some in common.
    layers.sort_by(|one, other| one.descriptor().digest.cmp(&other.descriptor().digest));
    layers.dedup_by(|one, other| one.descriptor().digest == other.descriptor().digest);
    let came = in_threads(&layers, progress, |layer, tell| {
        let Descriptor { digest, size, .. } = layer.descriptor();
        let (repositories, told) = match layer {
            Layer::Base(layer) => (&layer.repositories[..], *size),
            // They were counted when it was measured.
            Layer::Top(_) => (&[][..], 0),
        };
        let came = registry.put_streamed(&Streamed {
            digest,
            size: *size,
            repositories,
            open: &|| match layer {
                Layer::Base(layer) => (bases.open)(&layer.descriptor.digest),
                Layer::Top(layer) => layer.open(),
            },
        })?;
        tell(told);
        Ok(came)
    })?;
    for (layer, came) in layers.iter().zip(came) {
        figures.count(layer.descriptor().size, came);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
