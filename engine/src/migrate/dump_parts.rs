//! The dumps of all containers that move, and what they share, as they are written and sent.
//!
//! ```text
//!  containers, several at once: CRIU ──> <draft>/<container>/   DumpFiles ──> sent while it is written, one by one
//!  beside them: /dev/shm, emptyDirs  ──> <draft>/.shared/       DumpFiles ──> sent when all are exported
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use transship_checkpoint::manifest::{Losses, Shared};
use transship_checkpoint::shared_dirs::{SHARED_DIR, SharedDir};
use transship_checkpoint::wire::missing_pages::Wanted;
use transship_containerd::Containerd;
use transship_layer::KnownContents;

use super::dump_files::{DumpFiles, Next, There};
use super::frozen_memory::FrozenMemory;
use super::memory_images::{KnownMemory, by_pid_inside};
use super::moving::Moving;
use crate::begun_dump::BegunDump;
use crate::dump_hold::DumpHold;
use crate::dumped_fifos::DumpedFifos;
use crate::error::{Context, Error, Result};
use crate::frozen::Pids;
use crate::machine::at_once;
use crate::process_files;
use crate::source::{DumpOptions, Dumped};

/// How often it is looked whether there is more to send.
const LOOK: Duration = Duration::from_millis(1);
/// And when nothing has come for some time: each look lists the directories of all dumps that are left.
const MOST_LOOK: Duration = Duration::from_millis(4);

/// What the target has of a container before it is frozen.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) memory: Option<KnownMemory>,
    pub(super) contents: Option<Arc<KnownContents>>,
}

/// The same of all that moves.
#[derive(Debug)]
pub(super) struct KnownBefore {
    /// In the order of the containers.
    pub(super) containers: Vec<Known>,
    pub(super) volumes: BTreeMap<SharedDir, Arc<KnownContents>>,
}

/// The dumps that wait for the freeze, in the order of the containers. Dropped, those that have not gone on end without having
/// touched a task.
#[derive(Debug, Default)]
pub(super) struct BegunDumps(Vec<Option<(DumpHold, BegunDump)>>);

impl BegunDumps {
    /// Begins those whose memory is read in the processes, as many as are made at once.
    ///
    /// # Errors
    /// One of them fails already, or takes longer than `patience`.
    pub(super) async fn begin(
        node: &Containerd,
        moving: &Arc<Moving>,
        known: &KnownBefore,
        draft: &Path,
        patience: Duration,
    ) -> Result<Self> {
        let mut begins = JoinSet::new();
        for (at, known) in known.containers.iter().enumerate().take(at_once()) {
            if known.memory.is_none() {
                continue;
            }
            let (node, moving, draft) = (node.clone(), Arc::clone(moving), draft.to_path_buf());
            begins.spawn(async move {
                let source = &moving.containers[at];
                let hold = DumpHold::make(&draft, &source.container.name)?;
                let begun = source.begin_dump(&node, &draft, &hold, patience).await;
                let begun = begun.map_err(|error| source.cannot_be_dumped(error))?;
                Ok::<_, Error>((at, (hold, begun)))
            });
        }
        let mut all: Vec<_> = known.containers.iter().map(|_| None).collect();
        while let Some(begun) = begins.join_next().await {
            match begun.map_err(Error::from).flatten() {
                Ok((at, begun)) => all[at] = Some(begun),
                Err(error) => {
                    begins.shutdown().await;
                    return Err(error);
                }
            }
        }
        Ok(Self(all))
    }
}

/// What is known and has begun when all that moves stands still.
#[derive(Debug)]
pub(super) struct ToDump {
    pub(super) known: KnownBefore,
    pub(super) begun: BegunDumps,
    pub(super) pids: Pids,
}

/// All of it, in the order in which it is looked at for what can be sent.
#[derive(Debug)]
pub(super) struct DumpParts {
    parts: Vec<Part>,
    /// Contents of files that the target has of what the containers share.
    volumes: BTreeMap<SharedDir, Arc<KnownContents>>,
    /// What they share, when all of it is in its directory.
    shared: OnceLock<Shared>,
}

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
    /// FIFOs of which an earlier part has what lies in them.
    fifos_elsewhere: BTreeSet<u32>,
    /// Its dump, if that waits for its turn.
    begun: Mutex<Option<BegunDump>>,
}

