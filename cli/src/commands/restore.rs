//! `transship restore NAME`

use std::path::Path;

use serde::Serialize;
use transship_engine::Result;
use transship_engine::interrupt::Interrupt;
use transship_engine::restore::{self, Request, allowed_by_node};
use transship_engine::timeline::Report;
use transship_sandbox::admission::node_config::NODE_CONFIG;

use super::{connect, opened, print, store};
use crate::args::{Global, RestoreArgs};
use crate::progress::Progress;

#[derive(Serialize)]
struct Done {
    container: String,
    pid: u32,
    timeline: Report,
}

pub(crate) async fn run(global: &Global, args: RestoreArgs) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let mut target = args.target.target(args.criu.overrides());
    target
        .allowed
        .extend(allowed_by_node(Path::new(NODE_CONFIG))?.0);
    let request = Request {
        name: &args.name,
        container: args.container.as_deref(),
        target,
    };
    // A name that is wrong is told before containerd is asked.
    let _opened = opened(&args.name, &args.keys, global.json)?;
    let node = connect(global).await?;
    let progress = Progress::new(global.json);
    let done = restore::restore(&node, &store(), &request, &interrupt, &progress).await?;
    drop(progress);
    let shown = Done {
        container: done.container,
        pid: done.pid,
        timeline: done.timeline.report(),
    };
    print(global, &shown, || {
        format!(
            "{} runs, pid {}\n{}",
            shown.container,
            shown.pid,
            done.timeline.draw()
        )
    })
}
