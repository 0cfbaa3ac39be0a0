//! The target's side of a migration, from the offer to the moment when the source may be removed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use tokio::time::sleep;
use transship_checkpoint::annotations::of_migration;
use transship_checkpoint::manifest::{CONTENTS_DIR, check_name};
use transship_checkpoint::shown_text::printable;
use transship_checkpoint::store::{Checkpoint, Store};
use transship_checkpoint::wire::{
    Message, Offer, OfferedContainer, OfferedPod, PROTOCOL, unexpected,
};
use transship_containerd::Containerd;
use transship_sandbox::criu_lock;
use transship_sandbox::opened::{Holds, InMemory};

use super::arrival::{Arrival, Arrivals, Locked, State};
use super::commitment::wait_for_commit;
use super::late_pages::PageRelay;
use super::offered_files::{listen, receive, require_room_for_files};
use super::pod::{self, PodPlan};
use super::{Received, Request, image, leases, settle, tell};
use crate::check::node_facts::NodeFacts;
use crate::conversation::Conversation;
use crate::dump_hold::has_userfaultfd;
use crate::error::{Error, Kind, Result};
use crate::interrupt::Interrupt;
use crate::machine::architecture;
use crate::memory_dir::{MigrationFiles, remove_when_unused};
use crate::progress::Progress;
use crate::reasons::Reasons;
use crate::restore::{self, Plan, Prepared, Restored};
use crate::room::{KEEP_FREE, require_room};
use crate::timeline::human_bytes;

/// Containers of a pod: a record holds what there is of each.
const MOST_CONTAINERS: usize = 1000;
/// How long after a record could not be written that is tried again.
const RECORD_PAUSE: Duration = Duration::from_secs(2);
/// How long an interrupt waits until the source knows that the copy runs.
const TELL_GRACE: Duration = Duration::from_secs(10);

