//! A checkpoint with its image in a small registry over HTTP.

use std::fs;
use std::io::{self, Read};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;
use transship_checkpoint::store::Store;

use super::*;
use crate::encryption::Identities;
use crate::oci::document::Manifest;
use crate::oci::registry::server::{Asked, Mood, Server};
use crate::oci::registry::tests::{PATIENCE, noise, registry};
use crate::oci::{BaseLayer, Offered};
use crate::package_tests::{checkpoint_with, from_blobs, one_line, quickly, tar_of};

const BASE_LAYER: &[u8] = b"a layer, of which nobody looks at the content";

/// A checkpoint of some chunks that has changed a file.
fn checkpoint(root: &Path) -> Checkpoint {
    let layer = tar_of(&[("data/file", tar::EntryType::Regular, b"changed")]);
    checkpoint_with(root, &noise(1 << 20), &[(ROOTFS_DIFF_FILE, &layer)])
}

fn bases<'a>(open: &'a OpenBlob<'a>) -> Bases<'a> {
    Bases {
        images: vec![Base {
            container: "c".into(),
            config: br#"{"architecture": "amd64", "os": "linux", "config": {"Cmd": ["/web"]},
                         "rootfs": {"type": "layers", "diff_ids": ["sha256:1"]}}"#
                .to_vec(),
            layers: vec![BaseLayer {
                descriptor: Descriptor::new("application/vnd.oci.image.layer.v1.tar", BASE_LAYER),
                diff_id: "sha256:1".into(),
                repositories: vec!["../x".into(), "shop/web".into(), "library/web".into()],
            }],
        }],
        open,
    }
}

fn gives_base(_digest: &str) -> io::Result<Box<dyn Read + Send>> {
    Ok(Box::new(BASE_LAYER))
}

fn push_to(server: &Server, checkpoint: &Checkpoint) -> Result<Pushed, PackageError> {
    let registry = registry(server, PATIENCE, None);
    push(
        checkpoint,
        &quickly(),
        &bases(&gives_base),
        &registry,
        "1",
        &mut |_| {},
    )
}

fn json(server: &Server, reference: &str) -> Value {
    serde_json::from_slice(&server.manifest(reference).unwrap()).unwrap()
}

#[test]
fn a_tag_names_an_image_and_the_checkpoint() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let checkpoint = checkpoint(root);
    let server = Server::start();
    let pushed = push_to(&server, &checkpoint).unwrap();
    assert_eq!(pushed.stored.blobs, pushed.stored.new_blobs);
    let index = json(&server, "1");
    assert_eq!(
        digest_of(&server.manifest("1").unwrap()),
        pushed.stored.digest
    );
    // An engine that finds these here takes the image for its own kind of checkpoint, and does not start it.
    assert!(index["annotations"].is_null());
    let (image, artifact) = (&index["manifests"][0], &index["manifests"][1]);
    assert_eq!(image["digest"], pushed.images[0].digest);
    assert_eq!(image["platform"]["architecture"], "amd64");
    assert_eq!(artifact["digest"], pushed.artifact);
    assert!(artifact["platform"].is_null());
    assert_eq!(
        artifact["annotations"]["org.criu.checkpoint.container.name"],
        "c"
    );
    let manifest = json(&server, &pushed.images[0].digest);
    let top = manifest["layers"][1]["digest"].as_str().unwrap();
    let mut tar = Vec::new();
    let packed = server.blob(top).unwrap();
    flate2::read::GzDecoder::new(&packed[..])
        .read_to_end(&mut tar)
        .unwrap();
    assert!(String::from_utf8_lossy(&tar).contains("changed"));
    let config = server
        .blob(manifest["config"]["digest"].as_str().unwrap())
        .unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["rootfs"]["diff_ids"][1], digest_of(&tar));
    assert_eq!(config["config"]["Cmd"][0], "/web");
    let base = manifest["layers"][0]["digest"].as_str().unwrap();
    assert_eq!(server.blob(base).unwrap(), BASE_LAYER);

    // Another attempt sends nothing.
    server.is_in(|_, _| Mood::Good);
    let again = push_to(&server, &checkpoint).unwrap();
    assert_eq!(
        (again.stored.new_blobs, &again.artifact),
        (0, &pushed.artifact)
    );
    let puts = |asked: &Asked| asked.method == "PUT" && asked.path.contains("/blobs/");
    assert!(!server.asked().iter().any(puts));

    // By the tag, by the digest of either; not by that of the image.
    let target = Store::at(root.join("target"));
    let registry = registry(&server, PATIENCE, None);
    for reference in ["1", &pushed.stored.digest, &pushed.artifact] {
        let back = from_blobs(&registry, reference, &target).unwrap();
        assert_eq!(back.manifest, checkpoint.manifest);
        target.remove("web").unwrap();
    }
    let error = Offered::read(
        &registry,
        &pushed.images[0].digest,
        &Identities::default(),
        None,
    )
    .unwrap_err();
    assert!(error.to_string().contains("is no checkpoint"), "{error}");
}

