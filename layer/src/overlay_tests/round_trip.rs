//! The property that all is about: what a program sees after export and import over the same lower
//! layers is what it saw before.

use std::collections::BTreeSet;
use std::path::PathBuf;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use super::have_root;
use super::mounted_overlay::OverlayDirs;
use super::random_operations::{Operation, operations, run};
use super::tree_state::{
    TreeState, differences, holes, link_groups, read_tree, without_upper_sockets,
};
use crate::export::export_with;
use crate::read_ahead::ReadAhead;
use crate::tar_read::{TarEntry, TarReader};
use crate::tar_write::TarWriter;
use crate::{
    ExportOptions, ExportStats, ImportOptions, OverlayStack, export_upperdir, import_into_upperdir,
};

/// What one case does: operations per lower layer, lowest first, then those of the container.
#[derive(Debug, Clone)]
struct Case {
    layers: Vec<Vec<Operation>>,
    changes: Vec<Operation>,
    tell_lowerdirs: bool,
    /// The container's overlay is mounted with `redirect_dir=on,metacopy=on`.
    renames: bool,
}

fn cases() -> impl Strategy<Value = Case> {
    let layers = proptest::collection::vec(operations(30), 1..4);
    (layers, operations(70), any::<bool>(), any::<bool>()).prop_map(
        |(layers, changes, tell, renames)| {
            // Without the lower layers, what was renamed cannot be exported.
            Case {
                layers,
                changes,
                tell_lowerdirs: tell || renames,
                renames,
            }
        },
    )
}

fn export(dirs: &OverlayDirs, upperdir: &std::path::Path, lowerdirs: &[PathBuf]) -> Vec<u8> {
    let stack = OverlayStack::new(upperdir, lowerdirs);
    let mut tar = Vec::new();
    let stats = export_upperdir(&stack, &mut tar, &ExportOptions::default()).unwrap();
    assert_eq!(stats.bytes, tar.len() as u64);
    // Who has loaded a file, and how it was opened, must not show.
    let mut alone = Vec::new();
    let stats_alone = export_with(
        &stack,
        TarWriter::new(&mut alone),
        &ExportOptions {
            in_use: true,
            ..ExportOptions::default()
        },
        ReadAhead::without_threads(),
    );
    assert_eq!(stats_alone.unwrap(), stats);
    assert!(alone == tar);
    assert!(dirs.base.path().is_dir());
    tar
}

/// Makes the lower layers and the upperdir of a case. Returns what the container saw at the end.
fn make_upper(dirs: &mut OverlayDirs, case: &Case) -> TreeState {
    run(&dirs.lowerdirs[0], &case.layers[0]);
    for layer in &case.layers[1..] {
        let mounted = dirs.mount();
        run(&dirs.merged, layer);
        drop(mounted);
        dirs.commit();
    }
    if case.renames {
        dirs.mount_options.push_str(",redirect_dir=on,metacopy=on");
    }
    let mounted = dirs.mount();
    run(&dirs.merged, &case.changes);
    let before = read_tree(&dirs.merged);
    drop(mounted);
    before
}

fn check(mut dirs: OverlayDirs, case: &Case) -> Result<(), TestCaseError> {
    let before = make_upper(&mut dirs, case);
    let told = if case.tell_lowerdirs {
        dirs.lowerdirs.clone()
    } else {
        Vec::new()
    };
    let tar = export(&dirs, &dirs.upperdir, &told);
    prop_assert!(
        tar == export(&dirs, &dirs.upperdir, &told),
        "two exports differ"
    );

    let original = dirs.new_upper();
    let stats = import_into_upperdir(&tar[..], &dirs.stack(), &ImportOptions::default()).unwrap();
    prop_assert_eq!(stats.bytes, tar.len() as u64);
    prop_assert_eq!(stats.implied_directories, 0);
    let before = without_upper_sockets(before, (!case.renames).then_some(&original));
    if !case.renames {
        // With renames, files move from the lower layers to the upperdir: no such comparison.
        prop_assert_eq!(link_groups(&original), link_groups(&dirs.upperdir));
        prop_assert_eq!(holes(&original), holes(&dirs.upperdir));
    }
    if stats.needless_whiteouts == 0 && case.tell_lowerdirs && !case.renames {
        let again = export(&dirs, &dirs.upperdir, &told);
        prop_assert!(tar == again, "an import exports to another layer");
    }
    let mounted = dirs.mount();
    let mut after = read_tree(&dirs.merged);
    drop(mounted);
    if case.renames {
        after = without_upper_sockets(after, None);
    }
    let found = differences(&before, &after);
    prop_assert!(found.is_empty(), "{}", found.join("\n"));
    Ok(())
}

/// The property is worth what the operations reach.
#[test]
fn root_random_operations_reach_every_kind_of_entry() {
    if !have_root() {
        return;
    }
    let mut runner = TestRunner::deterministic();
    let mut sum = ExportStats::default();
    let mut types = BTreeSet::new();
    let mut with_xattrs = 0;
    for _ in 0..150 {
        let case = cases().new_tree(&mut runner).unwrap().current();
        let mut dirs = OverlayDirs::in_memory();
        make_upper(&mut dirs, &case);
        let mut tar = Vec::new();
        let options = ExportOptions::default();
        let stats = export_upperdir(&dirs.stack(), &mut tar, &options).unwrap();
        sum.whiteouts += stats.whiteouts;
        sum.opaque_directories += stats.opaque_directories;
        sum.hard_links += stats.hard_links;
        sum.sparse_files += stats.sparse_files;
        sum.metacopy_files += stats.metacopy_files;
        sum.sockets += stats.sockets;
        sum.broken_lower_links += stats.broken_lower_links;
        let mut reader = TarReader::new(&tar[..]);
        let mut entry = TarEntry::default();
        while reader.next_entry(&mut entry).unwrap() {
            types.insert(format!("{:?}", entry.tar_type));
            with_xattrs += entry.xattrs.len();
        }
    }
    assert!(sum.whiteouts > 50, "{sum:?}");
    assert!(sum.opaque_directories > 15, "{sum:?}");
    assert!(sum.hard_links > 15, "{sum:?}");
    assert!(sum.sparse_files > 20, "{sum:?}");
    assert!(sum.metacopy_files > 5, "{sum:?}");
    assert!(sum.sockets > 5, "{sum:?}");
    assert!(sum.broken_lower_links > 0, "{sum:?}");
    assert!(with_xattrs > 50);
    let all = [
        "BlockDevice",
        "CharDevice",
        "Directory",
        "Fifo",
        "HardLink",
        "Regular",
        "Symlink",
    ];
    assert_eq!(types.iter().map(String::as_str).collect::<Vec<_>>(), all);
}

proptest! {
    // 256 cases, or as many as PROPTEST_CASES says.
    #![proptest_config(ProptestConfig { max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn root_round_trip_shows_the_same_tree(case in cases()) {
        if have_root() {
            check(OverlayDirs::in_memory(), &case)?;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn root_round_trip_on_disk_shows_the_same_tree(case in cases()) {
        if have_root() {
            check(OverlayDirs::on_disk(), &case)?;
        }
    }
}
