//! The container on the source: found, looked at, frozen, dumped.
//!
//! ```text
//!  find --> look (conditions) --> freeze --> dump (CRIU)        --> <draft>/<container>/checkpoint
//!                                       `--> export (upperdir)  --> <draft>/<container>/rootfs-diff.tar
//!                                       thaw
//! ```
//!
//! The dump and the export run side by side: both only need the container to stand still.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use containerd_client::services::v1::Container as Record;
use containerd_client::types::v1::{Process, Status};
use prost::Message;
use serde::Deserialize;
use transship_checkpoint::annotations::Annotations;
use transship_checkpoint::container_log::keep as keep_log;
use transship_checkpoint::cri_names::annotations::SANDBOX_ID;
use transship_checkpoint::criu_log;
use transship_checkpoint::criu_options::{ConfigLine, CriuOptions, CriuOverrides};
use transship_checkpoint::manifest::{
    Container, DUMP_LOG_FILE, DUMP_STATS_FILE, Format, IMAGES_DIR, Image, Losses, Manifest,
    NotRunning, Pod, ROOTFS_DIFF_FILE, RuntimeOptions, SHARED_FEATURE, SPEC_FILE, Shared, Source,
    Stdio, check_name,
};
use transship_checkpoint::namespaces;
use transship_checkpoint::shared_dirs::{LINKS_FILE, SharedDir};
use transship_checkpoint::spec::Spec;
use transship_checkpoint::task_attributes::{TASKS_FILE, TaskAttributes};
use transship_containerd::Containerd;
use transship_containerd::ResolvedImage;
use transship_layer::{
    ExportOptions, ExportStats, KnownContents, OverlayStack, export_upperdir_to_file,
};
use transship_proto::runc_options::Options;
use transship_sandbox::admission::service_account;
use transship_sandbox::criu_lock;
use transship_sandbox::shared_dirs::shared_mounts;

use crate::conditions::{self, Found, Needs, Subject};
use crate::container_log;
use crate::cri_record::{cri_kind, name_in_pod, pod_of};
use crate::dump_hold::DumpHold;
use crate::dumped_fifos;
use crate::error::{Context, Error, Result};
use crate::exported_layer::Layer;
use crate::locks::{Lock, lock_for_dump};
use crate::lost_watches;
use crate::oci_runtime::{ExportInside, OciRuntime};
use crate::overlay_mounts::overlay_stack;
use crate::own_networks;
use crate::reasons::Reasons;
use crate::renamed_sockets::{self, Named};
use crate::shim_options;
use crate::stuck_dump;
use crate::task_attributes;
use crate::task_to_freeze::TaskToFreeze;
use crate::thaw;
use crate::timer_threads;
use crate::wall_clock_timers::Expiries;

/// How long a runtime may take to notice that its CRIU is gone.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// What an export in the middle of a dump says, in the work directory.
const FIGURES_FILE: &str = "export.json";

/// A running container and everything that a checkpoint of it needs to know.
#[derive(Debug)]
pub struct SourceContainer {
    /// What the manifest will say, still without files.
    pub container: Container,
    /// The record's OCI spec, as JSON.
    pub spec: Vec<u8>,
    /// Its snapshot's key.
    pub snapshot_key: String,
    /// Where its files are.
    pub stack: OverlayStack,
    /// The image below them, when the content store has it.
    pub image: Option<(containerd_client::types::Descriptor, ResolvedImage)>,
    /// The pod that it belongs to.
    pub pod: Option<Pod>,
    /// Whether somebody had paused it before.
    pub was_paused: bool,
    /// What people call it.
    pub called: String,
    /// Nobody else dumps it meanwhile; none where it was looked at alone.
    _in_use: Option<Lock>,
    /// Its first process.
    pub pid: u32,
    /// Tasks that somebody has stopped with a signal.
    pub stopped: Vec<String>,
    /// What it needs of a node.
    pub needs: Needs,
    /// Its log, which comes along.
    pub log: Option<PathBuf>,
    /// What CRIU is told to find the files that are watched.
    watched: Vec<ConfigLine>,
    /// Whether containerd's own dump, with what the front adds by the annotations, has the options
    /// that are wanted.
    by_containerd: bool,
    /// What made it, for dumps that containerd cannot ask for.
    pub runtime: OciRuntime,
}

/// The name of the container in its checkpoint: a directory is made of it.
fn checkpoint_name(record: &Record, namespace: &str) -> Result<String> {
    let name = name_in_pod(record, namespace).unwrap_or(&record.id);
    check_name("the container's name", name).map_err(|error| {
        let message = format!("{:?} cannot be dumped", record.id);
        Error::refused(message).because(error)
    })?;
    if name.starts_with('.') {
        let message = format!(
            "{:?} cannot be dumped: its name begins with a dot",
            record.id
        );
        return Err(Error::refused(message));
    }
    Ok(name.to_owned())
}

