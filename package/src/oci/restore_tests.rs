//! What somebody has pushed whose digests are all right, and who lies all the same.

use std::fs;
use std::path::Path;

use tar::EntryType::Regular;
use transship_checkpoint::manifest;

use super::*;
use crate::oci::registry::tests::noise;
use crate::oci::{Layout, store};
use crate::package_tests::{checkpoint_of, from_blobs, one_line, quickly, tar_of};

fn put(layout: &Layout, media_type: &str, bytes: &[u8]) -> Descriptor {
    layout.put(&digest_of(bytes), bytes).unwrap();
    Descriptor::new(media_type, bytes)
}

fn packed(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// The artifact that the tag `one` names, changed.
fn refused(layout: &Layout, root: &Path, lie: impl FnOnce(&mut Manifest)) -> String {
    let mut artifact = Manifest::parse(&layout.manifest("one", 1 << 20).unwrap()).unwrap();
    lie(&mut artifact);
    let json = artifact.to_json();
    layout.put_manifest(MANIFEST, &json, Some("lie")).unwrap();
    let target = Store::at(root.join("target"));
    let error = from_blobs(layout, "lie", &target).unwrap_err();
    let left = fs::read_dir(target.root()).map_or(0, Iterator::count);
    assert_eq!(left, 0, "something is left: {error}");
    one_line(&error)
}

#[test]
fn a_manifest_that_lies_is_refused_before_a_byte_is_written() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let checkpoint = checkpoint_of(root, &noise(1 << 20));
    let layout = Layout::create(&root.join("layout")).unwrap();
    store(&checkpoint, &quickly(), &layout, "one", &mut |_| {}).unwrap();
    type Lie = fn(&mut manifest::Manifest);
    let lies: [(Lie, &str); 6] = [
        (|it| it.format.version = 2, "format version 2"),
        (|it| it.format.features.push("more".into()), "\"more\""),
        (|it| it.source.architecture = "s390x".into(), "is of s390x"),
        (
            |it| it.containers[0].files[1].size = 10 << 40,
            "free on the disk",
        ),
        (
            |it| it.containers[0].files[1].path = "../x".into(),
            "not a plain name",
        ),
        (
            |it| {
                let twice = it.containers[0].files[1].clone();
                it.containers[0].files.push(twice);
            },
            "twice",
        ),
    ];
    for (lie, said) in lies {
        let mut changed = checkpoint.manifest.clone();
        lie(&mut changed);
        let line = refused(&layout, root, |artifact| {
            artifact.config = put(&layout, &artifact.config.media_type, &changed.to_json());
        });
        assert!(line.contains(said), "{said}: {line}");
    }
}

#[test]
fn chunks_that_lie_are_one_error() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let checkpoint = checkpoint_of(root, &noise(1 << 20));
    let layout = Layout::create(&root.join("layout")).unwrap();
    store(&checkpoint, &quickly(), &layout, "one", &mut |_| {}).unwrap();
    let chunk = |artifact: &Manifest| {
        let mut layers = artifact.layers.iter();
        layers.position(|it| it.media_type == CHUNK).unwrap()
    };
    let annotate = |artifact: &mut Manifest, name: &str, value: &str| {
        let at = chunk(artifact);
        let annotations = &mut artifact.layers[at].annotations;
        annotations.insert(name.to_owned(), value.to_owned());
    };
    let line = refused(&layout, root, |it| drop(it.layers.remove(chunk(it))));
    assert!(line.contains("pages-1.img"), "missing: {line}");
    for (name, value, said) in [
        (OFFSET, "4096", "pages-1.img"),
        (OFFSET, "18446744073709551615", "outside of its file"),
        (OFFSET, "1048576", "outside of its file"),
        (OFFSET, "-1", "where it belongs"),
        (LENGTH, "99999999", "outside of its file"),
        (LENGTH, "4096", "package"),
        (PATH, "c/../../x", "no large file"),
        (PATH, "c/spec.dump", "no large file"),
    ] {
        let line = refused(&layout, root, |it| annotate(it, name, value));
        assert!(line.contains(said), "{name} {value}: {line}");
    }
    // A small blob that becomes large.
    let bomb = put(&layout, CHUNK, &packed(&vec![0; 64 << 20]));
    let line = refused(&layout, root, |it| {
        let at = chunk(it);
        let annotations = std::mem::take(&mut it.layers[at].annotations);
        it.layers[at] = Descriptor {
            annotations,
            ..bomb
        };
    });
    assert!(line.contains("package"), "{line}");
}

#[test]
fn small_files_that_lie_are_one_error() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let checkpoint = checkpoint_of(root, &noise(1 << 20));
    let layout = Layout::create(&root.join("layout")).unwrap();
    store(&checkpoint, &quickly(), &layout, "one", &mut |_| {}).unwrap();
    let inventory = ("c/checkpoint/inventory.img", Regular, &b"inventory"[..]);
    let spec = ("c/spec.dump", Regular, &b"{}"[..]);
    let zeros = vec![0; 1 << 20];
    for (members, said) in [
        (vec![inventory], "ends before c/spec.dump"),
        (vec![inventory, spec, spec], "there twice"),
        (vec![inventory, spec, ("../x", Regular, b"x")], "\"../x\""),
        (
            vec![inventory, ("c/spec.dump", Regular, &zeros[..])],
            "does not know it so",
        ),
        (
            vec![inventory, ("c/spec.dump", Regular, b"[]")],
            "spec.dump",
        ),
    ] {
        let files = put(&layout, FILES, &packed(&tar_of(&members)));
        let line = refused(&layout, root, |artifact| {
            let mut layers = artifact.layers.iter_mut();
            *layers.find(|it| it.media_type == FILES).unwrap() = files;
        });
        assert!(line.contains(said), "{said}: {line}");
    }
    let line = refused(&layout, root, |artifact| {
        artifact.layers.retain(|it| it.media_type != FILES);
    });
    assert!(line.contains("its small files"), "{line}");
}

/// Where an index has a tag instead of a digest, what was asked for by its digest would be something else tomorrow; and a
/// path would lead to another repository.
#[test]
fn an_index_names_digests_alone() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let checkpoint = checkpoint_of(root, b"pages");
    let layout = Layout::create(&root.join("layout")).unwrap();
    store(&checkpoint, &quickly(), &layout, "one", &mut |_| {}).unwrap();
    for name in ["one", "../manifests/one", "sha256:one", ""] {
        let entry = Descriptor {
            digest: name.to_owned(),
            media_type: MANIFEST.to_owned(),
            artifact_type: Some(ARTIFACT.to_owned()),
            ..Descriptor::default()
        };
        let index = Index {
            manifests: vec![entry],
            ..Index::default()
        };
        let json = index.to_json();
        layout.put_manifest("index", &json, Some("lie")).unwrap();
        let offered = Offered::read(&layout, &digest_of(&json), &Identities::default(), None);
        let error = offered.unwrap_err();
        assert!(one_line(&error).contains("digest"), "{name}: {error}");
    }
}
