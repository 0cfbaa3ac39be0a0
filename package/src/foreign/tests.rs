//! Archives of other engines that are not as they should be: one error each, and nothing is left.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use serde_json::json;
use tar::EntryType;
use transship_checkpoint::store::{Checkpoint, Store};

use super::*;
use crate::import::{Imported, import};
use crate::package_tests::{one_line, options, tar_of};

type Members = Vec<(String, EntryType, Vec<u8>)>;

const DIGEST: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// Files of the package that is kept as a test of format 1.
fn fixture() -> std::collections::BTreeMap<String, Vec<u8>> {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/format-1.package"
    );
    let package = fs::read(path).unwrap();
    let tar = zstd::stream::read::Decoder::new(&package[..]).unwrap();
    let mut files = std::collections::BTreeMap::new();
    for entry in tar::Archive::new(tar).entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().to_str().unwrap().to_owned();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        files.insert(path, bytes);
    }
    files
}

/// What containerd's CRI writes.
fn archive() -> Members {
    let files = fixture();
    let config = json!({
        "id": "1f0c", "name": "web", "rootfsImageName": "docker.io/library/web:1",
        "rootfsImageRef": format!("docker.io/library/web@{DIGEST}"),
        "checkpointedTime": "2026-11-26T09:27:01Z"});
    let spec = json!({"ociVersion": "1.2.1", "annotations": {
        "io.kubernetes.cri.container-name": "web", "io.kubernetes.cri.sandbox-name": "web",
        "io.kubernetes.cri.sandbox-namespace": "shop"}});
    let mut members = vec![
        ("checkpoint/inventory.img".to_owned(), b"inventory".to_vec()),
        ("checkpoint/pstree.img".to_owned(), b"pstree".to_vec()),
        ("config.dump".to_owned(), config.to_string().into_bytes()),
        ("spec.dump".to_owned(), spec.to_string().into_bytes()),
        (
            "status.dump".to_owned(),
            br#"{"labels": {"a": "b"}}"#.to_vec(),
        ),
    ];
    for path in [
        "checkpoint/core-15652.img",
        "checkpoint/pages-1.img",
        "rootfs-diff.tar",
    ] {
        members.push((path.to_owned(), files[&format!("web/{path}")].clone()));
    }
    let regular = |(path, bytes)| (path, EntryType::Regular, bytes);
    members.into_iter().map(regular).collect()
}

fn tar(members: &Members) -> Vec<u8> {
    let each = members.iter();
    let members: Vec<_> = each
        .map(|(path, kind, bytes)| (path.as_str(), *kind, bytes.as_slice()))
        .collect();
    tar_of(&members)
}

/// Reads an archive, of which nothing may be left when that fails.
fn read(root: &Path, bytes: &[u8], options: &ImportOptions) -> Result<Checkpoint, PackageError> {
    let store = Store::at(root.join("target"));
    let read = import(bytes, &store, options, &mut |_| {}).and_then(|imported| match imported {
        Imported::Foreign(foreign) => foreign.commit(DIGEST, DIGEST),
        Imported::Checkpoint(checkpoint) => panic!("{checkpoint:?}"),
    });
    match &read {
        Ok(checkpoint) => {
            checkpoint.verify().unwrap();
            store.remove(&checkpoint.manifest.name).unwrap();
        }
        Err(_) => {
            let left = fs::read_dir(store.root()).map_or(0, Iterator::count);
            assert_eq!(left, 0, "something is left");
        }
    }
    read
}

#[test]
fn an_archive_becomes_a_checkpoint_however_it_is_compressed() {
    let root = tempfile::tempdir().unwrap();
    let plain = tar(&archive());
    let zstd = zstd::bulk::compress(&plain, 1).unwrap();
    for bytes in [&plain, &zstd] {
        let made = read(root.path(), bytes, &options()).unwrap().manifest;
        assert_eq!(
            (made.name.as_str(), made.created),
            ("archive", 1_795_685_221)
        );
        assert_eq!(made.pod.as_ref().unwrap().namespace, "shop");
        let container = &made.containers[0];
        assert_eq!((container.name.as_str(), container.files.len()), ("web", 6));
        assert_eq!(container.labels["a"], "b");
    }
}

/// Members that are not taken have names as well, and zstd makes nothing of a million of them.
#[test]
fn names_of_members_have_an_end() {
    let root = tempfile::tempdir().unwrap();
    let with = |more: usize| {
        let mut builder = tar::Builder::new(Vec::new());
        let more = (0..more).map(|nth| {
            let path = format!("artifacts/{nth}/{}", "x".repeat(4000));
            (path, EntryType::Regular, Vec::new())
        });
        for (path, kind, bytes) in archive().into_iter().chain(more) {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(bytes.len() as u64);
            header.set_mode(0o600);
            builder.append_data(&mut header, path, &bytes[..]).unwrap();
        }
        read(root.path(), &builder.into_inner().unwrap(), &options())
    };
    with(100).unwrap();
    let error = with(5000).unwrap_err();
    assert!(one_line(&error).contains("names"), "{error}");
}

