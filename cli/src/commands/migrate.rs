//! `transship migrate CONTAINER --to COMMAND`: the source's side of a migration.
//!
//! ```text
//!              before Commit                 | Commit sent    | Running heard
//!   on failure: source resumes, target       | source stays   | source is removed
//!               removes what it made         | paused         |
//! ```

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use transship_checkpoint::manifest::{Container, IMAGES_DIR, Shared};
use transship_checkpoint::store::{Draft, list_files};
use transship_checkpoint::wire::{Message, Offer, WireError, unexpected};

use super::{connect, print, store};
use crate::args::{Global, MigrateArgs};
use crate::progress::Progress;
use transship_containerd::{Node, unique};
use transship_engine::Progress as _;
use transship_engine::conversation::Conversation;
use transship_engine::freeze_guard::FreezeGuard;
use transship_engine::interrupt::Interrupt;
use transship_engine::problem::{Kind, Problem, one_line};
use transship_engine::source::{self, Dumped, SourceContainer};
use transship_engine::timeline::{Report, Timeline, human_bytes};

#[derive(Serialize)]
struct Migrated {
    container: String,
    pid: u32,
    bytes: u64,
    timeline: Report,
}

/// What the steps share.
struct Migration<'a> {
    node: &'a Node,
    container: &'a SourceContainer,
    conversation: Conversation,
    timeline: Timeline,
    progress: Progress,
    interrupt: Interrupt,
    bytes: u64,
    /// Bytes of memory and files, as far as they can be known before.
    estimate: u64,
    dump_patience: Duration,
}

pub(crate) async fn run(global: &Global, args: MigrateArgs) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let node = connect(global).await?;
    let container = source::find(&node, &args.container, &args.criu.overrides()).await?;
    let mut child = start_target(&args)?;
    let (Some(input), Some(output)) = (child.stdout.take(), child.stdin.take()) else {
        anyhow::bail!("the command has no pipes");
    };
    let mut migration = Migration {
        node: &node,
        container: &container,
        conversation: Conversation::new(input, output, interrupt.clone()),
        timeline: Timeline::begin(),
        progress: Progress::new(global.json),
        interrupt: interrupt.clone(),
        bytes: 0,
        estimate: 0,
        dump_patience: args.dump.patience(),
    };
    let result = migration.carry_out(&args).await;
    if let Err(error) = &result {
        migration.conversation.give_up(one_line(error)).await;
    }
    let Migration {
        conversation,
        timeline,
        progress,
        bytes,
        ..
    } = migration;
    drop((conversation, progress));
    end_target(child, result.is_err() && interrupt.check().is_err()).await;
    let pid = result.map_err(|error| blame_target(error, &args.to))?;

    remove_source(&node, &container, args.keep_source)
        .await
        .with_context(|| {
            format!(
                "{:?} runs on the other node, but could not be removed here",
                args.container
            )
        })?;
    let container = args.target.id.clone().unwrap_or(args.container);
    let migrated = Migrated {
        container,
        pid,
        bytes,
        timeline: timeline.report(),
    };
    print(global, &migrated, || {
        format!(
            "{} runs on the other node, pid {pid} there ({} moved)\n{}",
            migrated.container,
            human_bytes(bytes),
            timeline.draw()
        )
    })
}