impl Part {
    fn take_begun(&self) -> Option<BegunDump> {
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        begun.take()
    }
}

impl DumpParts {
    /// Those of what moves, which stands still, below the draft. Memory may come late: then nobody lets the dumps go on
    /// but [`Self::release_holds`].
    ///
    /// # Errors
    /// A hold cannot be made.
    pub(super) fn of(
        moving: &Moving,
        ToDump {
            known,
            begun,
            pids: frozen,
        }: ToDump,
        draft: &Path,
        is_late: bool,
    ) -> Result<Self> {
        let mut parts = Vec::new();
        let mut all_begun = begun.0.into_iter();
        let mut fifos = DumpedFifos::default();
        let is_alone = moving.containers.len() == 1;
        for (source, known) in moving.containers.iter().zip(known.containers) {
            let container = &source.container;
            let pids = frozen.of(source.id()).to_vec();
            // CRIU writes beside who sends what it has written; who finds out what is new reads the processes.
            let processes = || by_pid_inside(source.pid, &pids);
            let memory = known.memory.map(|known| match known.has_rounds() {
                _ if is_late => FrozenMemory::late(known, processes()),
                true => FrozenMemory::of(known, processes()),
                false => FrozenMemory::unsent(known, processes()),
            });
            let (hold, begun) = match (all_begun.next().flatten(), &memory) {
                (Some((hold, begun)), _) => (Some(hold), Some(begun)),
                (None, Some(_)) => (Some(DumpHold::make(draft, &container.name)?), None),
                (None, None) => (None, None),
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
                fifos_elsewhere: match is_alone {
                    true => BTreeSet::new(),
                    false => fifos.add(source.pid, &pids),
                },
                pids,
                begun: Mutex::new(begun),
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
                fifos_elsewhere: BTreeSet::new(),
                begun: Mutex::default(),
            });
        }
        Ok(Self {
            parts,
            volumes: known.volumes,
            shared: OnceLock::new(),
        })
    }

    pub(super) fn all(&self) -> &[Part] {
        &self.parts
    }

    /// Waits for what can be sent next, of whichever part that is left; none when there will be no more. A dump that is
    /// held waits for its memory to be sent, and others for their turn after it.
    pub(super) fn next<'p>(&self, left: &mut Vec<&'p Part>) -> Option<(&'p Part, Next)> {
        let mut pause = LOOK;
        loop {
            let mut found = None;
            left.retain(|part| {
                if found.is_some() {
                    return true;
                }
                let there = part.files.look();
                let is_left = there != There::NoMore;
                if let There::Next(next) = there {
                    found = Some((*part, next));
                }
                is_left
            });
            if found.is_some() || left.is_empty() {
                return found;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(MOST_LOOK);
        }
    }

    /// Nobody reads memory in its processes any more: the dumps go on, also those that have not come so far.
    pub(super) fn release_holds(&self) {
        let holds = self.parts.iter().filter_map(|part| part.files.hold());
        holds.for_each(DumpHold::release);
    }

    /// Whether CRIU holds all processes, as it has since the dump began: nobody else traces them.
    pub(super) fn are_traced(&self) -> bool {
        let is_traced =
            |pid: &u32| process_files::status(*pid).is_ok_and(|status| status.tracerpid != 0);
        self.parts.iter().flat_map(|part| &part.pids).all(is_traced)
    }

    /// Fills the buffer with these pages of the one container that moves.
    ///
    /// # Errors
    /// They cannot be read.
    pub(super) fn read(&self, wanted: Wanted, pages: &mut Vec<u8>) -> io::Result<()> {
        match self.parts.iter().find_map(|part| part.memory.as_ref()) {
            Some(memory) => memory.read(wanted, pages),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// What the layers cannot say, and what the containers share, if that is known of all of them before the dumps have ended:
    /// their files are whole, and CRIU has only to take its parasite out.
    pub(super) fn known_before_end(&self) -> Option<(Vec<Losses>, Shared)> {
        let (of_all, containers): (Vec<_>, Vec<_>) =
            { self.parts.iter() }.partition(|part| part.name == SHARED_DIR);
        let shared = match of_all.is_empty() {
            true => Shared::default(),
            false => self.shared.get()?.clone(),
        };
        let mut all = containers.iter();
        if all.any(|part| part.files.has_failed()) {
            return None;
        }
        let layers = { containers.iter() }.map(|part| part.files.hold()?.layer());
        let losses = layers.map(|layer| Some(layer?.losses.clone()));
        Some((losses.collect::<Option<_>>()?, shared))
    }

    /// All that the containers share is in its directory.
    fn have_shared(&self, shared: &Shared) {
        // Said once.
        drop(self.shared.set(shared.clone()));
        let mut parts = self.parts.iter();
        if let Some(part) = parts.find(|part| part.name == SHARED_DIR) {
            part.files.ended(true);
        }
    }
}

/// The dumps, which go on beside whoever waits for them. Dropped, nobody waits for them any more.
#[derive(Debug)]
pub(super) struct Dumping {
    dumps: JoinSet<Result<(Vec<PartDump>, Shared)>>,
    parts: Arc<DumpParts>,
}

/// The dump of one container.
#[derive(Debug)]
pub(super) struct PartDump {
    /// When it began, after the first one.
    pub(super) after: Duration,
    pub(super) dumped: Dumped,
}

impl Drop for Dumping {
    fn drop(&mut self) {
        // Whoever sends what they write need not wait for more. What has ended well has said so before.
        let parts = self.parts.all().iter();
        parts.for_each(|part| part.files.ended(false));
    }
}

impl Dumping {
    /// Whether CRIU still holds all processes.
    pub(super) fn are_held(&self) -> bool {
        self.parts.are_traced()
    }

    /// Begins to dump all frozen containers below `draft`. A dump that writes nothing for `patience` is ended.
    pub(super) fn begin(
        node: &Containerd,
        moving: &Arc<Moving>,
        draft: &Path,
        parts: &Arc<DumpParts>,
        patience: Duration,
    ) -> Self {
        let all = AllDumps {
            node: node.clone(),
            moving: Arc::clone(moving),
            draft: draft.to_path_buf(),
            parts: Arc::clone(parts),
            patience,
        };
        let mut dumps = JoinSet::new();
        dumps.spawn(all.make());
        Self {
            dumps,
            parts: Arc::clone(parts),
        }
    }

    /// What they have written, when they have ended already.
    ///
    /// # Errors
    /// One of them failed.
    pub(super) fn ended(&mut self) -> Option<Result<(Vec<PartDump>, Shared)>> {
        Some(self.dumps.try_join_next()?.map_err(Error::from).flatten())
    }

    /// Lets them come to their end, and waits for it.
    ///
    /// # Errors
    /// One of them failed.
    pub(super) async fn end(mut self) -> Result<(Vec<PartDump>, Shared)> {
        self.parts.release_holds();
        self.wait().await
    }

    /// Waits for their end.
    ///
    /// # Errors
    /// One of them failed.
    pub(super) async fn wait(&mut self) -> Result<(Vec<PartDump>, Shared)> {
        match self.dumps.join_next().await {
            Some(ended) => ended?,
            None => Err(Error::failed("the dumps have ended before")),
        }
    }
}

/// What the dumps are made of.
#[derive(Debug, Clone)]
struct AllDumps {
    node: Containerd,
    moving: Arc<Moving>,
    draft: PathBuf,
    parts: Arc<DumpParts>,
    patience: Duration,
}

/// Tells who follows the dumps that those of no part go on, whatever has ended them.
struct EndAll<'a>(&'a [Part]);

impl Drop for EndAll<'_> {
    fn drop(&mut self) {
        self.0.iter().for_each(|part| part.files.ended(false));
    }
}

