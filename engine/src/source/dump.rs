//! The dump of a container.
//!
//! ```text
//!  begin_dump   while it runs: directories, the spec, the runtime and CRIU, which waits (dump_hold)
//!  dump         when it is frozen:  CRIU       --> <draft>/<container>/checkpoint
//!                                   the export --> <draft>/<container>/rootfs-diff.tar
//!                                   attributes of the tasks, its log, what CRIU gets wrong
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Deserialize;
use tokio::time::timeout;
use transship_checkpoint::container_log::keep as keep_log;
use transship_checkpoint::cri_names::annotations::SANDBOX_ID;
use transship_checkpoint::criu_log;
use transship_checkpoint::manifest::{
    DUMP_LOG_FILE, DUMP_STATS_FILE, IMAGES_DIR, Losses, ROOTFS_DIFF_FILE, SPEC_FILE,
};
use transship_checkpoint::shared_dirs::{LINKS_FILE, SharedDir};
use transship_checkpoint::spec::Spec;
use transship_checkpoint::task_attributes::{TASKS_FILE, TaskAttributes};
use transship_containerd::Containerd;
use transship_layer::{
    ExportOptions, ExportStats, KnownContents, OverlayStack, export_upperdir_to_file,
};
use transship_sandbox::shared_dirs::shared_mounts;

use super::SourceContainer;
use crate::begun_dump::BegunDump;
use crate::conditions::{self, Found, Subject};
use crate::dump_hold::DumpHold;
use crate::dumped_fifos;
use crate::error::{Context, Error, Result};
use crate::exported_layer::Layer;
use crate::lost_watches;
use crate::oci_runtime::ExportInside;
use crate::renamed_sockets::{self, Named};
use crate::shim_options;
use crate::stuck_dump;
use crate::task_attributes;
use crate::timer_threads;
use crate::wall_clock_timers::Expiries;

/// How long a runtime may take to notice that its CRIU is gone.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// Where CRIU writes its log, and its figures, below the container's directory.
const WORK_DIR: &str = "work";
/// What an export in the middle of a dump says, in the work directory.
const FIGURES_FILE: &str = "export.json";

impl SourceContainer {
    /// Begins to dump the container, which still runs, into its directory below `draft`; CRIU waits for the freeze when this
    /// returns, and has looked at no task.
    ///
    /// # Errors
    /// The runtime or CRIU has failed already, or does not come to the dump within `patience`.
    pub(crate) async fn begin_dump(
        &self,
        node: &Containerd,
        draft: &Path,
        hold: &DumpHold,
        patience: Duration,
    ) -> Result<BegunDump> {
        let dir = self.dump_dir(draft);
        self.make_dump_dir(&dir)?;
        let mut begun = self.begin_criu(node, &dir, Some(hold)).await?;
        let log = dir.join(WORK_DIR).join(DUMP_LOG_FILE);
        let ready = match timeout(patience, begun.ready(hold)).await {
            Ok(ready) => ready,
            Err(_) => Err(Error::failed(format!(
                "the dump of {} did not begin within {} s",
                self.called,
                patience.as_secs()
            ))),
        };
        ready.map_err(|error| self.with_reason_of_criu(&log, error))?;
        Ok(begun)
    }

    /// Says of a container of a pod by its name there, which says more than its id, that it is not dumped.
    pub(crate) fn cannot_be_dumped(&self, error: Error) -> Error {
        match &*self.container.name {
            name if name == self.id() => error,
            name => Error::failed(format!("the pod's container {name:?} cannot be dumped"))
                .because(error),
        }
    }

    fn dump_dir(&self, draft: &Path) -> PathBuf {
        draft.join(&self.container.name)
    }

    fn make_dump_dir(&self, dir: &Path) -> Result<()> {
        // Nobody else has anything in a draft: what is there already is somebody's trap.
        for path in [dir, &dir.join(IMAGES_DIR), &dir.join(WORK_DIR)] {
            fs::create_dir(path).with_context(|| format!("cannot make {}", path.display()))?;
        }
        let spec = dir.join(SPEC_FILE);
        fs::File::create_new(&spec)
            .and_then(|mut file| file.write_all(&self.spec))
            .with_context(|| format!("cannot write {}", spec.display()))
    }

