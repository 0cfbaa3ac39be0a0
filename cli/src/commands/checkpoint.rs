//! `transship checkpoint CONTAINER`, `transship checkpoint --pod POD`

use std::path::Path;

use anyhow::Result;
use serde::Serialize;
use transship_checkpoint::manifest::Pod;
use transship_checkpoint::store::{Durability, digest_files};

use super::{connect, print, store};
use crate::args::{CheckpointArgs, Global};
use crate::interrupt::Interrupt;
use crate::node::Node;
use crate::pod::{self, SourcePod};
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
    bytes: u64,
    timeline: Report,
}

pub(crate) async fn run(global: &Global, args: CheckpointArgs) -> Result<()> {
    // A freeze must end as it should, whatever the terminal sends meanwhile.
    let interrupt = Interrupt::install()?;
    let progress = Progress::new(global.json);
    let mut timeline = Timeline::begin();
    let (node, what, pod, sources, left_out) = find(global, &args).await?;
    let name = args.name.unwrap_or_else(|| default_name(&what));
    let draft = store().draft(&name)?;

    progress.step("dump");
    timeline.freeze();
    let dumped = stop_and_dump(&node, &sources, draft.dir(), args.leave_paused).await;
    timeline.thaw();
    for (source, (from, Dumped { criu, upperdir, .. })) in sources.iter().zip(&dumped?) {
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
    let names = containers
        .iter()
        .map(|container| container.name.clone())
        .collect();
    let manifest = source::manifest(&node, &name, pod, containers).await?;
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
        format!(
            "{} ({})\n{left_out}{}",
            taken.directory,
            human_bytes(bytes),
            timeline.draw()
        )
    })
}

type Found = (Node, String, Option<Pod>, Vec<SourceContainer>, Vec<String>);

async fn find(global: &Global, args: &CheckpointArgs) -> Result<Found> {
    let node = connect(global).await?;
    let criu = args.criu.overrides();
    match (&args.pod, &args.container) {
        (Some(selector), _) => {
            // The CRI's containers are in no other namespace.
            let node = node.in_namespace("k8s.io")?;
            let SourcePod {
                pod,
                containers,
                stopped,
            } = pod::find(&node, selector, &criu).await?;
            let what = format!("{}-{}", pod.namespace, pod.name);
            Ok((node, what, Some(pod), containers, stopped))
        }
        (None, id) => {
            let source = source::find(&node, id.as_deref().unwrap_or_default(), &criu).await?;
            Ok((
                node,
                source.id().to_owned(),
                source.pod.clone(),
                vec![source],
                Vec::new(),
            ))
        }
    }
}

/// Freezes all containers, dumps one after the other, and lets all go again, whatever happened.
async fn stop_and_dump(
    node: &Node,
    sources: &[SourceContainer],
    draft: &Path,
    leave_paused: bool,
) -> Result<Vec<(std::time::Instant, Dumped)>> {
    let mut frozen = Vec::new();
    let mut result = Ok(Vec::new());
    for source in sources {
        if let Err(error) = source.freeze(node).await {
            result = Err(error);
            break;
        }
        frozen.push(source);
    }
    if frozen.len() == sources.len() {
        result = dump_all(node, sources, draft).await;
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
