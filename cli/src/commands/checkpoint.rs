//! `transship checkpoint CONTAINER`, `transship checkpoint --pod POD`

use std::fmt::Write as _;
use std::sync::Arc;

use transship_engine::Result;
use transship_engine::checkpoint::{self, Afterwards, Moves, Report, Request, Selection};
use transship_engine::interrupt::Interrupt;
use transship_engine::timeline::human_bytes;
use transship_package::DEFAULT_LEVEL;
use transship_package::encryption::Recipients;
use transship_package::export::ExportOptions;

use super::{connect, print, store};
use crate::args::{CheckpointArgs, Global, VolumesArg};
use crate::progress::Progress;
use crate::timeline_file::TimelineFile;

pub(crate) async fn run(global: &Global, args: CheckpointArgs) -> Result<()> {
    // A freeze must end as it should, whatever the terminal sends meanwhile.
    let interrupt = Interrupt::install()?;
    let picture = TimelineFile::open(args.timeline.timeline)?;
    let progress = Progress::new(global.json);
    let of = match args.pod {
        Some(pod) => Selection::Pod(pod),
        None => Selection::Container(args.container.unwrap_or_default()),
    };
    let request = Request {
        of,
        criu: args.criu.overrides(),
        empty_dirs: args.volumes.contains(&VolumesArg::EmptyDir),
        dump_patience: args.dump.patience(),
        max_freeze: args.freeze.max_freeze,
        moves: match (args.moved, args.source_pod_will_be_deleted) {
            (false, _) => Moves::No,
            (true, false) => Moves::Marked,
            (true, true) => Moves::WillBeDeleted,
        },
        verify_restore: args.verify_restore,
        leave_logs: args.dump.leave_logs(),
        seal: sealing(&args.encrypt_to)?,
    };
    let afterwards = if args.leave_paused || args.moved {
        Afterwards::Paused
    } else {
        Afterwards::Run
    };
    let target = checkpoint::find(&connect(global).await?, &request).await?;
    let name = args.name.unwrap_or_else(|| target.default_name());
    let taken =
        checkpoint::checkpoint(&target, &name, &store(), afterwards, &interrupt, &progress).await?;
    drop(progress);
    print(global, &taken, || text(&taken))?;
    picture.write(&taken.timeline)
}

/// How it is encrypted, for these readers.
fn sealing(readers: &[String]) -> Result<Option<Arc<ExportOptions>>> {
    let mut recipients = Recipients::default();
    for text in readers {
        recipients.add(text)?;
    }
    Ok((!recipients.is_empty()).then(|| {
        Arc::new(ExportOptions {
            level: Some(DEFAULT_LEVEL),
            recipients,
            signer: None,
        })
    }))
}

fn text(taken: &Report) -> String {
    let sealed = { taken.sealed_bytes }.map(|bytes| format!(", sealed in {}", human_bytes(bytes)));
    let sealed = sealed.unwrap_or_default();
    let mut text = format!(
        "{} ({}{sealed})\n",
        taken.directory,
        human_bytes(taken.bytes)
    );
    // Writing to a string cannot fail.
    if !taken.left_out.is_empty() {
        let stopped = taken.left_out.join(", ");
        let _ = writeln!(text, "not in it, because they do not run: {stopped}");
    }
    if !taken.failed.is_empty() {
        let failed = taken.failed.join(", ");
        let _ = writeln!(text, "had failed, and end so again: {failed}");
    }
    if !taken.done.is_empty() {
        let done = taken.done.join(", ");
        let _ = writeln!(text, "ended with 0, and do not run again: {done}");
    }
    if !taken.shared.is_empty() {
        let _ = writeln!(text, "with {}", taken.shared.join(", "));
    }
    if taken.restore_tried {
        text += "a restore of it was tried, and succeeded\n";
    }
    for (container, losses) in &taken.losses {
        let _ = writeln!(
            text,
            "note: hard links to the image, inode flags or attributes of {} files of {container} \
             are not in it: {}",
            losses.lower_links + losses.inode_flags + losses.xattrs,
            losses.examples.join(", ")
        );
    }
    text + &taken.timeline.draw()
}
