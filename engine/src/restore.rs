//! A container made of a checkpoint.
//!
//! ```text
//!  checkpoint, Target --> plan     all that can be checked and decided before anything is made
//!      plan           --> held     snapshot, upperdir, record, task: restored, and held
//!      Restored::start             it runs
//!      Restored::settle            an ordinary container;  Restored::undo: nothing is left
//! ```
//!
//! `verify` tries a restore and removes it. `copy_guard` removes the copy of a command that was killed. `client_files` makes anew what nerdctl makes for a container.
//!
//! What the checkpoint says is its maker's word: the spec, the labels and the options of the manifest
//! go through `transship_sandbox::admission::foreign_spec`, and everything that leads to a program, a
//! path or a privilege of this node comes from the [`Target`], which the node's operator fills in.

use transship_checkpoint::store::{Checkpoint, Store, StoreError};
use transship_containerd::Containerd;

use copy_guard::CopyGuard;

use crate::error::{Error, Kind, Result};
use crate::interrupt::Interrupt;
use crate::origin::Origins;
use crate::progress::Progress;
use crate::timeline::Timeline;

mod client_files;
mod copy_guard;
mod held;
mod networks;
mod plan;
mod spec;
mod target;
pub mod verify;

pub(crate) use client_files::remove as remove_client_files;
pub use copy_guard::run as run_guard;
pub use held::{Copy, LEASE, Prepared, Restored, hold, hold_in, prepare, settle};
pub(crate) use held::{fill_upperdir, make_contents_dir};
pub use plan::{Plan, plan};
pub use target::{AddressChoice, Target, allowed_by_node};

/// What to restore, and as what.
#[derive(Debug, Default)]
pub struct Request<'a> {
    /// Name of the checkpoint in the store.
    pub name: &'a str,
    /// Which of its containers, when it has several.
    pub container: Option<&'a str>,
    /// How it is made here.
    pub target: Target,
}

/// A container that was restored and runs.
#[derive(Debug)]
pub struct Report {
    /// Its id.
    pub container: String,
    /// Process id of its first process.
    pub pid: u32,
    /// What took how long.
    pub timeline: Timeline,
}

/// Restores a container of a checkpoint and lets it run.
///
/// # Errors
/// Nothing of it is left then.
pub async fn restore(
    node: &Containerd,
    store: &Store,
    request: &Request<'_>,
    interrupt: &Interrupt,
    progress: &dyn Progress,
) -> Result<Report> {
    let mut timeline = Timeline::begin();
    let checkpoint = open(store, request.name)?;
    let _in_use = checkpoint.lock_for_reading()?;
    tokio::task::spawn_blocking({
        let checkpoint = checkpoint.clone();
        move || Origins::of_node().require(&checkpoint)
    })
    .await??;
    let container = checkpoint.manifest.container(request.container)?.clone();
    let spec = checkpoint.read_spec(&container)?;
    let plan = plan(node, &container, &spec, &request.target).await?;

    progress.step("digests");
    let bytes = checkpoint.manifest.size();
    let from = timeline.now();
    tokio::task::spawn_blocking({
        let checkpoint = checkpoint.clone();
        move || checkpoint.verify()
    })
    .await??;
    timeline.step("digests", from, Some(bytes));
    interrupt.check()?;

    progress.step("restore");
    let leased = node.with_lease(LEASE).await?;
    let guard = CopyGuard::start(&leased, &plan, &checkpoint)?;
    let from = timeline.now();
    let run = async {
        let restored = hold(&leased, plan, &checkpoint).await?;
        timeline.step("restore", from, Some(bytes));
        let from = timeline.now();
        let id = restored.id().to_owned();
        let started = match interrupt.check() {
            Ok(()) => restored.start().await,
            Err(interrupted) => Err(interrupted.into()),
        };
        let pid = match started {
            Ok(pid) => pid,
            Err(error) => return Err(restored.undo_after(error).await),
        };
        timeline.step("start", from, None);
        restored.settle().await?;
        Ok((id, pid))
    };
    let done = run.await;
    // What was made is referred to by now, or gone. A lease that cannot be dropped ends by itself.
    drop(leased.end_lease().await);
    guard.stand_down(&done).await;
    let (container, pid) = done?;
    Ok(Report {
        container,
        pid,
        timeline,
    })
}

/// Opens a checkpoint; one that is not there has a kind of its own.
///
/// # Errors
/// [`Kind::NotFound`], or a checkpoint that cannot be read.
pub fn open(store: &Store, name: &str) -> Result<Checkpoint> {
    match store.open(name) {
        Err(error @ StoreError::NotFound { .. }) => {
            Err(Error::new(Kind::NotFound, error.to_string()).hint("transship ls"))
        }
        Err(error @ StoreError::Sealed { .. }) => {
            Err(Error::refused(error.to_string()).hint("--identity FILE"))
        }
        other => Ok(other?),
    }
}