/// Finds the container `id` and checks that it can be dumped; why not is kept with other reasons.
///
/// # Errors
/// [`crate::Kind::NotFound`], it does not run, or it is not known how to dump it.
pub(crate) async fn find(
    node: &Containerd,
    id: &str,
    criu: &CriuOverrides,
    reasons: &mut Reasons,
) -> Result<SourceContainer> {
    let (record, task) = find_running(node, id).await?;
    inspect(node, &record, &task, criu, reasons).await
}

/// Finds the container `id` and looks at it.
///
/// # Errors
/// [`crate::Kind::NotFound`], or it does not run.
pub async fn look_for(node: &Containerd, id: &str, criu: &CriuOverrides) -> Result<Looked> {
    let (record, task) = find_running(node, id).await?;
    look(node, &record, &task, criu).await
}

async fn find_running(node: &Containerd, id: &str) -> Result<(Record, Process)> {
    let record = match node.container(id).await {
        Err(error) if error.is_not_found() => {
            return Err(Error::not_found(format!(
                "there is no container {id:?} in the namespace {:?}",
                node.namespace()
            ))
            .hint(format!("ctr -n {} containers ls", node.namespace())));
        }
        record => record?,
    };
    match running_task(node, id).await? {
        Ok(task) => Ok((record, task)),
        Err(state) => Err(not_running(node, id, &state)),
    }
}

/// The task of a container that runs or is paused; else the words for what it does instead.
pub async fn running_task(node: &Containerd, id: &str) -> Result<Result<Process, String>> {
    let task = match node.task(id).await {
        Err(error) if error.is_not_found() => return Ok(Err("has no task".to_owned())),
        task => task?,
    };
    Ok(match task.status() {
        Status::Running | Status::Paused => Ok(task),
        other => Err(format!("is {}", other.as_str_name().to_lowercase())),
    })
}

fn not_running(node: &Containerd, id: &str, state: &str) -> Error {
    Error::refused(format!(
        "the container {id:?} {state}: only a running one has memory to move"
    ))
    .hint(format!("ctr -n {} tasks start -d {id}", node.namespace()))
}

/// A container that was looked at.
#[derive(Debug)]
pub struct Looked {
    /// What people call it.
    pub called: String,
    /// What keeps it from being moved, and what it would lose.
    pub found: Vec<Found>,
    /// What it needs of a node.
    pub needs: Needs,
    /// The container; none when it is not known how to dump it.
    pub source: Option<SourceContainer>,
}

/// Checks that a running container can be dumped; why not is kept with other reasons.
///
/// # Errors
/// [`crate::Kind::Refused`]: somebody dumps it already, or it is not known how to dump it.
pub(crate) async fn inspect(
    node: &Containerd,
    record: &Record,
    task: &Process,
    criu: &CriuOverrides,
    reasons: &mut Reasons,
) -> Result<SourceContainer> {
    let in_use = Some(lock_for_dump(node.namespace(), &record.id).await?);
    let Looked {
        called,
        found,
        source,
        needs,
    } = look(node, record, task, criu).await?;
    let (hindering, losing): (Vec<Found>, Vec<Found>) =
        found.into_iter().partition(|found| found.hinders());
    let refused = || {
        let lines: Vec<String> = hindering.iter().map(Found::line).collect();
        Error::refused(format!("{called} cannot be dumped: {}", lines.join("; ")))
    };
    match source {
        Some(source) => {
            if !hindering.is_empty() {
                reasons.add(refused());
            }
            for found in &losing {
                tracing::warn!("{called}: {}", found.line());
            }
            Ok(SourceContainer {
                needs,
                _in_use: in_use,
                ..source
            })
        }
        None => Err(refused()),
    }
}

