//! The source's side of a migration.
//!
//! ```text
//!              before Commit                 | Commit sent        | Running heard      | Durable heard
//!   on failure: source resumes, target       | the target is asked | source is ended,   | source is
//!               removes what it made         | (ask); else source  | its files stay     | removed, and
//!                                            | stays paused        | until it is asked  | the record
//! ```
//!
//! `record` is the file of this one migration: it keeps others from the same container, and from `Commit` on tells
//! what is under way; `moving` is what moves, a container or all of a pod; `recover` ends what this process has left.
//! `commit_guard` asks the target when this process is killed. `restart_policy` keeps containerd from making a second copy meanwhile. `transaction` is the talk with the target
//! (`engine::receive`); `precopy`, `memory_images` and `frozen_memory` are how memory gets there, `file_contents` how large
//! files do.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use transship_checkpoint::annotations::of_migration;
use transship_checkpoint::cri_names::CRI_NAMESPACE;
use transship_checkpoint::store::Store;
use transship_checkpoint::wire::{Compressed, WireError};
use transship_containerd::Containerd;
use transship_sandbox::moved::{self, DEFAULT_MOVED_DIR};

use crate::check::lacking::MayLack;
use crate::conversation::{Conversation, LINK_PATIENCE};
use crate::cri_pods::CriPods;
use crate::data_channel::DataAddress;
use crate::error::{Context, Error, Kind, Result, one_line};
use crate::image_blobs;
use crate::interrupt::Interrupt;
use crate::kubelet;
use crate::lost_task;
use crate::moved_mark::Mark;
use crate::progress::Progress;
use crate::reasons::Reasons;
use crate::receive::{Arrivals, new_migration, settle_all};
use crate::restart_policy;
use crate::restore::{Target, remove_client_files};
use crate::source::{self, SourceContainer};
use crate::thaw;
use crate::timeline::Timeline;

mod ask;
mod before_restore;
mod commit_guard;
mod dump_files;
mod dump_parts;
mod file_contents;
mod frozen_memory;
mod late_pages;
mod memory_images;
mod moving;
mod network;
mod precopy;
mod process_memory;
mod record;
mod recover;
mod remote;
mod transaction;

pub use commit_guard::run as run_guard;
pub use precopy::Bounds as PrecopyBounds;
pub use record::{Pending, PendingPod, Records};
pub use recover::{Decided, Decision, Recovered, pending, recover_all};
pub use remote::receive_arguments;

use moving::Moving;
use record::Record;
use remote::Remote;
use transaction::Transaction;

/// How a pod moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PodRequest {
    /// Whether the content of its emptyDirs comes along.
    pub empty_dirs: bool,
    /// Whether somebody else makes the pod on the other node, with the annotation that names this migration.
    pub wait: bool,
}

/// What moves where, and as what.
#[derive(Debug, Clone)]
pub struct Request {
    /// Container id, or the pod by the id of its sandbox or as `namespace/name`.
    pub container: String,
    /// It is a pod.
    pub pod: Option<PodRequest>,
    /// Command that runs its arguments on the other node.
    pub to: String,
    /// The program's path on the other node.
    pub remote_program: String,
    /// Command to run here while neither copy runs.
    pub before_restore: Option<String>,
    /// Whether record and snapshot stay here.
    pub keep_source: bool,
    /// Whether what it has written stays behind.
    pub leave_logs: bool,
    /// How long a dump may write nothing.
    pub dump_patience: Duration,
    /// How long the source may stand still before the copy is told to run; none: as long as it takes.
    pub max_freeze: Option<Duration>,
    /// How long the link may be silent.
    pub link_patience: Duration,
    /// Whether the copy runs as soon as all but its memory is there, which comes while it runs. A copy whose source or
    /// link goes meanwhile is lost. Not for a pod.
    pub is_lazy: bool,
    /// What is sent before the freeze.
    pub precopy: PrecopyBounds,
    /// What of a comparison of the nodes the other one may lack.
    pub may_lack: MayLack,
    /// Where the other node is to listen for the bulk of the data; none: where it thinks best.
    pub data_address: Option<DataAddress>,
    /// How it is made on the other node. CRIU's options hold for the dump as well.
    pub target: Target,
}

