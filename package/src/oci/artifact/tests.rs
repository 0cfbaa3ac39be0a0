use std::fs;

use transship_checkpoint::store::Store;

use super::*;
use crate::oci::Layout;
use crate::oci::registry::tests::noise;
use crate::package_tests::{checkpoint_of, checkpoint_with, from_blobs, quickly};

/// Many small files are many blobs, each of which is read as one.
#[test]
fn small_files_fill_several_blobs() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let content = vec![7; 200 << 10];
    let names: Vec<_> = (0..100).map(|at| format!("small-{at}")).collect();
    let more: Vec<_> = { names.iter() }
        .map(|it| (it.as_str(), &content[..]))
        .collect();
    let checkpoint = checkpoint_with(root, &vec![1; 1 << 20], &more);
    let layout = Layout::create(&root.join("layout")).unwrap();
    store(&checkpoint, &quickly(), &layout, "one", &mut |_| {}).unwrap();
    let artifact = Manifest::parse(&layout.manifest("one", ARTIFACT_LIMIT).unwrap()).unwrap();
    let files: Vec<_> = { artifact.layers.iter() }
        .filter(|it| it.media_type == FILES)
        .collect();
    assert!((3..8).contains(&files.len()), "{files:?}");
    for blob in files {
        let packed = layout.get(blob, FILES_LIMIT).unwrap();
        let tar = zstd::decode_all(&packed[..]).unwrap();
        assert!(tar.len() as u64 <= FILES_BLOB + (64 << 10), "{}", tar.len());
    }
    let target = Store::at(root.join("target"));
    from_blobs(&layout, "one", &target).unwrap();
}

/// All that is on its way at once, in the most memory that there ever was.
#[test]
fn chunks_on_their_way_take_little_memory() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let checkpoint = checkpoint_of(root, &noise(128 << 20));
    let layout = Layout::create(&root.join("layout")).unwrap();
    let peak = || {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|it| it.starts_with("VmHWM:")).unwrap();
        let kilobytes = line.split_whitespace().nth(1).unwrap();
        kilobytes.parse::<u64>().unwrap() >> 10
    };
    // As long as they are in checkpoints of so many bytes.
    for (gibibytes, most) in [(1, 32), (12, 56), (96, 100)] {
        fs::write("/proc/self/clear_refs", "5").unwrap();
        let before = peak();
        let size = ChunkSize::of(gibibytes << 30);
        let figures = Figures::default();
        store_large(&checkpoint, 1, &layout, size, &figures, &mut |_| {}).unwrap();
        let taken = peak() - before;
        println!("{gibibytes} GiB: {taken} MiB");
        assert!(
            taken < most,
            "{gibibytes} GiB: {before} MiB, and {taken} MiB more"
        );
    }
}

#[test]
fn what_no_manifest_can_name_is_refused_before_it_is_sent() {
    let length = |gibibytes: u64| {
        let bytes = gibibytes << 30;
        least_length("web/checkpoint/pages-1.img", bytes, ChunkSize::of(bytes))
    };
    check_length(length(90)).unwrap();
    let longest = ChunkSize::of(96 << 30).longest();
    assert!(
        compress_bound(longest) as u64 <= CHUNK_LIMIT,
        "no reader takes it"
    );
    let error = check_length(length(120)).unwrap_err().to_string();
    assert!(error.contains("100 GB"), "{error}");
}
