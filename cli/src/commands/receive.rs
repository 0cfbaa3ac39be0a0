//! `transship receive`: a checkpoint, or the target of a migration, on stdin.
//!
//! The target makes nothing that it cannot take back until the source says `Commit`; the protocol
//! is drawn in `transship_checkpoint::wire`.

use std::path::Path;

use anyhow::{Context, Result};
use containerd_client::types::Descriptor;
use tokio::sync::mpsc;
use transship_checkpoint::manifest::check_name;
use transship_checkpoint::store::{Checkpoint, Durability, Store};
use transship_checkpoint::wire::{Message, Offer, unexpected};

use super::{connect, print, store};
use crate::args::{Global, ReceiveArgs};
use crate::progress::Progress;
use transship_containerd::{Node, unique};
use transship_engine::Progress as _;
use transship_engine::conversation::Conversation;
use transship_engine::interrupt::Interrupt;
use transship_engine::problem::{Kind, Problem, one_line};
use transship_engine::restore_container::{self, Plan, Restored};
use transship_engine::timeline::human_bytes;

pub(crate) async fn run(global: &Global, args: ReceiveArgs) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let mut conversation =
        Conversation::new(std::io::stdin(), std::io::stdout(), interrupt.clone());
    match conversation.receive("a checkpoint or a migration").await? {
        Message::Begin { name } => receive_checkpoint(global, &mut conversation, args, &name).await,
        Message::Offer(offer) => {
            let result = accept(global, &mut conversation, *offer, &interrupt).await;
            if let Err(error) = &result {
                conversation.give_up(one_line(error)).await;
            }
            result
        }
        other => Err(unexpected("a checkpoint or a migration", &other).into()),
    }
}

async fn receive_checkpoint(
    global: &Global,
    conversation: &mut Conversation,
    args: ReceiveArgs,
    name: &str,
) -> Result<()> {
    let name = args.name.unwrap_or_else(|| name.to_owned());
    let checkpoint = receive_files(&store(), conversation, &name, Durability::Synced).await?;
    print(global, &checkpoint.manifest, || {
        format!("{}\n", checkpoint.dir.display())
    })
}

async fn receive_files(
    store: &Store,
    conversation: &mut Conversation,
    name: &str,
    durability: Durability,
) -> Result<Checkpoint> {
    let draft = store.draft(name)?;
    let progress = Progress::new(true);
    let mut count = progress.counter();
    let dir = draft.dir().to_path_buf();
    let mut manifest = conversation
        .step(move |(_, receiver)| receiver.receive_files(&dir, &mut count))
        .await?;
    name.clone_into(&mut manifest.name);
    Ok(draft.commit(manifest, durability)?)
}

/// The target's side of a migration.
async fn accept(
    global: &Global,
    conversation: &mut Conversation,
    offer: Offer,
    interrupt: &Interrupt,
) -> Result<()> {
    let node = connect(global).await?;
    let store = store();
    let plan = check_offer(&node, &store, &offer).await?;
    let node = node.in_namespace(&plan.namespace)?;
    receive_image(&node, conversation, &offer, &plan.snapshotter).await?;
    conversation.send(Message::Ready).await?;

    match conversation.receive("the checkpoint").await? {
        Message::Begin { .. } => {}
        other => return Err(unexpected("the checkpoint", &other).into()),
    }
    let name = format!("migration-{}-{}", plan.id, unique());
    let checkpoint = receive_files(&store, conversation, &name, Durability::Ephemeral).await?;
    let result = restore(&node, conversation, plan, &checkpoint, interrupt).await;
    // Consumed, or of no use to anybody: the source has all of it.
    let removed = store.remove(&name);
    result?;
    Ok(removed?)
}

async fn check_offer(node: &Node, store: &Store, offer: &Offer) -> Result<Plan> {
    check_name("the container's name", &offer.container.name)?;
    let here = nix::sys::utsname::uname().context("cannot ask the kernel for its name")?;
    let here = here.machine().to_string_lossy();
    if offer.architecture != here {
        let message = format!(
            "this node is {here}, the container runs on {}",
            offer.architecture
        );
        return Err(Problem::new(Kind::Refused, message).into());
    }
    let plan =
        restore_container::plan(node, &offer.container, offer.spec.as_bytes(), &offer.target)
            .await?;
    let free = free_bytes(store.root())?;
    // Twice: the checkpoint, and the upperdir filled from it.
    if free < offer.estimate.saturating_mul(2) {
        let message = format!(
            "not enough room below {}: {} free, about {} needed",
            store.root().display(),
            human_bytes(free),
            human_bytes(offer.estimate * 2)
        );
        return Err(Problem::new(Kind::Refused, message).into());
    }
    Ok(plan)
}

/// Free bytes of the file system that `path` is or will be on.
fn free_bytes(path: &Path) -> Result<u64> {
    let there = path
        .ancestors()
        .find(|path| path.symlink_metadata().is_ok());
    let there = there.unwrap_or(Path::new("/"));
    let stat = nix::sys::statvfs::statvfs(there)
        .with_context(|| format!("cannot ask for the free space of {}", there.display()))?;
    Ok(stat.blocks_available() * stat.fragment_size())
}

