//! `transship checkpoint CONTAINER`, `transship checkpoint --pod POD`

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use transship_checkpoint::criu_options::CriuOverrides;
use transship_checkpoint::manifest::{Pod, Shared};
use transship_checkpoint::shared_dirs::SHARED_DIR;
use transship_checkpoint::store::{Durability, Store, digest_files};

use super::{connect, print, store};
use crate::args::{CheckpointArgs, Global, VolumesArg};
use crate::progress::Progress;
use transship_containerd::Containerd;
use transship_engine::Progress as _;
use transship_engine::freeze_guard::FreezeGuard;
use transship_engine::interrupt::Interrupt;
use transship_engine::pod::{self, SourcePod};
use transship_engine::pod_dirs::{self, SharedDirs};
use transship_engine::source::{self, Dumped, SourceContainer};
use transship_engine::stuck_dump::PROGRESS_PATIENCE;
use transship_engine::timeline::{Report, Timeline, human_bytes};

/// What a checkpoint is to be taken of, and how.
#[derive(Debug, Default)]
pub(crate) struct Order<'a> {
    /// A container, if it is not a pod.
    pub(crate) container: &'a str,
    /// A pod, by its id or as namespace/name.
    pub(crate) pod: Option<&'a str>,
    /// What CRIU is told.
    pub(crate) criu: CriuOverrides,
    /// Whether the content of emptyDir volumes comes along.
    pub(crate) empty_dirs: bool,
    /// Whether it stands still afterwards.
    pub(crate) leave_paused: bool,
    /// How long the dump of a container may write nothing.
    pub(crate) dump_patience: Option<Duration>,
}

/// What to stop after a checkpoint that left it paused.
#[derive(Debug)]
pub(crate) struct StopPlan {
    pub(crate) sandbox: String,
    pub(crate) containers: Vec<String>,
}

/// A checkpoint that has been taken.
#[derive(Debug, Serialize)]
pub(crate) struct Taken {
    name: String,
    directory: String,
    containers: Vec<String>,
    /// Containers of the pod that did not run.
    left_out: Vec<String>,
    /// What the containers share, and which of them.
    shared: Vec<String>,
    bytes: u64,
    timeline: Report,
    #[serde(skip)]
    drawn: String,
}

pub(crate) async fn run(global: &Global, args: CheckpointArgs) -> Result<()> {
    // A freeze must end as it should, whatever the terminal sends meanwhile.
    let interrupt = Interrupt::install()?;
    let progress = Progress::new(global.json);
    let order = Order {
        container: args.container.as_deref().unwrap_or_default(),
        pod: args.pod.as_deref(),
        criu: args.criu.overrides(),
        empty_dirs: args.volumes.contains(&VolumesArg::EmptyDir),
        leave_paused: args.leave_paused,
        dump_patience: Some(args.dump.patience()),
    };
    let found = find(&connect(global).await?, &order).await?;
    let name = args.name.unwrap_or_else(|| default_name(&found.what));
    let paused = order.leave_paused;
    let taken = take(found, &name, &store(), paused, &interrupt, &progress).await?;
    drop(progress);
    print(global, &taken, || {
        let left_out = match taken.left_out.as_slice() {
            [] => String::new(),
            stopped => format!(
                "not in it, because they do not run: {}\n",
                stopped.join(", ")
            ),
        };
        let shared = match taken.shared.as_slice() {
            [] => String::new(),
            shared => format!("with {}\n", shared.join(", ")),
        };
        format!(
            "{} ({})\n{left_out}{shared}{}",
            taken.directory,
            human_bytes(taken.bytes),
            taken.drawn
        )
    })
}

/// Takes the checkpoint: what the command and the node's API share. One that fails lets everything
/// run again, and leaves nothing.
pub(crate) async fn take(
    found: Found,
    name: &str,
    store: &Store,
    leave_paused: bool,
    interrupt: &Interrupt,
    progress: &Progress,
) -> Result<Taken> {
    let taken = dump_and_keep(&found, name, store, leave_paused, interrupt, progress).await;
    if taken.is_err() && leave_paused {
        // It may stand still already; whoever runs is not disturbed.
        for source in &found.sources {
            drop(source.thaw(&found.node).await);
        }
    }
    taken
}

