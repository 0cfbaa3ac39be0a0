//! The dumps of all containers that move, and what they share, as they are written and sent.
//!
//! ```text
//!  containers, one after the other: CRIU ──> <draft>/<container>/   DumpFiles ──> sent while it is written
//!  beside them: /dev/shm, emptyDirs      ──> <draft>/.shared/       DumpFiles ──> sent at the end
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use transship_checkpoint::manifest::{Losses, Shared};
use transship_checkpoint::shared_dirs::SHARED_DIR;
use transship_checkpoint::wire::missing_pages::Wanted;
use transship_containerd::Containerd;
use transship_layer::KnownContents;

use super::dump_files::DumpFiles;
use super::frozen_memory::FrozenMemory;
use super::memory_images::{KnownMemory, by_pid_inside};
use super::moving::Moving;
use crate::dump_hold::DumpHold;
use crate::error::{Context, Error, Result};
use crate::source::Dumped;

/// What the target has of a container before it is frozen.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) memory: Option<KnownMemory>,
    pub(super) contents: Option<Arc<KnownContents>>,
}

/// All of it, in the order in which it is sent.
#[derive(Debug)]
pub(super) struct DumpParts(Vec<Part>);

/// One directory of the checkpoint.
#[derive(Debug)]
pub(super) struct Part {
    /// Its name.
    pub(super) name: String,
    pub(super) dir: PathBuf,
    pub(super) files: DumpFiles,
    /// Where it is not CRIU that copies it.
    pub(super) memory: Option<FrozenMemory>,
    /// Contents of files that the target has.
    contents: Option<Arc<KnownContents>>,
    /// The processes of the container.
    pids: Vec<u32>,
}

impl DumpParts {
    /// Those of what moves, which stands still, below the draft. Memory may come late: then nobody lets the dumps go on
    /// but [`Self::release_holds`].
    ///
    /// # Errors
    /// The answer of containerd, or a hold cannot be made.
    pub(super) async fn of(
        node: &Containerd,
        moving: &Moving,
        known: Vec<Known>,
        draft: &Path,
        is_late: bool,
    ) -> Result<Self> {
        let mut parts = Vec::new();
        for (source, known) in moving.containers.iter().zip(known) {
            let container = &source.container;
            let pids = node.pids(source.id()).await?;
            // CRIU writes beside who sends what it has written; who finds out what is new reads the processes.
            let processes = || by_pid_inside(source.pid, &pids);
            let memory = known.memory.map(|known| match known.has_rounds() {
                _ if is_late => FrozenMemory::late(known, processes()),
                true => FrozenMemory::of(known, processes()),
                false => FrozenMemory::unsent(known, processes()),
            });
            let hold = match &memory {
                Some(_) => Some(DumpHold::make(draft, &container.name)?),
                None => None,
            };
            let shares = memory.as_ref().map_or(0, FrozenMemory::shares);
            let dir = draft.join(&container.name);
            let files = DumpFiles::of(&dir, !container.criu.link_remap, hold, shares);
            parts.push(Part {
                name: container.name.clone(),
                files: if is_late {
                    files.that_stay_held()
                } else {
                    files
                },
                dir,
                memory,
                contents: known.contents,
                pids,
            });
        }
        if moving.pod.is_some() {
            let dir = draft.join(SHARED_DIR);
            parts.push(Part {
                name: SHARED_DIR.to_owned(),
                files: DumpFiles::of(&dir, false, None, 0),
                dir,
                memory: None,
                contents: None,
                pids: Vec::new(),
            });
        }
        Ok(Self(parts))
    }

    pub(super) fn all(&self) -> &[Part] {
        &self.0
    }

    /// Nobody reads memory in its processes any more: the dumps go on, also those that have not come so far.
    pub(super) fn release_holds(&self) {
        let holds = self.0.iter().filter_map(|part| part.files.hold());
        holds.for_each(DumpHold::release);
    }

