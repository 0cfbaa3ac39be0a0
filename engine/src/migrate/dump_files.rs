//! The files of a dump in the order in which they can be sent, while CRIU still writes them.
//!
//! ```text
//!  checkpoint/pages-1.img     grows until pages-2.img is there, or the dump has ended
//!  checkpoint/pages-2.img     ...                          (a file for each process, and for shared memory)
//!  rootfs-diff.tar            gets its name when it is whole, but for one that is written inside of the dump
//!  all others                 small; edited after the dump; sent when it has ended
//!
//!  of a dump that is held (dump_hold), instead of the files of pages, each of which is made while it is sent:
//!  memory that is at rest     at once, where nothing of it was sent before (frozen_memory)
//!  checkpoint/pagemap-1.img   when the dump waits; when all of them have been sent it goes on
//!  all others                 when they are whole, which is before the dump has ended
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError};

use transship_checkpoint::manifest::{IMAGES_DIR, ROOTFS_DIFF_FILE};
use transship_checkpoint::store::list_files;

use super::memory_images::image_name;
use crate::dump_hold::DumpHold;

const RUNS: u8 = 0;
const WHOLE: u8 = 1;
const FAILED: u8 = 2;

/// The dump of a container, as several threads take its files.
#[derive(Debug)]
pub(super) struct DumpFiles {
    dir: PathBuf,
    /// Whether the layer has its name only when it is whole.
    layer_by_rename: bool,
    hold: Option<DumpHold>,
    /// Whether somebody else lets it go.
    stays_held: bool,
    /// Of memory that is at rest.
    shares: usize,
    state: AtomicU8,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    paths: BTreeSet<String>,
    /// Shares of what is at rest that somebody has taken.
    shares: usize,
    /// Images of memory that are being sent, or will be; none before the dump is held.
    memory_left: Option<usize>,
}

/// What is to be sent next, by its path.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// A file as it is.
    File(String),
    /// The pages of this pagemap.
    Memory(String),
    /// A share of the memory that is at rest.
    Share(usize),
}

/// What a look has found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum There {
    Next(Next),
    NotYet,
    NoMore,
}

impl DumpFiles {
    /// Those of the container's directory, in which there may be none yet.
    pub(super) fn of(
        dir: &Path,
        layer_by_rename: bool,
        hold: Option<DumpHold>,
        shares: usize,
    ) -> Self {
        Self {
            shares,
            dir: dir.to_path_buf(),
            layer_by_rename,
            hold,
            stays_held: false,
            state: AtomicU8::new(RUNS),
            taken: Mutex::default(),
        }
    }

    /// The same of a dump that is held on when its images of memory have been sent.
    pub(super) fn that_stay_held(self) -> Self {
        Self {
            stays_held: true,
            ..self
        }
    }

    /// What holds the dump.
    pub(super) fn hold(&self) -> Option<&DumpHold> {
        self.hold.as_ref()
    }

    /// The dump has ended, or nobody waits for it any more: nothing is written that is sent. What is said first counts.
    pub(super) fn ended(&self, well: bool) {
        let state = if well { WHOLE } else { FAILED };
        let (success, failure) = (Ordering::Release, Ordering::Relaxed);
        // One that has ended before stays as it was.
        let _ = self.state.compare_exchange(RUNS, state, success, failure);
        self.release();
    }

    /// Whether what is there is not whole, and will not be.
    pub(super) fn has_failed(&self) -> bool {
        self.state.load(Ordering::Acquire) == FAILED
    }

    /// One image of memory has been sent.
    pub(super) fn memory_sent(&self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.memory_left = taken.memory_left.map(|left| left.saturating_sub(1));
        if taken.memory_left == Some(0) && !self.stays_held {
            self.release();
        }
    }

    fn release(&self) {
        if let Some(hold) = &self.hold {
            hold.release();
        }
    }

