//! Packages written and read, and what is done about those that are not as they should be.

use std::fs;
use std::path::Path;

use transship_checkpoint::manifest::{Container, File, Manifest, Source};
use transship_checkpoint::sealed::{PACKAGE_FILE, Sealed};
use transship_checkpoint::store::{Checkpoint, Durability, Store, digest_files};
use transship_digest::sha256_hex;
pub(crate) use transship_path_error::one_line;

use super::*;
use crate::encryption::{Identities, Recipients};
use crate::export::{ExportOptions, export};
use crate::import::{ImportOptions, Imported, import};
use crate::open_package::OpenPackage;
use crate::signature::{Signer, TrustedKeys};

const ARCHITECTURE: &str = "x86_64";

fn checkpoint(root: &Path) -> Checkpoint {
    let mut pages = vec![0; 3 << 20];
    for (at, byte) in pages.iter_mut().enumerate().take(1 << 20) {
        *byte = at.to_le_bytes()[0] ^ at.to_le_bytes()[1];
    }
    checkpoint_of(root, &pages)
}

/// A checkpoint of a container with these pages, below `root`.
pub(crate) fn checkpoint_of(root: &Path, pages: &[u8]) -> Checkpoint {
    checkpoint_with(root, pages, &[])
}

/// The same with more files.
pub(crate) fn checkpoint_with(root: &Path, pages: &[u8], more: &[(&str, &[u8])]) -> Checkpoint {
    let store = Store::at(root.join("source"));
    let draft = store.draft("web").unwrap();
    let dir = draft.dir().join("c");
    fs::create_dir_all(dir.join("checkpoint")).unwrap();
    fs::write(dir.join("checkpoint/pages-1.img"), pages).unwrap();
    fs::write(dir.join("checkpoint/inventory.img"), b"inventory").unwrap();
    fs::write(dir.join("spec.dump"), b"{}").unwrap();
    for (name, bytes) in more {
        fs::write(dir.join(name), bytes).unwrap();
    }
    let files = digest_files(&dir).unwrap();
    let manifest = Manifest {
        name: "web".into(),
        created: 1_700_000_000,
        source: Source {
            architecture: ARCHITECTURE.into(),
            ..Source::default()
        },
        containers: vec![Container {
            name: "c".into(),
            files,
            ..Container::default()
        }],
        ..Manifest::default()
    };
    draft.commit(manifest, Durability::Ephemeral).unwrap()
}

pub(crate) fn options() -> ImportOptions {
    ImportOptions {
        name: None,
        name_without: "archive".into(),
        identities: Identities::default(),
        trusted: TrustedKeys::default(),
        max_bytes: u64::MAX,
        architecture: ARCHITECTURE.into(),
    }
}

fn packed(checkpoint: &Checkpoint, options: &ExportOptions) -> Vec<u8> {
    export(checkpoint, options, Vec::new(), &mut |_| {}).unwrap()
}

fn own(imported: Result<Imported, PackageError>) -> Result<Checkpoint, PackageError> {
    match imported? {
        Imported::Checkpoint(checkpoint) => Ok(checkpoint),
        Imported::Foreign(foreign) => panic!("{foreign:?}"),
    }
}

/// Reads a package into a store, in which nothing may be left when that fails.
fn read(root: &Path, bytes: &[u8], options: &ImportOptions) -> Result<Checkpoint, PackageError> {
    let store = Store::at(root.join("target"));
    let read = own(import(bytes, &store, options, &mut |_| {}));
    match &read {
        Ok(checkpoint) => {
            checkpoint.verify().unwrap();
            let kept = checkpoint.clone();
            store.remove(&checkpoint.manifest.name).unwrap();
            return Ok(kept);
        }
        Err(_) => {
            let left = fs::read_dir(store.root()).map_or(0, Iterator::count);
            assert_eq!(left, 0, "something is left");
        }
    }
    read
}

