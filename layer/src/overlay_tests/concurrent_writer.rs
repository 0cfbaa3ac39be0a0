//! Imports into a directory that somebody else writes to at the same time, as containers of a pod can to
//! an emptyDir that a restore fills.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::have_root;
use super::hostile_layers::tar;
use crate::{ImportOptions, OverlayStack, import_into_upperdir};

/// Enough FIFOs that one of them is caught on two busy processors.
const FIFOS: usize = 3000;
/// One swap in some hundred hits between two system calls of the import.
const ROUNDS: usize = 20;

#[test]
fn root_a_swapped_name_leads_to_no_other_file() {
    if !have_root() {
        return;
    }
    let base = tempfile::tempdir_in("/dev/shm").unwrap();
    let victim = base.path().join("victim");
    fs::write(&victim, "").unwrap();
    fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
    let mut layer = tar();
    for number in 0..FIFOS {
        layer = layer
            .mode(0o4777)
            .raw(format!("f{number}").as_bytes(), b'6', b"", 0, b"");
    }
    let layer = layer.end();
    let mut caught = 0;
    for round in 0..ROUNDS {
        let volume = base.path().join(format!("volume{round}"));
        let traps = base.path().join(format!("traps{round}"));
        fs::create_dir(&volume).unwrap();
        fs::create_dir(&traps).unwrap();
        for number in 0..FIFOS {
            symlink(&victim, traps.join(format!("f{number}"))).unwrap();
        }
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let attacker = scope.spawn(|| swap_each(&volume, &traps, &done));
            let options = ImportOptions::default();
            let stack = OverlayStack::new(&volume, []);
            let imported = import_into_upperdir(&layer[..], &stack, &options);
            caught += usize::from(imported.is_err());
            done.store(true, Ordering::Relaxed);
            attacker.join().unwrap();
        });
        let mode = fs::metadata(&victim).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600, "round {round}");
    }
    eprintln!("{caught} of {ROUNDS} imports were stopped by a swapped name");
}

/// Replaces each FIFO by a symlink as soon as it is there.
fn swap_each(volume: &Path, traps: &Path, done: &AtomicBool) {
    for number in 0..FIFOS {
        let name = format!("f{number}");
        while fs::symlink_metadata(volume.join(&name)).is_err() {
            if done.load(Ordering::Relaxed) {
                return;
            }
        }
        // The import has failed when it is gone.
        drop(fs::rename(traps.join(&name), volume.join(&name)));
    }
}
