//! The property that all is about: what a program sees after export and import over the same lower
//! layers is what it saw before.

use std::path::PathBuf;

use proptest::prelude::*;

use super::have_root;
use super::mounted_overlay::OverlayDirs;
use super::random_operations::{Operation, operations, run};
use super::tree_state::{differences, holes, link_groups, read_tree, without_upper_sockets};
use crate::{ExportOptions, ImportOptions, export_upperdir, import_into_upperdir};

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
    let layers = proptest::collection::vec(operations(25), 1..4);
    (layers, operations(40), any::<bool>(), any::<bool>()).prop_map(
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
    let mut tar = Vec::new();
    let stats = export_upperdir(upperdir, lowerdirs, &mut tar, &ExportOptions::default()).unwrap();
    assert_eq!(stats.bytes, tar.len() as u64);
    assert!(dirs.base.path().is_dir());
    tar
}

fn check(mut dirs: OverlayDirs, case: &Case) -> Result<(), TestCaseError> {
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
    let stats = import_into_upperdir(
        &tar[..],
        &dirs.upperdir,
        &dirs.lowerdirs,
        &ImportOptions::default(),
    )
    .unwrap();
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
