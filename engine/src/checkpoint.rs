//! A checkpoint of a running container or pod.
//!
//! ```text
//!  Request --find--> DumpTarget --checkpoint--> Report
//!                      freeze; dumps (CRIU), one by one; volumes beside them; thaw
//!                      digests; manifest; sync, or seal (sealed.rs): then all of this is in memory
//! ```
//!
//! A checkpoint that fails lets everything run again, and leaves nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use transship_checkpoint::cri_names::CRI_NAMESPACE;
use transship_checkpoint::criu_options::CriuOverrides;
use transship_checkpoint::manifest::{Container, Losses, NotRunning, Pod, Shared};
use transship_checkpoint::shared_dirs::SHARED_DIR;
use transship_checkpoint::store::{Draft, Durability, Store, digest_files};
use transship_containerd::Containerd;
use transship_package::export::ExportOptions;
use transship_sandbox::admission::node_config::{NODE_CONFIG, NodeConfig};

use crate::check::node_facts::NodeFacts;
use crate::dumped_fifos::DumpedFifos;
use crate::error::{Context, Error, Result};
use crate::frozen::{Frozen, Pids, TaskToFreeze, at_most};
use crate::interrupt::Interrupt;
use crate::moved_mark::Mark;
use crate::origin::Origins;
use crate::pod::{self, SourcePod};
use crate::pod_dirs::{self, SharedDirs};
use crate::pod_ended;
use crate::progress::Progress;
use crate::reasons::Reasons;
use crate::restart_policy;
use crate::restore::verify;
use crate::retention;
use crate::sealed::Sealing;
pub use crate::selection::Selection;
use crate::sharing::share;
use crate::source::{self, DumpOptions, Dumped, SourceContainer};
use crate::stuck_dump::PROGRESS_PATIENCE;
use crate::timeline::{self, Timeline};

/// What a checkpoint is taken of, and how.
#[derive(Debug)]
pub struct Request {
    /// What is dumped.
    pub of: Selection,
    /// What CRIU is told.
    pub criu: CriuOverrides,
    /// Whether the content of emptyDir volumes comes along.
    pub empty_dirs: bool,
    /// How long the dump of a container may write nothing.
    pub dump_patience: Duration,
    /// How long the containers may stand still; none: as long as it takes. A dump by CRIU that has begun
    /// is waited for all the same.
    pub max_freeze: Option<Duration>,
    /// Whether the pod moves: then nothing of it starts here any more, unless the checkpoint fails.
    pub moves: Moves,
    /// Whether a restore of it is tried at once.
    pub verify_restore: bool,
    /// Whether what the containers have written stays behind.
    pub leave_logs: bool,
    /// How it is encrypted when it is taken; none: it lies in clear.
    pub seal: Option<Arc<ExportOptions>>,
}

/// Whether a pod is moved away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Moves {
    /// It stays.
    #[default]
    No,
    /// The runtime front keeps kubelet from starting it again.
    Marked,
    /// The same where the front runs it; else the caller deletes the pod in time.
    WillBeDeleted,
}

impl Request {
    /// With the options of the containers' annotations, without emptyDirs.
    pub fn of(of: Selection) -> Self {
        Self {
            of,
            criu: CriuOverrides::default(),
            empty_dirs: false,
            dump_patience: PROGRESS_PATIENCE,
            max_freeze: None,
            moves: Moves::No,
            verify_restore: false,
            leave_logs: false,
            seal: None,
        }
    }
}

/// What the containers do after a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Afterwards {
    /// They run.
    #[default]
    Run,
    /// They stay paused.
    Paused,
    /// They have ended, without an instruction after the moment of the checkpoint.
    Killed,
}