impl Request {
    /// A migration of `container` through the command `to`, all else as usual.
    pub fn new(container: impl Into<String>, to: impl Into<String>) -> Self {
        Self {
            container: container.into(),
            pod: None,
            to: to.into(),
            remote_program: "transship".to_owned(),
            before_restore: None,
            keep_source: false,
            leave_logs: false,
            dump_patience: crate::stuck_dump::PROGRESS_PATIENCE,
            max_freeze: None,
            link_patience: LINK_PATIENCE,
            is_lazy: false,
            precopy: PrecopyBounds::default(),
            may_lack: MayLack::default(),
            data_address: None,
            target: Target::default(),
        }
    }
}

/// A container or pod that runs on the other node.
#[derive(Debug)]
pub struct Report {
    /// Its id there; of a pod what people call it.
    pub container: String,
    /// Process id of its first process there, if the other node has said it.
    pub pid: Option<u32>,
    /// Bytes that were moved.
    pub bytes: u64,
    /// Bytes of files and memory that went compressed, because the link was slow.
    pub compressed: Compressed,
    /// Direct connections that they went through; 0: all went through the command.
    pub direct: usize,
    /// What took how long.
    pub timeline: Timeline,
    /// It runs there, but what was to be done here could not be.
    pub unfinished: Option<Error>,
}

/// Where the records of migrations are that have been committed.
pub const RECORDS: &str = "/var/lib/transship/migrations";
/// How long containerd may take to delete the tasks of a source, whose processes have ended.
const ENDING: Duration = Duration::from_secs(30);
/// How long containerd may take to end a lease.
const LEASES_END: Duration = Duration::from_secs(10);
/// Where the locks of migrations are.
const LOCKS: &str = "/run/transship/migrations";

/// Moves a running container to another node.
///
/// # Errors
/// The source runs on, unless the kind is [`Kind::Uncertain`]. Where the copy runs, what has failed here is in the report.
pub async fn migrate(
    node: &Containerd,
    store: &Store,
    request: &Request,
    interrupt: &Interrupt,
    progress: &dyn Progress,
) -> Result<Report> {
    let mut leases = Vec::new();
    let prepared = tokio::select! {
        prepared = prepare(node, store, request, &mut leases) => prepared,
        interrupted = interrupt.wait() => Err(interrupted.into()),
    };
    let moved = match prepared {
        Ok(prepared) => move_prepared(prepared, store, request, interrupt, progress).await,
        Err(error) => Err(error),
    };
    end_leases(leases).await;
    moved
}

/// Talks with the other node.
async fn move_prepared(
    prepared: Prepared,
    store: &Store,
    request: &Request,
    interrupt: &Interrupt,
    progress: &dyn Progress,
) -> Result<Report> {
    let Prepared {
        node,
        moving,
        record,
        pending,
        mut reasons,
    } = prepared;
    let (id, called) = (moving.id().to_owned(), moving.called());
    let mut remote = match Remote::start(node.namespace(), request) {
        Err(error) if !reasons.is_empty() => {
            reasons.add(error);
            return reasons.or(None);
        }
        started => started?,
    };
    let (input, output) = remote.pipes()?;
    let mut transaction = Transaction {
        node: &node,
        moving: &moving,
        reasons,
        store,
        request,
        record: &record,
        pending,
        durable: false,
        conversation: Conversation::new(input, output, interrupt.clone()),
        timeline: Timeline::begin(),
        progress,
        interrupt: interrupt.clone(),
        bytes: 0,
        compressed: Compressed::default(),
        direct: 0,
        estimate: 0,
        files_before: Vec::new(),
        takes_contents: Vec::new(),
        late: None,
        giving_away: None,
        guard: None,
    };
    let result = transaction.carry_out().await;
    if let Err(error) = &result
        && error.kind() != Kind::Uncertain
    {
        transaction.conversation.give_up(error.one_line()).await;
    }
    let moved = match result {
        Ok((pid, source)) => Ok((pid, transaction.finish(source).await)),
        Err(error) => Err(error),
    };
    // What is open is told, and for `recover`.
    if let Some(guard) = transaction.guard.take() {
        guard.stand_down();
    }
    let Transaction {
        mut conversation,
        timeline,
        bytes,
        compressed,
        direct,
        interrupt,
        ..
    } = transaction;
    conversation.close();
    let cut_short = moved.is_err() && interrupt.check().is_err();
    let status = remote.end(cut_short).await;
    let (pid, finished) = moved.map_err(|error| remote::blame(error, request, status.as_ref()))?;
    let unfinished = finished.with_context(|| format!("{called} runs on the other node"));
    let there = match &moving.pod {
        Some(_) => called,
        None => request.target.id.clone().unwrap_or(id),
    };
    Ok(Report {
        container: there,
        pid,
        bytes,
        compressed,
        direct,
        timeline,
        unfinished: unfinished.err(),
    })
}