/// The tar of a package as its maker could write it: (name, type, data).
pub(crate) fn tar_of(members: &[(&str, tar::EntryType, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, entry_type, data) in members {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(*entry_type);
        header.set_size(data.len() as u64);
        header.set_mode(0o600);
        let name = path.as_bytes();
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.set_cksum();
        builder.append(&header, *data).unwrap();
    }
    builder.into_inner().unwrap()
}

#[test]
fn a_package_comes_back_as_it_was() {
    let root = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(root.path());
    for level in [None, Some(1), Some(DEFAULT_LEVEL)] {
        let options_out = ExportOptions {
            level,
            ..ExportOptions::default()
        };
        let bytes = packed(&checkpoint, &options_out);
        assert_eq!(bytes.len() < 1 << 20, level.is_some(), "{}", bytes.len());
        let back = read(root.path(), &bytes, &options()).unwrap();
        assert_eq!(back.manifest, checkpoint.manifest);
        let renamed = ImportOptions {
            name: Some("other".into()),
            ..options()
        };
        let back = read(root.path(), &bytes, &renamed).unwrap();
        assert_eq!(back.manifest.name, "other");
    }
}

#[test]
fn pages_of_zeros_take_no_room() {
    use std::os::unix::fs::MetadataExt as _;
    let root = tempfile::tempdir().unwrap();
    let bytes = packed(&checkpoint(root.path()), &ExportOptions::default());
    let store = Store::at(root.path().join("target"));
    let back = own(import(&bytes[..], &store, &options(), &mut |_| {})).unwrap();
    let pages = fs::metadata(back.dir.join("c/checkpoint/pages-1.img")).unwrap();
    assert_eq!(pages.len(), 3 << 20);
    assert!(pages.blocks() * 512 < 2 << 20, "{} blocks", pages.blocks());
}

#[test]
fn a_package_that_is_cut_off_or_changed_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(root.path());
    let plain = packed(&checkpoint, &ExportOptions::default());
    let compressed = packed(
        &checkpoint,
        &ExportOptions {
            level: Some(1),
            ..ExportOptions::default()
        },
    );
    for bytes in [&plain, &compressed] {
        for part in 0..16 {
            let cut = &bytes[..bytes.len() * part / 16];
            assert!(read(root.path(), cut, &options()).is_err(), "{part}/16");
        }
    }
    let cut = &compressed[..compressed.len() - 1];
    assert!(read(root.path(), cut, &options()).is_err(), "the last byte");
    // Every bit of the manifest and of headers; some of the pages.
    for at in (0..4096)
        .step_by(7)
        .chain((4096..plain.len() - 1024).step_by(99_991))
    {
        let mut flipped = plain.clone();
        flipped[at] ^= 4;
        if let Ok(back) = read(root.path(), &flipped, &options()) {
            // What nobody reads, as the padding behind a name, may be anything.
            assert_eq!(
                back.manifest.containers, checkpoint.manifest.containers,
                "{at}"
            );
        }
    }
    for at in (0..compressed.len()).step_by(1_009) {
        let mut flipped = compressed.clone();
        flipped[at] ^= 4;
        if let Ok(back) = read(root.path(), &flipped, &options()) {
            assert_eq!(back.manifest, checkpoint.manifest, "{at}");
        }
    }
}

