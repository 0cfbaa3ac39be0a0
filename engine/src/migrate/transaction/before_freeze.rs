//! What goes to the target while the containers run: contents of large files, then memory. In the freeze only what has
//! changed since is sent.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use transship_checkpoint::manifest::CONTENTS_DIR;
use transship_checkpoint::shared_dirs::{SHARED_DIR, SharedDir};
use transship_checkpoint::wire::Arriving;
use transship_layer::KnownContents;

use super::Transaction;
use crate::error::Result;
use crate::machine::free_memory;
use crate::migrate::dump_parts::{Known, KnownBefore};
use crate::migrate::file_contents::{self, Directory};
use crate::migrate::late_pages::{can_hold_dumps, not_held};
use crate::migrate::memory_images::{KnownMemory, by_pid_inside};
use crate::migrate::precopy::Rounds;
use crate::migrate::process_memory::fits_lazy_dump;
use crate::source::SourceContainer;

impl Transaction<'_> {
    /// Sends what can go while the containers run, and gives what the target has then.
    pub(super) async fn send_before(&mut self) -> Result<KnownBefore> {
        let (contents, volumes) = self.send_contents().await?;
        let memory = self.send_memory().await?.into_iter();
        let containers = { memory.zip(contents) }
            .map(|(memory, contents)| Known { memory, contents })
            .collect();
        Ok(KnownBefore {
            containers,
            volumes,
        })
    }

    /// Sends the contents of large files, of containers and of what they share.
    async fn send_contents(&mut self) -> Result<(Vec<Option<KnownFiles>>, KnownVolumes)> {
        let moving = Arc::clone(self.moving);
        let from = self.timeline.now();
        let until = self.request.precopy.end_of(Instant::now());
        let bytes_before = self.bytes;
        let mut containers = Vec::new();
        for source in &moving.containers {
            let name = &source.container.name;
            // Otherwise CRIU has the layer written by a command of its own.
            let known = match source.container.criu.link_remap {
                false => {
                    let directory = (&**name, CONTENTS_DIR.to_owned());
                    let upperdir = source.stack.top.clone();
                    self.send_contents_of(directory, upperdir, until).await?
                }
                true => None,
            };
            containers.push(known);
        }
        let mut volumes = BTreeMap::new();
        for (dir, path) in moving.pod.iter().flat_map(|pod| pod.dirs.paths()) {
            let Some(contents) = dir.contents_dir() else {
                continue;
            };
            let directory = (SHARED_DIR, contents);
            let known = self.send_contents_of(directory, path.to_path_buf(), until);
            if let Some(known) = known.await? {
                volumes.insert(dir.clone(), known);
            }
        }
        let bytes = self.bytes - bytes_before;
        if bytes > 0 {
            self.timeline.step("files", from, Some(bytes));
        }
        Ok((containers, volumes))
    }

    /// Sends the contents of files below `path` to a directory in that of the checkpoint's part; nothing where the target
    /// does not take them.
    async fn send_contents_of(
        &mut self,
        (part, contents): (&str, String),
        path: PathBuf,
        until: Instant,
    ) -> Result<Option<KnownFiles>> {
        let is_taken = self.takes_contents.contains(&format!("{part}/{contents}"));
        if !is_taken || self.request.precopy.rounds == 0 {
            return Ok(None);
        }
        self.progress.bytes("files, while it runs", self.estimate);
        let mut count = self.progress.counter();
        let to = Directory {
            part: part.to_owned(),
            contents,
        };
        let sent = self
            .conversation
            .write_data(move |sender| file_contents::send(sender, &to, &path, until, &mut count))
            .await?;
        self.bytes += sent.bytes;
        let files = sent.files.into_iter().map(|file| (part.to_owned(), file));
        self.files_before.extend(files);
        Ok(Some(Arc::new(sent.known)))
    }

    /// Bytes that the target has taken so far.
    fn taken(&self) -> u64 {
        let files = self.files_before.iter();
        files.map(|(_, file)| Arriving::cost_of(file)).sum()
    }

    /// Sends memory while the containers run, and gives what the target has of each; none of one whose memory CRIU
    /// has to copy.
    async fn send_memory(&mut self) -> Result<Vec<Option<KnownMemory>>> {
        let containers = &self.moving.containers;
        let possible = can_hold_dumps();
        let can_be_held = |source: &SourceContainer| possible && source.runtime.can_hold_dumps();
        let mut known = Vec::new();
        for source in containers {
            let pids = self.node.pids(source.id()).await?;
            known.push(
                match can_be_held(source) && fits_lazy_dump(&pids, free_memory()) {
                    true => Some(KnownMemory::new()?),
                    false => None,
                },
            );
        }
        if self.request.is_lazy && known.iter().any(Option::is_none) {
            return Err(not_held());
        }
        if known.iter().all(Option::is_none) {
            tracing::info!("the dump cannot be held: all memory is sent in the freeze");
            return Ok(known);
        }
        let mut rounds = Rounds::within(self.request.precopy, self.estimate);
        let from = self.timeline.now();
        let until = rounds.until();
        while rounds.go_on(self.taken()) {
            self.progress.bytes("memory, while it runs", self.estimate);
            let (mut pages, mut bytes) = (0, 0);
            for (source, known) in containers.iter().zip(&mut known) {
                let Some(mut of_container) = known.take() else {
                    continue;
                };
                let pids = self.node.pids(source.id()).await?;
                let processes = by_pid_inside(source.pid, &pids);
                let name = source.container.name.clone();
                let mut count = self.progress.counter();
                let (back, sent) = self
                    .conversation
                    .write_data(move |sender| {
                        let sent = of_container.send_round(
                            sender,
                            (&name, &processes),
                            until,
                            &mut count,
                        )?;
                        Ok((of_container, sent))
                    })
                    .await?;
                *known = Some(back);
                pages += sent.pages;
                bytes += sent.bytes;
                let name = &source.container.name;
                let files = sent.files.into_iter().map(|file| (name.clone(), file));
                self.files_before.extend(files);
            }
            rounds.add(pages, bytes);
        }
        if rounds.done > 0 {
            self.timeline.step("precopy", from, Some(rounds.bytes));
            self.timeline.note(format!("{} rounds", rounds.done));
            self.bytes += rounds.bytes;
        }
        Ok(known)
    }
}

/// The contents that the target has of one directory.
type KnownFiles = Arc<KnownContents>;
/// Those of what the containers share.
type KnownVolumes = BTreeMap<SharedDir, KnownFiles>;
