//! The images of containers that are migrated here: blobs and layers, which are garbage until the copy
//! runs, and then the record. The CRI makes containers of images that have one, so those of a pod have it before, and
//! lose it with a pod that does not come to run.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::pin::pin;
use std::time::Duration;

use containerd_client::types::Descriptor;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use transship_checkpoint::wire::{Blob, DataPlace, Message, OfferedContainer, unexpected};
use transship_containerd::Containerd;
use transship_sandbox::admission::foreign_spec::{Allow, Allowed};

use super::arrival::ImageToName;
use crate::check::node_facts::NodeFacts;
use crate::conversation::Conversation;
use crate::data_channel::Connections;
use crate::error::{Context, Error, Result};
use crate::image_blobs::tying_labels;
use crate::room::{KEEP_FREE, require_room, while_room};

/// Where containerd's content is unless it says so.
const CONTENT: &str = "/var/lib/containerd";
/// What an image is called that was made out of snapshots.
const REBUILT: &str = "transship/rebuilt";
/// How long who writes a blob may take to take it back when no more of it comes; what is left goes with the lease.
const WRITER_PATIENCE: Duration = Duration::from_secs(2);
/// The longest name of an image, as in the reference grammar of the distribution project.
const NAME_LIMIT: usize = 255;
/// Blobs of all images together: containerd is asked for each, and each is looked for among all. An overlay has 500 layers.
const MOST_BLOBS: usize = 4096;