    /// Begins the dump past containerd, which carries five of CRIU's options and holds nothing.
    async fn begin_criu(
        &self,
        node: &Containerd,
        dir: &Path,
        hold: Option<&DumpHold>,
    ) -> Result<BegunDump> {
        let (images, work) = (dir.join(IMAGES_DIR), dir.join(WORK_DIR));
        let draft = dir.parent().unwrap_or(dir);
        let (diff, figures) = (dir.join(ROOTFS_DIFF_FILE), work.join(FIGURES_FILE));
        let (shm, links) = (shm_of_pod(&self.spec)?, dir.join(LINKS_FILE));
        let criu = &self.container.criu;
        let export = criu.link_remap.then(|| ExportInside {
            address: node.address(),
            namespace: node.namespace(),
            to: &diff,
            figures: &figures,
            links: shm.as_deref().map(|shm| (shm, links.as_path())),
        });
        self.runtime
            .begin_dump(
                self.id(),
                criu,
                (draft, &images, &work),
                &self.watched,
                export,
                hold,
            )
            .await
    }

    /// The dump itself: by containerd, or past it when it cannot carry the options. The container is frozen.
    async fn run_criu(
        &self,
        node: &Containerd,
        dir: &Path,
        begun: Option<BegunDump>,
        hold: Option<&DumpHold>,
    ) -> Result<()> {
        let begun = match begun {
            Some(begun) => begun,
            None if self.by_containerd && hold.is_none() => {
                let (images, work) = (dir.join(IMAGES_DIR), dir.join(WORK_DIR));
                let criu = &self.container.criu;
                let options = shim_options::checkpoint_options(criu, &images, &work);
                return Ok(node.dump(self.id(), &options).await?);
            }
            None => self.begin_criu(node, dir, hold).await?,
        };
        hold.map_or(Ok(()), DumpHold::begin)?;
        begun.end(hold).await
    }

    /// What CRIU says of a dump that has failed, in front of what the runtime says.
    fn with_reason_of_criu(&self, log: &Path, error: Error) -> Error {
        let reason = criu_log::first_error_of(log).ok().flatten();
        let stuck = error.cause::<StuckDump>().is_some();
        match reason.filter(|_| !stuck) {
            Some(reason) => {
                let message = format!("CRIU cannot dump {:?}: {reason}", self.id());
                Error::failed(message).because(error)
            }
            None => error,
        }
    }

    /// Waits for a dump; one that makes no progress is ended, and so is what runs it.
    async fn end_if_stuck(
        &self,
        run: impl Future<Output = Result<()>>,
        dir: &Path,
        patience: Duration,
        hold: Option<&DumpHold>,
    ) -> Result<()> {
        tokio::pin!(run);
        let waits = || hold.is_some_and(DumpHold::is_held);
        tokio::select! {
            done = &mut run => return done,
            () = stuck_dump::no_progress(dir, patience, waits) => {}
        }
        let dir = dir.to_path_buf();
        tokio::task::spawn_blocking(move || stuck_dump::end(&dir)).await?;
        // The runtime has lost its CRIU and tells its caller; one that does not is left to itself.
        drop(tokio::time::timeout(END_PATIENCE, run).await);
        Err(Error::caused_by(StuckDump {
            called: self.called.clone(),
            seconds: patience.as_secs(),
            stopped: self.stopped.clone(),
        }))
    }

