//! The end of a migration whose `receive` has not come to it: killed, or its node went down.
//!
//! ```text
//!  arriving, aborting     the copy is removed                                  -> aborted
//!  committed, held        it is let go                                         -> runs
//!  committed, runs                                                             -> runs
//!  committed, and gone    it has never run (the front's record says so)        -> aborting
//!                         it may have run                                      stays; the source hears `lost`
//!  committed, runs, and this node was down since: it has never run             -> aborting
//!                         it may have run, and not all is on the disk          stays; the source hears `lost`
//!  committed, and pages of its memory are still on the source: it is ended, and gone
//!  runs                   its record, image and files are written out          -> durable
//! ```
//!
//! Four call this: `receive` itself when it fails, the guard of `receive` (a process of its own, see [`crate::guard_process`]), who
//! answers a source that asks, and `transship recover` on this node, for what was left by a power cut.

use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_client::types::v1::Status;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use transship_checkpoint::annotations::of_migration;
use transship_checkpoint::store::{DEFAULT_OPENED, Store, StoreError};
use transship_checkpoint::wire::Outcome;
use transship_containerd::Containerd;
use transship_sandbox::consumed::{Consumed, DEFAULT_CONSUMED_DIR, Owner};

use super::arrival::{Arrival, Arrivals, Found, Locked, State};
use super::pod::settle::Committed;
use super::{durable, leases, pod};
use crate::error::{Context, Error, Kind, Result};
use crate::guard_process::{self, GuardProcess};
use crate::memory_dir::remove_when_unused;
use crate::restore::{self, Copy};

/// The first argument of the guard's process.
const ARGUMENT: &str = "receive-guard";
/// How long the guard goes on when containerd does not answer; `transship recover` does it later.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long a call of the runtime that nobody waits for any more may take.
const START_PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(500);

/// What the guard is told.
#[derive(Debug, Serialize, Deserialize)]
struct Orders {
    /// containerd's socket.
    address: std::path::PathBuf,
    /// containerd's namespace.
    namespace: String,
    /// The store's directory.
    store: std::path::PathBuf,
    migration: String,
}

/// Starts the guard of a migration.
///
/// # Errors
/// When the process cannot be started.
pub(super) fn guard(node: &Containerd, store: &Store, migration: &str) -> Result<GuardProcess> {
    let orders = Orders {
        address: node.address().to_path_buf(),
        namespace: node.namespace().to_owned(),
        store: store.root().to_path_buf(),
        migration: migration.to_owned(),
    };
    GuardProcess::start(ARGUMENT, &orders)
}

/// The guard's own life, with its orders on stdin; one that is not `alone` yet starts the one that is.
///
/// # Errors
/// The migration has not come to its end in time.
pub async fn run_guard(alone: bool) -> Result<()> {
    let Some(orders) = guard_process::orders::<Orders>(ARGUMENT, alone).await? else {
        return Ok(());
    };
    let store = Store::at(&orders.store);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let settle = async {
            let node = Containerd::connect(&orders.address, &orders.namespace).await?;
            let outcome = outcome(&node, &store, &Arrivals::default(), &orders.migration).await?;
            if outcome != Outcome::Undecided {
                // After the record of the image, which keeps its blobs.
                leases::end_those_of_the_gone(&node).await?;
                store.remove_orphans()?;
                let files = Path::new(DEFAULT_OPENED).join(of_migration(&orders.migration));
                remove_when_unused(&files).await;
            }
            Ok(outcome)
        };
        match settle.await {
            Ok(Outcome::Undecided) => {}
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => {}
            Ok(_) => return Ok(()),
        }
        sleep(PAUSE).await;
    }
}

/// What became of a migration; one that nobody works on is brought to its end.
///
/// # Errors
/// containerd does not answer, or a record cannot be read.
pub(super) async fn outcome(
    node: &Containerd,
    store: &Store,
    arrivals: &Arrivals,
    migration: &str,
) -> Result<Outcome> {
    match arrivals.open(migration)? {
        // Without a record nothing was restored: `Commit` has not been heard, and the only process
        // that could hear it has the lock as long as there is a copy.
        Found::Nothing => Ok(Outcome::Aborted),
        Found::Record(mut locked) => settle(node, store, &mut locked).await,
        // The copy runs, whatever is still being written.
        Found::Busy => Ok(match arrivals.state(migration)? {
            Some(State::Durable) => Outcome::Runs,
            _ => Outcome::Undecided,
        }),
    }
}