/// Takes the blobs that this node lacks and unpacks the image. Nothing of it is garbage if the
/// migration fails later: it is an image like any other, and the next attempt has it.
async fn receive_image(
    node: &Node,
    conversation: &mut Conversation,
    offer: &Offer,
    snapshotter: &str,
) -> Result<()> {
    let node = node.with_lease(restore_container::LEASE).await?;
    let taken = take_image(&node, conversation, offer, snapshotter).await;
    // Also after a failure; a lease that cannot be dropped ends by itself.
    drop(node.drop_lease().await);
    taken
}

async fn take_image(
    node: &Node,
    conversation: &mut Conversation,
    offer: &Offer,
    snapshotter: &str,
) -> Result<()> {
    let image = &offer.container.image;
    let mut missing = Vec::new();
    if node.snapshot(snapshotter, &image.chain_id).await.is_err() {
        for blob in &offer.blobs {
            if node.blob(&blob.digest).await?.is_none() {
                missing.push(blob.digest.clone());
            }
        }
    }
    conversation
        .send(Message::Need { digests: missing })
        .await?;
    loop {
        match conversation.receive("the image").await? {
            Message::Blob { digest, size } => {
                receive_blob(node, conversation, offer, &digest, size).await?;
            }
            Message::ImageEnd => break,
            other => return Err(unexpected("the image", &other).into()),
        }
    }
    if let Some(target) = offer.blobs.first() {
        let descriptor = Descriptor {
            media_type: target.media_type.clone(),
            digest: target.digest.clone(),
            size: i64::try_from(target.size)?,
            ..Descriptor::default()
        };
        if node.blob(&target.digest).await?.is_some() {
            let existing = node
                .image(&image.name)
                .await?
                .and_then(|found| found.target);
            // A name that means another image here goes on meaning it.
            let name = match existing {
                Some(existing) if existing.digest != target.digest => {
                    format!("{}@{}", image.name, target.digest)
                }
                _ => image.name.clone(),
            };
            node.create_image(&name, descriptor.clone()).await?;
            if let Some(resolved) = node.resolve_image(&descriptor, &image.chain_id).await? {
                node.unpack(&resolved, snapshotter).await?;
            }
        }
    }
    node.ensure_unpacked(&image.name, &image.chain_id, snapshotter)
        .await?;
    Ok(())
}

async fn receive_blob(
    node: &Node,
    conversation: &mut Conversation,
    offer: &Offer,
    digest: &str,
    size: u64,
) -> Result<()> {
    let known = offer
        .blobs
        .iter()
        .find(|blob| blob.digest == digest && blob.size == size);
    let Some(blob) = known else {
        anyhow::bail!("the stream holds the blob {digest}, which was not offered");
    };
    let labels = blob.labels.clone().into_iter().collect();
    let (pieces, queue) = mpsc::channel(4);
    let write = node.write_blob(digest, size, labels, queue);
    let read = conversation.step(move |(_, receiver)| {
        receiver.receive_data(size, &mut |piece| {
            // A writer that has gone says why by itself; the stream is read to the end.
            drop(pieces.blocking_send(piece));
            Ok(())
        })
    });
    let (written, read) = tokio::join!(write, read);
    read?;
    Ok(written?)
}

async fn restore(
    node: &Node,
    conversation: &mut Conversation,
    plan: Plan,
    checkpoint: &Checkpoint,
    interrupt: &Interrupt,
) -> Result<()> {
    conversation.send(Message::Received).await?;
    match conversation.receive("the word to restore").await? {
        Message::Restore => {}
        other => return Err(unexpected("the word to restore", &other).into()),
    }
    let container = checkpoint.manifest.container(None)?;
    let restored = restore_container::restore(node, plan, checkpoint, container).await?;
    let started = match agree(conversation, interrupt).await {
        Ok(()) => restored.start().await,
        Err(error) => Err(error),
    };
    let pid = match started {
        Ok(pid) => pid,
        Err(error) => return undo(restored, error).await,
    };
    // From here on the copy runs, whether the source hears it or not; nothing takes it back.
    let told = conversation
        .step_to_the_end(move |(sender, _)| sender.send(&Message::Running { pid }))
        .await;
    conversation.close();
    restored.settle().await?;
    told
}

async fn agree(conversation: &mut Conversation, interrupt: &Interrupt) -> Result<()> {
    interrupt.check()?;
    conversation.send(Message::Restored).await?;
    match conversation.receive("the commitment").await? {
        Message::Commit => Ok(()),
        other => Err(unexpected("the commitment", &other).into()),
    }
}

async fn undo(restored: Restored, error: anyhow::Error) -> Result<()> {
    let id = restored.id().to_owned();
    match restored.undo().await {
        Ok(()) => Err(error),
        Err(left) => Err(error.context(format!("and {id:?} could not be removed: {left:#}"))),
    }
}
