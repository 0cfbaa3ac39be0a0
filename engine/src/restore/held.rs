//! The held copy: made, let go, or undone.

use std::collections::HashMap;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_client::types::Mount;
use containerd_client::types::v1::Status;
use transship_checkpoint::beneath::open_last;
use transship_checkpoint::container_log::put_in_front;
use transship_checkpoint::manifest::{ROOTFS_DIFF_FILE, contents_in_filled};
use transship_checkpoint::store::Checkpoint;
use transship_checkpoint::wire::ContentsDir;
use transship_containerd::Containerd;
use transship_containerd::NewContainer;
use transship_containerd::Output;
use transship_layer::{ImportOptions, OverlayStack};
use transship_proto::runc_options::Options;

use super::client_files;
use super::plan::Plan;
use super::spec::{has_systemd_cgroup, without_restore};
use crate::container_log::path_of_uri;
use crate::error::{Context, Error, Result, one_line};
use crate::lost_task;
use crate::overlay_mounts::overlay_stack;
use crate::own_networks;
use crate::restart_policy;
use crate::room::while_room;

/// How long the garbage collector keeps its hands off a restore.
pub const LEASE: Duration = Duration::from_secs(3600);

/// The label by which the record and the snapshot of a copy say which restore has made them. Without it they are
/// another's, who was faster with the same id, and are never removed.
const COPY: &str = "dev.transship/copy";

/// The only runtime of containerd whose containers can be restored.
const RUNTIME: &str = "io.containerd.runc.v2";

/// A container that was restored and does not run yet.
#[derive(Debug)]
pub struct Restored {
    node: Containerd,
    plan: Plan,
    upperdir: PathBuf,
    /// The container's directory in the checkpoint.
    files: PathBuf,
    /// Process id of its first process.
    pub pid: u32,
}

/// The snapshot of a copy, without its files.
#[derive(Debug)]
pub struct Prepared {
    mounts: Vec<Mount>,
    stack: OverlayStack,
    /// Where contents of files come before the layer: a directory of this name at the top.
    contents: Option<String>,
}

impl Prepared {
    /// Makes the directory for contents of files that come before the layer, and gives it.
    ///
    /// # Errors
    /// A system call failed.
    pub fn make_contents_dir(&mut self, plan: &Plan) -> Result<ContentsDir> {
        let name = contents_in_filled(&plan.made_by);
        let dir = make_contents_dir(&self.stack.top, &name)?;
        self.contents = Some(name);
        Ok(dir)
    }
}

/// Makes a directory for contents of files in an upperdir.
///
/// # Errors
/// A system call failed.
pub(crate) fn make_contents_dir(upperdir: &Path, name: &str) -> Result<ContentsDir> {
    let made = ContentsDir::make(upperdir, name);
    made.with_context(|| format!("cannot make {}", upperdir.join(name).display()))
}

/// Makes the snapshot of the planned container.
///
/// # Errors
/// Its layers cannot be had, or its upperdir is not known; what there is of it is left for [`Copy::remove`].
pub async fn prepare(node: &Containerd, plan: &Plan) -> Result<Prepared> {
    let image = &plan.container.image;
    let unpacked = async {
        let chain = &image.chain_id;
        Ok(node
            .ensure_unpacked(&image.name, chain, &plan.snapshotter)
            .await?)
    };
    while_room(node, &plan.snapshotter, unpacked).await?;
    let mounts = node
        .snapshotter(&plan.snapshotter)
        .prepare(&plan.id, &image.chain_id, &[(COPY, &plan.made_by)])
        .await?;
    let stack = overlay_stack(&mounts).with_context(|| {
        format!(
            "the upperdir to fill is not known from the mounts of the snapshotter {:?}",
            plan.snapshotter
        )
    })?;
    // What is left of others is of no weight to this one. There may be many, which containerd is asked for one by one.
    if let Err(error) = client_files::sweep(node).await {
        tracing::warn!(error = %one_line(&error), "files of removed containers are left");
    }
    Ok(Prepared {
        mounts,
        stack,
        contents: None,
    })
}

/// Restores the planned container, up to the moment before its first instruction. `node` has a lease.
///
/// # Errors
/// Nothing of it is left then, or the error says what.
pub async fn hold(node: &Containerd, plan: Plan, checkpoint: &Checkpoint) -> Result<Restored> {
    match prepare(node, &plan).await {
        Ok(prepared) => hold_in(node, plan, prepared, checkpoint).await,
        Err(error) => Err(remove_after(node, &plan, error).await),
    }
}

