//! `transship migrate CONTAINER --to COMMAND`, `transship migrate --pod POD --to COMMAND`

use serde::Serialize;
use transship_engine::interrupt::Interrupt;
use transship_engine::migrate::{self, PodRequest, PrecopyBounds, Request};
use transship_engine::timeline::{Report, human_bytes};
use transship_engine::{Error, Result};

use super::{connect, print, store};
use crate::args::{Global, MigrateArgs, VolumesArg};
use crate::probe::{Answers, Probe};
use crate::progress::Progress;
use crate::timeline_file::TimelineFile;

/// What went compressed, and as what.
#[derive(Serialize)]
struct Compressed {
    bytes: u64,
    sent: u64,
}

#[derive(Serialize)]
struct Migrated {
    container: String,
    pid: Option<u32>,
    bytes: u64,
    compressed: Compressed,
    direct: usize,
    timeline: Report,
    #[serde(skip_serializing_if = "Option::is_none")]
    probe: Option<Answers>,
}

pub(crate) async fn run(global: &Global, mut args: MigrateArgs) -> Result<()> {
    if args.lazy && !args.accept_loss {
        let message = "the copy is lost if its source or the link goes before it has all of its memory: what \
                       was frozen here stays, what the copy has done since does not";
        return Err(Error::refused(message).hint("--accept-loss says that this may be"));
    }
    let picture = TimelineFile::open(args.timeline.timeline.take())?;
    let interrupt = Interrupt::install()?;
    let node = tokio::select! {
        node = connect(global) => node?,
        interrupted = interrupt.wait() => return Err(interrupted.into()),
    };
    let probe = match args.probe.take() {
        Some(command) => Some(Probe::begin(&command).await?),
        None => None,
    };
    let request = request(args);
    let progress = Progress::new(global.json);
    let migrated = migrate::migrate(&node, &store(), &request, &interrupt, &progress).await;
    drop(progress);
    let runs_there = { migrated.as_ref() }.is_ok_and(|done| done.unfinished.is_none());
    let probe = match probe {
        Some(probe) if runs_there => probe.finish(interrupt.wait()).await,
        Some(probe) => {
            probe.stop().await;
            None
        }
        None => None,
    };
    let done = migrated?;
    if let Some(unfinished) = done.unfinished {
        if let Err(error) = picture.write(&done.timeline) {
            tracing::warn!("{}", error.one_line());
        }
        return Err(unfinished);
    }
    let shown = Migrated {
        container: done.container,
        pid: done.pid,
        bytes: done.bytes,
        compressed: Compressed {
            bytes: done.compressed.bytes,
            sent: done.compressed.sent,
        },
        direct: done.direct,
        timeline: done.timeline.report(),
        probe,
    };
    print(global, &shown, || {
        let pid = shown.pid.map(|pid| format!(", pid {pid} there"));
        let Compressed { bytes, sent } = shown.compressed;
        let [bytes, sent] = [bytes, sent].map(|it| (it > 0).then(|| human_bytes(it)));
        let compressed = { bytes.zip(sent) }
            .map(|(bytes, sent)| format!(", of which {sent} were {bytes} and went compressed"));
        format!(
            "{} runs on the other node{} ({} moved{})\n{}{}",
            shown.container,
            pid.unwrap_or_default(),
            human_bytes(shown.bytes),
            compressed.unwrap_or_default(),
            done.timeline.draw(),
            shown
                .probe
                .iter()
                .map(|it| format!("\n{}", it.text()))
                .collect::<String>()
        )
    })?;
    picture.write(&done.timeline)
}

fn request(args: MigrateArgs) -> Request {
    let pod = args.pod.is_some().then_some(PodRequest {
        empty_dirs: args.volumes.contains(&VolumesArg::EmptyDir),
        wait: args.wait_for_pod,
    });
    // One of them is there.
    let what = args.container.or(args.pod).unwrap_or_default();
    Request {
        pod,
        remote_program: args.remote_program,
        before_restore: args.before_restore,
        keep_source: args.keep_source,
        leave_logs: args.dump.leave_logs(),
        dump_patience: args.dump.patience(),
        max_freeze: args.freeze.max_freeze,
        is_lazy: args.lazy,
        link_patience: args.link.patience(),
        precopy: PrecopyBounds {
            rounds: args.max_precopy_rounds,
            time: (args.max_precopy_time).unwrap_or(PrecopyBounds::default().time),
        },
        may_lack: args.may_lack.unwrap_or_default(),
        data_address: args.data_address,
        target: args.target.target(args.criu.overrides()),
        ..Request::new(what, args.to)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use transship_engine::migrate::receive_arguments;

    use super::*;
    use crate::args::{Cli, Command};

    /// What `migrate` asks of the other node is what `receive` there understands.
    #[test]
    fn the_other_node_reads_what_this_one_writes() {
        let line = "transship migrate web --to x --id web2 --sandbox s --snapshotter overlayfs \
                    --runtime-binary /r --log-uri file:///l --lsm-profile apparmor:p --network keep \
                    --lsm-mount-context c --manage-cgroups-mode ignore --ext-unix-sk=true \
                    --allow hooks --allow devices --link-timeout 5";
        let Command::Migrate(args) = Cli::parse_from(line.split_whitespace()).command else {
            panic!("no migrate");
        };
        let request = request(*args);
        let words = receive_arguments("moved", &request);
        let cli = Cli::parse_from(std::iter::once("transship".to_owned()).chain(words));
        assert_eq!(cli.global.namespace, "moved");
        let Command::Receive(args) = cli.command else {
            panic!("no receive");
        };
        assert_eq!(args.target.target(args.criu.overrides()), request.target);
        assert_eq!(args.link.patience(), request.link_patience);
    }
}
