//! The containers of the pod: made while the source runs, started when it stands still, and held.
//!
//! ```text
//!  CreateContainer ─> MadeContainer: where its files and its log are, of which layers it is    the source runs
//!  upperdirs filled ─ staged, `once` ─ StartContainer, the largest first ─> Held               the source stands still
//! ```
//!
//! What containerd has to be asked is asked before the source stands still, of containers that are made here.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::sleep;
use transship_checkpoint::manifest::{Manifest, ROOTFS_DIFF_FILE, contents_in_filled};
use transship_checkpoint::shared_dirs::SharedDir;
use transship_checkpoint::spec::Spec;
use transship_checkpoint::store::Checkpoint;
use transship_containerd::Containerd;
use transship_layer::OverlayStack;
use transship_sandbox::shared_dirs::shared_mounts;
use transship_sandbox::{Once, PodDir, State};

use crate::container_log;
use crate::cri_pods::CriPods;
use crate::error::{Context as _, Error, Result};
use crate::interrupt::Interrupt;
use crate::machine::at_once;
use crate::overlay_mounts::overlay_stack;
use crate::restore::fill_upperdir;

/// So long after another one a container is started. The shim of a pod makes one after the other, in the order in which
/// they reach it (the mutex of containerd's `service.Create`, 1.6 to 2.1).
const APART: Duration = Duration::from_millis(10);
/// How long it is looked for the reason of a failed restore, which its front writes when all of it has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
const LOOKS: u32 = 10;

/// What is there of the pod, and does not run.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) sandbox: String,
    /// None of a pod that somebody else makes.
    pub(super) containers: Vec<MadeContainer>,
}

impl Made {
    /// The container of this name, if it is made here.
    pub(super) fn container(&self, name: &str) -> Option<&MadeContainer> {
        self.containers.iter().find(|it| it.name == name)
    }
}

/// A container that is made.
#[derive(Debug, Clone)]
pub(super) struct MadeContainer {
    pub(super) name: String,
    pub(super) id: String,
    stack: OverlayStack,
    /// Where its files are: in its upperdir, and in what it shares with others of the pod.
    pub(super) files: Vec<PathBuf>,
    /// Chain id of the layers below its upperdir.
    chain_id: String,
    log: Option<PathBuf>,
}

impl MadeContainer {
    /// Asks containerd about the pod's container `name`.
    ///
    /// # Errors
    /// The answer of containerd, or its upperdir is not known from that.
    pub(super) async fn look_at(
        node: &Containerd,
        name: &str,
        id: &str,
        sandbox: &str,
    ) -> Result<Self> {
        let record = node.container(id).await?;
        let log = container_log::path(&record, "");
        let snapshotter = node.snapshotter(&record.snapshotter);
        let mounts = snapshotter.mounts(&record.snapshot_key).await?;
        let stack = overlay_stack(&mounts);
        let stack = stack.with_context(|| format!("the upperdir of {name:?} is not known"))?;
        let chain_id = snapshotter.stat(&record.snapshot_key).await?.parent;
        let spec = Spec::parse(&record.spec.unwrap_or_default().value);
        let spec = spec.with_context(|| format!("the spec of {name:?} is no OCI runtime spec"))?;
        let shared = shared_mounts(&spec, sandbox).into_iter();
        let shared = shared.filter(|it| it.dir != SharedDir::Shm);
        let mut files = vec![stack.top.clone()];
        files.extend(shared.map(|it| it.source));
        Ok(Self {
            name: name.to_owned(),
            id: id.to_owned(),
            stack,
            files,
            chain_id,
            log,
        })
    }

    pub(super) fn upperdir(&self) -> &Path {
        &self.stack.top
    }

    /// Whether its upperdir is filled here. Of layers that are mounted with an id mapping the front says why it is not.
    fn is_filled_here(&self) -> bool {
        !self.stack.has_idmapped_lowers
    }

    /// Fills its upperdir from what has come. Nothing is mounted yet: the runtime front would have to unmount what the shim has
    /// mounted, and for that the kernel writes out the whole file system that the upperdir is on (`ovl_sync_fs`), which on a
    /// busy node takes seconds, while the source stands still.
    ///
    /// # Errors
    /// As [`fill_upperdir`].
    fn fill(&self, checkpoint: &Checkpoint) -> Result<()> {
        if !self.is_filled_here() {
            return Ok(());
        }
        let diff = checkpoint.dir.join(&self.name).join(ROOTFS_DIFF_FILE);
        let contents = contents_in_filled(&checkpoint.manifest.name);
        fill_upperdir(&diff, &self.stack, Some(contents))
    }

    /// Whether its upperdir lies on the layers that were asked for: what comes is a diff against them.
    ///
    /// # Errors
    /// It does not.
    pub(super) fn check_base(&self, chain: &str) -> Result<()> {
        match self.chain_id == chain {
            true => Ok(()),
            false => Err(Error::failed(format!(
                "the CRI has made {:?} of the layers {}, and not of {chain}",
                self.name, self.chain_id
            ))),
        }
    }