    /// Dumps the frozen container into its directory below `draft`.
    ///
    /// `pids` are all of its processes.
    pub(crate) async fn dump(
        &self,
        node: &Containerd,
        draft: &Path,
        pids: &[u32],
        options: DumpOptions<'_>,
    ) -> Result<Dumped> {
        let DumpOptions {
            patience,
            hold,
            begun,
            known,
            fifos_elsewhere,
        } = options;
        let dir = self.dump_dir(draft);
        if begun.is_none() {
            self.make_dump_dir(&dir)?;
        }
        let (images, work) = (dir.join(IMAGES_DIR), dir.join(WORK_DIR));
        let frozen = pids.to_vec();
        let attributes = tokio::task::spawn_blocking(move || task_attributes::read(&frozen));
        let (attributes, changes) = tokio::join!(attributes, self.changes(pids));
        if let [first, ..] = changes?.as_slice() {
            let message = format!("{} has changed meanwhile: {}", self.called, first.line());
            return Err(Error::refused(message));
        }
        let attributes = attributes?;
        let finish = async || {
            dumped_fifos::leave_out(&images, fifos_elsewhere.clone()).await?;
            self.finish_images(&dir, pids, attributes.clone()).await
        };
        let diff = dir.join(ROOTFS_DIFF_FILE);
        // A link that CRIU makes for a file without a name is there during the dump only.
        let export_inside = self.container.criu.link_remap;
        let export = (!export_inside).then(|| {
            let (stack, diff) = (self.stack.clone(), diff.clone());
            tokio::task::spawn_blocking(move || {
                let began = Instant::now();
                export(&stack, &diff, known).map(|stats| Layer {
                    bytes: stats.bytes,
                    took: began.elapsed(),
                    losses: losses(&stats),
                })
            })
        });
        let started = Instant::now();
        let run = self.run_criu(node, &dir, begun, hold);
        let run = self.end_if_stuck(run, &dir, patience, hold);
        tokio::pin!(run);
        let held = async {
            match hold.filter(|_| !export_inside) {
                Some(hold) => hold.dumped().await,
                None => std::future::pending().await,
            }
        };
        let figures = work.join(FIGURES_FILE);
        let layer = async |took| match export {
            Some(export) => export
                .await
                .context("the export of the upperdir panicked")?,
            None => exported_inside(&diff, &figures, took),
        };
        let (dumped, finished) = tokio::select! {
            biased;
            dumped = &mut run => {
                let layer = layer(started.elapsed()).await;
                let finished = match (&dumped, layer) {
                    (Ok(()), Ok(layer)) => finish().await.map(|()| layer),
                    (_, layer) => layer,
                };
                (dumped, finished)
            }
            () = held => {
                // While CRIU waits, and ends.
                let finish = async {
                    let layer = layer(started.elapsed()).await?;
                    finish().await?;
                    hold.into_iter().for_each(|hold| hold.complete(layer.clone()));
                    Ok(layer)
                };
                tokio::join!(&mut run, finish)
            }
        };
        let criu = started.elapsed();
        let log = work.join(DUMP_LOG_FILE);
        dumped.map_err(|error| self.with_reason_of_criu(&log, error))?;
        let upperdir = finished?;
        // containerd 1.6 writes CRIU's log there only when runc keeps it; it is for people.
        if log.try_exists().unwrap_or(false) {
            fs::rename(&log, dir.join(DUMP_LOG_FILE)).context("cannot keep CRIU's log")?;
        }
        let stats = work.join(DUMP_STATS_FILE);
        if stats.try_exists().unwrap_or(false) {
            fs::rename(&stats, dir.join(DUMP_STATS_FILE)).context("cannot keep CRIU's figures")?;
        }
        fs::remove_dir_all(&work).context("cannot remove CRIU's work directory")?;
        Ok(Dumped { criu, upperdir })
    }

    /// What is done to the images when CRIU has written them.
    async fn changes(&self, pids: &[u32]) -> Result<Vec<Found>> {
        let subject = Subject {
            id: self.id().to_owned(),
            init: self.pid,
            pids: pids.to_vec(),
            spec: Spec::parse(&self.spec).context("cannot read the spec again")?,
            criu: self.container.criu.clone(),
        };
        conditions::changes_of_frozen(subject).await
    }

    async fn finish_images(
        &self,
        dir: &Path,
        pids: &[u32],
        (mut attributes, expiries): (TaskAttributes, Expiries),
    ) -> Result<()> {
        // Its last lines have had the time of the dump to get there.
        if let Some(log) = &self.log
            && let Err(error) = keep_log(log, dir)
        {
            let called = &self.called;
            tracing::warn!(
                "the log {} of {called} does not come along: {error}",
                log.display()
            );
        }
        let images = dir.join(IMAGES_DIR);
        lost_watches::refuse(&images, &self.called).await?;
        // By the times of the images, which nobody has changed yet.
        expiries.tell_moments(&images, &mut attributes).await?;
        timer_threads::translate(&images, pids).await?;
        let attributes = attributes.to_json().context("cannot write of tasks")?;
        fs::File::create_new(dir.join(TASKS_FILE))
            .and_then(|mut file| file.write_all(&attributes))
            .with_context(|| format!("cannot write {TASKS_FILE}"))?;
        let container = Named {
            pid: self.pid,
            upperdir: self.stack.top.clone(),
        };
        renamed_sockets::rename(&images, container).await
    }
}