/// Looks for room for the blobs of images that this node lacks, before anything is put under a lease.
///
/// # Errors
/// [`crate::Kind::Refused`]: there is none, or there are too many blobs.
pub(super) async fn check_room(
    node: &Containerd,
    offered: &[OfferedContainer],
    snapshotter: &str,
) -> Result<()> {
    check_count(offered.iter().map(|it| it.blobs.len()).sum())?;
    let mut missing = BTreeMap::new();
    for it in offered {
        let image = &it.container.image;
        let layers = node.snapshotter(snapshotter).stat(&image.chain_id).await;
        let is_there = match it.config {
            Some(_) => false,
            None => layers.is_ok(),
        };
        let found = node.find_image(&image.name, &image.chain_id);
        if is_there || found.await?.is_some() {
            continue;
        }
        for blob in &it.blobs {
            if !missing.contains_key(&blob.digest) && node.blob(&blob.digest).await?.is_none() {
                missing.insert(&blob.digest, blob.size);
            }
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let needed = { missing.into_values() }.fold(KEEP_FREE, u64::saturating_add);
    require_room(&content_root(node).await?, needed)
}

async fn content_root(node: &Containerd) -> Result<PathBuf> {
    let root = node.content_root().await?;
    Ok(root.unwrap_or_else(|| PathBuf::from(CONTENT)))
}

/// Takes the blobs that this node lacks, and unpacks the images; gives the chain ids of the layers that the copies
/// get. Without a record and with the lease of `node` gone all of it is garbage.
///
/// What the source has made again out of its snapshots is taken only where the original is not.
pub(super) async fn receive(
    node: &Containerd,
    conversation: &mut Conversation,
    offered: &[OfferedContainer],
    snapshotter: &str,
    listen: impl FnOnce() -> Option<Listening>,
) -> Result<Vec<String>> {
    check_count(offered.iter().map(|it| it.blobs.len()).sum())?;
    let mut missing: Vec<String> = Vec::new();
    let mut all_own = Vec::new();
    for it in offered {
        let image = &it.container.image;
        let own = node
            .ensure_unpacked(&image.name, &image.chain_id, snapshotter)
            .await;
        let own = match own {
            // The layers may be here as the lower ones of another image. The CRI wants the image itself.
            Ok(()) if it.config.is_some() => config_of(node, it, &image.chain_id).await.map(drop),
            own => own.map_err(Error::from),
        };
        if own.is_err() {
            for blob in &it.blobs {
                // Containers of a pod may have layers in common.
                let known = missing.contains(&blob.digest);
                if !known && node.hold_blob(&blob.digest).await?.is_none() {
                    missing.push(blob.digest.clone());
                }
            }
        }
        all_own.push(own);
    }
    let asked = { offered.iter().flat_map(|it| &it.blobs) }
        .filter(|blob| missing.contains(&blob.digest))
        .fold(KEEP_FREE, |sum, blob| sum.saturating_add(blob.size));
    let store = content_root(node).await?;
    if !missing.is_empty() {
        require_room(&store, asked)?;
    }
    let facts = NodeFacts::of_this(Some(node)).await?.json()?;
    // Last: the source is waited for from here on, and not for long.
    let (place, accepting) = listen().unzip();
    conversation
        .send(Message::Need {
            digests: missing.clone(),
            direct: place,
            facts,
        })
        .await?;
    loop {
        match conversation.receive("the image").await? {
            Message::Blob { digest, size } => {
                let at = missing.iter().position(|wanted| *wanted == digest);
                let known = { offered.iter() }
                    .flat_map(|it| &it.blobs)
                    .find(|blob| blob.digest == digest && blob.size == size);
                let (Some(at), Some(blob)) = (at, known) else {
                    return Err(Error::failed(
                        "the stream holds a blob that was not asked for",
                    ));
                };
                missing.swap_remove(at);
                // Others write there as well.
                require_room(&store, size.saturating_add(KEEP_FREE))?;
                receive_blob(node, conversation, blob).await?;
            }
            Message::ImageEnd { direct: 0 } => break,
            Message::ImageEnd { direct } => {
                let accepting = accepting.ok_or_else(|| {
                    Error::failed("the source has connected directly, where nobody has listened")
                })?;
                let mut connections = accepting.await??;
                if connections.count() > direct {
                    conversation.keep_for_pages(connections.take_last());
                }
                conversation.receive_files_through(connections);
                break;
            }
            other => return Err(unexpected("the image", &other).into()),
        }
    }
    let mut chains = Vec::new();
    for (it, own) in offered.iter().zip(all_own) {
        chains.push(match own {
            Ok(()) => it.container.image.chain_id.clone(),
            Err(error) => unpack_offered(node, it, snapshotter, error).await?,
        });
    }
    Ok(chains)
}

/// Unpacks what has come; `lacking` says why the node's own would not do.
async fn unpack_offered(
    node: &Containerd,
    offered: &OfferedContainer,
    snapshotter: &str,
    lacking: Error,
) -> Result<String> {
    let chain = offered_chain(offered);
    let resolved = match target_of(offered) {
        Some(target) => { node.resolve_image(&target, chain).await }
            .context("the image that was offered cannot be read")?,
        None => None,
    };
    let Some(resolved) = resolved else {
        return Err(lacking).context("the image is not on this node");
    };
    let unpacked = async { Ok(node.unpack(&resolved, snapshotter).await?) };
    while_room(node, snapshotter, unpacked)
        .await
        .context("the image that was offered cannot be unpacked")?;
    Ok(chain.to_owned())
}

/// Where the source may connect directly, and the wait for it.
pub(super) type Listening = (DataPlace, JoinHandle<Result<Connections>>);

/// Chain id of the layers that are offered.
fn offered_chain(offered: &OfferedContainer) -> &str {
    let image = &offered.container.image;
    { image.rebuilt.as_ref() }.map_or(&image.chain_id, |rebuilt| &rebuilt.chain_id)
}

fn target_of(offered: &OfferedContainer) -> Option<Descriptor> {
    let target = offered.blobs.first()?;
    Some(Descriptor {
        media_type: target.media_type.clone(),
        digest: target.digest.clone(),
        size: i64::try_from(target.size).ok()?,
        ..Descriptor::default()
    })
}

async fn receive_blob(
    node: &Containerd,
    conversation: &mut Conversation,
    blob: &Blob,
) -> Result<()> {
    let (size, digest) = (blob.size, blob.digest.as_str());
    let (pieces, queue) = mpsc::channel(4);
    // The source has no part in which labels are written here.
    let labels = tying_labels(blob.labels.clone());
    let write = node.write_blob(digest, size, labels, queue);
    let read = conversation.read(move |receiver| {
        receiver.receive_data(size, &mut |piece| {
            // A writer that has gone says why by itself; the stream is read to the end.
            drop(pieces.blocking_send(piece));
            Ok(())
        })
    });
    let (mut write, mut read) = (pin!(write), pin!(read));
    tokio::select! {
        read = &mut read => match read {
            Ok(()) => Ok(write.await?),
            Err(error) => {
                // Who was given up in the middle of a read has the queue for as long as that takes.
                drop(timeout(WRITER_PATIENCE, write).await);
                Err(error)
            }
        },
        written = &mut write => {
            read.await?;
            Ok(written?)
        }
    }
}

/// What the image is called here.
#[derive(Debug)]
pub(super) struct ImageName {
    /// Its name.
    pub(super) name: String,
    /// What the record will name, unless there is one already or the image is not whole.
    target: Option<Descriptor>,
}

/// Chooses the name: the one that this node has for the same content; else one that holds the digest,
/// because a plain name says to all others on this node which image it means.
pub(super) async fn choose_name(
    node: &Containerd,
    offered: &OfferedContainer,
    chain: &str,
    allowed: &Allowed,
) -> Result<ImageName> {
    let image = &offered.container.image;
    let Some(target) = target_of(offered) else {
        return Ok(ImageName {
            name: image.name.clone(),
            target: None,
        });
    };
    let suffix = format!("@{}", target.digest);
    if let Some(rebuilt) = &image.rebuilt {
        // It is not what the original's name means.
        let used = chain == rebuilt.chain_id;
        let whole = used && is_whole(node, &target, chain).await?;
        return Ok(ImageName {
            name: match used {
                true => format!("{REBUILT}{suffix}"),
                false => image.name.clone(),
            },
            target: whole.then_some(target),
        });
    }
    let own = image.name.as_str();
    let plain = own.strip_suffix(suffix.as_str()).unwrap_or(own);
    let mut free = false;
    for name in [own, plain] {
        let found = node.image(name).await?.and_then(|image| image.target);
        match found {
            Some(found) if found.digest == target.digest => {
                return Ok(ImageName {
                    name: name.to_owned(),
                    target: None,
                });
            }
            found => free = found.is_none(),
        }
    }
    let whole = is_whole(node, &target, &image.chain_id).await?;
    Ok(ImageName {
        name: match free && allowed.contains(&Allow::ImageName) {
            true => plain.to_owned(),
            false => own_name(plain, &suffix),
        },
        target: whole.then_some(target),
    })
}

/// Digest of the config of the image with these layers: the CRI calls it by that.
pub(super) async fn config_of(
    node: &Containerd,
    offered: &OfferedContainer,
    chain: &str,
) -> Result<String> {
    if let Some(target) = target_of(offered)
        && let Some(image) = node.resolve_image(&target, chain).await?
    {
        return Ok(image.config);
    }
    let name = &offered.container.image.name;
    match node.find_image(name, chain).await? {
        Some((_, image)) => Ok(image.config),
        None => Err(Error::refused(format!(
            "no image here has the layers of {name:?}: pull it"
        ))),
    }
}

/// Records the image, for the CRI.
pub(super) async fn record(
    node: &Containerd,
    offered: &OfferedContainer,
    chain: &str,
    allowed: &Allowed,
) -> Result<()> {
    let name = choose_name(node, offered, chain, allowed).await?;
    let Some(to_record) = name.to_record() else {
        let image = &offered.container.image.name;
        let message = format!("parts of the image {image:?} are not here: pull it");
        return Err(Error::refused(message));
    };
    let name = with_registry(&to_record.name);
    Ok({ node.create_image(&name, to_record.target()) }.await?)
}

/// The CRI takes a name without a registry for one of docker.io, and does not find its image then (containerd 2.1, when it
/// looks whether that is a checkpoint).
fn with_registry(name: &str) -> Cow<'_, str> {
    let registry = name.split_once('/').map_or("", |(first, _)| first);
    match registry == "localhost" || registry.contains(['.', ':']) {
        true => name.into(),
        false => format!("localhost/{name}").into(),
    }
}

fn check_count(blobs: usize) -> Result<()> {
    match blobs > MOST_BLOBS {
        true => Err(Error::refused(format!(
            "the images that are offered have {blobs} blobs, and {MOST_BLOBS} are the most"
        ))),
        false => Ok(()),
    }
}

fn own_name(plain: &str, suffix: &str) -> String {
    let is_reference = !plain.is_empty()
        && plain.len() <= NAME_LIMIT
        && plain
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "._-/:".contains(c));
    let plain = if is_reference {
        plain
    } else {
        "transship/migrated"
    };
    format!("{plain}{suffix}")
}