/// What is known before the other node is asked.
struct Prepared {
    /// In the namespace of what moves.
    node: Containerd,
    moving: Arc<Moving>,
    record: Record,
    pending: Pending,
    /// What speaks against it here.
    reasons: Reasons,
}

/// Looks at what moves, and makes what is missing of its images; what was made goes with the leases.
async fn prepare(
    node: &Containerd,
    store: &Store,
    request: &Request,
    leases: &mut Vec<Containerd>,
) -> Result<Prepared> {
    // What has come here and was given up would be a second pod of its name.
    for failed in settle_all(node, store, &Arrivals::default()).await?.failed {
        tracing::warn!("{}", failed.one_line());
    }
    let mut reasons = Reasons::default();
    let found = Moving::find(node, request, &mut reasons).await;
    let Some(mut moving) = reasons.keep(found)? else {
        return reasons.or(None);
    };
    late_pages::check(&moving, request, &mut reasons);
    let node = match moving.pod {
        // The CRI's containers are in no other namespace.
        Some(_) => node.in_namespace(CRI_NAMESPACE)?,
        None => node.clone(),
    };
    let (id, called) = (moving.id().to_owned(), moving.called());
    let record = Record::take(Path::new(RECORDS), Path::new(LOCKS), node.namespace(), &id)?;
    let was_paused = moving.containers.iter().any(|it| it.was_paused);
    let ids: Vec<&str> = moving.containers.iter().map(SourceContainer::id).collect();
    let created = recover::created(&node, &ids).await?;
    match record.read() {
        Ok(Some(earlier)) if !earlier.names_others(&created) => {
            if !was_paused && !earlier.copy_runs {
                // It has been decided: it runs.
                recover::let_be_connected(&node, &record, &earlier).await?;
            }
        }
        _ if was_paused => {}
        _ => record.clear()?,
    }
    record.check_clear(&id, node.namespace())?;
    if was_paused {
        let paused = moving.containers.iter().filter(|it| it.was_paused);
        let message = format!("{called} is paused, and its copy would run");
        reasons.add(paused.fold(Error::refused(message), |error, source| {
            let resume = format!("ctr -n {} tasks resume {}", node.namespace(), source.id());
            error.hint(resume)
        }));
        return reasons.or(None);
    }
    // What is not going to move needs no image.
    let completed = moving.containers.iter_mut().filter(|_| reasons.is_empty());
    for container in completed {
        if let Err(error) = image_blobs::complete(&node, container, leases).await {
            tracing::warn!(
                error = %one_line(&error),
                "parts of the image are missing, and cannot be made again"
            );
        }
    }
    let networks = moving.containers.iter();
    let networks = networks.flat_map(|it| it.container.networks.clone());
    let pending = Pending {
        migration: new_migration()?,
        namespace: node.namespace().to_owned(),
        container: id.clone(),
        pod: moving.pending_pod(),
        to: request.to.clone(),
        remote_program: request.remote_program.clone(),
        node: String::new(),
        created,
        was_paused,
        keep_source: request.keep_source,
        networks: networks.collect(),
        since: String::new(),
        copy_runs: false,
    };
    Ok(Prepared {
        node,
        moving: Arc::new(moving),
        record,
        pending,
        reasons,
    })
}

async fn end_leases(leases: Vec<Containerd>) {
    for leased in leases {
        // What is left of it ends by itself.
        drop(timeout(LEASES_END, leased.end_lease()).await);
    }
}

/// Leaves the source as it is, whose processes have ended; nothing starts it again.
async fn keep_source(node: &Containerd, pending: &Pending) -> Result<()> {
    for id in pending.ids() {
        let kept = restart_policy::keep_suspended(node, id).await;
        kept.with_context(|| format!("the labels of {id:?} could not be changed here"))?;
    }
    Ok(())
}

