//! The files of a migration: where the source may bring them, and whether they are those that it has offered.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::Path;

use transship_checkpoint::annotations::of_migration;
use transship_checkpoint::manifest::{CONTENTS_DIR, Container, File, Manifest, SPEC_FILE, Shared};
use transship_checkpoint::store::{Checkpoint, Durability, Store};
use transship_checkpoint::wire::{
    Arriving, Check, ContentsDir, DataPlace, Limits, Message, Offer, unexpected,
};

use super::durable::WriteOut;
use super::{Request, image, keep, receive_files};
use crate::conversation::Conversation;
use crate::data_channel::{Identity, STREAMS};
use crate::error::{Context, Error, Result};
use crate::memory_dir::make_room_in_memory;
use crate::node_id::node_id;
use crate::origin::Origins;
use crate::progress::Progress;
use crate::room::{self, KEEP_FREE, require_room};

/// An upperdir or emptyDir is filled where it is, wherever the files arrive.
pub(super) fn require_room_for_files(dir: &Path, offer: &Offer) -> Result<()> {
    require_room(dir, offer.estimate.saturating_add(KEEP_FREE))
}

/// Says that the source may begin, and receives the checkpoint of the migration; contents of files go to these directories,
/// by theirs in the checkpoint.
pub(super) async fn receive(
    store: &Store,
    conversation: &mut Conversation,
    (offer, contents): (&Offer, BTreeMap<String, ContentsDir>),
    request: &Request,
    progress: &dyn Progress,
) -> Result<Checkpoint> {
    let taken = contents.keys().cloned().collect();
    if offer.at_once {
        let (dir, bytes) = (store.root().to_path_buf(), offer.estimate);
        // Whatever keeps it from that is told when the files come.
        let room = tokio::task::spawn_blocking(move || make_room_in_memory(&dir, bytes));
        drop(room.await);
    }
    conversation
        .send(Message::Ready {
            contents: taken,
            node: node_id()?,
        })
        .await?;
    match conversation.receive("the checkpoint").await? {
        Message::Begin { .. } => {}
        other => return Err(unexpected("the checkpoint", &other).into()),
    }
    let draft = store.draft(&of_migration(&offer.migration))?;
    let places = contents.values().map(|dir| dir.path().to_path_buf());
    let write_out = WriteOut::begin(places.chain([store.root().to_path_buf()]).collect());
    let limits = Limits {
        max_bytes: most_bytes(offer, request),
        keep_free: KEEP_FREE,
    };
    let arriving = Arriving::into_dir(draft.dir(), limits, Check::Xxh3).with_contents(contents);
    let stream = receive_files(conversation, arriving, progress).await?;
    write_out.end().await?;
    let mut specs = Vec::new();
    for it in &offer.containers {
        let path = draft.dir().join(&it.container.name).join(SPEC_FILE);
        let spec = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        specs.push(spec);
    }
    let manifest = as_offered(offer, stream.0, &specs, draft.name())?;
    let checkpoint = keep(draft, manifest, Durability::Ephemeral).await?;
    Origins::of_node().made_here_for_now(&checkpoint)?;
    Ok(checkpoint)
}

/// Waits for the source to connect directly; none where it cannot be waited for.
pub(super) fn listen(offer: &Offer, addresses: &[IpAddr]) -> Option<image::Listening> {
    if addresses.is_empty() || offer.key.is_empty() {
        return None;
    }
    let listening = || {
        let identity = Identity::new()?;
        let streams = STREAMS + usize::from(offer.lazy);
        let listener = identity.listen(addresses, &offer.key, streams)?;
        let place = DataPlace {
            addresses: listener.addresses()?,
            key: identity.public().to_owned(),
        };
        Ok((place, tokio::task::spawn_blocking(|| listener.accept())))
    };
    let listening: Result<_> = listening();
    let told = listening.inspect_err(|error| {
        tracing::info!("no direct connection: {}", error.one_line());
    });
    told.ok()
}

fn most_bytes(offer: &Offer, request: &Request) -> u64 {
    let expected = room::most_bytes(offer.estimate);
    request.max_size.map_or(expected, |most| most.min(expected))
}