/// `/dev/shm` of the sandbox, for a container of a pod.
fn shm_of_pod(spec: &[u8]) -> Result<Option<PathBuf>> {
    let spec = Spec::parse(spec).context("the spec is no OCI runtime spec")?;
    let annotations = spec.annotations();
    let Some(sandbox) = annotations.get(SANDBOX_ID) else {
        return Ok(None);
    };
    let mut mounts = shared_mounts(&spec, sandbox).into_iter();
    let shm = mounts.find(|mount| mount.dir == SharedDir::Shm);
    Ok(shm.map(|mount| mount.source))
}

/// A dump that has been given up.
#[derive(Debug, thiserror::Error)]
#[error(
    "the dump of {called} wrote nothing for {seconds} s and was ended{}",
    because(stopped)
)]
struct StuckDump {
    called: String,
    seconds: u64,
    stopped: Vec<String>,
}

fn because(stopped: &[String]) -> String {
    match stopped {
        [] => String::new(),
        _ => format!(
            "; it has stopped tasks, for which CRIU may wait for ever while the cgroup v1 freezer \
             holds them (SIGCONT lets them go): {}",
            stopped.join(", ")
        ),
    }
}

/// How a container is dumped.
#[derive(Debug)]
pub(crate) struct DumpOptions<'a> {
    /// A dump that writes nothing for so long is ended.
    pub(crate) patience: Duration,
    /// With it the dump waits when the pages are all that is missing.
    pub(crate) hold: Option<&'a DumpHold>,
    /// What [`SourceContainer::begin_dump`] has begun with that hold.
    pub(crate) begun: Option<BegunDump>,
    /// What the layer need not have.
    pub(crate) known: Option<Arc<KnownContents>>,
    /// FIFOs of which another container's images have what lies in them.
    pub(crate) fifos_elsewhere: BTreeSet<u32>,
}

/// What a dump has left in the draft.
#[derive(Debug)]
pub struct Dumped {
    /// How long CRIU took.
    pub criu: Duration,
    /// The layer of the upperdir.
    pub upperdir: Layer,
}

/// The layer that `transship snapshot export` has written in the middle of the dump.
fn exported_inside(diff: &Path, figures: &Path, took: Duration) -> Result<Layer> {
    #[derive(Deserialize)]
    struct Figures {
        #[serde(default)]
        losses: Losses,
    }
    let metadata = fs::metadata(diff).with_context(|| format!("cannot find {}", diff.display()))?;
    let said = fs::read_to_string(figures)
        .with_context(|| format!("cannot read {}", figures.display()))?;
    let Figures { losses } = serde_json::from_str(&said)
        .with_context(|| format!("the export of the upperdir has failed: {}", said.trim()))?;
    Ok(Layer {
        bytes: metadata.len(),
        took,
        losses,
    })
}

/// Who sends the files of the dump takes one that has its name for whole.
fn export(
    stack: &OverlayStack,
    to: &Path,
    known: Option<Arc<KnownContents>>,
) -> Result<ExportStats> {
    let part = to.with_extension("part");
    let file =
        fs::File::create_new(&part).with_context(|| format!("cannot make {}", part.display()))?;
    let options = ExportOptions {
        known,
        beside_criu: true,
        // Another container of the pod, which may run, reaches its files through /proc.
        in_use: true,
        ..ExportOptions::default()
    };
    let stats = export_upperdir_to_file(stack, &file, &options)
        .with_context(|| format!("cannot export the upperdir {}", stack.top.display()))?;
    fs::rename(&part, to).with_context(|| format!("cannot rename {}", part.display()))?;
    Ok(stats)
}

/// What an export has left out, for the manifest.
pub fn losses(stats: &ExportStats) -> Losses {
    let paths = stats.noted_paths.iter();
    Losses {
        lower_links: stats.broken_lower_links,
        inode_flags: stats.lost_inode_flags,
        xattrs: stats.lost_xattrs,
        examples: paths.map(|path| path.display().to_string()).collect(),
    }
}