/// Looks at a running container.
///
/// # Errors
/// It cannot be looked at, or its annotations mean nothing.
pub async fn look(
    node: &Containerd,
    record: &Record,
    task: &Process,
    criu: &CriuOverrides,
) -> Result<Looked> {
    let id = &record.id;
    let name = checkpoint_name(record, node.namespace())?;
    let called = called(record, node.namespace());
    let mut found = Vec::new();
    let runtime = record.runtime.clone().unwrap_or_default();
    if runtime.name != "io.containerd.runc.v2" {
        found.push(Found::new("runtime", [runtime.name.clone()]));
    }
    if task.terminal && cri_kind(record, node.namespace()).is_none() {
        // The CRI makes a new one with the new container.
        found.push(Found::new("terminal", []));
    }
    let pids = node.pids(id).await?;
    let spec = record.spec.clone().unwrap_or_default().value;
    let parsed =
        Spec::parse(&spec).with_context(|| format!("the spec of {id:?} is no OCI runtime spec"))?;
    let annotations = Annotations::read(id, Some(&parsed.annotations()))
        .map_err(|error| Error::refused(format!("{called} cannot be dumped")).because(error))?;
    let in_pod = cri_kind(record, node.namespace()).is_some();
    let annotated = annotations.criu.over(CriuOptions::of_kind(in_pod));
    let criu = criu.over(annotated.clone());
    let mounts = node
        .snapshotter(&record.snapshotter)
        .mounts(&record.snapshot_key)
        .await?;
    let stack = overlay_stack(&mounts)
        .inspect_err(|error| {
            let why = format!("{:?}: {error}", record.snapshotter);
            found.push(Found::new("upperdir", [why]));
        })
        .ok();
    if in_pod && stack.as_ref().is_some_and(|it| it.lowerdirs.is_empty()) {
        // Without layers it is no overlay in the new pod, and is filled before that is known.
        let why = "an image without layers".to_owned();
        found.push(Found::new("upperdir", [why]));
    }
    let subject = Subject {
        id: id.clone(),
        init: task.pid,
        pids: pids.clone(),
        spec: parsed.clone(),
        criu: criu.clone(),
    };
    let seen = conditions::look(&subject).await?;
    found.extend(seen.found);
    let Some(stack) = stack else {
        return Ok(Looked {
            called,
            found,
            needs: seen.needs,
            source: None,
        });
    };
    let (chain_id, image) = node.base_of(record).await?;
    let options = match &runtime.options {
        Some(any) => Some(Options::decode(&*any.value).with_context(|| {
            format!("the options of the runtime of {id:?} are not those of runc's shim")
        })?),
        None => None,
    };
    // The front applies the annotations to what containerd asks for, and must not undo a flag.
    let by_containerd = !criu.exceed_containerd()
        && (criu == annotated || !annotations.ours)
        && seen.watched.is_empty();
    let container = Container {
        name,
        id: id.clone(),
        namespace: node.namespace().to_owned(),
        image: Image {
            name: record.image.clone(),
            digest: { image.as_ref() }
                .map(|(target, _)| target.digest.clone())
                .unwrap_or_default(),
            chain_id,
            rebuilt: None,
        },
        snapshotter: record.snapshotter.clone(),
        runtime: runtime.name,
        runtime_options: options.clone().map(|options| RuntimeOptions {
            binary_name: options.binary_name,
            systemd_cgroup: options.systemd_cgroup,
        }),
        joined: namespaces::joined(&parsed)
            .keys()
            .map(|kind| kind.oci_name().to_owned())
            .collect(),
        networks: own_networks::of_container(node.namespace(), id, task.pid, &parsed)?,
        stdio: Stdio {
            terminal: task.terminal,
            stdout: task.stdout.clone(),
            stderr: task.stderr.clone(),
        },
        criu,
        labels: record.labels.clone().into_iter().collect(),
        losses: Losses::default(),
        files: Vec::new(),
    };
    // CRIU is asked while the container runs; the dump knows the answer.
    tokio::task::spawn_blocking(criu_lock).await?;
    let source = SourceContainer {
        container,
        spec,
        snapshot_key: record.snapshot_key.clone(),
        stack,
        image,
        pod: pod_of(record, node.namespace()).map(|pod| Pod {
            service_account: service_account::of_spec(&parsed, &pod.namespace),
            ..pod
        }),
        was_paused: task.status() == Status::Paused,
        called: called.clone(),
        _in_use: None,
        pid: task.pid,
        stopped: stuck_dump::stopped_tasks(&pids),
        needs: Needs::default(),
        log: container_log::path(record, &task.stdout),
        watched: seen.watched,
        by_containerd,
        runtime: OciRuntime::of(&options.unwrap_or_default(), node.namespace()),
    };
    Ok(Looked {
        called,
        found,
        needs: seen.needs,
        source: Some(source),
    })
}

/// What people call a container: in a pod not the id that the CRI has made up.
fn called(record: &Record, namespace: &str) -> String {
    match (name_in_pod(record, namespace), pod_of(record, namespace)) {
        (Some(name), Some(pod)) => format!(
            "the container {name:?} of the pod \"{}/{}\"",
            pod.namespace, pod.name
        ),
        _ => format!("{:?}", record.id),
    }
}