/// A checkpoint that has been taken.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Its name.
    pub name: String,
    /// Its directory.
    pub directory: String,
    /// Names of the containers in it.
    pub containers: Vec<String>,
    /// Names of the containers of the pod that did not run.
    pub left_out: Vec<String>,
    /// Those of them that had ended with 0, and do not run again when the pod is restored.
    pub done: Vec<String>,
    /// Those that had ended with another code, and end so again.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub failed: Vec<String>,
    /// What the containers share, as in "/dev/shm".
    pub shared: Vec<String>,
    /// What the layers could not say, by the container's name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub losses: BTreeMap<String, Losses>,
    /// Bytes of all files.
    pub bytes: u64,
    /// Bytes that they take encrypted, when it is sealed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sealed_bytes: Option<u64>,
    /// Whether a restore of it was tried, and succeeded.
    pub restore_tried: bool,
    /// What took how long.
    #[serde(serialize_with = "timeline::serialize")]
    pub timeline: Timeline,
}

/// What is to be dumped, found and looked at.
#[derive(Debug)]
pub struct DumpTarget {
    node: Containerd,
    what: String,
    pod: Option<Pod>,
    sources: Vec<SourceContainer>,
    not_running: Vec<NotRunning>,
    dirs: SharedDirs,
    sandbox: Option<String>,
    dump_patience: Duration,
    max_freeze: Option<Duration>,
    moves: Moves,
    verify_restore: bool,
    seal: Option<Arc<ExportOptions>>,
}

impl DumpTarget {
    /// A name for the checkpoint: what it is of, and the moment. A second checkpoint within a second
    /// gets an error, not a mix.
    pub fn default_name(&self) -> String {
        let now = transship_containerd::rfc3339(std::time::SystemTime::now());
        let now = now.replace(['-', ':', 'Z'], "").replace('T', "-");
        format!("{}-{now}", self.what)
    }

    /// Id of the pod's sandbox; none for a container alone.
    pub fn sandbox(&self) -> Option<&str> {
        self.sandbox.as_deref()
    }
}

/// Finds what is to be dumped, and checks that it can be.
///
/// # Errors
/// [`crate::Kind::NotFound`], or [`crate::Kind::Refused`] with the reasons.
pub async fn find(node: &Containerd, request: &Request) -> Result<DumpTarget> {
    let selector = match &request.of {
        Selection::Pod(selector) => selector,
        Selection::Container(id) => {
            let mut reasons = Reasons::default();
            let source = source::find(node, id, &request.criu, &mut reasons).await?;
            let mut source = reasons.or(Some(source))?;
            source.log = source.log.filter(|_| !request.leave_logs);
            if request.verify_restore {
                let memory = source.estimate(node).await?;
                verify::can_be_tried(&source.spec, &source.container, &source.called, memory)?;
            }
            check_options(std::slice::from_ref(&source))?;
            return Ok(DumpTarget {
                node: node.clone(),
                what: source.id().to_owned(),
                pod: source.pod.clone(),
                sources: vec![source],
                not_running: Vec::new(),
                dirs: SharedDirs::default(),
                sandbox: None,
                dump_patience: request.dump_patience,
                max_freeze: request.max_freeze,
                moves: Moves::No,
                verify_restore: request.verify_restore,
                seal: request.seal.clone(),
            });
        }
    };
    if request.verify_restore {
        let message =
            "a restore of a pod cannot be tried: it needs a pod of its own, which a CRI makes";
        return Err(Error::refused(message));
    }
    // The CRI's containers are in no other namespace.
    let node = node.in_namespace(CRI_NAMESPACE)?;
    let mut reasons = Reasons::default();
    let found = pod::find(&node, selector, &request.criu, &mut reasons).await?;
    let SourcePod {
        pod,
        sandbox,
        mut containers,
        ended,
    } = reasons.or(Some(found))?;
    check_options(&containers)?;
    if request.leave_logs {
        containers.iter_mut().for_each(|source| source.log = None);
    }
    let dirs = pod_dirs::find(&containers, &sandbox, request.empty_dirs)?;
    pod_dirs::check_left_behind(&node, &containers, &sandbox, &dirs).await?;
    Ok(DumpTarget {
        not_running: pod_ended::not_running(&ended, &containers, &dirs, &sandbox),
        dirs,
        node,
        what: format!("{}-{}", pod.namespace, pod.name),
        pod: Some(pod),
        sources: containers,
        sandbox: Some(sandbox),
        dump_patience: request.dump_patience,
        max_freeze: request.max_freeze,
        moves: request.moves,
        verify_restore: false,
        seal: request.seal.clone(),
    })
}

