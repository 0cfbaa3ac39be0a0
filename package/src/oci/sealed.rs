//! A checkpoint that only the owners of some keys can read, among blobs: a package (`export`), encrypted by age and cut
//! into pieces.
//!
//! ```text
//! manifest   artifactType application/vnd.transship.checkpoint.encrypted.v1
//!   config   application/vnd.oci.empty.v1+json               {}
//!   layers   application/vnd.transship.checkpoint.piece.v1   8 MiB of the package each, the last one less; in their order
//!
//! <store>/.pulls/<digest of the manifest>/sealed.age     what has come of it (partial.rs), piece by piece in its place
//! ```
//!
//! Nothing is said in clear: no names, no annotations, no image. Two pushes of one checkpoint have no blob in common. Pieces
//! that are changed, missing, twice or in another place do not open (encryption.rs).

use std::fs::{File, OpenOptions};
use std::io::{self, Cursor, Read, Write};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};

use transship_checkpoint::manifest::MANIFEST_FILE;
use transship_checkpoint::sealed::PACKAGE_FILE;
use transship_checkpoint::store::{Checkpoint, Draft, Store};
use transship_path_error::During as _;

use super::artifact::{Figures, Stored, put, to_bytes};
use super::blobs::Blobs;
use super::digests::digest_of;
use super::document::{Descriptor, MANIFEST, Manifest};
use super::partial::Partial;
use super::transfers::in_threads;
use crate::contents::Contents;
use crate::encryption::Identities;
use crate::error::PackageError;
use crate::export::{ExportOptions, export};
use crate::import::{Head, Imported, OF_MAX_SIZE, import};
use crate::import_options::ImportOptions;
use crate::layer_changes::Digests;
use crate::look::look;
use crate::new_file::check_room;
use crate::open_package::OpenPackage;
use crate::signature::TrustedKeys;

pub(super) const SEALED: &str = "application/vnd.transship.checkpoint.encrypted.v1";
const EMPTY: &str = "application/vnd.oci.empty.v1+json";
const PIECE: &str = "application/vnd.transship.checkpoint.piece.v1";
/// Bytes of a piece.
const PIECE_BYTES: usize = 8 << 20;

/// Puts an encrypted checkpoint among `blobs` under the tag `tag`. `progress` gets the bytes.
///
/// # Errors
/// There is nobody to encrypt it for, a file is damaged, or a blob cannot be put there.
pub fn store_encrypted(
    checkpoint: &Checkpoint,
    options: &ExportOptions,
    blobs: &dyn Blobs,
    tag: &str,
    progress: &mut dyn FnMut(u64),
) -> Result<Stored, PackageError> {
    if options.recipients.is_empty() {
        return Err(PackageError::Format {
            name: checkpoint.manifest.name.clone(),
            format: "nobody",
            reason: "it is to be encrypted".to_owned(),
        });
    }
    let figures = Figures::default();
    let mut pieces = PieceWriter {
        blobs,
        figures: &figures,
        piece: Vec::with_capacity(PIECE_BYTES),
        layers: Vec::new(),
        failed: None,
    };
    let exported = export(checkpoint, options, &mut pieces, progress).map(drop);
    // What the registry has said is more than that a package cannot be written.
    if let Some(error) = pieces.failed.take() {
        return Err(error);
    }
    exported?;
    pieces.put_piece()?;
    let manifest = Manifest {
        artifact_type: Some(SEALED.to_owned()),
        config: put(blobs, EMPTY, b"{}", &figures)?,
        layers: pieces.layers,
        ..Manifest::default()
    };
    let json = to_bytes(&manifest)?;
    blobs.put_manifest(MANIFEST, &json, Some(tag))?;
    Ok(Stored {
        digest: digest_of(&json),
        ..figures.stored()
    })
}

/// Puts what is written there, a piece at a time.
struct PieceWriter<'a> {
    blobs: &'a dyn Blobs,
    figures: &'a Figures,
    piece: Vec<u8>,
    layers: Vec<Descriptor>,
    failed: Option<PackageError>,
}

impl PieceWriter<'_> {
    fn put_piece(&mut self) -> Result<(), PackageError> {
        let layer = put(self.blobs, PIECE, &self.piece, self.figures)?;
        self.layers.push(layer);
        self.piece.clear();
        Ok(())
    }
}

impl Write for PieceWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = PIECE_BYTES - self.piece.len();
        let some = &bytes[..bytes.len().min(room)];
        self.piece.extend_from_slice(some);
        if self.piece.len() == PIECE_BYTES
            && let Err(error) = self.put_piece()
        {
            self.failed = Some(error);
            return Err(io::Error::other("a piece cannot be put there"));
        }
        Ok(some.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The package again.
pub(super) struct PieceReader<'a> {
    blobs: &'a dyn Blobs,
    layers: std::slice::Iter<'a, Descriptor>,
    piece: Cursor<Vec<u8>>,
}