async fn dump_and_keep(
    found: &Found,
    name: &str,
    store: &Store,
    leave_paused: bool,
    interrupt: &Interrupt,
    progress: &Progress,
) -> Result<Taken> {
    let Found { node, sources, .. } = found;
    let mut timeline = Timeline::begin();
    let draft = store.draft(name)?;

    progress.step("dump");
    timeline.freeze();
    let dumped = stop_and_dump(found, draft.dir(), leave_paused).await;
    timeline.thaw();
    let (dumped, mut shared) = dumped?;
    for (source, (from, Dumped { criu, upperdir, .. })) in sources.iter().zip(&dumped) {
        let from = timeline.since(*from);
        timeline.step_of("dump", from, *criu, None);
        timeline.note(&source.container.name);
        timeline.step_of("upperdir", from, upperdir.1, Some(upperdir.0));
    }
    interrupt.check()?;

    progress.step("digests");
    let from = timeline.now();
    let mut containers = Vec::new();
    for source in sources {
        let mut container = source.container.clone();
        let dir = draft.dir().join(&container.name);
        container.files = tokio::task::spawn_blocking(move || digest_files(&dir)).await??;
        containers.push(container);
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
    let names = containers
        .iter()
        .map(|container| container.name.clone())
        .collect();
    let manifest = source::manifest(node, name, found.pod.clone(), containers, shared).await?;
    let bytes = manifest.size();
    timeline.step("digests", from, Some(bytes));
    let from = timeline.now();
    let checkpoint = draft.commit(manifest, Durability::Synced)?;
    timeline.step("sync", from, None);
    let directory = checkpoint.dir.display().to_string();
    Ok(Taken {
        name: name.to_owned(),
        directory,
        containers: names,
        left_out: found.left_out.clone(),
        shared: shared_names,
        bytes,
        drawn: timeline.draw(),
        timeline: timeline.report(),
    })
}

/// What is to be dumped.
#[derive(Debug)]
pub(crate) struct Found {
    node: Containerd,
    /// Its name, for that of the checkpoint.
    what: String,
    pod: Option<Pod>,
    sources: Vec<SourceContainer>,
    left_out: Vec<String>,
    dirs: SharedDirs,
    /// Id of the pod's sandbox.
    sandbox: String,
    dump_patience: Duration,
}

impl Found {
    /// What to stop afterwards.
    pub(crate) fn stop_plan(&self) -> StopPlan {
        StopPlan {
            sandbox: self.sandbox.clone(),
            containers: self.sources.iter().map(|it| it.id().to_owned()).collect(),
        }
    }
}

/// Finds it, and checks that it can be dumped.
pub(crate) async fn find(node: &Containerd, order: &Order<'_>) -> Result<Found> {
    let dump_patience = order.dump_patience.unwrap_or(PROGRESS_PATIENCE);
    let Some(selector) = order.pod else {
        let source = source::find(node, order.container, &order.criu).await?;
        return Ok(Found {
            node: node.clone(),
            what: source.id().to_owned(),
            pod: source.pod.clone(),
            sources: vec![source],
            left_out: Vec::new(),
            dirs: SharedDirs::default(),
            sandbox: String::new(),
            dump_patience,
        });
    };
    // The CRI's containers are in no other namespace.
    let node = node.in_namespace(transship_checkpoint::cri_names::CRI_NAMESPACE)?;
    let SourcePod {
        pod,
        sandbox,
        containers,
        stopped,
    } = pod::find(&node, selector, &order.criu).await?;
    Ok(Found {
        dirs: pod_dirs::find(&containers, &sandbox, order.empty_dirs)?,
        node,
        what: format!("{}-{}", pod.namespace, pod.name),
        pod: Some(pod),
        sources: containers,
        left_out: stopped,
        sandbox,
        dump_patience,
    })
}

type AllDumped = (Vec<(std::time::Instant, Dumped)>, Shared);

/// Freezes all containers, dumps one after the other, and lets all go again, whatever happened.
async fn stop_and_dump(found: &Found, draft: &Path, leave_paused: bool) -> Result<AllDumped> {
    let Found { node, sources, .. } = found;
    let to_thaw = sources.iter().filter(|source| !source.was_paused);
    let to_thaw: Vec<&str> = to_thaw.map(SourceContainer::id).collect();
    let guard = FreezeGuard::start(node, &to_thaw, Some(draft))?;
    let mut frozen = Vec::new();
    let mut result = Ok(AllDumped::default());
    for source in sources {
        if let Err(error) = source.freeze(node).await {
            result = Err(error);
            break;
        }
        frozen.push(source);
    }
    if frozen.len() == sources.len() {
        result = dump_all(found, draft).await;
    }
    if leave_paused && result.is_ok() {
        guard.stand_down();
        return result;
    }
    for source in frozen {
        if let Err(error) = source.thaw(node).await {
            let (id, namespace) = (source.id(), node.namespace());
            let still = format!(
                "{id:?} is still paused; `ctr -n {namespace} tasks resume {id}` lets it run"
            );
            result = Err(result.err().unwrap_or(error).context(still));
        }
    }
    guard.stand_down();
    result
}

async fn dump_all(found: &Found, draft: &Path) -> Result<AllDumped> {
    // Beside the dumps: those only read memory.
    let export = tokio::task::spawn_blocking({
        let (dirs, draft) = (found.dirs.clone(), draft.to_path_buf());
        move || dirs.export(&draft)
    });
    let dumped = dump_one_by_one(found, draft).await;
    // Whatever the dumps did: nobody may thaw while it reads.
    let shared = export.await.context("the export of volumes panicked")?;
    Ok((dumped?, shared?))
}

async fn dump_one_by_one(found: &Found, draft: &Path) -> Result<Vec<(std::time::Instant, Dumped)>> {
    let mut all = Vec::new();
    for source in &found.sources {
        let from = std::time::Instant::now();
        let dumped = source.dump(&found.node, draft, found.dump_patience).await;
        let name = &source.container.name;
        let dumped = match dumped {
            // The pod's name of it says more than its id.
            Err(error) if name != source.id() => {
                return Err(
                    error.context(format!("the pod's container {name:?} stands in the way"))
                );
            }
            dumped => dumped?,
        };
        all.push((from, dumped));
    }
    Ok(all)
}

/// What it is of and the moment; a second checkpoint within a second gets an error, not a mix.
fn default_name(what: &str) -> String {
    let now = transship_containerd::rfc3339(std::time::SystemTime::now());
    format!(
        "{what}-{}",
        now.replace(['-', ':', 'Z'], "").replace('T', "-")
    )
}
