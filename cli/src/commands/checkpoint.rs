//! `transship checkpoint CONTAINER`, `transship checkpoint --pod POD`

use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;
use transship_checkpoint::manifest::{Pod, Shared};
use transship_checkpoint::shared_dirs::SHARED_DIR;
use transship_checkpoint::store::{Durability, digest_files};

use super::{connect, print, store};
use crate::args::{CheckpointArgs, Global, VolumesArg};
use crate::interrupt::Interrupt;
use crate::node::Node;
use crate::pod::{self, SourcePod};
use crate::pod_dirs::{self, SharedDirs};
use crate::progress::Progress;
use crate::source::{self, Dumped, SourceContainer};
use crate::timeline::{Report, Timeline, human_bytes};

#[derive(Serialize)]
struct Taken {
    name: String,
    directory: String,
    containers: Vec<String>,
    /// Containers of the pod that did not run.
    left_out: Vec<String>,
    /// What the containers share, and which of them.
    shared: Vec<String>,
    bytes: u64,
    timeline: Report,
}

pub(crate) async fn run(global: &Global, args: CheckpointArgs) -> Result<()> {
    // A freeze must end as it should, whatever the terminal sends meanwhile.
    let interrupt = Interrupt::install()?;
    let progress = Progress::new(global.json);
    let mut timeline = Timeline::begin();
    let Found {
        node,
        what,
        pod,
        sources,
        left_out,
        dirs,
    } = find(global, &args).await?;
    let name = args.name.unwrap_or_else(|| default_name(&what));
    let draft = store().draft(&name)?;

    progress.step("dump");
    timeline.freeze();
    let dumped = stop_and_dump(&node, &sources, &dirs, draft.dir(), args.leave_paused).await;
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
    for SourceContainer { mut container, .. } in sources {
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
    let manifest = source::manifest(&node, &name, pod, containers, shared).await?;
    let bytes = manifest.size();
    timeline.step("digests", from, Some(bytes));
    let from = timeline.now();
    let checkpoint = draft.commit(manifest, Durability::Synced)?;
    timeline.step("sync", from, None);
    drop(progress);

    let directory = checkpoint.dir.display().to_string();
    let taken = Taken {
        name,
        directory,
        containers: names,
        left_out,
        shared: shared_names,
        bytes,
        timeline: timeline.report(),
    };
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
            human_bytes(bytes),
            timeline.draw()
        )
    })
}

/// What is to be dumped.
struct Found {
    node: Node,
    /// Its name, for that of the checkpoint.
    what: String,
    pod: Option<Pod>,
    sources: Vec<SourceContainer>,
    left_out: Vec<String>,
    dirs: SharedDirs,
}

async fn find(global: &Global, args: &CheckpointArgs) -> Result<Found> {
    let node = connect(global).await?;
    let criu = args.criu.overrides();
    match (&args.pod, &args.container) {
        (Some(selector), _) => {
            // The CRI's containers are in no other namespace.
            let node = node.in_namespace("k8s.io")?;
            let SourcePod {
                pod,
                sandbox,
                containers,
                stopped,
            } = pod::find(&node, selector, &criu).await?;
            let empty_dirs = args.volumes.contains(&VolumesArg::EmptyDir);
            Ok(Found {
                dirs: pod_dirs::find(&containers, &sandbox, empty_dirs)?,
                node,
                what: format!("{}-{}", pod.namespace, pod.name),
                pod: Some(pod),
                sources: containers,
                left_out: stopped,
            })
        }
        (None, id) => {
            let source = source::find(&node, id.as_deref().unwrap_or_default(), &criu).await?;
            Ok(Found {
                node,
                what: source.id().to_owned(),
                pod: source.pod.clone(),
                sources: vec![source],
                left_out: Vec::new(),
                dirs: SharedDirs::default(),
            })
        }
    }
}

type AllDumped = (Vec<(std::time::Instant, Dumped)>, Shared);

/// Freezes all containers, dumps one after the other, and lets all go again, whatever happened.
async fn stop_and_dump(
    node: &Node,
    sources: &[SourceContainer],
    dirs: &SharedDirs,
    draft: &Path,
    leave_paused: bool,
) -> Result<AllDumped> {
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
        result = dump_all(node, sources, dirs, draft).await;
    }
    if leave_paused && result.is_ok() {
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
    result
}

async fn dump_all(
    node: &Node,
    sources: &[SourceContainer],
    dirs: &SharedDirs,
    draft: &Path,
) -> Result<AllDumped> {
    // Beside the dumps: those only read memory.
    let export = tokio::task::spawn_blocking({
        let (dirs, draft) = (dirs.clone(), draft.to_path_buf());
        move || dirs.export(&draft)
    });
    let dumped = dump_one_by_one(node, sources, draft).await;
    // Whatever the dumps did: nobody may thaw while it reads.
    let shared = export.await.context("the export of volumes panicked")?;
    Ok((dumped?, shared?))
}

async fn dump_one_by_one(
    node: &Node,
    sources: &[SourceContainer],
    draft: &Path,
) -> Result<Vec<(std::time::Instant, Dumped)>> {
    let mut all = Vec::new();
    for source in sources {
        let from = std::time::Instant::now();
        all.push((from, source.dump(node, draft).await?));
    }
    Ok(all)
}

/// What it is of and the moment; a second checkpoint within a second gets an error, not a mix.
fn default_name(what: &str) -> String {
    let now = crate::node::rfc3339(std::time::SystemTime::now());
    format!(
        "{what}-{}",
        now.replace(['-', ':', 'Z'], "").replace('T', "-")
    )
}