/// What is made here.
enum ToMake<'o> {
    Container(&'o OfferedContainer, Box<Plan>),
    Pod(&'o OfferedPod, Box<PodPlan>),
}

pub(super) async fn accept(
    node: &Containerd,
    store: &Store,
    conversation: &mut Conversation,
    offer: Offer,
    request: &Request,
    around: (&Interrupt, &dyn Progress),
) -> Result<Received> {
    let checkpoint = of_migration(&offer.migration);
    let make = |opened: &Path| InMemory::of(opened, &checkpoint);
    let (files, why_on_disk) =
        MigrationFiles::choose(store, (needed_bytes(&offer), Holds::Arrival), make);
    if let Some(why) = why_on_disk {
        tracing::info!("the files arrive on the disk: {}", why.one_line());
    }
    let arriving = match look_at(node, (store, &files.store), &offer, request).await {
        Ok(arriving) => arriving,
        Err(error) => {
            if error.kind() == Kind::Refused {
                // What else this node lacks only the source can tell, which knows what the containers need.
                let facts = NodeFacts::of_this(Some(node)).await;
                let facts = facts.and_then(|facts| facts.json()).unwrap_or_default();
                conversation.refuse(error.one_line(), facts).await;
            }
            return Err(error);
        }
    };
    let guard = settle::guard(node, store, &offer.migration)?;
    // All that is made is garbage until the copy runs.
    let leased = leases::take(node).await?;
    let result = match arriving {
        ToMake::Container(one, plan) => {
            take(
                &leased,
                &files.store,
                conversation,
                (&offer, one),
                *plan,
                request,
                around,
            )
            .await
        }
        ToMake::Pod(pod, plan) => {
            let what = (&offer, pod);
            let taken = pod::take(
                &leased,
                &files.store,
                conversation,
                what,
                *plan,
                request,
                around,
            )
            .await;
            match taken {
                Ok((locked, Ok(pid))) => {
                    let released = pod::settle::release(&leased, &locked.arrival).await;
                    let copy = (pid, released, None);
                    runs(&leased, &files.store, conversation, locked, copy).await
                }
                Ok((mut locked, Err(error))) => {
                    Err(settle::undo(&leased, &files.store, &mut locked, error).await)
                }
                Err(error) => Err(error),
            }
        }
    };
    if let Err(error) = &result {
        // It stands still: what is left to do here is not to be waited for.
        tell(conversation, error).await;
    }
    // After a failure the garbage is waited for: the next attempt must not find layers that are about to go.
    let lease_ended = match &result {
        Ok(_) => leased.end_lease().await,
        Err(_) => leased.end_lease_and_collect().await,
    };
    let place = files.store.root().to_path_buf();
    drop(files);
    // What has not come to its end is the guard's, as soon as this process has: a copy that could not be undone, or a
    // lease, when containerd does not answer.
    if Arrivals::default().has_ended(&offer.migration)? {
        // Whoever serves memory lazily reads them to the end.
        remove_when_unused(&place).await;
        if lease_ended.is_ok() {
            guard.stand_down();
        }
    }
    result
}

/// Looks at all that can be looked at before anything is made.
///
/// # Errors
/// [`Kind::Refused`] with all reasons in one line.
async fn look_at<'o>(
    node: &Containerd,
    (store, files): (&Store, &Store),
    offer: &'o Offer,
    request: &Request,
) -> Result<ToMake<'o>> {
    check_offer(offer)?;
    // CRIU looks once after each boot what the kernel can: while the container runs, not in the restore.
    tokio::task::spawn_blocking(criu_lock).await?;
    let mut reasons = Reasons::default();
    reasons.keep(check_node(node, offer, request).await)?;
    reasons.keep(check_architecture(offer))?;
    reasons.keep(check_size(offer, request))?;
    reasons.keep(check_lazy(offer, request))?;
    reasons.keep(require_room(files.root(), needed_bytes(offer)))?;
    // Records are on the disk, wherever the files arrive.
    if files.root() != store.root() {
        reasons.keep(require_room(store.root(), KEEP_FREE))?;
    }
    let to_make = match (&offer.pod, offer.containers.as_slice()) {
        (Some(pod), [_, ..]) => {
            let plan = pod::plan(node, offer, pod, request).await;
            { reasons.keep(plan)? }.map(|plan| ToMake::Pod(pod, Box::new(plan)))
        }
        (None, [one]) => {
            let spec = one.spec.as_bytes();
            let plan = restore::plan(node, &one.container, spec, &request.target).await;
            { reasons.keep(plan)? }.map(|mut plan| {
                plan.keep_restart_policy();
                ToMake::Container(one, Box::new(plan))
            })
        }
        _ => {
            let message = "the offer is of no container, or of several";
            return Err(Error::refused(message));
        }
    };
    let (images, snapshotter) = match &to_make {
        Some(ToMake::Container(_, plan)) => (offer.containers.as_slice(), &*plan.snapshotter),
        Some(ToMake::Pod(_, plan)) => (plan.images_of(offer), plan.snapshotter()),
        // Where it would be made is not known; most likely as it was.
        None => match offer.containers.first() {
            Some(first) if !request.wait_for_pod => {
                (offer.containers.as_slice(), &*first.container.snapshotter)
            }
            _ => (&[][..], ""),
        },
    };
    reasons.keep(image::check_room(node, images, snapshotter).await)?;
    // Upperdirs are filled where they are; that is looked at again when they are there.
    if let Some(root) = node.snapshotter_root(snapshotter).await? {
        reasons.keep(require_room_for_files(&root, offer))?;
    }
    reasons.or(to_make)
}

/// Whether memory can come late here.
fn check_lazy(offer: &Offer, request: &Request) -> Result<()> {
    if !offer.lazy {
        return Ok(());
    }
    if request.data_addresses.is_empty() {
        let message =
            "memory cannot come late (--lazy): this node listens nowhere for a direct connection";
        return Err(Error::refused(message).hint("--data-address names where it listens"));
    }
    if offer.pod.is_some() {
        return Err(Error::refused("the memory of a pod cannot come late"));
    }
    match has_userfaultfd() {
        true => Ok(()),
        false => Err(Error::refused(
            "memory cannot come late here: `criu check --feature uffd-noncoop` fails",
        )),
    }
}