impl SourceContainer {
    /// Id of the container.
    pub fn id(&self) -> &str {
        &self.container.id
    }

    /// What a freeze needs to know of it.
    pub fn to_freeze(&self) -> TaskToFreeze {
        TaskToFreeze {
            id: self.container.id.clone(),
            pid: self.pid,
            runtime: self.runtime.clone(),
            was_paused: self.was_paused,
            network_is_locked: false,
            given_away: Vec::new(),
            hides_policy: false,
            marked: None,
        }
    }

    /// Bytes that a dump will roughly have: resident memory and upperdir.
    pub async fn estimate(&self, node: &Containerd) -> Result<u64> {
        let memory: u64 = node
            .pids(self.id())
            .await?
            .into_iter()
            .map(resident_bytes)
            .sum();
        let usage = transship_layer::upperdir_usage(&self.stack.top)?;
        Ok(memory + usage.size)
    }

    /// The dump itself: by containerd, or past it when it cannot carry the options.
    async fn run_criu(
        &self,
        node: &Containerd,
        images: &Path,
        work: &Path,
        export_inside: Option<&Path>,
        hold: Option<&DumpHold>,
    ) -> Result<()> {
        let criu = &self.container.criu;
        if self.by_containerd && hold.is_none() {
            let options = shim_options::checkpoint_options(criu, images, work);
            return Ok(node.dump(self.id(), &options).await?);
        }
        let figures = work.join(FIGURES_FILE);
        let shm = shm_of_pod(&self.spec)?;
        let links = work.with_file_name(LINKS_FILE);
        let export = export_inside.map(|to| ExportInside {
            address: node.address(),
            namespace: node.namespace(),
            to,
            figures: &figures,
            links: shm.as_deref().map(|shm| (shm, links.as_path())),
        });
        self.runtime
            .dump(self.id(), criu, (images, work), &self.watched, export, hold)
            .await
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
            known,
            fifos_elsewhere,
        } = options;
        let dir = draft.join(&self.container.name);
        let images = dir.join(IMAGES_DIR);
        let work = dir.join("work");
        // Nobody else has anything in a draft: what is there already is somebody's trap.
        for path in [&dir, &images, &work] {
            fs::create_dir(path).with_context(|| format!("cannot make {}", path.display()))?;
        }
        let spec = dir.join(SPEC_FILE);
        fs::File::create_new(&spec)
            .and_then(|mut file| file.write_all(&self.spec))
            .with_context(|| format!("cannot write {}", spec.display()))?;
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
        let export_to = export_inside.then_some(&*diff);
        let run = self.run_criu(node, &images, &work, export_to, hold);
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
        if let Err(error) = dumped {
            let reason = criu_log::first_error_of(&log).ok().flatten();
            let stuck = error.cause::<StuckDump>().is_some();
            return Err(match reason.filter(|_| !stuck) {
                Some(reason) => {
                    let message = format!("CRIU cannot dump {:?}: {reason}", self.id());
                    Error::failed(message).because(error)
                }
                None => error,
            });
        }
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

/// Resident bytes of a process; a process that has ended has none.
fn resident_bytes(pid: u32) -> u64 {
    let pages = fs::read_to_string(format!("/proc/{pid}/statm"))
        .ok()
        .and_then(|line| {
            line.split(' ')
                .nth(1)
                .and_then(|field| field.parse::<u64>().ok())
        });
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
    let page = page
        .ok()
        .flatten()
        .and_then(|size| u64::try_from(size).ok());
    // Every port of Linux has this call.
    pages.unwrap_or_default() * page.unwrap_or(4096)
}

/// The manifest of a checkpoint.
pub async fn manifest(
    node: &Containerd,
    name: &str,
    pod: Option<Pod>,
    containers: Vec<Container>,
    not_running: Vec<NotRunning>,
    shared: Shared,
) -> Result<Manifest> {
    let uname = nix::sys::utsname::uname().context("cannot ask the kernel for its name")?;
    let created = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    Ok(Manifest {
        format: Format {
            features: (!shared.is_empty())
                .then(|| SHARED_FEATURE.to_owned())
                .into_iter()
                .collect(),
            ..Format::default()
        },
        name: name.to_owned(),
        created: created.map_or(0, |since| since.as_secs()),
        source: Source {
            hostname: uname.nodename().to_string_lossy().into_owned(),
            architecture: uname.machine().to_string_lossy().into_owned(),
            kernel: uname.release().to_string_lossy().into_owned(),
            containerd: thaw::answered(thaw::ANSWER, node.version()).await?,
            ..Source::default()
        },
        pod,
        containers,
        not_running,
        shared,
    })
}