impl AllDumps {
    /// Nobody reads what they share any more when this returns.
    async fn make(self) -> Result<(Vec<PartDump>, Shared)> {
        let parts = Arc::clone(&self.parts);
        // What has ended well has said so before.
        let _end = EndAll(parts.all());
        let dirs = self.moving.pod.as_ref().map(|pod| pod.dirs.clone());
        let export = {
            let draft = self.draft.clone();
            let parts = Arc::clone(&parts);
            let export = move || {
                let Some(dirs) = dirs else {
                    return Ok::<_, Error>(Shared::default());
                };
                let shared = dirs.export(&draft, &parts.volumes)?;
                parts.have_shared(&shared);
                Ok(shared)
            };
            tokio::task::spawn_blocking(export)
        };
        // Beside the dumps, which only read memory, unless CRIU makes links in what is exported.
        let makes_links = self.makes_links();
        let (early, late) = match makes_links {
            true => (
                Some(export.await.context("the export of volumes panicked")??),
                None,
            ),
            false => (None, Some(export)),
        };
        let dumped = self.dump_containers().await;
        // Whatever the dumps did: nobody may thaw while it reads.
        let shared = match (early, late) {
            (Some(shared), _) => Ok(shared),
            (None, Some(export)) => export.await.context("the export of volumes panicked")?,
            (None, None) => Ok(Shared::default()),
        };
        Ok((dumped?, shared?))
    }

