//! `transship recover [CONTAINER]`

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;
use transship_engine::interrupt::Interrupt;
use transship_engine::memory_dir::remove_unused_at_last;
use transship_engine::migrate::{Decided, Decision, Pending, Recovered, recover_all};
use transship_engine::moved_pods;
use transship_engine::{Error, Kind, Result};

use super::{connect, print, store};
use crate::args::{Global, RecoverArgs};

#[derive(Serialize)]
struct Line {
    namespace: String,
    container: String,
    to: String,
    since: String,
    outcome: &'static str,
}

pub(crate) async fn run(global: &Global, args: &RecoverArgs) -> Result<()> {
    let interrupt = Interrupt::install()?;
    remove_unused_at_last().await;
    let node = connect(global).await?;
    if let Some(pod) = &args.pod {
        moved_pods::decide(&node, pod, args.source_runs).await?;
        return print(global, pod, String::new);
    }
    let decision = match (args.source_runs, args.target_runs) {
        (true, _) => Decision::SourceRuns,
        (_, true) => Decision::TargetRuns,
        _ => Decision::Ask(args.once.then_some(Duration::ZERO)),
    };
    let wanted = |it: &Pending| match &args.container {
        Some(name) => it.is_called(&global.namespace, name),
        None => true,
    };
    let Recovered {
        decided: found,
        failed,
    } = recover_all(&node, &store(), wanted, decision, &interrupt).await?;
    for error in &failed {
        tracing::warn!("{}", error.one_line());
    }
    let failed = match failed.len() {
        0 => Ok(()),
        count => Err(Error::failed(format!(
            "{count} that were cut off cannot be brought to their end; the log says why"
        ))),
    };
    if let (Some(id), true) = (&args.container, found.is_empty()) {
        let message = format!("there is no migration of {id:?} that is not decided");
        return Err(Error::not_found(message).hint("transship recover --once"));
    }
    let (mut lines, mut undecided) = (Vec::new(), None);
    for (pending, decided) in found {
        let outcome = match &decided {
            Ok(Decided::SourceRuns) => "runs on here",
            Ok(Decided::TargetRuns) => "runs on the other node; removed here",
            Ok(Decided::TargetRunsFilesStay) => "has ended here; its files stay",
            Ok(Decided::Replaced) => {
                "has been removed here; the container that has its id now is left as it is"
            }
            Ok(Decided::Ended) => "has ended here, and never ran on the other node",
            Err(_) => "not decided; paused here",
        };
        undecided = undecided.or(decided.err());
        lines.push(Line {
            container: pending.called(),
            namespace: pending.namespace,
            to: pending.to,
            since: pending.since,
            outcome,
        });
    }
    print(global, &lines, || {
        let mut text = String::new();
        for it in &lines {
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{}/{} to {:?} since {}: {}",
                it.namespace, it.container, it.to, it.since, it.outcome
            );
        }
        text
    })?;
    match undecided {
        Some(error) if error.kind() == Kind::Uncertain => Err(error),
        Some(error) => Err(Error::new(Kind::Uncertain, "not all could be decided").because(error)),
        None => failed,
    }
}