#[test]
fn an_index_that_was_copied_by_others_is_read() {
    let root = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(root.path());
    let server = Server::start();
    push_to(&server, &checkpoint).unwrap();
    let registry = registry(&server, PATIENCE, None);
    let mut index = Index::parse(&server.manifest("1").unwrap()).unwrap();
    // skopeo 1.9 leaves these out.
    index.manifests[1].artifact_type = None;
    index.manifests[1].annotations.clear();
    registry
        .put_manifest(INDEX, &index.to_json(), Some("copied"))
        .unwrap();
    Offered::read(&registry, "copied", &Identities::default(), None).unwrap();
    // One that has lost the checkpoint.
    let artifact = index.manifests.pop();
    registry
        .put_manifest(INDEX, &index.to_json(), Some("lost"))
        .unwrap();
    let error = Offered::read(&registry, "lost", &Identities::default(), None).unwrap_err();
    assert!(
        error.to_string().contains("lost is no checkpoint"),
        "{error}"
    );
    // One whose entry is another manifest than it says.
    index.manifests.extend(artifact);
    server.is_in(
        |asked, nth| match asked.path.contains("/manifests/") && nth > 0 {
            true => Mood::Lie,
            false => Mood::Good,
        },
    );
    let error = Offered::read(&registry, "1", &Identities::default(), None).unwrap_err();
    assert!(error.to_string().contains("its digest differs"), "{error}");
}

#[test]
fn a_registry_that_has_the_base_is_not_sent_it() {
    let root = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(root.path());
    let server = Server::start();
    server.has_elsewhere("library/web", BASE_LAYER);
    let registry = registry(&server, PATIENCE, None);
    let refuses = |digest: &str| -> io::Result<Box<dyn Read + Send>> { panic!("{digest} is read") };
    server.is_in(|_, _| Mood::Good);
    let pushed = push(
        &checkpoint,
        &quickly(),
        &bases(&refuses),
        &registry,
        "1",
        &mut |_| {},
    );
    let pushed = pushed.unwrap();
    assert_eq!(pushed.stored.mounted_bytes, BASE_LAYER.len() as u64);
    // Nobody is asked for a name that leads elsewhere, nor for the repository itself.
    let asked = server.asked();
    let mounts = asked.iter().filter(|it| it.path.contains("mount="));
    assert_eq!(mounts.count(), 1);
    // One that may not be read is no reason to fail.
    server.forget_everything();
    server.is_in(|asked, _| match asked.path.contains("mount=") {
        true => Mood::Status("403 Forbidden", ""),
        false => Mood::Good,
    });
    let pushed = push_to(&server, &checkpoint).unwrap();
    assert_eq!(pushed.stored.mounted_bytes, 0);
}

#[test]
fn the_checkpoint_is_found_from_its_image() {
    let root = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(root.path());
    let server = Server::start();
    let pushed = push_to(&server, &checkpoint).unwrap();
    let artifact = Manifest::parse(&server.manifest(&pushed.artifact).unwrap()).unwrap();
    let image = pushed.images[0].digest.clone();
    assert_eq!(artifact.subject.unwrap().digest, image);
    let tag = image.replace(':', "-");
    let list = json(&server, &tag);
    let listed = list["manifests"].as_array().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0]["digest"], pushed.artifact);
    assert_eq!(listed[0]["artifactType"], ARTIFACT);
    assert_eq!(
        listed[0]["annotations"]["io.podman.annotations.checkpoint.name"],
        "c"
    );
    // Again, and another checkpoint of an equal container.
    push_to(&server, &checkpoint).unwrap();
    let registry = registry(&server, PATIENCE, None);
    let other = Descriptor::new(MANIFEST, b"{}");
    let subject = Descriptor {
        digest: image,
        ..Descriptor::default()
    };
    registry
        .put_referrer(b"{}", &other, Some(&subject))
        .unwrap();
    assert_eq!(
        json(&server, &tag)["manifests"].as_array().unwrap().len(),
        2
    );
    // Something else that has this name is left alone.
    registry
        .put_manifest(MANIFEST, &Manifest::default().to_json(), Some(&tag))
        .unwrap();
    let error = push_to(&server, &checkpoint).unwrap_err();
    assert!(
        error.to_string().contains("is no list of artifacts"),
        "{error}"
    );
    // A registry that keeps the list itself.
    server.forget_everything();
    server.knows_subjects();
    push_to(&server, &checkpoint).unwrap();
    assert!(server.manifest(&tag).is_none());
}

#[test]
fn several_checkpoints_are_named_by_their_digests() {
    let root = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(root.path());
    let server = Server::start();
    let pushed = push_to(&server, &checkpoint).unwrap();
    let registry = registry(&server, PATIENCE, None);
    let artifact = server.manifest(&pushed.artifact).unwrap();
    let mut second = Manifest::parse(&artifact).unwrap();
    second.annotations.clear();
    let second = second.to_json();
    registry.put_manifest(MANIFEST, &second, None).unwrap();
    let entries = [&artifact, &second].map(|json| Descriptor::new(MANIFEST, json));
    let index = Index {
        manifests: entries.into(),
        ..Index::default()
    };
    registry
        .put_manifest(INDEX, &index.to_json(), Some("both"))
        .unwrap();
    let error = Offered::read(&registry, "both", &Identities::default(), None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("both has 2 checkpoints"), "{error}");
    assert!(
        error.contains(&pushed.artifact) && error.contains(&digest_of(&second)),
        "{error}"
    );
}