/// Brings all that nobody works on to its end, also leases of processes that were killed. One that cannot be keeps no other
/// waiting.
///
/// # Errors
/// The records cannot be listed.
pub async fn settle_all(node: &Containerd, store: &Store, arrivals: &Arrivals) -> Result<Settled> {
    let mut settled = Settled::default();
    for migration in arrivals.unfinished()? {
        match outcome(node, store, arrivals, &migration).await {
            Ok(Outcome::Lost) => settled.lost.push(migration),
            Ok(_) => {}
            Err(error) => settled.failed.push(error),
        }
    }
    let late = pod::settle::remove_late(node, arrivals).await;
    settled.failed.extend(late.err());
    match node.namespaces().await {
        Ok(namespaces) => {
            for namespace in namespaces {
                let ended = match node.in_namespace(&namespace) {
                    Ok(node) => leases::end_those_of_the_gone(&node).await,
                    Err(error) => Err(error.into()),
                };
                settled.failed.extend(ended.err());
            }
        }
        Err(error) => settled.failed.push(error.into()),
    }
    Ok(settled)
}

/// What is left when all that nobody works on has been looked at.
#[derive(Debug, Default)]
pub struct Settled {
    /// The migrations that may be lost.
    pub lost: Vec<String>,
    /// Why others have not come to their end.
    pub failed: Vec<Error>,
}

async fn settle(node: &Containerd, store: &Store, locked: &mut Locked) -> Result<Outcome> {
    let node = node.in_namespace(&locked.arrival.namespace)?;
    loop {
        match locked.arrival.state {
            State::Durable => return Ok(Outcome::Runs),
            State::Aborted => return Ok(Outcome::Aborted),
            State::Arriving | State::Aborting => abort(&node, store, locked).await?,
            State::Committed | State::Runs if locked.is_of_another_boot()? => {
                if !never_ran(locked)? {
                    return Ok(Outcome::Lost);
                }
                abort(&node, store, locked).await?;
            }
            State::Committed => {
                if !let_go(&node, store, locked).await? {
                    return Ok(Outcome::Lost);
                }
            }
            State::Runs => write_out(&node, store, locked).await?,
        }
    }
}

/// Undoes a migration that has failed before its source has committed itself, and gives the error to tell. Nothing is
/// undone where that word may be on the disk ([`Kind::Uncertain`]): who asks is told.
pub(super) async fn undo(
    node: &Containerd,
    store: &Store,
    locked: &mut Locked,
    error: Error,
) -> Error {
    if error.kind() == Kind::Uncertain {
        return error;
    }
    match abort(node, store, locked).await {
        Ok(()) => error,
        Err(left) => left.after(error),
    }
}

/// What is done when the copy could not be let go, after its source has committed itself: a call that has failed may
/// have done its work. The copy runs when this succeeds.
///
/// # Errors
/// The copy has not run and never will; or that is not known yet, and nobody may say so ([`Kind::Uncertain`]).
pub(super) async fn after_commit(
    node: &Containerd,
    store: &Store,
    locked: &mut Locked,
    error: Error,
) -> Result<()> {
    let uncertain = |message: &str| Error::new(Kind::Uncertain, message.to_owned());
    match settle(node, store, locked).await {
        Ok(Outcome::Runs) => Ok(()),
        Ok(Outcome::Aborted) => Err(error),
        Ok(_) => Err(uncertain("the copy may have run, and is gone").because(error)),
        Err(failed) => {
            Err(uncertain("whether the copy runs is not known yet").because(failed.after(error)))
        }
    }
}

/// Removes what there is of the copy, which has not run.
async fn abort(node: &Containerd, store: &Store, locked: &mut Locked) -> Result<()> {
    if locked.arrival.state == State::Committed {
        // What says that it has not run is removed with it.
        locked.set(State::Aborting)?;
    }
    let arrival = &locked.arrival;
    match &arrival.pod {
        Some(pod) => pod::settle::remove(node, pod, &locked.migration()).await?,
        None => {
            copy_of(arrival).remove(node).await?;
        }
    }
    remove_checkpoint(store, &arrival.checkpoint)?;
    locked.set_aborted();
    Ok(())
}

fn copy_of(arrival: &Arrival) -> Copy<'_> {
    Copy {
        id: &arrival.container,
        snapshotter: &arrival.snapshotter,
        made_by: &arrival.made_by,
    }
}