/// The same in a snapshot that is there.
///
/// # Errors
/// As [`hold`].
pub async fn hold_in(
    node: &Containerd,
    plan: Plan,
    prepared: Prepared,
    checkpoint: &Checkpoint,
) -> Result<Restored> {
    match make(node, &plan, prepared, checkpoint).await {
        Ok((pid, upperdir)) => Ok(Restored {
            node: node.clone(),
            files: checkpoint.container_dir(&plan.container),
            plan,
            upperdir,
            pid,
        }),
        Err(error) => Err(remove_after(node, &plan, error).await),
    }
}

async fn remove_after(node: &Containerd, plan: &Plan, error: Error) -> Error {
    match Copy::of(plan).remove(node).await {
        Ok(()) => error,
        Err(left) => Error::failed(format!(
            "and not all of it could be removed: {}",
            left.one_line()
        ))
        .because(error),
    }
}

async fn make(
    node: &Containerd,
    plan: &Plan,
    prepared: Prepared,
    checkpoint: &Checkpoint,
) -> Result<(u32, PathBuf)> {
    let container = &plan.container;
    let held = plan.asking_for_restore(&checkpoint.manifest.name);
    let image = &container.image;
    let Prepared {
        mounts,
        stack,
        contents,
    } = prepared;
    let upperdir = stack.top.clone();
    let diff = checkpoint.container_dir(container).join(ROOTFS_DIFF_FILE);
    tokio::task::spawn_blocking(move || fill_upperdir(&diff, &stack, contents)).await??;

    let json = held.to_json();
    let value = serde_json::from_slice(&json).context("our own spec cannot be parsed")?;
    let options = Options {
        binary_name: plan.runtime_binary.display().to_string(),
        systemd_cgroup: has_systemd_cgroup(&value),
        ..Options::default()
    };
    let mut labels: HashMap<_, _> = plan.labels.clone().into_iter().collect();
    labels.insert(COPY.to_owned(), plan.made_by.clone());
    node.create_container(NewContainer {
        id: plan.id.clone(),
        labels,
        image: image.name.clone(),
        runtime: RUNTIME.to_owned(),
        runtime_options: Some(containerd_client::to_any(&options)),
        spec: json,
        snapshotter: plan.snapshotter.clone(),
        snapshot_key: plan.id.clone(),
    })
    .await?;
    if let Some(files) = &plan.client_files {
        files.write(&[])?;
    }
    let (stdout, stderr) = plan.output.clone();
    let pid = node
        .create_task(&plan.id, mounts, Output { stdout, stderr })
        .await?;
    if let Some(files) = &plan.client_files {
        let networks = own_networks::of_container(node.namespace(), &plan.id, pid, &held)?;
        let addresses = networks.into_iter().flat_map(|network| network.addresses);
        files.write(&addresses.collect::<Vec<_>>())?;
    }
    Ok((pid, upperdir))
}

/// Fills the upperdir of a stack that is not mounted from the layer `diff`, and from the directory `contents` in it, where
/// contents of files have come before.
///
/// # Errors
/// The layer cannot be read, or not be filled in.
pub(crate) fn fill_upperdir(
    diff: &Path,
    stack: &OverlayStack,
    contents: Option<String>,
) -> Result<()> {
    let file = open_last(diff).with_context(|| format!("cannot open {}", diff.display()))?;
    // What is filled in is no larger than what has come, and that has a bound.
    let length = file
        .metadata()
        .with_context(|| format!("cannot stat {}", diff.display()))?
        .len();
    let failed = || format!("cannot fill the upperdir {}", stack.top.display());
    let layer = transship_layer::decompress(BufReader::with_capacity(1 << 20, file))
        .with_context(failed)?;
    let options = ImportOptions {
        contents,
        ..ImportOptions::for_checkpoint(length, layer.compression())
    };
    transship_layer::import_into_upperdir(layer, stack, &options).with_context(failed)?;
    Ok(())
}

impl Restored {
    /// Id of the container.
    pub fn id(&self) -> &str {
        &self.plan.id
    }

    /// Where its files are.
    pub fn upperdir(&self) -> &Path {
        &self.upperdir
    }

    /// Lets the copy run, and gives its process id. If it does not, it is still there to be undone.
    ///
    /// # Errors
    /// What containerd answers.
    pub async fn start(&self) -> Result<u32> {
        if let Some(log) = path_of_uri(&self.plan.output.0) {
            let dir = self.files.clone();
            let put = tokio::task::spawn_blocking(move || put_in_front(&dir, &log)).await?;
            if let Err(error) = put {
                tracing::warn!(
                    "the old log of {:?} is not in front of the new one: {error}",
                    self.plan.id
                );
            }
        }
        self.node.start_task(&self.plan.id).await?;
        Ok(self.pid)
    }

    /// Makes the running copy a container like any other; see [`settle`].
    ///
    /// # Errors
    /// It runs all the same.
    pub async fn settle(self) -> Result<()> {
        settle(&self.node, &self.plan.id).await
    }