#[test]
fn each_fault_has_one_clear_error() {
    use tar::EntryType::{Link, Regular, Symlink};
    let root = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(root.path());
    let json = checkpoint.manifest.to_json();
    let dir = checkpoint.dir.join("c");
    let file = |path: &str| fs::read(dir.join(path)).unwrap();
    let (inventory, pages) = (
        file("checkpoint/inventory.img"),
        file("checkpoint/pages-1.img"),
    );
    let manifest = ("transship.json", Regular, json.as_slice());
    let first = ("c/checkpoint/inventory.img", Regular, inventory.as_slice());
    let second = ("c/checkpoint/pages-1.img", Regular, pages.as_slice());
    let third = ("c/spec.dump", Regular, &b"{}"[..]);
    read(
        root.path(),
        &tar_of(&[manifest, first, second, third]),
        &options(),
    )
    .unwrap();
    let mut later = checkpoint.manifest.clone();
    later.format.version = 2;
    let later = later.to_json();
    let mut claims = checkpoint.manifest.clone();
    claims.containers[0].files[0].size = 10 << 40;
    let claims = claims.to_json();
    type Member<'a> = (&'a str, tar::EntryType, &'a [u8]);
    let cases: [(&str, Vec<Member<'_>>, &str); 13] = [
        (
            "missing",
            vec![manifest, first, second],
            "ends before c/spec.dump",
        ),
        (
            "twice",
            vec![manifest, first, first, second, third],
            "is expected there",
        ),
        (
            "one more",
            vec![manifest, first, second, third, third],
            "does not know it",
        ),
        (
            "order",
            vec![manifest, second, first, third],
            "is expected there",
        ),
        (
            "no manifest",
            vec![third, manifest, first, second],
            "this is no package",
        ),
        (
            "length",
            vec![manifest, ("c/checkpoint/inventory.img", Regular, b"x")],
            "its length differs",
        ),
        (
            "content",
            vec![
                manifest,
                ("c/checkpoint/inventory.img", Regular, b"inventorx"),
            ],
            "its digest differs",
        ),
        (
            "symlink",
            vec![manifest, ("c/checkpoint/inventory.img", Symlink, b"")],
            "only regular files",
        ),
        (
            "hard link",
            vec![manifest, ("c/x", Link, b"")],
            "only regular files",
        ),
        (
            "absolute",
            vec![("/etc/passwd", Regular, b"x")],
            "leads elsewhere",
        ),
        ("upwards", vec![("../x", Regular, b"x")], "leads elsewhere"),
        (
            "version",
            vec![("transship.json", Regular, later.as_slice())],
            "format version 2",
        ),
        (
            "claim",
            vec![("transship.json", Regular, claims.as_slice())],
            "free on the disk",
        ),
    ];
    for (what, members, said) in cases {
        let error = read(root.path(), &tar_of(&members), &options()).unwrap_err();
        let line = one_line(&error);
        assert!(line.contains(said), "{what}: {line}");
    }
    let other = ImportOptions {
        architecture: "aarch64".into(),
        ..options()
    };
    let bytes = tar_of(&[manifest, first, second, third]);
    let error = read(root.path(), &bytes, &other).unwrap_err().to_string();
    assert_eq!(
        error,
        "the package is of x86_64, and this machine is aarch64"
    );
    let small = ImportOptions {
        max_bytes: 1000,
        ..options()
    };
    let error = read(root.path(), &bytes, &small).unwrap_err().to_string();
    assert!(
        error.contains("1000 are taken at most: --max-size"),
        "{error}"
    );
    for bytes in [&b""[..], b"\0", b"hello", &[0; 4096]] {
        let error = read(root.path(), bytes, &options()).unwrap_err();
        let line = one_line(&error);
        assert!(line.contains("package"), "{line}");
    }
}

#[test]
fn encrypted_packages_open_for_their_recipients_alone() {
    use age::secrecy::ExposeSecret as _;
    let root = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(root.path());
    let key = age::x25519::Identity::generate();
    let path = root.path().join("key");
    fs::write(&path, key.to_string().expose_secret()).unwrap();
    let mut recipients = Recipients::default();
    recipients.add(&key.to_public().to_string()).unwrap();
    let bytes = packed(
        &checkpoint,
        &ExportOptions {
            level: Some(1),
            recipients,
            ..ExportOptions::default()
        },
    );
    assert!(
        !bytes.windows(9).any(|it| it == b"transship"),
        "a name in clear"
    );
    let mut identities = Identities::default();
    identities.add_file(&path).unwrap();
    let with_key = ImportOptions {
        identities,
        ..options()
    };
    let back = read(root.path(), &bytes, &with_key).unwrap();
    assert_eq!(back.manifest, checkpoint.manifest);
    let error = read(root.path(), &bytes, &options())
        .unwrap_err()
        .to_string();
    assert!(error.contains("--identity"), "{error}");
    for part in 1..12 {
        let cut = &bytes[..bytes.len() * part / 12];
        assert!(read(root.path(), cut, &with_key).is_err(), "{part}/12");
        let mut flipped = bytes.clone();
        flipped[bytes.len() * part / 12] ^= 1;
        assert!(read(root.path(), &flipped, &with_key).is_err(), "{part}/12");
    }
    let longer = [bytes.as_slice(), b"x"].concat();
    assert!(read(root.path(), &longer, &with_key).is_err());
}

#[test]
fn a_signature_travels_and_can_be_demanded() {
    let root = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(root.path());
    let pair = minisign::KeyPair::generate_unencrypted_keypair().unwrap();
    let path = root.path().join("secret");
    fs::write(&path, pair.sk.to_box(None).unwrap().to_string()).unwrap();
    let signed = ExportOptions {
        signer: Some(Signer::read(&path).unwrap()),
        ..ExportOptions::default()
    };
    let demanding = || ImportOptions {
        trusted: TrustedKeys::parse([pair.pk.to_base64().as_str()]).unwrap(),
        ..options()
    };
    let unsigned = packed(&checkpoint, &ExportOptions::default());
    let error = read(root.path(), &unsigned, &demanding()).unwrap_err();
    assert!(error.to_string().contains("is not signed"), "{error}");
    let bytes = packed(&checkpoint, &signed);
    // From there it goes on with the signature, which nobody makes again.
    let store = Store::at(root.path().join("between"));
    let between = own(import(&bytes[..], &store, &demanding(), &mut |_| {})).unwrap();
    let again = packed(&between, &ExportOptions::default());
    read(root.path(), &again, &demanding()).unwrap();
    let renamed = ImportOptions {
        name: Some("other".into()),
        ..demanding()
    };
    let error = read(root.path(), &again, &renamed).unwrap_err().to_string();
    assert!(error.contains("signed under the name"), "{error}");
}

#[test]
fn what_is_damaged_is_not_packed() {
    let root = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(root.path());
    let path = checkpoint.dir.join("c/checkpoint/inventory.img");
    for (content, said) in [(&b"inventorx"[..], "digest"), (b"inv", "digest")] {
        fs::write(&path, content).unwrap();
        let packed = export(
            &checkpoint,
            &ExportOptions::default(),
            Vec::new(),
            &mut |_| {},
        );
        let error = packed.unwrap_err().to_string();
        assert!(
            error.contains(said) && error.contains("inventory.img"),
            "{error}"
        );
    }
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
    assert!(
        export(
            &checkpoint,
            &ExportOptions::default(),
            Vec::new(),
            &mut |_| {}
        )
        .is_err()
    );
}

pub(crate) fn quickly() -> oci::StoreOptions {
    oci::StoreOptions {
        level: 1,
        signer: None,
    }
}

/// Makes a checkpoint of what has this tag.
pub(crate) fn from_blobs(
    blobs: &dyn oci::Blobs,
    tag: &str,
    store: &Store,
) -> Result<Checkpoint, PackageError> {
    let offered = oci::Offered::read(blobs, tag, &Identities::default(), Some(&options()))?;
    let mut bytes = 0;
    let made = offered.restore(blobs, store, &options(), &mut |came| bytes += came)?;
    assert_eq!(bytes, offered.bytes());
    Ok(made)
}

#[test]
fn checkpoints_share_blobs_and_come_back() {
    let root = tempfile::tempdir().unwrap();
    let one = checkpoint(root.path());
    let layout = oci::Layout::create(&root.path().join("layout")).unwrap();
    let first = oci::store(&one, &quickly(), &layout, "one", &mut |_| {}).unwrap();
    assert_eq!(first.blobs, first.new_blobs);
    let again = oci::store(&one, &quickly(), &layout, "again", &mut |_| {}).unwrap();
    assert_eq!((again.blobs, again.new_blobs), (first.blobs, 0));
    let store = Store::at(root.path().join("target"));
    let back = from_blobs(&layout, "one", &store).unwrap();
    assert_eq!(back.manifest, one.manifest);
    back.verify().unwrap();
    store.remove("web").unwrap();
    // Each blob in turn is missing, or another one: one error, and nothing is left.
    let blobs = root.path().join("layout/blobs/sha256");
    for entry in fs::read_dir(&blobs).unwrap() {
        let path = entry.unwrap().path();
        let whole = fs::read(&path).unwrap();
        for spoil in [
            None,
            Some(whole[..whole.len() - 1].to_vec()),
            Some(vec![0; whole.len()]),
        ] {
            match spoil {
                Some(bytes) => fs::write(&path, bytes).unwrap(),
                None => fs::remove_file(&path).unwrap(),
            }
            assert!(from_blobs(&layout, "one", &store).is_err());
            assert_eq!(fs::read_dir(store.root()).unwrap().count(), 0);
        }
        fs::write(&path, whole).unwrap();
    }
    assert!(from_blobs(&layout, "none", &store).is_err());
}

/// Version 1 is the first that was released: what it wrote is read for ever.
/// The bytes of the manifest in a package.
fn read_manifest(package: &[u8]) -> Vec<u8> {
    let mut package = OpenPackage::new(package, &Identities::default()).unwrap();
    let (path, member) = package.next().unwrap().unwrap();
    package.read_all(&path, &member, 1 << 20).unwrap()
}

#[test]
fn packages_of_format_1_are_read() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let root = tempfile::tempdir().unwrap();
    let mut identities = Identities::default();
    identities.add_file(&fixtures.join("age.key")).unwrap();
    let key = "RWThgSI8U3mWXyR4obbFHrJWAiO5hyezKvOkATr62ipuRZ473CZ9VTE8";
    let demanding = ImportOptions {
        identities,
        trusted: TrustedKeys::parse([key]).unwrap(),
        ..options()
    };
    let plain = fs::read(fixtures.join("format-1.package")).unwrap();
    let first = read(root.path(), &plain, &options()).unwrap().manifest;
    assert_eq!(first.format.compatible, ["some-later-thing"]);
    assert_eq!(first.pod.as_ref().unwrap().namespace, "shop");
    assert_eq!(first.source.criu.as_deref(), Some("4.2.1"));
    assert_eq!(first.containers[0].files.len(), 13);
    assert_eq!(first.shared.shm, ["web"]);
    // The same in the ways of Debian's own age and minisign.
    let sealed = fs::read(fixtures.join("format-1.age")).unwrap();
    let second = read(root.path(), &sealed, &demanding).unwrap().manifest;
    assert_eq!(second, first);
    // As it lies sealed in a store.
    let head = fs::read(fixtures.join("format-1.sealed.json")).unwrap();
    let package = File {
        path: PACKAGE_FILE.into(),
        size: sealed.len() as u64,
        sha256: sha256_hex(&sealed),
    };
    let kept = read_manifest(&plain);
    let expected = Sealed::new(package, &first, sha256_hex(&kept));
    assert_eq!(Sealed::parse(&head).unwrap(), expected);
    let layout = oci::Layout::open(&fixtures.join("format-1.oci")).unwrap();
    let store = Store::at(root.path().join("target"));
    let third = from_blobs(&layout, "format-1", &store).unwrap();
    assert_eq!(third.manifest, first);
}

/// What a manifest takes in memory is many times its length.
#[test]
fn nothing_is_parsed_that_nobody_has_signed() {
    let root = tempfile::tempdir().unwrap();
    let key = "RWThgSI8U3mWXyR4obbFHrJWAiO5hyezKvOkATr62ipuRZ473CZ9VTE8";
    let trusting = ImportOptions {
        trusted: TrustedKeys::parse([key]).unwrap(),
        ..options()
    };
    let regular = tar::EntryType::Regular;
    let unsigned = [("transship.json", regular, &b"no JSON"[..])];
    let forged = [
        unsigned[0],
        ("transship.json.minisig", regular, &b"none"[..]),
    ];
    for (members, said) in [
        (&unsigned[..], "is not signed"),
        (&forged, "by none of the keys"),
    ] {
        let error = read(root.path(), &tar_of(members), &trusting).unwrap_err();
        assert!(one_line(&error).contains(said), "{error}");
    }
}