/// Lets the copy of a source go that has committed itself. False: it is gone, and may have run.
async fn let_go(node: &Containerd, store: &Store, locked: &mut Locked) -> Result<bool> {
    if locked.arrival.pod.is_some() {
        match pod::settle::let_go(node, &locked.arrival).await? {
            Committed::Runs => locked.set(State::Runs)?,
            Committed::NeverRan => abort(node, store, locked).await?,
            Committed::Gone => return Ok(false),
        }
        return Ok(true);
    }
    let id = locked.arrival.container.clone();
    let status = copy_of(&locked.arrival).status(node).await?;
    if locked.arrival.lacks_memory {
        // Nobody brings the rest of it: it would wait for ever.
        if status != Status::Stopped {
            node.kill_task(&id).await?;
        }
        if has_run(locked)? {
            return Ok(false);
        }
        abort(node, store, locked).await?;
        return Ok(true);
    }
    match status {
        Status::Created => match node.start_task(&id).await {
            Ok(()) => locked.set(State::Runs)?,
            Err(error) => {
                if runs_soon(locked).await? {
                    return Err(error.into());
                }
                // The end of it first, and then the last look.
                node.kill_task(&id).await?;
                if has_run(locked)? {
                    return Ok(false);
                }
                abort(node, store, locked).await?;
            }
        },
        Status::Running | Status::Paused | Status::Pausing => locked.set(State::Runs)?,
        Status::Stopped if has_run(locked)? => return Ok(false),
        Status::Stopped => abort(node, store, locked).await?,
        // What nobody knows of is neither told nor removed.
        Status::Unknown => return Err(Error::failed(format!("what {id:?} does is not known"))),
    }
    Ok(true)
}

/// Whether a runtime whose caller has gone lets it go.
async fn runs_soon(locked: &Locked) -> Result<bool> {
    let deadline = Instant::now() + START_PATIENCE;
    while !has_run(locked)? {
        if Instant::now() > deadline {
            return Ok(false);
        }
        sleep(PAUSE).await;
    }
    Ok(true)
}

/// Whether the runtime front has let it go: it writes that down before the first instruction.
fn has_run(locked: &Locked) -> Result<bool> {
    let arrival = &locked.arrival;
    let Some(upperdir) = upperdir_left(arrival)? else {
        return Ok(true);
    };
    let consumed = Consumed::by(Path::new(DEFAULT_CONSUMED_DIR), &Owner::Layer(upperdir))?;
    let found = consumed.container(&arrival.checkpoint, &arrival.name);
    Ok(found.is_some())
}

/// Whether a copy, whose node was down since it was to be let go, has not run: what the front says of a pod goes with the
/// pod's sandbox.
fn never_ran(locked: &Locked) -> Result<bool> {
    let arrival = &locked.arrival;
    Ok(arrival.state == State::Committed && arrival.pod.is_none() && !has_run(locked)?)
}

/// The upperdir of the copy, unless the copy has been removed since.
fn upperdir_left(arrival: &Arrival) -> Result<Option<PathBuf>> {
    let Some(upperdir) = arrival.upperdir.clone() else {
        return Ok(None);
    };
    let is_there = upperdir.try_exists();
    let is_there = is_there.with_context(|| format!("cannot look for {}", upperdir.display()))?;
    Ok(is_there.then_some(upperdir))
}

/// Makes the copy a container like any other, and writes all of it to the disk.
pub(super) async fn write_out(node: &Containerd, store: &Store, locked: &mut Locked) -> Result<()> {
    match locked.arrival.state {
        State::Durable => return Ok(()),
        State::Runs => {}
        // From then on nobody knows it from another container with its id.
        _ => locked.set(State::Runs)?,
    }
    let arrival = locked.arrival.clone();
    if let Some(pod) = &arrival.pod {
        for place in &pod.files {
            // One that has ended since, and been removed, has none.
            if place.try_exists().unwrap_or(true) {
                durable::sync(node, place).await?;
            }
        }
        remove_checkpoint(store, &arrival.checkpoint)?;
        return locked.set(State::Durable);
    }
    let copy = copy_of(&arrival);
    if copy.has_record(node).await?
        && let Err(error) = restore::settle(node, copy.id).await
        // It may have ended since, and been removed.
        && copy.has_record(node).await?
    {
        return Err(error);
    }
    if let Some(image) = &arrival.image {
        node.create_image(&image.name, image.target()).await?;
    }
    if let Some(upperdir) = upperdir_left(&arrival)? {
        durable::sync(node, &upperdir).await?;
    }
    remove_checkpoint(store, &arrival.checkpoint)?;
    locked.set(State::Durable)
}

fn remove_checkpoint(store: &Store, name: &str) -> Result<()> {
    match store.remove(name) {
        Ok(()) | Err(StoreError::NotFound { .. }) => Ok(()),
        Err(error) => Err(Error::from(error)).context("the files of the migration are left"),
    }
}