/// Whether pods may have these options on this node: a checkpoint with others could not be restored.
pub(crate) fn check_options(sources: &[SourceContainer]) -> Result<()> {
    let mut of_pods = sources
        .iter()
        .filter(|source| source.pod.is_some())
        .peekable();
    if of_pods.peek().is_none() {
        return Ok(());
    }
    let rules = NodeConfig::read(Path::new(NODE_CONFIG))
        .map_err(|error| Error::refused("the rules of this node cannot be read").because(error))?;
    for source in of_pods {
        let closed = rules.check_options(&source.container.criu);
        closed.map_err(|closed| Error::refused(closed.to_string()))?;
    }
    Ok(())
}

/// Takes the checkpoint `name`.
///
/// # Errors
/// Everything runs as before then, and nothing of the checkpoint is left; unless the error says that a
/// container is still paused.
pub async fn checkpoint(
    target: &DumpTarget,
    name: &str,
    store: &Store,
    afterwards: Afterwards,
    interrupt: &Interrupt,
    progress: &dyn Progress,
) -> Result<Report> {
    let timeline = Timeline::begin();
    let bytes = check_room(target, store).await?;
    let kept = store.draft(name)?;
    let (sealing, draft) = match target.seal {
        None => (None, kept),
        Some(_) => {
            let sealing = Sealing::prepare(store, kept, bytes)?;
            let draft = sealing.draft()?;
            (Some(sealing), draft)
        }
    };

    let mark = match (&target.pod, target.moves) {
        (_, Moves::No) | (None, _) => None,
        (Some(pod), moves) => {
            let will_be_deleted = moves == Moves::WillBeDeleted;
            Some(Mark::of(pod, &target.sources, name, will_be_deleted)?)
        }
    };
    let into = (store, (sealing, draft), timeline);
    let how = (afterwards, mark.as_ref());
    let taken = take(target, name, into, how, interrupt, progress).await;
    if taken.is_ok() {
        // Whoever was to run runs again.
        share_blocks(store, name).await?;
    }
    match (taken, mark) {
        (Err(error), Some(mark)) => Err(mark.take_back(error)),
        (taken, _) => taken,
    }
}

async fn share_blocks(store: &Store, name: &str) -> Result<()> {
    let (store, name) = (store.clone(), name.to_owned());
    let share = move || {
        if let Ok(new) = store.find(&name) {
            share(&store, &new);
        }
    };
    Ok(tokio::task::spawn_blocking(share).await?)
}