impl<'a> PieceReader<'a> {
    pub(super) fn new(blobs: &'a dyn Blobs, artifact: &'a Manifest) -> Self {
        Self {
            blobs,
            layers: artifact.layers.iter(),
            piece: Cursor::default(),
        }
    }
}

impl Read for PieceReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.piece.read(buffer)?;
            if read > 0 || buffer.is_empty() {
                return Ok(read);
            }
            let Some(layer) = self.layers.next() else {
                return Ok(0);
            };
            let piece = self.blobs.get(layer, PIECE_BYTES as u64);
            self.piece = Cursor::new(piece.map_err(io::Error::other)?);
        }
    }
}

/// What it begins with.
pub(super) fn read_head(
    blobs: &dyn Blobs,
    artifact: &Manifest,
    identities: &Identities,
    trusted: Option<&TrustedKeys>,
) -> Result<Head, PackageError> {
    let mut package = OpenPackage::new(PieceReader::new(blobs, artifact), identities)?;
    let first = package.next()?.filter(|(path, _)| path == MANIFEST_FILE);
    let (_, member) = first.ok_or_else(no_checkpoint)?;
    Head::read(&mut package, &member, trusted)
}

/// All pieces of a package, in one file as they belong together.
#[derive(Debug)]
pub struct FetchedPackage {
    partial: Partial,
}

impl FetchedPackage {
    /// The package, from its beginning on.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(&self) -> Result<File, PackageError> {
        let path = self.partial.dir().join(PACKAGE_FILE);
        Ok(File::open(&path).during("open", &path)?)
    }

    /// Makes a draft of it, called `name`, in which it is [`PACKAGE_FILE`].
    ///
    /// # Errors
    /// The name is taken, or a system call failed.
    pub fn into_draft(self, store: &Store, name: &str) -> Result<Draft, PackageError> {
        store.check_free(name)?;
        self.partial.into_draft(store, name)
    }
}

/// Fetches the pieces that are missing, several at once, where there is room for them and for as many bytes as will lie
/// `beside` them. What has come is kept when they cannot be had, or have no room, for now.
pub(super) fn fetch(
    blobs: &dyn Blobs,
    (digest, artifact): (&str, &Manifest),
    store: &Store,
    (max_bytes, beside): (u64, u64),
    progress: &mut dyn FnMut(u64),
) -> Result<FetchedPackage, PackageError> {
    let mut pieces = Vec::new();
    let mut end = 0_u64;
    for (number, layer) in artifact.layers.iter().enumerate() {
        pieces.push((number, end, layer));
        end = end.saturating_add(layer.size);
    }
    if end > max_bytes {
        return Err(PackageError::TooLarge {
            bytes: end,
            limit: max_bytes,
            of: OF_MAX_SIZE,
        });
    }
    let partial = Partial::open(store, digest)?;
    match fill(blobs, &pieces, (end, beside), &partial, progress) {
        Ok(()) => Ok(FetchedPackage { partial }),
        Err(error) => {
            partial.keep_after(&error);
            Err(error)
        }
    }
}

fn fill(
    blobs: &dyn Blobs,
    pieces: &[(usize, u64, &Descriptor)],
    (size, beside): (u64, u64),
    partial: &Partial,
    progress: &mut dyn FnMut(u64),
) -> Result<(), PackageError> {
    let there = pieces.iter().filter(|(it, ..)| partial.is_done(*it));
    let there = { there.map(|(.., it)| it.size) }.fold(0, u64::saturating_add);
    let missing = size.saturating_sub(there);
    check_room(partial.dir(), missing.saturating_add(beside))?;
    progress(there);
    let path = partial.dir().join(PACKAGE_FILE);
    let mut open = OpenOptions::new();
    open.write(true).create(true).truncate(false).mode(0o600);
    open.custom_flags(nix::libc::O_NOFOLLOW);
    let file = open.open(&path).during("open", &path)?;
    file.set_len(size).during("write", &path)?;
    let missing = pieces.iter().filter(|(it, ..)| !partial.is_done(*it));
    let missing: Vec<_> = missing.collect();
    in_threads(&missing, progress, |(number, offset, layer), tell| {
        let piece = blobs.get(layer, PIECE_BYTES as u64)?;
        file.write_all_at(&piece, *offset).during("write", &path)?;
        partial.set_done(*number)?;
        tell(piece.len() as u64);
        Ok(())
    })?;
    Ok(())
}

