//! `transship restore NAME`

use anyhow::{Context, Result};
use serde::Serialize;
use transship_checkpoint::manifest::SPEC_FILE;

use super::{connect, print, store};
use crate::args::{Global, RestoreArgs};
use crate::progress::Progress;
use transship_checkpoint::store::{Checkpoint, Store, StoreError};
use transship_engine::Progress as _;
use transship_engine::interrupt::Interrupt;
use transship_engine::problem::{Kind, Problem};
use transship_engine::restore_container;
use transship_engine::timeline::{Report, Timeline};

#[derive(Serialize)]
struct Done {
    container: String,
    pid: u32,
    timeline: Report,
}

pub(crate) async fn run(global: &Global, args: RestoreArgs) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let progress = Progress::new(global.json);
    let mut timeline = Timeline::begin();
    let checkpoint = open(&store(), &args.name)?;
    let container = checkpoint
        .manifest
        .container(args.container.as_deref())?
        .clone();
    let node = connect(global).await?;
    let path = checkpoint.container_dir(&container).join(SPEC_FILE);
    let spec = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let target = args.target.target(Some(global.namespace.clone()));
    let mut plan = restore_container::plan(&node, &container, &spec, &target).await?;
    plan.criu = args.criu.overrides().over(plan.criu);

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
    let from = timeline.now();
    let restored = restore_container::restore(&node, plan, &checkpoint, &container).await?;
    timeline.step("restore", from, Some(bytes));
    let from = timeline.now();
    let id = restored.id().to_owned();
    let started = match interrupt.check() {
        Ok(()) => restored.start().await,
        Err(interrupted) => Err(interrupted.into()),
    };
    let pid = match started {
        Ok(pid) => pid,
        Err(error) => {
            restored.undo().await?;
            return Err(error);
        }
    };
    timeline.step("start", from, None);
    restored.settle().await?;
    drop(progress);

    let done = Done {
        container: id,
        pid,
        timeline: timeline.report(),
    };
    print(global, &done, || {
        format!("{} runs, pid {pid}\n{}", done.container, timeline.draw())
    })
}

/// Opens a checkpoint; one that is not there has an exit code of its own.
pub(crate) fn open(store: &Store, name: &str) -> Result<Checkpoint> {
    match store.open(name) {
        Err(error @ StoreError::NotFound { .. }) => {
            Err(Problem::new(Kind::NotFound, error.to_string())
                .hint("transship ls")
                .into())
        }
        other => Ok(other?),
    }
}
