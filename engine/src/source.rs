//! The container on the source: found, looked at, frozen, dumped.
//!
//! ```text
//!  find --> look (conditions) --> freeze --> dump (CRIU)        --> <draft>/<container>/checkpoint
//!                                       `--> export (upperdir)  --> <draft>/<container>/rootfs-diff.tar
//!                                       thaw
//! ```
//!
//! The dump and the export (both in `dump`) run side by side: both only need the container to stand still. Runtime and CRIU may
//! be started before.

use std::fs;
use std::path::PathBuf;

use containerd_client::services::v1::Container as Record;
use containerd_client::types::v1::{Process, Status};
use prost::Message;
use transship_checkpoint::annotations::Annotations;
use transship_checkpoint::criu_options::{ConfigLine, CriuOptions, CriuOverrides};
use transship_checkpoint::manifest::{
    Container, Format, Image, Losses, Manifest, NotRunning, Pod, RuntimeOptions, SHARED_FEATURE,
    Shared, Source, Stdio, check_name,
};
use transship_checkpoint::namespaces;
use transship_checkpoint::spec::Spec;
use transship_containerd::Containerd;
use transship_containerd::ResolvedImage;
use transship_layer::OverlayStack;
use transship_proto::runc_options::Options;
use transship_sandbox::admission::service_account;
use transship_sandbox::criu_lock;

use crate::conditions::{self, Found, Needs, Subject};
use crate::container_log;
use crate::cri_record::{cri_kind, name_in_pod, pod_of};
use crate::error::{Context, Error, Result};
use crate::locks::{Lock, lock_for_dump};
use crate::oci_runtime::OciRuntime;
use crate::overlay_mounts::overlay_stack;
use crate::own_networks;
use crate::reasons::Reasons;
use crate::stuck_dump;
use crate::task_to_freeze::TaskToFreeze;
use crate::thaw;

mod dump;

pub(crate) use dump::DumpOptions;
pub use dump::{Dumped, losses};

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