/// Makes a checkpoint of it, with so many bytes when it is opened: until it is whole, both lie on the disk.
pub(super) fn restore(
    blobs: &dyn Blobs,
    (artifact, bytes): ((&str, &Manifest), u64),
    store: &Store,
    options: &ImportOptions,
    progress: &mut dyn FnMut(u64),
) -> Result<Checkpoint, PackageError> {
    let bounds = (options.max_bytes, bytes);
    let package = fetch(blobs, artifact, store, bounds, progress)?;
    match import(package.open()?, store, options, &mut |_| {})? {
        Imported::Checkpoint(checkpoint) => Ok(checkpoint),
        Imported::Foreign(_) => Err(no_checkpoint()),
    }
}

/// Looks into it; memory is read through.
pub(super) fn look_into(
    blobs: &dyn Blobs,
    artifact: &Manifest,
    identities: &Identities,
    digests: Digests,
) -> Result<Contents, PackageError> {
    let looked = look(PieceReader::new(blobs, artifact), identities, digests)?;
    Ok(looked.contents)
}

fn no_checkpoint() -> PackageError {
    PackageError::Unknown {
        reason: "what is encrypted is no package of transship".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use age::secrecy::ExposeSecret as _;
    use transship_checkpoint::store::Store;

    use super::*;
    use crate::encryption::Recipients;
    use crate::oci::registry::tests::noise;
    use crate::oci::{Layout, Offered};
    use crate::package_tests::{checkpoint_of, one_line, options};

    /// A new key: who can read with it, and who is written for.
    fn key(dir: &Path, name: &str) -> (Identities, Recipients) {
        let key = age::x25519::Identity::generate();
        let path = dir.join(name);
        fs::write(&path, key.to_string().expose_secret()).unwrap();
        let (mut identities, mut recipients) = (Identities::default(), Recipients::default());
        identities.add_file(&path).unwrap();
        recipients.add(&key.to_public().to_string()).unwrap();
        (identities, recipients)
    }

    fn with(identities: Identities) -> ImportOptions {
        ImportOptions {
            identities,
            ..options()
        }
    }

    fn pull(
        blobs: &dyn Blobs,
        tag: &str,
        root: &Path,
        options: &ImportOptions,
    ) -> Result<Checkpoint, PackageError> {
        let store = Store::at(root.join("target"));
        let offered = Offered::read(blobs, tag, &options.identities, Some(options))?;
        offered.restore(blobs, &store, options, &mut |_| {})
    }

    #[test]
    fn only_who_has_the_key_reads_anything_of_it() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let checkpoint = checkpoint_of(root, &noise(PIECE_BYTES + (1 << 20)));
        let layout = Layout::create(&root.join("layout")).unwrap();
        let (mine, for_me) = key(root, "mine");
        let (yours, _) = key(root, "yours");
        let sealed = ExportOptions {
            level: Some(1),
            recipients: for_me,
            signer: None,
        };
        store_encrypted(&checkpoint, &sealed, &layout, "web", &mut |_| {}).unwrap();
        for blob in fs::read_dir(root.join("layout/blobs/sha256")).unwrap() {
            let bytes = fs::read(blob.unwrap().path()).unwrap();
            let names: [&[u8]; 3] = [b"inventory.img", b"x86_64", b"org.criu"];
            for name in names {
                assert!(!bytes.windows(name.len()).any(|it| it == name));
            }
        }
        let line = one_line(&pull(&layout, "web", root, &options()).unwrap_err());
        assert!(line.contains("--identity"), "{line}");
        let line = one_line(&pull(&layout, "web", root, &with(yours)).unwrap_err());
        assert!(line.contains("none of the identities"), "{line}");
        let mine = with(mine);
        let offered = Offered::read(&layout, "web", &mine.identities, None).unwrap();
        assert!(offered.is_encrypted());
        let back = pull(&layout, "web", root, &mine).unwrap();
        assert_eq!(back.manifest, checkpoint.manifest);
        back.verify().unwrap();
        Store::at(root.join("target")).remove("web").unwrap();

        let json = layout.manifest("web", 1 << 20).unwrap();
        let manifest = Manifest::parse(&json).unwrap();
        assert_eq!(manifest.layers.len(), 2);
        let mut swapped = manifest.clone();
        swapped.layers.swap(0, 1);
        let mut cut = manifest.clone();
        cut.layers.pop();
        let mut twice = manifest;
        twice.layers.push(twice.layers[0].clone());
        for (what, manifest) in [("swapped", swapped), ("cut", cut), ("twice", twice)] {
            layout
                .put_manifest(MANIFEST, &manifest.to_json(), Some(what))
                .unwrap();
            assert!(pull(&layout, what, root, &mine).is_err(), "{what}");
        }
        let left = fs::read_dir(root.join("target")).map_or(0, Iterator::count);
        assert_eq!(left, 0, "something is left");
        let for_nobody = ExportOptions::default();
        let error = store_encrypted(&checkpoint, &for_nobody, &layout, "web", &mut |_| {});
        assert!(error.is_err());
    }

    /// The pieces that have come are not fetched again.
    #[test]
    fn an_encrypted_pull_goes_on_with_what_an_earlier_one_has_brought() {
        use crate::oci::registry::server::{Mood, Server};
        use crate::oci::registry::tests::{PATIENCE, registry};
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let checkpoint = checkpoint_of(root, &noise(5 * PIECE_BYTES));
        let (mine, for_me) = key(root, "mine");
        let (mine, sealed) = (with(mine), for_nobody_else(for_me));
        let server = Server::start();
        let registry = registry(&server, PATIENCE, None);
        store_encrypted(&checkpoint, &sealed, &registry, "1", &mut |_| {}).unwrap();
        let blobs = |server: &Server| {
            let asked = server.asked().into_iter().filter(|it| it.is_for_blob());
            asked.map(|it| it.path).collect::<Vec<_>>()
        };
        let all = Manifest::parse(&server.manifest("1").unwrap()).unwrap();
        let last = all.layers.last().unwrap().digest.clone();
        server.is_in(move |asked, _| match asked.path.ends_with(&last) {
            true => Mood::Status("500 Internal Server Error", ""),
            false => Mood::Good,
        });
        let error = pull(&registry, "1", root, &mine).unwrap_err();
        assert!(error.is_passing(), "{}", one_line(&error));
        server.is_in(|_, _| Mood::Good);
        let mut told = 0;
        let store = Store::at(root.join("target"));
        let offered = Offered::read(&registry, "1", &mine.identities, Some(&mine)).unwrap();
        let back = offered.restore(&registry, &store, &mine, &mut |bytes| told += bytes);
        back.unwrap().verify().unwrap();
        let again = blobs(&server);
        // Its head is read from the first one.
        assert_eq!(again.len(), 2, "{again:?}");
        assert_eq!(told, offered.package_bytes());
        assert!(!root.join("target/.pulls").try_exists().unwrap());

        // What was spoilt meanwhile is found, and not kept.
        store.remove("web").unwrap();
        let last = all.layers.last().unwrap().digest.clone();
        server.is_in(move |asked, _| match asked.path.ends_with(&last) {
            true => Mood::Status("500 Internal Server Error", ""),
            false => Mood::Good,
        });
        pull(&registry, "1", root, &mine).unwrap_err();
        let kept = fs::read_dir(root.join("target/.pulls")).unwrap().next();
        let kept = kept.unwrap().unwrap().path().join(PACKAGE_FILE);
        let file = OpenOptions::new().write(true).open(kept).unwrap();
        file.write_all_at(&[0; 100], PIECE_BYTES as u64).unwrap();
        server.is_in(|_, _| Mood::Good);
        let error = pull(&registry, "1", root, &mine).unwrap_err();
        assert!(!error.is_passing(), "{}", one_line(&error));
        pull(&registry, "1", root, &mine).unwrap().verify().unwrap();
    }

    fn for_nobody_else(recipients: Recipients) -> ExportOptions {
        ExportOptions {
            level: Some(1),
            recipients,
            signer: None,
        }
    }

    #[test]
    fn what_a_registry_says_is_told() {
        use crate::oci::registry::server::{Mood, Server};
        use crate::oci::registry::tests::{PATIENCE, registry};
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let checkpoint = checkpoint_of(root, &noise(1 << 20));
        let (mine, for_me) = key(root, "mine");
        let sealed = ExportOptions {
            level: Some(1),
            recipients: for_me,
            signer: None,
        };
        let server = Server::start();
        let registry = registry(&server, PATIENCE, None);
        store_encrypted(&checkpoint, &sealed, &registry, "1", &mut |_| {}).unwrap();
        let mine = with(mine);
        server.is_in(|asked, nth| match asked.is_for_blob() && nth > 1 {
            true => Mood::Status("500 Internal Server Error", ""),
            false => Mood::Good,
        });
        let error = pull(&registry, "1", root, &mine).unwrap_err();
        assert!(error.is_passing(), "{}", one_line(&error));
        server.is_in(|_, _| Mood::Status("403 Forbidden", ""));
        let error = store_encrypted(&checkpoint, &sealed, &registry, "2", &mut |_| {});
        let line = one_line(&error.unwrap_err());
        assert!(line.contains("refuses"), "{line}");
    }
}