/// Whether the content store has every blob of the image: a record without its layers makes kubelet
/// believe that it need not pull them.
async fn is_whole(node: &Containerd, target: &Descriptor, chain: &str) -> Result<bool> {
    let resolved = node.resolve_image(target, chain).await;
    match resolved.context("the image that was offered cannot be read")? {
        Some(image) => Ok(node.has_all_blobs(&image).await?),
        None => Ok(false),
    }
}

impl ImageName {
    /// What the image will be recorded as, when the copy runs.
    pub(super) fn to_record(&self) -> Option<ImageToName> {
        let target = self.target.as_ref()?;
        Some(ImageToName::new(&self.name, target))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn a_name_of_ours_says_what_it_means() {
        let suffix = "@sha256:0";
        assert_eq!(
            own_name("docker.io/x/y:1", suffix),
            "docker.io/x/y:1@sha256:0"
        );
        for hostile in ["", "a@sha256:1", "a b", "a\n", &"x".repeat(300)] {
            assert_eq!(own_name(hostile, suffix), "transship/migrated@sha256:0");
        }
    }

    #[test]
    fn names_for_the_cri_have_a_registry() {
        for (name, with) in [
            ("web:1@sha256:0", "localhost/web:1@sha256:0"),
            (
                "transship/rebuilt@sha256:0",
                "localhost/transship/rebuilt@sha256:0",
            ),
            ("localhost/web@sha256:0", "localhost/web@sha256:0"),
            ("docker.io/x/y:1", "docker.io/x/y:1"),
            ("registry:5000/y", "registry:5000/y"),
        ] {
            assert_eq!(with_registry(name), with);
        }
    }

    #[test]
    fn images_have_so_many_blobs_at_most() {
        check_count(MOST_BLOBS).unwrap();
        let error = check_count(MOST_BLOBS + 1).unwrap_err();
        assert!(error.one_line().contains("4097 blobs"), "{error}");
    }

    #[test]
    fn labels_of_the_garbage_collector_stay_behind() {
        let names = [
            "containerd.io/gc.root",
            "containerd.io/gc.ref.snapshot.overlayfs",
            "containerd.io/gc.ref.content.l.0",
            "containerd.io/uncompressed",
            "containerd.io/distribution.source.docker.io",
        ];
        let labels = names.map(|name| (name.to_owned(), "x".to_owned()));
        let mut kept: Vec<_> = tying_labels::<HashMap<_, _>>(labels).into_keys().collect();
        kept.sort_unstable();
        // What a layer unpacks to is known when it has been unpacked.
        assert_eq!(kept, ["containerd.io/gc.ref.content.l.0"]);
    }
}
