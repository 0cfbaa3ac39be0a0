//! The files of a dump in the order in which they can be sent, while CRIU still writes them.
//!
//! ```text
//!  checkpoint/pages-1.img     grows until pages-2.img is there, or the dump has ended
//!  checkpoint/pages-2.img     ...                          (a file for each process, and for shared memory)
//!  rootfs-diff.tar            gets its name when it is whole, but for one that is written inside of the dump
//!  all others                 small; edited after the dump; sent when it has ended
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use transship_checkpoint::manifest::{IMAGES_DIR, ROOTFS_DIFF_FILE};
use transship_checkpoint::store::list_files;

/// How often it is looked whether there is one more.
const LOOK: Duration = Duration::from_millis(1);

const RUNS: u8 = 0;
const WHOLE: u8 = 1;
const FAILED: u8 = 2;

/// The dump of a container, as several threads take its files.
#[derive(Debug)]
pub(super) struct DumpFiles {
    dir: PathBuf,
    /// Whether the layer has its name only when it is whole.
    layer_by_rename: bool,
    state: AtomicU8,
    taken: Mutex<BTreeSet<String>>,
}

impl DumpFiles {
    /// Those of the container's directory, in which there may be none yet.
    pub(super) fn of(dir: &Path, layer_by_rename: bool) -> Self {
        Self {
            dir: dir.to_path_buf(),
            layer_by_rename,
            state: AtomicU8::new(RUNS),
            taken: Mutex::default(),
        }
    }

    /// The dump has ended: nothing is written any more.
    pub(super) fn ended(&self, well: bool) {
        let state = if well { WHOLE } else { FAILED };
        self.state.store(state, Ordering::Release);
    }

    /// Waits for the next file that nobody has taken, and gives its path; none when there will be no more.
    pub(super) fn next(&self) -> Option<String> {
        loop {
            // Asked before the look: what was written until then is seen by it.
            let state = self.state.load(Ordering::Acquire);
            let there = match state {
                RUNS => self.while_it_runs(),
                // What cannot be listed is missed by the manifest's digests.
                WHOLE => list_files(&self.dir).unwrap_or_default(),
                _ => return None,
            };
            let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
            let next = there.into_iter().find(|path| !taken.contains(path));
            if let Some(path) = next {
                taken.insert(path.clone());
                return Some(path);
            }
            drop(taken);
            if state == WHOLE {
                return None;
            }
            std::thread::sleep(LOOK);
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

    fn while_it_runs(&self) -> Vec<String> {
        let pages = self.pages().into_iter();
        let mut there: Vec<String> = pages
            .map(|number| format!("{IMAGES_DIR}/pages-{number}.img"))
            .collect();
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

/// Whether it has pages of memory, one after the other.
pub(super) fn is_memory(path: &str) -> bool {
    number(path).is_some()
}

/// Of `pages-<n>.img`.
fn number(path: &str) -> Option<u32> {
    let name = path.rsplit('/').next()?;
    let digits = name.strip_prefix("pages-")?.strip_suffix(".img")?;
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_first_and_the_rest_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let images = dir.path().join(IMAGES_DIR);
        fs::create_dir(&images).unwrap();
        fs::write(images.join("core-1.img"), "").unwrap();
        fs::write(images.join("pages-1.img"), "").unwrap();
        let files = DumpFiles::of(dir.path(), true);
        assert_eq!(files.next().unwrap(), "checkpoint/pages-1.img");
        assert!(!files.is_whole("checkpoint/pages-1.img"));
        fs::write(images.join("pages-12.img"), "").unwrap();
        assert!(files.is_whole("checkpoint/pages-1.img"));
        fs::write(dir.path().join(ROOTFS_DIFF_FILE), "").unwrap();
        assert_eq!(files.next().unwrap(), "checkpoint/pages-12.img");
        assert_eq!(files.next().unwrap(), ROOTFS_DIFF_FILE);
        files.ended(true);
        assert!(files.is_whole("checkpoint/pages-12.img"));
        assert_eq!(files.next().unwrap(), "checkpoint/core-1.img");
        assert_eq!(files.next(), None);
    }

    #[test]
    fn nothing_more_comes_of_a_dump_that_has_failed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(IMAGES_DIR)).unwrap();
        fs::write(dir.path().join("spec.dump"), "").unwrap();
        let files = DumpFiles::of(dir.path(), false);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| files.next());
            files.ended(false);
            assert_eq!(waiting.join().unwrap(), None);
        });
    }
}
