//! Each file of the corpora once: what a fuzzer has found stays found.
#![allow(clippy::tests_outside_test_module, reason = "the whole file is tests")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use transship_fuzz::TARGETS;

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = { fs::read_dir(dir).unwrap() }
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort_unstable();
    files
}

#[test]
fn every_corpus_is_replayed() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (name, target) in TARGETS {
        let files = files(&corpora.join(name));
        assert!(!files.is_empty(), "{name} has no corpus");
        for file in files {
            // The last one is the one that fails.
            eprintln!("{}", file.display());
            target(&fs::read(file).unwrap());
        }
    }
    let known: BTreeSet<_> = TARGETS.iter().map(|(name, _)| corpora.join(name)).collect();
    let there: BTreeSet<_> = files(&corpora).into_iter().collect();
    assert_eq!(there, known, "a corpus without a target");
}
