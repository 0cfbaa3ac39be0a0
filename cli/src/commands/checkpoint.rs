//! `transship checkpoint CONTAINER`

use anyhow::{Context, Result};
use serde::Serialize;
use transship_checkpoint::store::{Durability, digest_files};

use super::{connect, print, store};
use crate::args::{CheckpointArgs, Global};
use crate::interrupt::Interrupt;
use crate::progress::Progress;
use crate::source::{self, Dumped, SourceContainer};
use crate::timeline::{Report, Timeline, human_bytes};

#[derive(Serialize)]
struct Taken {
    name: String,
    directory: String,
    bytes: u64,
    timeline: Report,
}

pub(crate) async fn run(global: &Global, args: CheckpointArgs) -> Result<()> {
    // A freeze must end as it should, whatever the terminal sends meanwhile.
    let interrupt = Interrupt::install()?;
    let progress = Progress::new(global.json);
    let mut timeline = Timeline::begin();
    let node = connect(global).await?;
    let container = source::find(&node, &args.container, &args.dump.options()).await?;
    let name = args.name.unwrap_or_else(|| default_name(container.id()));
    let draft = store().draft(&name)?;

    progress.step("dump");
    timeline.freeze();
    container.freeze(&node).await?;
    let from = timeline.now();
    let dumped = container.dump(&node, draft.dir()).await;
    if args.leave_paused && dumped.is_ok() {
        timeline.thaw();
    } else {
        container.thaw(&node).await.with_context(|| {
            format!(
                "{:?} is still paused; ctr tasks resume {:?} lets it run",
                args.container, args.container
            )
        })?;
        timeline.thaw();
    }
    let Dumped {
        dir,
        criu,
        upperdir,
    } = dumped?;
    timeline.step_of("dump", from, criu, None);
    timeline.step_of("upperdir", from, upperdir.1, Some(upperdir.0));
    interrupt.check()?;

    progress.step("digests");
    let from = timeline.now();
    let SourceContainer { mut container, .. } = container;
    container.files = tokio::task::spawn_blocking(move || digest_files(&dir)).await??;
    let manifest = source::manifest(&node, &name, container).await?;
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
        bytes,
        timeline: timeline.report(),
    };
    print(global, &taken, || {
        format!(
            "{} ({})\n{}",
            taken.directory,
            human_bytes(bytes),
            timeline.draw()
        )
    })
}

/// The container and the moment; a second checkpoint within a second gets an error, not a mix.
fn default_name(id: &str) -> String {
    let now = crate::node::rfc3339(std::time::SystemTime::now());
    format!(
        "{id}-{}",
        now.replace(['-', ':', 'Z'], "").replace('T', "-")
    )
}