    /// Looks for one that nobody has taken.
    pub(super) fn look(&self) -> There {
        // Asked before the look: what was written until then is seen by it.
        let state = self.state.load(Ordering::Acquire);
        let whole = (state == RUNS).then(|| self.when_others_are_whole());
        let whole = whole.flatten();
        let is_complete = state == WHOLE || whole.is_some();
        let there = match state {
            RUNS => whole.unwrap_or_else(|| self.while_it_runs()),
            // What cannot be listed is missed by the manifest's digests.
            WHOLE => self.when_it_has_ended(),
            _ => return There::NoMore,
        };
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.shares < self.shares {
            taken.shares += 1;
            return There::Next(Next::Share(taken.shares - 1));
        }
        if state == RUNS
            && taken.memory_left.is_none()
            && self.hold().is_some_and(DumpHold::is_dumped)
        {
            let images = there.iter().filter(|path| image_name(path).is_some());
            let images = images.count();
            taken.memory_left = Some(images);
            if images == 0 && !self.stays_held {
                self.release();
            }
        }
        let next = there.into_iter().find(|path| !taken.paths.contains(path));
        if let Some(path) = next {
            taken.paths.insert(path.clone());
            return There::Next(match self.hold.is_some() && image_name(&path).is_some() {
                true => Next::Memory(path),
                false => Next::File(path),
            });
        }
        match is_complete {
            true => There::NoMore,
            false => There::NotYet,
        }
    }

    /// Whether nothing is written to this file any more.
    pub(super) fn is_whole(&self, path: &str) -> bool {
        if self.state.load(Ordering::Acquire) != RUNS {
            return true;
        }
        match number(path) {
            Some(number) => self.pages().into_iter().any(|other| other > number),
            None => true,
        }
    }

    fn when_it_has_ended(&self) -> Vec<String> {
        let mut files = list_files(&self.dir).unwrap_or_default();
        if self.hold.is_some() {
            files.retain(|path| is_not_memory(path));
        }
        files
    }

    /// All files of a dump that is held, when nothing is written to them any more; none before.
    fn when_others_are_whole(&self) -> Option<Vec<String>> {
        self.hold()?.layer()?;
        let images = list_files(&self.dir.join(IMAGES_DIR)).ok()?.into_iter();
        let mut files: Vec<String> = { images.map(|name| format!("{IMAGES_DIR}/{name}")) }
            .filter(|path| number(path).is_none())
            .collect();
        // Not what is below: what CRIU says to people is there to the end of the dump, and goes then.
        for entry in fs::read_dir(&self.dir).ok()? {
            let entry = entry.ok()?;
            if entry.file_type().ok()?.is_file() {
                files.push(entry.file_name().into_string().ok()?);
            }
        }
        Some(files)
    }

    fn images_of_memory(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.join(IMAGES_DIR));
        let entries = entries.into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        { names.filter(|name| image_name(name).is_some()) }
            .map(|name| format!("{IMAGES_DIR}/{name}"))
            .collect()
    }

    fn while_it_runs(&self) -> Vec<String> {
        let mut there: Vec<String> = match &self.hold {
            Some(hold) if hold.is_dumped() => self.images_of_memory(),
            Some(_) => Vec::new(),
            None => { self.pages().into_iter() }
                .map(|number| format!("{IMAGES_DIR}/pages-{number}.img"))
                .collect(),
        };
        if self.layer_by_rename && self.dir.join(ROOTFS_DIFF_FILE).symlink_metadata().is_ok() {
            there.push(ROOTFS_DIFF_FILE.to_owned());
        }
        there
    }

    /// The numbers of the files of pages, in the order in which CRIU makes them.
    fn pages(&self) -> BTreeSet<u32> {
        let entries = fs::read_dir(self.dir.join(IMAGES_DIR));
        let entries = entries.into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        names.filter_map(|name| number(&name)).collect()
    }
}

/// What is not made anew while it is sent.
fn is_not_memory(path: &str) -> bool {
    number(path).is_none() && image_name(path).is_none()
}

