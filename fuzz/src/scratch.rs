//! A directory in memory, and beside it a file that nobody may touch.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

const GUARDED: &str = "guarded";
const CONTENT: &[u8] = b"nobody writes here";

/// A directory that goes away with this.
#[derive(Debug)]
pub(crate) struct Scratch {
    base: TempDir,
    guarded: (u32, u64),
}

impl Scratch {
    pub(crate) fn new() -> Self {
        let base = tempfile::Builder::new()
            .prefix("transship-fuzz-")
            .tempdir_in("/dev/shm")
            .expect("/dev/shm can be written to");
        fs::create_dir(base.path().join("dir")).expect("it is new");
        let guarded = base.path().join(GUARDED);
        fs::write(&guarded, CONTENT).expect("it is new");
        let guarded = identity(&guarded);
        Self { base, guarded }
    }

    /// The directory.
    pub(crate) fn dir(&self) -> PathBuf {
        self.base.path().join("dir")
    }

    /// The file beside it.
    pub(crate) fn guarded(&self) -> PathBuf {
        self.base.path().join(GUARDED)
    }

    /// Panics when anything beside the directory has changed.
    pub(crate) fn check(&self) {
        let entries = fs::read_dir(self.base.path()).expect("it is ours");
        assert_eq!(
            entries.count(),
            2,
            "something was made beside the directory"
        );
        let guarded = self.guarded();
        assert_eq!(
            identity(&guarded),
            self.guarded,
            "mode or links of a file beside it"
        );
        let content = fs::read(guarded).expect("it is ours");
        assert_eq!(content, CONTENT, "the content of a file beside it");
    }
}

fn identity(path: &Path) -> (u32, u64) {
    let meta = fs::symlink_metadata(path).expect("it is there");
    (meta.mode(), meta.nlink())
}