/// Whether it is an offer at all, so that what is in it can be looked at.
fn check_offer(offer: &Offer) -> Result<()> {
    if offer.protocol != PROTOCOL {
        let age = match offer.protocol < PROTOCOL {
            true => "older",
            false => "newer",
        };
        return Err(Error::refused(format!(
            "the transship of the source is {age} than that of the target (protocol {}, here \
             {PROTOCOL}): both nodes need the same",
            offer.protocol.max(1)
        )));
    }
    if offer.containers.len() > MOST_CONTAINERS {
        return Err(Error::refused(format!(
            "the pod has {} containers, and {MOST_CONTAINERS} are the most",
            offer.containers.len()
        )));
    }
    let mut names = BTreeSet::new();
    for it in &offer.containers {
        let name = &it.container.name;
        check_name("the container's name", name)?;
        if name.starts_with('.') || !names.insert(name) {
            let name = printable(name);
            let message = format!("a container cannot be called {name:?}, or two are");
            return Err(Error::refused(message));
        }
    }
    Ok(())
}

/// Whether it comes from another node.
async fn check_node(node: &Containerd, offer: &Offer, request: &Request) -> Result<()> {
    if !offer.node.is_empty()
        && offer.node == node.server_id().await?
        && request.target.id.is_none()
    {
        return Err(Error::refused(
            "the other node is the node that the container runs on",
        ));
    }
    Ok(())
}

fn check_architecture(offer: &Offer) -> Result<()> {
    let here = architecture()?;
    if offer.architecture != here {
        let there = printable(&offer.architecture);
        return Err(Error::refused(format!(
            "this node is {here}, the container runs on {there}"
        )));
    }
    Ok(())
}

/// Whether it is not more than this node takes.
fn check_size(offer: &Offer, request: &Request) -> Result<()> {
    let blobs = { offer.containers.iter().flat_map(|it| &it.blobs) }
        .fold(0, |sum: u64, blob| sum.saturating_add(blob.size));
    let most = request.max_size.unwrap_or(u64::MAX);
    if offer.estimate.saturating_add(blobs) > most {
        return Err(Error::refused(format!(
            "it has about {}, and this node takes {} (--max-size)",
            human_bytes(offer.estimate.saturating_add(blobs)),
            human_bytes(most)
        )));
    }
    Ok(())
}

/// Three times what there is: memory that comes before the freeze, the checkpoint, and the upperdir filled from it.
fn needed_bytes(offer: &Offer) -> u64 {
    offer.estimate.saturating_mul(3).saturating_add(KEEP_FREE)
}

async fn take(
    node: &Containerd,
    store: &Store,
    conversation: &mut Conversation,
    (offer, offered): (&Offer, &OfferedContainer),
    mut plan: Plan,
    request: &Request,
    (interrupt, progress): (&Interrupt, &dyn Progress),
) -> Result<Received> {
    progress.step("image");
    let listen = || listen(offer, &request.data_addresses);
    let all = std::slice::from_ref(offered);
    let chains = image::receive(node, conversation, all, &plan.snapshotter, listen).await?;
    let chain = chains.first().map_or("", String::as_str);
    let name = image::choose_name(node, offered, chain, &request.target.allowed).await?;
    plan.set_image(&name.name, chain);
    let arrival = Arrival {
        state: State::Arriving,
        boot: String::new(),
        namespace: node.namespace().to_owned(),
        container: plan.id.clone(),
        name: offered.container.name.clone(),
        snapshotter: plan.snapshotter.clone(),
        made_by: plan.made_by.clone(),
        checkpoint: of_migration(&offer.migration),
        upperdir: None,
        image: name.to_record(),
        lacks_memory: false,
        pod: None,
    };
    // Before the first thing is made that no lease takes away, and before the source is frozen.
    let mut locked = Arrivals::default().begin(&offer.migration, arrival)?;
    let taken = async {
        let mut prepared = restore::prepare(node, &plan).await?;
        let contents = prepared.make_contents_dir(&plan)?;
        require_room_for_files(contents.path(), offer)?;
        let place = format!("{}/{CONTENTS_DIR}", offered.container.name);
        let contents = BTreeMap::from([(place, contents)]);
        let what = (offer, contents);
        let checkpoint = receive(store, conversation, what, request, progress).await?;
        let late = match offer.lazy {
            true => {
                let dir = checkpoint.dir.join(&offered.container.name);
                let link = conversation.take_for_pages();
                Some(PageRelay::bring(&dir, link, request.link_patience)?)
            }
            false => None,
        };
        locked.arrival.lacks_memory = late.is_some();
        let restored = agree(
            node,
            conversation,
            (plan, prepared),
            &checkpoint,
            &mut locked,
            interrupt,
        )
        .await?;
        Ok((restored, late))
    };
    let (restored, late) = match taken.await {
        Ok(taken) => taken,
        Err(error) => return Err(settle::undo(node, store, &mut locked, error).await),
    };
    let released = restored.start().await.map(drop);
    let copy = (restored.pid, released, late);
    runs(node, store, conversation, locked, copy).await
}