/// Of `pages-<n>.img`.
fn number(path: &str) -> Option<u32> {
    let name = path.rsplit('/').next()?;
    let digits = name.strip_prefix("pages-")?.strip_suffix(".img")?;
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::exported_layer::Layer;

    impl DumpFiles {
        /// Waits for the next one that nobody has taken; none when there will be no more.
        fn next(&self) -> Option<Next> {
            loop {
                match self.look() {
                    There::Next(next) => return Some(next),
                    There::NoMore => return None,
                    There::NotYet => std::thread::sleep(Duration::from_millis(1)),
                }
            }
        }
    }

    fn file(path: &str) -> Option<Next> {
        Some(Next::File(path.to_owned()))
    }

    #[test]
    fn pages_come_first_and_the_rest_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let images = dir.path().join(IMAGES_DIR);
        fs::create_dir(&images).unwrap();
        fs::write(images.join("core-1.img"), "").unwrap();
        fs::write(images.join("pages-1.img"), "").unwrap();
        let files = DumpFiles::of(dir.path(), true, None, 0);
        assert_eq!(files.next(), file("checkpoint/pages-1.img"));
        assert!(!files.is_whole("checkpoint/pages-1.img"));
        fs::write(images.join("pages-12.img"), "").unwrap();
        assert!(files.is_whole("checkpoint/pages-1.img"));
        fs::write(dir.path().join(ROOTFS_DIFF_FILE), "").unwrap();
        assert_eq!(files.next(), file("checkpoint/pages-12.img"));
        assert_eq!(files.next(), file(ROOTFS_DIFF_FILE));
        files.ended(true);
        assert!(files.is_whole("checkpoint/pages-12.img"));
        assert_eq!(files.next(), file("checkpoint/core-1.img"));
        assert_eq!(files.next(), None);
    }

    #[test]
    fn nothing_more_comes_of_a_dump_that_has_failed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(IMAGES_DIR)).unwrap();
        fs::write(dir.path().join("spec.dump"), "").unwrap();
        let files = DumpFiles::of(dir.path(), false, None, 0);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| files.next());
            files.ended(false);
            assert_eq!(waiting.join().unwrap(), None);
        });
    }

    #[test]
    fn a_dump_that_is_held_goes_on_when_its_memory_has_been_sent() {
        let draft = tempfile::tempdir().unwrap();
        let dir = draft.path().join("c");
        let images = dir.join(IMAGES_DIR);
        fs::create_dir_all(&images).unwrap();
        for name in [
            "pages-1.img",
            "pagemap-1.img",
            "pagemap-7.img",
            "core-1.img",
        ] {
            fs::write(images.join(name), "").unwrap();
        }
        let hold = DumpHold::make(draft.path(), "c").unwrap();
        let files = DumpFiles::of(&dir, true, Some(hold), 2);
        fs::write(dir.join(ROOTFS_DIFF_FILE), "").unwrap();
        assert_eq!(files.next(), Some(Next::Share(0)));
        assert_eq!(files.next(), Some(Next::Share(1)));
        assert_eq!(files.next(), file(ROOTFS_DIFF_FILE));
        assert!(!files.hold().unwrap().is_held());
        fs::write(draft.path().join(".hold-c/dumped"), "").unwrap();
        let (first, second) = (files.next(), files.next());
        for found in [first, second] {
            assert!(matches!(found, Some(Next::Memory(path)) if path.contains("pagemap-")));
        }
        files.memory_sent();
        assert!(files.hold().unwrap().is_held());
        files.memory_sent();
        assert!(!files.hold().unwrap().is_held());
        // All there is to send is there before the dump has ended.
        fs::create_dir(dir.join("work")).unwrap();
        fs::write(dir.join("work/dump.log"), "").unwrap();
        files.hold().unwrap().complete(Layer {
            bytes: 0,
            took: Duration::ZERO,
            losses: Default::default(),
        });
        assert_eq!(files.next(), file("checkpoint/core-1.img"));
        assert_eq!(files.next(), None);
        fs::remove_dir_all(dir.join("work")).unwrap();
        files.ended(true);
        assert_eq!(files.next(), None);
    }
}