    /// Fills the buffer with these pages of the one container that moves.
    ///
    /// # Errors
    /// They cannot be read.
    pub(super) fn read(&self, wanted: Wanted, pages: &mut Vec<u8>) -> io::Result<()> {
        match self.0.iter().find_map(|part| part.memory.as_ref()) {
            Some(memory) => memory.read(wanted, pages),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// What the layers cannot say, if that is known of all parts before the dumps have ended.
    pub(super) fn losses(&self) -> Option<Vec<Losses>> {
        let layers = self.0.iter().map(|part| part.files.hold()?.layer());
        layers.map(|layer| Some(layer?.losses.clone())).collect()
    }
}

/// The dumps, which go on beside whoever waits for them. Dropped, nobody waits for them any more.
#[derive(Debug)]
pub(super) struct Dumping {
    dumps: JoinSet<Result<(Vec<Dumped>, Shared)>>,
    parts: Arc<DumpParts>,
}

impl Dumping {
    /// Begins to dump all frozen containers below `draft`. A dump that writes nothing for `patience` is ended.
    pub(super) fn begin(
        node: &Containerd,
        moving: &Arc<Moving>,
        draft: &Path,
        parts: &Arc<DumpParts>,
        patience: Duration,
    ) -> Self {
        let (node, moving, draft) = (node.clone(), Arc::clone(moving), draft.to_path_buf());
        let parts = Arc::clone(parts);
        let mut dumps = JoinSet::new();
        {
            let parts = Arc::clone(&parts);
            dumps.spawn(async move { dump_all(&node, &moving, &draft, &parts, patience).await });
        }
        Self { dumps, parts }
    }

    /// What they have written, when they have ended already.
    ///
    /// # Errors
    /// One of them failed.
    pub(super) fn ended(&mut self) -> Option<Result<(Vec<Dumped>, Shared)>> {
        Some(self.dumps.try_join_next()?.map_err(Error::from).flatten())
    }

    /// Lets them come to their end, and waits for it.
    ///
    /// # Errors
    /// One of them failed.
    pub(super) async fn end(mut self) -> Result<(Vec<Dumped>, Shared)> {
        self.parts.release_holds();
        self.wait().await
    }

    /// Waits for their end.
    ///
    /// # Errors
    /// One of them failed.
    pub(super) async fn wait(&mut self) -> Result<(Vec<Dumped>, Shared)> {
        match self.dumps.join_next().await {
            Some(ended) => ended?,
            None => Err(Error::failed("the dumps have ended before")),
        }
    }
}

/// Tells who follows the dumps that they have ended, whatever has ended them.
struct EndAll<'a> {
    parts: &'a [Part],
    ended: usize,
}

impl EndAll<'_> {
    fn next(&mut self, well: bool) {
        if let Some(part) = self.parts.get(self.ended) {
            part.files.ended(well);
        }
        self.ended += 1;
    }
}

impl Drop for EndAll<'_> {
    fn drop(&mut self) {
        while self.ended < self.parts.len() {
            self.next(false);
        }
    }
}

/// Nobody reads what they share any more when this returns.
async fn dump_all(
    node: &Containerd,
    moving: &Moving,
    draft: &Path,
    parts: &DumpParts,
    patience: Duration,
) -> Result<(Vec<Dumped>, Shared)> {
    let mut end = EndAll {
        parts: parts.all(),
        ended: 0,
    };
    let dirs = moving.pod.as_ref().map(|pod| pod.dirs.clone());
    let export = {
        let draft = draft.to_path_buf();
        let export = move || dirs.map_or(Ok(Shared::default()), |dirs| dirs.export(&draft));
        tokio::task::spawn_blocking(export)
    };
    // Beside the dumps, which only read memory, unless CRIU makes links in what is exported.
    let makes_links = moving
        .containers
        .iter()
        .any(|it| it.container.criu.link_remap);
    let (early, late) = match makes_links {
        true => (
            Some(export.await.context("the export of volumes panicked")??),
            None,
        ),
        false => (None, Some(export)),
    };
    let dumped = async {
        let mut all = Vec::new();
        for (source, part) in moving.containers.iter().zip(parts.all()) {
            let hold = part.files.hold();
            let contents = part.contents.clone();
            let dumped = source.dump(node, draft, &part.pids, patience, hold, contents);
            let dumped = dumped.await;
            end.next(dumped.is_ok());
            let name = &source.container.name;
            all.push(match dumped {
                // The pod's name of it says more than its id.
                Err(error) if moving.pod.is_some() => {
                    let message = format!("the pod's container {name:?} cannot be dumped");
                    return Err(Error::failed(message).because(error));
                }
                dumped => dumped?,
            });
        }
        Ok(all)
    };
    let dumped = dumped.await;
    // Whatever the dumps did: nobody may thaw while it reads.
    let shared = match (early, late) {
        (Some(shared), _) => Ok(shared),
        (None, Some(export)) => export.await.context("the export of volumes panicked")?,
        (None, None) => Ok(Shared::default()),
    };
    let (dumped, shared) = (dumped?, shared?);
    if moving.pod.is_some() {
        end.next(true);
    }
    Ok((dumped, shared))
}