    /// For the runtime front, which need not ask then, when its upperdir has its files.
    pub(super) fn once(&self) -> Once {
        Once {
            id: self.id.clone(),
            log: self.log.clone(),
            is_filled: self.is_filled_here(),
        }
    }
}

/// A container that is held although it has been started.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) id: String,
    /// Its first process.
    pub(super) pid: i32,
    /// When that started, in clock ticks since boot.
    pub(super) start_time: u64,
}

/// The pod's container `name`, if it is held although it has been started.
///
/// # Errors
/// What is staged cannot be read.
pub(super) fn held(pod: &PodDir, name: &str) -> Result<Option<Held>> {
    let Some(staged) = pod.staged(name)? else {
        return Ok(None);
    };
    let held = staged.started()?.zip(staged.holder());
    Ok(held.map(|(id, (pid, start_time))| Held {
        id,
        pid,
        start_time,
    }))
}

/// Whether none of these containers of the pod has been started and could not be restored: whoever starts it may do so
/// again, and the source stands still until then.
///
/// # Errors
/// One has, and why.
pub(super) fn check_none_failed<'n>(
    pod: &PodDir,
    names: impl Iterator<Item = &'n str>,
) -> Result<()> {
    for name in names {
        let state = pod.staged(name)?.map(|staged| staged.state()).transpose()?;
        if let Some(State::Failed(reason)) = state {
            let message = format!("the container {name:?} of the pod is not restored: {reason}");
            return Err(Error::failed(message));
        }
    }
    Ok(())
}

/// The containers that are made, those with the most files and memory first: their memory is written while the others are
/// restored.
pub(super) fn largest_first<'m>(made: &'m Made, manifest: &Manifest) -> Vec<&'m MadeContainer> {
    let bytes_of = |name: &str| -> u64 {
        let mut containers = manifest.containers.iter();
        let files = containers.find(|it| it.name == name).map(|it| &it.files);
        files.into_iter().flatten().map(|file| file.size).sum()
    };
    let mut all: Vec<_> = made.containers.iter().collect();
    all.sort_by_key(|it| std::cmp::Reverse(bytes_of(&it.name)));
    all
}

/// The reason of a restore that has failed. A shim that hears of the end of its first task before it is asked for the start
/// says no more than that.
async fn why_not_restored(pod: &PodDir, names: &[&str]) -> Option<Error> {
    for _ in 0..LOOKS {
        if let Err(error) = check_none_failed(pod, names.iter().copied()) {
            return Some(error);
        }
        sleep(LOOK_AGAIN).await;
    }
    None
}

/// Fills the upperdirs of all that are made, [`at_once`]. Nobody fills any of them when this returns.
///
/// # Errors
/// The first that cannot be filled.
pub(super) async fn fill_all(made: &Made, checkpoint: &Checkpoint) -> Result<()> {
    let checkpoint = Arc::new(checkpoint.clone());
    let (mut fills, mut all) = (JoinSet::new(), Ok(()));
    let mut containers = made.containers.iter();
    loop {
        while all.is_ok()
            && fills.len() < at_once()
            && let Some(container) = containers.next()
        {
            let (container, checkpoint) = (container.clone(), Arc::clone(&checkpoint));
            fills.spawn_blocking(move || container.fill(&checkpoint));
        }
        let Some(filled) = fills.join_next().await else {
            return all;
        };
        all = all.and(filled.map_err(Error::from).flatten());
    }
}

/// Starts containers, which are restored by that and held, [`at_once`]. Nobody works on any of them when this returns.
pub(super) async fn start_all(
    cri: &CriPods,
    pod: &PodDir,
    containers: Vec<&MadeContainer>,
    interrupt: &Interrupt,
) -> Result<()> {
    let most = at_once();
    let names: Vec<&str> = containers.iter().map(|it| &*it.name).collect();
    let (mut next, mut starts) = (containers.into_iter(), JoinSet::new());
    let mut all = Ok(());
    loop {
        while all.is_ok()
            && starts.len() < most
            && let Some(made) = next.next()
        {
            let (mut cri, name, id) = (cri.clone(), made.name.clone(), made.id.clone());
            if !starts.is_empty() {
                sleep(APART).await;
            }
            starts.spawn(async move { cri.start(&name, &id).await.map(|()| (name, id)) });
        }
        let Some(start) = starts.join_next().await else {
            return match all {
                Err(error) if interrupt.check().is_ok() => {
                    Err(why_not_restored(pod, &names).await.unwrap_or(error))
                }
                all => all,
            };
        };
        let is_held = start.map_err(Error::from).flatten().and_then(|(name, id)| {
            interrupt.check()?;
            match held(pod, &name)?.is_some_and(|held| held.id == id) {
                true => Ok(()),
                false => {
                    let message = format!("{name:?} has been started, and is not held");
                    Err(Error::failed(message))
                }
            }
        });
        all = all.and(is_held);
    }
}