#[test]
fn a_push_of_an_image_gets_through_whatever_fails_once() {
    let root = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(root.path());
    let server = Server::start();
    server.is_in(|_, _| Mood::Good);
    push_to(&server, &checkpoint).unwrap();
    let requests = server.asked().len();
    for mood in [Mood::Status("500 Internal Server Error", ""), Mood::Cut(0)] {
        for bad in 0..requests {
            server.forget_everything();
            server.is_in(move |_, nth| if nth == bad { mood } else { Mood::Good });
            push_to(&server, &checkpoint)
                .unwrap_or_else(|error| panic!("{mood:?}, {bad}: {error}"));
            server.is_in(|_, _| Mood::Good);
            let registry = registry(&server, PATIENCE, None);
            Offered::read(&registry, "1", &Identities::default(), None).unwrap();
        }
    }
}

#[test]
fn a_base_that_cannot_be_read_is_one_error_and_no_tag() {
    let root = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(root.path());
    let server = Server::start();
    let registry = registry(&server, PATIENCE, None);
    let opened = AtomicUsize::new(0);
    let fails = |_: &str| -> io::Result<Box<dyn Read + Send>> {
        opened.fetch_add(1, Ordering::Relaxed);
        Err(io::Error::other("containerd is gone"))
    };
    let ends = |_: &str| -> io::Result<Box<dyn Read + Send>> { Ok(Box::new(&BASE_LAYER[..5])) };
    let open: [(&OpenBlob<'_>, &str); 2] = [(&fails, "containerd is gone"), (&ends, "end of file")];
    for (open, said) in open {
        let pushed = push(
            &checkpoint,
            &quickly(),
            &bases(open),
            &registry,
            "1",
            &mut |_| {},
        );
        let line = one_line(&pushed.unwrap_err());
        assert!(
            line.contains("cannot be read") && line.contains(said),
            "{line}"
        );
        assert!(server.manifest("1").is_none());
    }
    assert_eq!(opened.load(Ordering::Relaxed), 1);
}

#[test]
fn each_container_of_a_pod_has_an_image() {
    let root = tempfile::tempdir().unwrap();
    let mut checkpoint = checkpoint(root.path());
    let mut second = checkpoint.manifest.containers[0].clone();
    second.name = "d".into();
    let from = checkpoint.dir.join("c");
    let to = checkpoint.dir.join("d");
    fs::create_dir_all(to.join("checkpoint")).unwrap();
    for file in &second.files {
        fs::copy(from.join(&file.path), to.join(&file.path)).unwrap();
    }
    checkpoint.manifest.containers.push(second);
    let json = checkpoint.manifest.to_json();
    fs::write(checkpoint.dir.join("transship.json"), json).unwrap();
    let server = Server::start();
    let opened = AtomicUsize::new(0);
    let counts = |digest: &str| {
        opened.fetch_add(1, Ordering::Relaxed);
        gives_base(digest)
    };
    let mut bases = bases(&counts);
    let mut other = bases.images[0].clone();
    other.container = "d".into();
    bases.images.push(other);
    let registry = registry(&server, PATIENCE, None);
    let pushed = push(&checkpoint, &quickly(), &bases, &registry, "1", &mut |_| {}).unwrap();
    // They have the base in common.
    assert_eq!(opened.load(Ordering::Relaxed), 1);
    let names: Vec<_> = pushed
        .images
        .iter()
        .map(|it| it.container.as_str())
        .collect();
    assert_eq!(names, ["c", "d"]);
    let index = self::json(&server, "1");
    let listed = index["manifests"].as_array().unwrap();
    assert_eq!(listed.len(), 3);
    assert_eq!(listed[1]["digest"], pushed.images[1].digest);
    let artifact = self::json(&server, &pushed.artifact);
    assert_eq!(artifact["subject"]["digest"], pushed.images[0].digest);
    assert_eq!(
        artifact["annotations"]["org.criu.checkpoint.container.name"],
        "c,d"
    );
    let target = Store::at(root.path().join("target"));
    let back = from_blobs(&registry, "1", &target).unwrap();
    assert_eq!(back.manifest, checkpoint.manifest);
}

#[test]
fn what_is_only_in_the_artifact_is_said_in_words() {
    let left_out = LeftOut {
        path: "data/file".into(),
        what: NotInImages::Attribute("trusted.x".into()),
    };
    let said = OnlyInArtifact::from(&left_out);
    assert_eq!(said.path, "/data/file");
    assert!(said.reason.contains("trusted.x"), "{said:?}");
}