/// What was checked is what is used: the containers and specs are those of the offer, the stream has brought files.
fn as_offered(offer: &Offer, stream: Manifest, specs: &[Vec<u8>], name: &str) -> Result<Manifest> {
    let differs = |what: &str| {
        Error::failed(format!(
            "{what} of the stream is not the one that was offered"
        ))
    };
    if stream.containers.len() != offer.containers.len() || specs.len() != offer.containers.len() {
        return Err(differs("the set of containers"));
    }
    let mut containers = Vec::new();
    for ((found, it), spec) in stream.containers.iter().zip(&offer.containers).zip(specs) {
        let offered = Container {
            files: found.files.clone(),
            // Known after the export only; they are told, and decide nothing.
            losses: found.losses.clone(),
            ..it.container.clone()
        };
        if *found != offered {
            return Err(differs("the container"));
        }
        if spec != it.spec.as_bytes() {
            return Err(differs(SPEC_FILE));
        }
        containers.push(Container {
            files: without_contents(offered.files),
            ..offered
        });
    }
    let pod = offer.pod.as_ref();
    let not_running = pod.map(|it| it.not_running.as_slice()).unwrap_or_default();
    if stream.pod.as_ref() != pod.map(|it| &it.pod) || stream.not_running != not_running {
        return Err(differs("the pod"));
    }
    // What the containers of a pod share is known when they stand still.
    if pod.is_none() && !stream.shared.is_empty() {
        return Err(differs("the container"));
    }
    let shared = Shared {
        files: without_contents(stream.shared.files),
        ..stream.shared
    };
    Ok(Manifest {
        name: name.to_owned(),
        containers,
        shared,
        ..stream
    })
}

/// The files of a directory of the checkpoint. Contents that have come before are where they will be filled in.
fn without_contents(mut files: Vec<File>) -> Vec<File> {
    files.retain(|file| !file.path.starts_with(&format!("{CONTENTS_DIR}/")));
    files
}

#[cfg(test)]
mod tests {
    use transship_checkpoint::wire::{OfferedContainer, PROTOCOL};

    use super::*;

    fn offer() -> Offer {
        Offer {
            protocol: PROTOCOL,
            migration: String::new(),
            node: String::new(),
            architecture: "x86_64".into(),
            containers: vec![OfferedContainer {
                container: Container {
                    name: "web".into(),
                    ..Container::default()
                },
                spec: "{}".into(),
                blobs: Vec::new(),
                config: None,
            }],
            pod: None,
            estimate: u64::MAX,
            key: String::new(),
            lazy: false,
            at_once: false,
        }
    }

    fn stream() -> Manifest {
        let mut container = offer().containers.remove(0).container;
        container.files = vec![File {
            path: SPEC_FILE.into(),
            size: 2,
            sha256: String::new(),
        }];
        Manifest {
            name: "there".into(),
            created: 1,
            containers: vec![container],
            shared: Default::default(),
            ..Manifest::default()
        }
    }

    #[test]
    fn a_stream_brings_files_and_nothing_else() {
        let taken = as_offered(&offer(), stream(), &[b"{}".to_vec()], "here").unwrap();
        assert_eq!(taken.name, "here");
        assert_eq!(taken.containers[0].files.len(), 1);
        assert!(as_offered(&offer(), stream(), &[b"{ }".to_vec()], "here").is_err());
        let changes: [fn(&mut Manifest); 4] = [
            |it| it.containers[0].criu.ext_unix_sk = true,
            |it| it.pod = Some(Default::default()),
            |it| it.containers.clear(),
            |it| it.shared.shm.push("web".into()),
        ];
        for change in changes {
            let mut other = stream();
            change(&mut other);
            let error = as_offered(&offer(), other, &[b"{}".to_vec()], "here").unwrap_err();
            assert!(error.to_string().contains("offered"), "{error}");
        }
    }

    #[test]
    fn bounds_do_not_overflow() {
        assert_eq!(most_bytes(&offer(), &Request::default()), u64::MAX);
        let small = Request {
            max_size: Some(5),
            ..Request::default()
        };
        assert_eq!(most_bytes(&offer(), &small), 5);
    }
}