    fn makes_links(&self) -> bool {
        let mut containers = self.moving.containers.iter();
        containers.any(|it| it.container.criu.link_remap)
    }

    /// How many dumps are made side by side. Processes of one pid namespace, and links that several CRIU make in one
    /// directory, are kept apart.
    fn most_at_once(&self) -> usize {
        let mut seen = BTreeSet::new();
        let mut containers = self.moving.containers.iter();
        let apart = containers.all(|it| {
            let namespace = std::fs::read_link(format!("/proc/{}/ns/pid", it.pid));
            namespace.is_ok_and(|namespace| seen.insert(namespace))
        });
        match apart && !self.makes_links() {
            true => at_once(),
            false => 1,
        }
    }

    /// Begins them in the order in which they are looked at: one that is held waits for who sends.
    async fn dump_containers(&self) -> Result<Vec<PartDump>> {
        let (began, most) = (Instant::now(), self.most_at_once());
        let mut after = Duration::ZERO;
        let mut done = BTreeMap::new();
        let mut failed = None;
        let mut dumps = JoinSet::new();
        let mut next = 0..self.moving.containers.len();
        loop {
            while failed.is_none()
                && dumps.len() < most
                && let Some(at) = next.next()
            {
                let all = self.clone();
                dumps.spawn(async move {
                    let dumped = all.dump_container(at).await?;
                    Ok((at, PartDump { after, dumped }))
                });
            }
            match dumps.join_next().await {
                None => break,
                Some(Ok(Ok((at, dump)))) => drop(done.insert(at, dump)),
                Some(Ok(Err(error))) => failed = failed.or(Some(error)),
                Some(Err(error)) => failed = failed.or(Some(error.into())),
            }
            after = began.elapsed();
            if failed.is_some() {
                // Nobody sends the memory that the others wait for.
                self.parts.release_holds();
            }
        }
        match failed {
            Some(error) => Err(error),
            None => Ok(done.into_values().collect()),
        }
    }

    async fn dump_container(&self, at: usize) -> Result<Dumped> {
        let (source, part) = (&self.moving.containers[at], &self.parts.all()[at]);
        let options = DumpOptions {
            patience: self.patience,
            hold: part.files.hold(),
            begun: part.take_begun(),
            known: part.contents.clone(),
            fifos_elsewhere: part.fifos_elsewhere.clone(),
        };
        let dumped = source.dump(&self.node, &self.draft, &part.pids, options);
        let dumped = dumped.await;
        part.files.ended(dumped.is_ok());
        dumped.map_err(|error| source.cannot_be_dumped(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_is_not_ready_keeps_no_other_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let part = |name: &str| {
            let dir = dir.path().join(name);
            Part {
                name: name.to_owned(),
                files: DumpFiles::of(&dir, true, None, 0),
                dir,
                memory: None,
                contents: None,
                pids: Vec::new(),
                fifos_elsewhere: BTreeSet::new(),
                begun: Mutex::default(),
            }
        };
        let parts = DumpParts {
            parts: vec![part("slow"), part("quick")],
            volumes: BTreeMap::new(),
            shared: OnceLock::new(),
        };
        let [slow, quick] = parts.all() else {
            panic!("two parts")
        };
        std::fs::create_dir(&quick.dir).unwrap();
        std::fs::write(quick.dir.join("spec.dump"), "{}").unwrap();
        quick.files.ended(true);
        let mut left: Vec<_> = parts.all().iter().collect();
        let (part, next) = parts.next(&mut left).unwrap();
        assert_eq!(part.name, "quick");
        assert_eq!(next, Next::File("spec.dump".into()));
        slow.files.ended(false);
        assert!(parts.next(&mut left).is_none() && left.is_empty());
    }
}