async fn take(
    target: &DumpTarget,
    name: &str,
    (store, (sealing, draft), mut timeline): (&Store, (Option<Sealing>, Draft), Timeline),
    (afterwards, mark): (Afterwards, Option<&Mark>),
    interrupt: &Interrupt,
    progress: &dyn Progress,
) -> Result<Report> {
    progress.step("dump");
    let tasks = target.sources.iter().map(|source| TaskToFreeze {
        marked: mark.and_then(Mark::new_for),
        // containerd before 2.0 takes what stands still for ended, and starts it again.
        hides_policy: true,
        ..source.to_freeze()
    });
    let (tasks, bounds) = (tasks.collect(), (target.max_freeze, interrupt));
    let frozen =
        Frozen::freeze_marked(&target.node, tasks, Some(draft.dir()), bounds, mark).await?;
    timeline.freeze(frozen.since().into_std());
    let dump = dump_all(target, frozen.pids(), draft.dir(), &mut timeline);
    let dumped = match at_most(target.max_freeze, frozen.since(), dump).await {
        Ok(dumped) => dumped,
        Err(error) => return Err(frozen.thaw_after(error).await),
    };
    if afterwards == Afterwards::Run {
        frozen.thaw().await?;
        timeline.thaw();
        let kept = (sealing, draft);
        let mut report = keep(target, kept, dumped, timeline, interrupt, progress).await?;
        if target.verify_restore {
            progress.step("trial of a restore");
            let from = report.timeline.now();
            verify::try_restore(&target.node, store, name).await?;
            report.timeline.step("trial", from, None);
            report.restore_tried = true;
        }
        return Ok(report);
    }
    timeline.thaw();
    let kept = (sealing, draft);
    let kept = keep(target, kept, dumped, timeline, interrupt, progress).await;
    match (kept, afterwards) {
        (Err(error), _) => Err(frozen.thaw_after(error).await),
        (Ok(report), Afterwards::Killed) => {
            frozen.kill().await?;
            Ok(report)
        }
        (Ok(report), Afterwards::Run | Afterwards::Paused) => {
            for source in &target.sources {
                // Of one that is marked nothing starts again, whatever has ended.
                if target.moves != Moves::Marked && !source.runtime.has_paused(source.id()).await {
                    let called = &source.called;
                    let message =
                        format!("{called} does not stand still any more: it was ended, or let go");
                    let error = Error::failed(message);
                    let error = match store.remove(name) {
                        Ok(()) => error,
                        Err(left) => Error::from(left).after(error),
                    };
                    return Err(frozen.thaw_after(error).await);
                }
            }
            tell_hidden(target, progress).await;
            frozen.leave();
            Ok(report)
        }
    }
}

/// What is left paused is not started again by containerd, until somebody says so.
async fn tell_hidden(target: &DumpTarget, progress: &dyn Progress) {
    let node = &target.node;
    for source in &target.sources {
        let id = source.id();
        if matches!(restart_policy::is_suspended(node, id).await, Ok(true)) {
            progress.tell(&format!(
                "{} is hidden from containerd's restart monitor; when it runs again: ctr -n {} containers label {id} \
                 containerd.io/restart.status=running",
                source.called,
                node.namespace()
            ));
        }
    }
}

/// The checkpoint is not begun where node.toml allows no more. Gives the bytes that it will roughly have.
async fn check_room(target: &DumpTarget, store: &Store) -> Result<u64> {
    let mut bytes = 0;
    for source in &target.sources {
        bytes += source.estimate(&target.node).await?;
    }
    let store = store.clone();
    let check = move || retention::check_quota(&store, Path::new(NODE_CONFIG), bytes);
    tokio::task::spawn_blocking(check).await??;
    Ok(bytes)
}

/// What the dumps have made: the containers as the manifest has them, and what they share.
type AllDumped = (Vec<Container>, Shared);

/// Dumps all frozen containers, one after the other.
async fn dump_all(
    target: &DumpTarget,
    frozen: &Pids,
    draft: &Path,
    timeline: &mut Timeline,
) -> Result<AllDumped> {
    let mut export = tokio::task::spawn_blocking({
        let (dirs, draft) = (target.dirs.clone(), draft.to_path_buf());
        move || dirs.export(&draft, &BTreeMap::new())
    });
    // Beside the dumps, which only read memory, unless CRIU makes links in what is exported.
    if target.sources.iter().any(|it| it.container.criu.link_remap) {
        let shared = (&mut export)
            .await
            .context("the export of volumes panicked")??;
        return Ok((
            dump_one_by_one(target, frozen, draft, timeline).await?,
            shared,
        ));
    }
    let dumped = dump_one_by_one(target, frozen, draft, timeline).await;
    // Whatever the dumps did: nobody may thaw while it reads.
    let shared = export.await.context("the export of volumes panicked")?;
    Ok((dumped?, shared?))
}