/// What is left to do when the copy has been let go, the source having committed itself.
async fn runs(
    node: &Containerd,
    store: &Store,
    conversation: &mut Conversation,
    mut locked: Locked,
    copy: (u32, Result<()>, Option<PageRelay>),
) -> Result<Received> {
    let container = locked.arrival.container.clone();
    let pid = copy.0;
    let ended = write_out(node, store, conversation, &mut locked, copy).await;
    if ended.is_err() && locked.arrival.state != State::Aborted {
        // Whatever has failed, the source must not hear that the copy does not run; it asks.
        conversation.close();
    }
    ended.map(|()| Received::Migrated { container, pid })
}

async fn write_out(
    node: &Containerd,
    store: &Store,
    conversation: &mut Conversation,
    locked: &mut Locked,
    (pid, released, late): (u32, Result<()>, Option<PageRelay>),
) -> Result<()> {
    match released {
        // It can still be lost.
        Ok(()) if late.is_some() => {}
        // Without this word the next one who looks sees that it runs.
        Ok(()) => drop(locked.set(State::Runs)),
        Err(error) => settle::after_commit(node, store, locked, error).await?,
    }
    // The copy runs, whether the source hears it or not; nothing takes it back.
    let running = Message::Running { pid };
    let mut told = conversation.send_with_grace(running, TELL_GRACE).await;
    if let Some(late) = late {
        match late.all().await {
            Ok(()) => {
                locked.arrival.lacks_memory = false;
                // Whoever finds the record as it was ends the copy: a full disk is waited for, as long as it lives.
                while let Err(error) = locked.set(State::Runs) {
                    let process = Path::new("/proc").join(pid.to_string());
                    if process.symlink_metadata().is_err() {
                        return Err(error);
                    }
                    tracing::warn!("{}", error.one_line());
                    sleep(RECORD_PAUSE).await;
                }
            }
            Err(error) => settle::after_commit(node, store, locked, error).await?,
        }
        let all = Message::AllPages;
        told = told.and(conversation.send_with_grace(all, TELL_GRACE).await);
    }
    settle::write_out(node, store, locked).await?;
    told?;
    let told = conversation.send(Message::Durable).await;
    conversation.close();
    told
}

/// Restores, and waits until the source has committed itself: then the copy may be let go.
async fn agree(
    node: &Containerd,
    conversation: &mut Conversation,
    (plan, prepared): (Plan, Prepared),
    checkpoint: &Checkpoint,
    locked: &mut Locked,
    interrupt: &Interrupt,
) -> Result<Restored> {
    conversation.send(Message::Received).await?;
    match conversation.receive("the word to restore").await? {
        Message::Restore => {}
        other => return Err(unexpected("the word to restore", &other).into()),
    }
    let restored = restore::hold_in(node, plan, prepared, checkpoint).await?;
    locked.arrival.upperdir = Some(restored.upperdir().to_path_buf());
    interrupt.check()?;
    conversation.send(Message::Restored).await?;
    wait_for_commit(conversation).await?;
    locked.commit()?;
    Ok(restored)
}