/// Runs `COMMAND transship receive`; the command goes through a shell, so that it can have
/// arguments of its own.
fn start_target(args: &MigrateArgs) -> Result<Child> {
    Command::new("sh")
        .args([
            "-c",
            &format!("{} \"$@\"", args.to),
            "sh",
            &args.remote_program,
            "receive",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {:?}", args.to))
}

/// Waits for the command. One that does not end by itself is killed; so is one whose pipes are
/// still held by a step that an interrupt has cut short.
async fn end_target(mut child: Child, cut_short: bool) {
    for _ in 0..if cut_short { 0 } else { 100 } {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    drop(child.kill());
    drop(child.wait());
}

/// Gives failures of the other side their kind.
fn blame_target(error: anyhow::Error, command: &str) -> anyhow::Error {
    if Problem::in_chain(&error).is_some() {
        return error;
    }
    match error
        .chain()
        .find_map(|cause| cause.downcast_ref::<WireError>())
    {
        Some(WireError::Failed { .. }) => error.context(Problem::new(
            Kind::Target,
            "the other node refused or failed",
        )),
        Some(_) => {
            let message = format!("the connection to the other node through {command:?} failed");
            error.context(
                Problem::new(Kind::Target, message)
                    .hint(format!("try it by hand: {command} transship --version")),
            )
        }
        None => error,
    }
}

impl Migration<'_> {
    /// Everything up to the moment when the copy runs. On failure the source runs, too, unless
    /// nobody can know which does.
    async fn carry_out(&mut self, args: &MigrateArgs) -> Result<u32> {
        self.offer(args).await?;
        let draft = store().draft(&format!("migration-{}-{}", self.container.id(), unique()))?;
        self.interrupt.check()?;
        let to_thaw = (!self.container.was_paused).then(|| self.container.id());
        let guard = FreezeGuard::start(self.node, to_thaw.as_slice(), Some(draft.dir()))?;
        self.timeline.freeze();
        let frozen = match self.container.freeze(self.node).await {
            Ok(()) => self.move_frozen(args, &draft).await,
            Err(error) => Err(error),
        };
        if let Err(error) = frozen {
            let error = self.resume_source(error).await;
            guard.stand_down();
            return Err(error);
        }
        // From here on nobody else may decide that the source runs.
        guard.stand_down();
        self.commit().await
    }

    /// Says what will come, and sends the parts of the image that the target lacks.
    async fn offer(&mut self, args: &MigrateArgs) -> Result<()> {
        self.progress.step("image");
        let from = self.timeline.now();
        let blobs = match &self.container.image {
            Some((_, image)) => {
                transship_engine::image_blobs::offer_blobs(self.node, image).await?
            }
            None => Vec::new(),
        };
        self.estimate = self.container.estimate(self.node).await?;
        let uname = nix::sys::utsname::uname().context("cannot ask the kernel for its name")?;
        let offer = Offer {
            container: self.container.container.clone(),
            spec: String::from_utf8(self.container.spec.clone()).context("the spec is not text")?,
            architecture: uname.machine().to_string_lossy().into_owned(),
            target: args.target.target(None),
            blobs: blobs.clone(),
            estimate: self.estimate,
        };
        self.conversation
            .send(Message::Offer(Box::new(offer)))
            .await?;
        let needed = match self.conversation.receive("the target's answer").await? {
            Message::Need { digests } => digests,
            other => return Err(unexpected("the target's answer", &other).into()),
        };
        let mut bytes = 0;
        for blob in blobs.iter().filter(|blob| needed.contains(&blob.digest)) {
            self.send_blob(&blob.digest, blob.size).await?;
            bytes += blob.size;
        }
        self.conversation.send(Message::ImageEnd).await?;
        match self
            .conversation
            .receive("the target to have the image")
            .await?
        {
            Message::Ready => {}
            other => return Err(unexpected("the target to have the image", &other).into()),
        }
        self.timeline.step("image", from, Some(bytes));
        if needed.is_empty() {
            self.timeline.note("the target has it");
        }
        self.bytes += bytes;
        Ok(())
    }

    async fn send_blob(&mut self, digest: &str, size: u64) -> Result<()> {
        self.conversation
            .send(Message::Blob {
                digest: digest.to_owned(),
                size,
            })
            .await?;
        let mut stream = self.node.read_blob(digest).await?;
        while let Some(piece) = stream.next().await? {
            self.conversation
                .step(move |(sender, _)| sender.send_data(&piece))
                .await?;
        }
        Ok(())
    }

    /// Everything that happens while the source stands still and can still go on.
    async fn move_frozen(&mut self, args: &MigrateArgs, draft: &Draft) -> Result<()> {
        let container = self.dump_and_send(draft).await?;
        let manifest = source::manifest(
            self.node,
            draft.name(),
            None,
            vec![container],
            Shared::default(),
        )
        .await?;
        self.conversation
            .send(Message::End {
                manifest: Box::new(manifest),
            })
            .await?;
        match self
            .conversation
            .receive("the target to have the checkpoint")
            .await?
        {
            Message::Received => {}
            other => return Err(unexpected("the target to have the checkpoint", &other).into()),
        }
        self.timeline.end_step();

        if let Some(command) = &args.before_restore {
            self.run_before_restore(command).await?;
        }
        self.progress.step("restore");
        let from = self.timeline.now();
        self.conversation.send(Message::Restore).await?;
        match self.conversation.receive("the copy to exist").await? {
            Message::Restored => {}
            other => return Err(unexpected("the copy to exist", &other).into()),
        }
        self.timeline.step("restore", from, None);
        Ok(())
    }

    /// Dumps the container and sends its files; the pages, which are most of it, while CRIU still
    /// writes them.
    async fn dump_and_send(&mut self, draft: &Draft) -> Result<Container> {
        let from = self.timeline.now();
        let mut container = self.container.container.clone();
        let (name, dir) = (container.name.clone(), draft.dir().join(&container.name));
        self.progress.bytes(
            "dump and transfer",
            self.container.estimate(self.node).await?,
        );
        self.conversation
            .send(Message::Begin {
                name: draft.name().to_owned(),
            })
            .await?;

        let dumped = Arc::new(AtomicBool::new(false));
        let follow = {
            let (name, dir, dumped) = (name.clone(), dir.clone(), Arc::clone(&dumped));
            let mut count = self.progress.counter();
            self.conversation.step(move |(sender, _)| {
                let complete = || dumped.load(Ordering::Acquire);
                match first_pages(&dir, &complete) {
                    Some(path) => sender
                        .send_file(&name, &dir, &path, &complete, &mut count)
                        .map(Some),
                    None => Ok(None),
                }
            })
        };
        let dump = async {
            let result = self
                .container
                .dump(self.node, draft.dir(), self.dump_patience)
                .await;
            dumped.store(true, Ordering::Release);
            result
        };
        let (dump, followed) = tokio::join!(dump, follow);
        let Dumped { criu, upperdir, .. } = dump?;
        container.files.extend(followed?);
        self.timeline.step_of("dump", from, criu, None);
        self.timeline
            .step_of("upperdir", from, upperdir.1, Some(upperdir.0));
        self.interrupt.check()?;

        for path in list_files(&dir)? {
            if container.files.iter().any(|sent| sent.path == path) {
                continue;
            }
            let (name, dir, mut count) = (name.clone(), dir.clone(), self.progress.counter());
            let file = self
                .conversation
                .step(move |(sender, _)| sender.send_file(&name, &dir, &path, &|| true, &mut count))
                .await?;
            container.files.push(file);
        }
        let bytes = container.files.iter().map(|file| file.size).sum();
        self.timeline.step("transfer", from, Some(bytes));
        self.bytes += bytes;
        Ok(container)
    }

    async fn run_before_restore(&mut self, command: &str) -> Result<()> {
        self.progress.step("before-restore command");
        let from = self.timeline.now();
        let mut child = tokio::process::Command::new("sh")
            .args(["-c", command])
            .stdin(Stdio::null())
            // Ours is for the result.
            .stdout(std::io::stderr())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot run {command:?}"))?;
        let status = tokio::select! {
            status = child.wait() => status.with_context(|| format!("cannot run {command:?}"))?,
            interrupted = self.interrupt.wait() => return Err(interrupted.into()),
        };
        if !status.success() {
            anyhow::bail!("the command before the restore failed ({status}): {command}");
        }
        self.timeline.step("command", from, None);
        Ok(())
    }

    /// The one moment in which a lost connection leaves it open which copy runs. Interrupts wait.
    async fn commit(&mut self) -> Result<u32> {
        let from = self.timeline.now();
        let answer = self
            .conversation
            .step_to_the_end(|(sender, receiver)| {
                sender.send(&Message::Commit)?;
                receiver.receive("the copy to run")
            })
            .await;
        match answer {
            Ok(Message::Running { pid }) => {
                self.timeline.thaw();
                self.timeline.step("commit", from, None);
                Ok(pid)
            }
            Ok(other) => Err(unexpected("the copy to run", &other).into()),
            Err(error) => match error.downcast_ref::<WireError>() {
                // The target says that its copy does not run.
                Some(WireError::Failed { .. }) => Err(self.resume_source(error).await),
                _ => Err(self.uncertain(error)),
            },
        }
    }

    async fn resume_source(&self, error: anyhow::Error) -> anyhow::Error {
        let id = self.container.id();
        match self.container.thaw(self.node).await {
            Ok(()) => error.context(format!("{id:?} runs on here as before")),
            Err(paused) => error.context(format!("{id:?} is left paused here: {paused:#}")),
        }
    }

    fn uncertain(&self, error: anyhow::Error) -> anyhow::Error {
        let id = self.container.id();
        let namespace = self.node.namespace();
        error.context(
            Problem::new(
                Kind::Uncertain,
                format!(
                    "the connection broke while the copy of {id:?} was told to run; it is left \
                     paused here"
                ),
            )
            .hint("if it runs on the other node, remove it here:")
            .hint(format!(
                "  ctr -n {namespace} tasks rm -f {id} && ctr -n {namespace} containers rm {id}"
            ))
            .hint("if it does not, let it go on here:")
            .hint(format!("  ctr -n {namespace} tasks resume {id}")),
        )
    }
}

/// Waits for the first file of memory pages and gives its path in the container's directory; none
/// when the dump ends without one.
fn first_pages(dir: &Path, complete: &dyn Fn() -> bool) -> Option<String> {
    loop {
        let whole = complete();
        let names = fs::read_dir(dir.join(IMAGES_DIR))
            .into_iter()
            .flatten()
            .flatten();
        let mut names = names.filter_map(|entry| entry.file_name().into_string().ok());
        let pages = names.find(|name| name.starts_with("pages-"));
        if pages.is_some() || whole {
            return pages.map(|name| format!("{IMAGES_DIR}/{name}"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

async fn remove_source(node: &Node, container: &SourceContainer, keep_record: bool) -> Result<()> {
    let id = container.id();
    node.kill_task(id).await?;
    if !keep_record {
        node.delete_container(id).await?;
        node.remove_snapshot(&container.container.snapshotter, &container.snapshot_key)
            .await?;
    }
    Ok(())
}