/// Removes what is left of the source, whose processes have ended.
async fn remove_source(node: &Containerd, pending: &Pending) -> Result<()> {
    let removed = match &pending.pod {
        None => remove_container(node, &pending.container).await,
        Some(pod) => {
            async {
                CriPods::of(node).remove(&pending.container).await?;
                // A kubelet here goes on trying to make it again, until it hears that the pod has gone.
                match kubelet::seen() {
                    Some(_) => Ok(()),
                    None => Ok(moved::unmark(Path::new(DEFAULT_MOVED_DIR), &pod.uid)?),
                }
            }
            .await
        }
    };
    removed.context("it could not be removed here")
}

async fn remove_container(node: &Containerd, id: &str) -> Result<()> {
    match node.container(id).await {
        Err(error) if error.is_not_found() => {}
        record => {
            let record = record?;
            lost_task::delete_of_runtime(node, &record).await?;
            match node.delete_container(id).await {
                // Its client (`ctr run --rm`) removes it as well.
                Err(error) if error.is_not_found() => {}
                deleted => deleted?,
            }
            let snapshotter = node.snapshotter(&record.snapshotter);
            { snapshotter.remove_if_exists(&record.snapshot_key) }.await?;
        }
    }
    remove_client_files(node.namespace(), id)?;
    lost_task::remove(node, id).await
}

/// Deletes the tasks of the source, which have ended; its files stay. Those of a pod are the CRI's.
async fn end_source(node: &Containerd, pending: &Pending) -> Result<()> {
    let end = async {
        match pending.pod {
            None => Ok(node.kill_task(&pending.container).await?),
            Some(_) => CriPods::of(node).stop(&pending.container).await,
        }
    };
    // Its processes have ended, and a shim may be silent for ever.
    let ended = thaw::answered(ENDING, end).await;
    ended.context("it could not be ended here")
}

/// By which a kubelet here starts nothing of the pod any more, whatever its probes say of what stands still.
fn mark_of(moving: &Moving, pending: &Pending) -> Result<Option<Mark>> {
    let Some(pod) = moving.pod.as_ref().filter(|_| kubelet::seen().is_some()) else {
        return Ok(None);
    };
    let checkpoint = of_migration(&pending.migration);
    Mark::of(&pod.pod, &moving.containers, &checkpoint, false).map(Some)
}

/// It runs on here.
fn unmark_moved(pending: &Pending) -> Result<()> {
    match &pending.pod {
        Some(pod) => Ok(moved::unmark(Path::new(DEFAULT_MOVED_DIR), &pod.uid)?),
        None => Ok(()),
    }
}

/// The error, and that the source runs on, as far as `thawed` says so.
async fn resume_source(
    node: &Containerd,
    moving: &Moving,
    thawed: Result<()>,
    error: Error,
) -> Error {
    let called = moving.called();
    // Only what runs may be looked after again.
    let mut put_back = Ok(());
    for container in &moving.containers {
        put_back = put_back.and(restart_policy::put_back(node, container.id()).await);
    }
    let state = match (&thawed, &put_back) {
        (Ok(()), Ok(())) => match ended_meanwhile(node, moving).await {
            None => format!("{called} runs on here as before"),
            Some(ended) => ended,
        },
        (Ok(()), Err(left)) => format!(
            "{called} runs on here, without its restart policy ({})",
            left.one_line()
        ),
        (Err(paused), _) => match source::running_task(node, moving.id()).await {
            Ok(Err(state)) if moving.pod.is_none() => {
                format!("{called} {state} here: it has ended by itself")
            }
            _ => paused.one_line(),
        },
    };
    Error::failed(state).because(error)
}

/// What of it does not run on, if there is something: a CRIU that is killed can take a process with it.
async fn ended_meanwhile(node: &Containerd, moving: &Moving) -> Option<String> {
    let mut ended = Vec::new();
    for source in &moving.containers {
        if let Ok(Err(state)) = source::running_task(node, source.id()).await {
            ended.push(format!("{} {state}", source.called));
        }
    }
    let called = moving.called();
    (!ended.is_empty()).then(|| {
        let ended = ended.join(", ");
        format!("{called} was not moved, and has not gone on as before: {ended}")
    })
}

fn is_refusal_of_target(error: &Error) -> bool {
    error.kind() == Kind::Failed
        && matches!(error.cause::<WireError>(), Some(WireError::Failed { .. }))
}