#[test]
fn an_archive_that_is_cut_off_or_changed_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let plain = tar(&archive());
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.include_checksum(true).unwrap();
    encoder.write_all(&plain).unwrap();
    let zstd = encoder.finish().unwrap();
    for bytes in [&plain, &zstd] {
        for part in 0..16 {
            let cut = &bytes[..bytes.len() * part / 16];
            assert!(read(root.path(), cut, &options()).is_err(), "{part}/16");
        }
    }
    // These archives have no digests: what is changed within a file is not seen, unless they are compressed.
    for at in (0..plain.len()).step_by(97) {
        let mut flipped = plain.clone();
        flipped[at] ^= 4;
        drop(read(root.path(), &flipped, &options()));
    }
    for at in (4..zstd.len()).step_by(53) {
        let mut flipped = zstd.clone();
        flipped[at] ^= 4;
        if let Ok(made) = read(root.path(), &flipped, &options()) {
            assert_eq!(made.manifest.containers[0].files.len(), 6, "{at}");
        }
    }
}

#[test]
fn each_fault_of_an_archive_has_one_clear_error() {
    let root = tempfile::tempdir().unwrap();
    let with = |path: &str, kind, bytes: &[u8]| {
        let mut members = archive();
        members.retain(|(other, ..)| other != path);
        members.push((path.to_owned(), kind, bytes.to_vec()));
        tar(&members)
    };
    let twice = |path: &str| {
        let mut members = archive();
        let again = members.iter().find(|it| it.0 == path).unwrap().clone();
        members.push(again);
        tar(&members)
    };
    let without = |path: &str| {
        let mut members = archive();
        members.retain(|it| it.0 != path);
        tar(&members)
    };
    // The header claims 10 GiB of what comes last.
    let claims = |path: &str| {
        let bytes = with(path, EntryType::Regular, b"");
        let at = bytes.len() - 1024 - 512;
        let mut header = tar::Header::from_byte_slice(&bytes[at..at + 512]).clone();
        header.set_size(10 << 30);
        header.set_cksum();
        [&bytes[..at], header.as_bytes(), &[0; 4096]].concat()
    };
    use EntryType::{Link, Regular, Symlink};
    let cases = [
        (
            without("checkpoint/inventory.img"),
            "ends before checkpoint/inventory.img",
        ),
        (
            without("checkpoint/pstree.img"),
            "ends before checkpoint/pstree.img",
        ),
        (without("spec.dump"), "ends before spec.dump"),
        (without("config.dump"), "ends before config.dump"),
        (twice("checkpoint/pages-1.img"), "it is there twice"),
        (twice("config.dump"), "it is there twice"),
        (twice("rootfs-diff.tar"), "it is there twice"),
        (with("config.dump", Regular, b"{"), "cannot be parsed"),
        (with("config.dump", Regular, b"{}"), "names no container"),
        (with("spec.dump", Regular, b"no JSON"), "cannot be parsed"),
        (
            with("deleted.files", Regular, b"[\"/../x\"]"),
            "no path of a file",
        ),
        (
            with("checkpoint/parent", Symlink, b""),
            "only regular files",
        ),
        (
            with("checkpoint/pages-2.img", Link, b""),
            "only regular files",
        ),
        (with("checkpoint/../../x", Regular, b"x"), "leads elsewhere"),
        (
            with("checkpoint/evil.sh", Regular, b"x"),
            "no image of CRIU",
        ),
        (
            with("pre-checkpoint/pages-1.img", Regular, b"x"),
            "before the last one",
        ),
        (claims("config.dump"), "claims 10737418240 bytes"),
        (claims("checkpoint/pages-1.img"), "package"),
        (claims("rootfs-diff.tar"), "package"),
    ];
    for (at, (bytes, said)) in cases.iter().enumerate() {
        let line = one_line(&read(root.path(), bytes, &options()).unwrap_err());
        assert!(line.contains(said), "{at}, {said}: {line}");
    }
    let other = ImportOptions {
        architecture: "aarch64".into(),
        ..options()
    };
    let error = read(root.path(), &tar(&archive()), &other).unwrap_err();
    let line = error.to_string();
    assert_eq!(
        line,
        "the package is of x86_64, and this machine is aarch64"
    );
    // What is claimed, and what a small layer grows to, count before they are on the disk.
    let small = || ImportOptions {
        max_bytes: 40 << 20,
        ..options()
    };
    let zeros = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    for bytes in [
        with("rootfs-diff.tar", Regular, &zeros),
        claims("checkpoint/pages-1.img"),
    ] {
        let line = read(root.path(), &bytes, &small()).unwrap_err().to_string();
        assert!(line.contains("--max-size"), "{line}");
    }
}