    /// Removes all that was made.
    ///
    /// # Errors
    /// What could not be removed.
    pub async fn undo(self) -> Result<()> {
        let id = &self.plan.id;
        let removed = Copy::of(&self.plan).remove(&self.node).await;
        removed.with_context(|| format!("{id:?} could not be removed again"))
    }

    /// Removes all that was made, because of this error.
    pub async fn undo_after(self, error: Error) -> Error {
        match Copy::of(&self.plan).remove(&self.node).await {
            Ok(()) => error,
            Err(left) => Error::failed(format!(
                "{:?} could not be removed again ({}) after this",
                self.plan.id,
                left.one_line()
            ))
            .because(error),
        }
    }
}

/// Makes a restored container that runs one like any other: started again, it starts its program, so
/// what asked for the restore leaves its record.
///
/// # Errors
/// It runs all the same.
pub async fn settle(node: &Containerd, id: &str) -> Result<()> {
    let settle = async {
        let mut record = node.container(id).await?;
        let spec = record.spec.unwrap_or_default().value;
        node.update_spec(id, without_restore(&spec)?).await?;
        record.labels.remove(COPY);
        let labels = restart_policy::shown(record.labels);
        Ok(node.label_container(id, labels).await?)
    };
    let settled: Result<()> = settle.await;
    settled.with_context(|| format!("{id:?} runs, but its record still asks for the restore"))
}

/// What a restore makes, and may remove again.
#[derive(Debug, Clone, Copy)]
pub struct Copy<'a> {
    /// Id of the container, and key of its snapshot.
    pub id: &'a str,
    /// The snapshotter that has its snapshot.
    pub snapshotter: &'a str,
    /// The restore that makes it, as [`Plan::made_by`] has it.
    pub made_by: &'a str,
}

impl<'p> Copy<'p> {
    /// What the restore of this plan makes.
    fn of(plan: &'p Plan) -> Self {
        Self {
            id: &plan.id,
            snapshotter: &plan.snapshotter,
            made_by: &plan.made_by,
        }
    }
}

impl Copy<'_> {
    /// Removes what there is of it: task, record and snapshot. What another has made with the same id stays.
    ///
    /// # Errors
    /// What containerd answers.
    pub async fn remove(&self, node: &Containerd) -> Result<()> {
        let Self { id, .. } = *self;
        let snapshots = node.snapshotter(self.snapshotter);
        let record = self.has_record(node).await?;
        let snapshot = self.has_snapshot(node).await?;
        if record {
            node.kill_task(id).await?;
            match node.delete_container(id).await {
                Err(error) if !error.is_not_found() => return Err(error.into()),
                _ => {}
            }
        }
        if record || snapshot {
            client_files::remove(node.namespace(), id)?;
            lost_task::remove(node, id).await?;
        }
        // Made first and removed last: without it there is nothing else.
        match snapshot {
            true => Ok(snapshots.remove_if_exists(id).await?),
            false => Ok(()),
        }
    }

    /// Whether its record is there, and not yet one like any other.
    ///
    /// # Errors
    /// What containerd answers.
    pub async fn has_record(&self, node: &Containerd) -> Result<bool> {
        match node.container(self.id).await {
            Err(error) if !error.is_not_found() => Err(error.into()),
            record => Ok(record.is_ok_and(|it| self.has_made(&it.labels))),
        }
    }

    /// Whether its snapshot is there.
    async fn has_snapshot(&self, node: &Containerd) -> Result<bool> {
        // Its record says that it is a container like any other, and its snapshot goes on saying who has made it.
        match node.container(self.id).await {
            Ok(record) if !self.has_made(&record.labels) => return Ok(false),
            Err(error) if !error.is_not_found() => return Err(error.into()),
            _ => {}
        }
        match node.snapshotter(self.snapshotter).stat(self.id).await {
            Err(error) if !error.is_not_found() => Err(error.into()),
            snapshot => Ok(snapshot.is_ok_and(|it| self.has_made(&it.labels))),
        }
    }

    /// Whether anything of it is there for [`Self::remove`].
    ///
    /// # Errors
    /// What containerd answers.
    pub async fn is_to_be_removed(&self, node: &Containerd) -> Result<bool> {
        Ok(self.has_record(node).await? || self.has_snapshot(node).await?)
    }

    /// The state of its task: stopped, where there is none any more, also where another has its id now.
    ///
    /// # Errors
    /// What containerd answers.
    pub async fn status(&self, node: &Containerd) -> Result<Status> {
        if !self.has_record(node).await? {
            return Ok(Status::Stopped);
        }
        match node.task(self.id).await {
            Err(error) if error.is_not_found() => Ok(Status::Stopped),
            task => Ok(task?.status()),
        }
    }

    fn has_made(&self, labels: &HashMap<String, String>) -> bool {
        labels.get(COPY).is_some_and(|it| it == self.made_by)
    }
}