async fn dump_one_by_one(
    target: &DumpTarget,
    frozen: &Pids,
    draft: &Path,
    timeline: &mut Timeline,
) -> Result<Vec<Container>> {
    let mut all = Vec::new();
    let mut fifos = DumpedFifos::default();
    for source in &target.sources {
        let from = timeline.now();
        let pids = frozen.of(source.id());
        let options = DumpOptions {
            patience: target.dump_patience,
            hold: None,
            begun: None,
            known: None,
            fifos_elsewhere: match target.sources.as_slice() {
                [_] => BTreeSet::new(),
                _ => fifos.add(source.pid, pids),
            },
        };
        let dumped = source.dump(&target.node, draft, pids, options).await;
        let dumped = dumped.map_err(|error| source.cannot_be_dumped(error));
        let Dumped { criu, upperdir } = dumped?;
        timeline.step_of("dump", from, criu, None);
        timeline.note(&source.container.name);
        timeline.step_of("upperdir", from, upperdir.took, Some(upperdir.bytes));
        let mut container = source.container.clone();
        container.losses = upperdir.losses;
        all.push(container);
    }
    Ok(all)
}

/// Makes a checkpoint of the dump.
async fn keep(
    target: &DumpTarget,
    (sealing, draft): (Option<Sealing>, Draft),
    (mut containers, mut shared): AllDumped,
    mut timeline: Timeline,
    interrupt: &Interrupt,
    progress: &dyn Progress,
) -> Result<Report> {
    interrupt.check()?;
    progress.step("digests");
    let from = timeline.now();
    for container in &mut containers {
        let dir = draft.dir().join(&container.name);
        container.files = tokio::task::spawn_blocking(move || digest_files(&dir)).await??;
    }
    if !shared.is_empty() {
        let dir = draft.dir().join(SHARED_DIR);
        shared.files = tokio::task::spawn_blocking(move || digest_files(&dir)).await??;
    }
    let volumes = shared.volumes.iter();
    let shared_names = (!shared.shm.is_empty())
        .then(|| "/dev/shm".to_owned())
        .into_iter()
        .chain(volumes.map(|volume| format!("emptyDir {}", volume.name)))
        .collect();
    let names = containers.iter().map(|it| it.name.clone()).collect();
    let lossy = containers.iter().filter(|it| !it.losses.is_empty());
    let losses = lossy
        .map(|it| (it.name.clone(), it.losses.clone()))
        .collect();
    let name = draft.name().to_owned();
    let pod = target.pod.clone();
    let not_running = target.not_running.clone();
    let left_out = not_running.iter().map(|it| it.name.clone()).collect();
    let done = { not_running.iter() }.filter(|it| it.done);
    let done = done.map(|it| it.name.clone()).collect();
    let failed = { not_running.iter() }.filter(|it| it.failed.is_some());
    let failed = failed.map(|it| it.name.clone()).collect();
    let mut manifest =
        source::manifest(&target.node, &name, pod, containers, not_running, shared).await?;
    NodeFacts::of_this(None)
        .await?
        .complete(&mut manifest.source);
    let bytes = manifest.size();
    timeline.step("digests", from, Some(bytes));
    let from = timeline.now();
    let place = sealing.as_ref().map_or(draft.place(), Sealing::place);
    let (made, place) = (manifest.clone(), place.to_owned());
    Origins::of_node().makes_here(&made, &place)?;
    let checkpoint = match (sealing, &target.seal) {
        (Some(sealing), Some(options)) => {
            let plain = draft.commit(manifest, Durability::Ephemeral)?;
            let sealed = sealing.seal(&plain, options, progress)?;
            timeline.step("seal", from, Some(bytes));
            sealed
        }
        _ => {
            let plain = draft.commit(manifest, Durability::Synced)?;
            timeline.step("sync", from, None);
            plain
        }
    };
    // A `transship serve` of an earlier version forgets the record of what is not in its place yet.
    drop(Origins::of_node().makes_here(&made, &place));
    Ok(Report {
        name,
        directory: checkpoint.dir.display().to_string(),
        containers: names,
        left_out,
        done,
        failed,
        shared: shared_names,
        losses,
        bytes,
        sealed_bytes: checkpoint.sealed.map(|sealed| sealed.package.size),
        restore_tried: false,
        timeline,
    })
}
