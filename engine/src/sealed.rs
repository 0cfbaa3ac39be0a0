//! Checkpoints that lie sealed: encrypted when they are taken, opened into memory when they are needed.
//!
//! ```text
//!  dump ──> memory (sandbox/src/opened.rs) ── package, encrypted ──> store: sealed.age, and its head in clear
//!  store ── key ──> memory: compared with the head, and with every digest ──> restored, exported, looked into
//! ```
//!
//! In both directions memory is in clear only in a tmpfs that the kernel never swaps out, half of what is available at
//! most.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Read, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::Flock;
use transship_checkpoint::beneath::{Links, open_regular};
use transship_checkpoint::manifest;
use transship_checkpoint::sealed::{PACKAGE_FILE, Sealed};
use transship_checkpoint::store::{Checkpoint, Draft, Store, StoreError};
use transship_digest::{Hashed, Through, sha256_hex};
use transship_package::PackageError;
use transship_package::encryption::Identities;
use transship_package::export::{ExportOptions, export};
use transship_package::import::{
    ImportOptions, Imported, OF_MAX_SIZE, OF_ROOM, import, room as room_on_disk,
};
use transship_package::oci::FetchedPackage;
use transship_package::signature::TrustedKeys;
use transship_path_error::During as _;
use transship_sandbox::admission::node_config::{NODE_CONFIG, NodeConfig};
use transship_sandbox::opened::{Holds, InMemory};
use transship_sandbox::wanted_image::manifest_digest;

use crate::error::{Context as _, Error, Kind, Result};
use crate::machine::architecture;
use crate::memory_dir::{Memory, room};
use crate::progress::{Progress, Silent};

const OF_ANOTHER: &str = "what is said of it in clear is of another checkpoint";

/// A checkpoint that can be used, kept from being removed. One that is sealed is opened as long as this is there.
#[derive(Debug)]
pub struct Opened {
    /// The checkpoint.
    pub checkpoint: Checkpoint,
    _reading: Flock<File>,
    memory: Option<Memory>,
}

impl Opened {
    /// Whether it lies sealed.
    #[must_use]
    pub fn was_sealed(&self) -> bool {
        self.memory.is_some()
    }

    /// Leaves one that was sealed opened, for somebody who keeps it from being removed.
    pub fn stay(self) {
        if let Some(memory) = self.memory {
            memory.stay();
        }
    }
}

/// Opens a checkpoint of `store`; one that is sealed with the key that it needs.
///
/// # Errors
/// [`Kind::NotFound`]; [`Kind::Refused`] without its key, or where it cannot be opened in memory; it is damaged, or
/// its parts are those of several checkpoints. Nothing of it is left in clear then.
pub fn open(
    store: &Store,
    name: &str,
    identities: Identities,
    progress: &dyn Progress,
) -> Result<Opened> {
    let found = match store.find(name) {
        Err(error @ StoreError::NotFound { .. }) => {
            return Err(Error::new(Kind::NotFound, error.to_string()).hint("transship ls"));
        }
        found => found?,
    };
    let reading = found.lock_for_reading()?;
    if found.sealed.is_some() && found.manifest.name != name {
        return Err(damaged(&found, OF_ANOTHER));
    }
    let Some(sealed) = &found.sealed else {
        return Ok(Opened {
            checkpoint: found,
            _reading: reading,
            memory: None,
        });
    };
    if identities.is_empty() {
        let refused = StoreError::Sealed {
            name: name.to_owned(),
        };
        return Err(Error::refused(refused.to_string()).hint("--identity FILE"));
    }
    let package = open_package(&found)?;
    { identities.check(package) }
        .with_context(|| format!("the checkpoint {name:?} cannot be opened"))?;
    let options = ImportOptions {
        // It may have another one in its package.
        name: Some(sealed.head.name.clone()),
        name_without: String::new(),
        identities,
        // It has been taken in already.
        trusted: TrustedKeys::default(),
        max_bytes: u64::MAX,
        architecture: architecture()?,
    };
    let memory = memory_of(store, sealed, &options, &found, progress)
        .with_context(|| format!("the checkpoint {name:?} cannot be opened"))?;
    let checkpoint = store.open(name)?;
    Ok(Opened {
        checkpoint,
        _reading: reading,
        memory: Some(memory),
    })
}

fn open_package(found: &Checkpoint) -> Result<File> {
    let opened = open_regular(&found.dir, Path::new(PACKAGE_FILE), Links::Refused);
    opened.with_context(|| format!("cannot open {}/{PACKAGE_FILE}", found.dir.display()))
}

/// The sealed checkpoint in memory; somebody else may have opened it already.
fn memory_of(
    store: &Store,
    sealed: &Sealed,
    options: &ImportOptions,
    found: &Checkpoint,
    progress: &dyn Progress,
) -> Result<Memory> {
    let name = &sealed.head.name;
    let memory = Memory::of_store(store, |opened| InMemory::of(opened, &sealed.opened_key()))?;
    let there = memory.dir();
    let filling = there.lock_to_fill()?;
    if there.store().find(name).is_err() {
        let bytes = room(sealed.bytes, "opened")?;
        there.mount(bytes, Holds::Sealed)?;
        progress.bytes("open", sealed.bytes);
        let package = open_package(found)?;
        fill(package, &there.store(), sealed, options, progress)?;
    }
    // Also of one that somebody else has opened: what is in clear may have been changed since.
    let manifest = there.store().find(name)?.manifest;
    let digest = manifest_digest(&there.store(), name).unwrap_or_default();
    if !sealed.is_of(&manifest, &digest) {
        return Err(damaged(found, OF_ANOTHER));
    }
    drop(filling);
    Ok(memory)
}

/// Decrypts the package into `store`.
fn fill(
    package: impl Read,
    store: &Store,
    sealed: &Sealed,
    options: &ImportOptions,
    progress: &dyn Progress,
) -> Result<()> {
    let mut package = Hashed::new(package);
    let imported = import(&mut package, store, options, &mut *progress.counter())?;
    let Imported::Checkpoint(checkpoint) = imported else {
        return Err(Error::failed(
            "what is sealed is no checkpoint of transship",
        ));
    };
    io::copy(&mut package, &mut io::sink()).context("cannot read the sealed package")?;
    let found = package_file(package.finish().1);
    if checkpoint.manifest.name != sealed.head.name || found != sealed.package {
        // Nobody else may find it there.
        store.remove(&checkpoint.manifest.name)?;
        return Err(damaged(
            &checkpoint,
            "its package is not the one that was sealed",
        ));
    }
    Ok(())
}

fn damaged(checkpoint: &Checkpoint, what: &str) -> Error {
    Error::caused_by(StoreError::Damaged {
        path: checkpoint.dir.join(PACKAGE_FILE),
        what: what.to_owned(),
    })
}

/// The encrypted package of a sealed checkpoint, kept from being removed.
#[derive(Debug)]
pub struct SealedPackage {
    /// It, from its beginning on.
    pub file: File,
    /// Bytes of the checkpoint when it is opened.
    pub bytes: u64,
    _reading: Flock<File>,
}

/// Finds it.
///
/// # Errors
/// There is no such checkpoint, or it is not sealed.
pub fn sealed_package(store: &Store, name: &str) -> Result<SealedPackage> {
    let found = store.find(name)?;
    let _reading = found.lock_for_reading()?;
    let Some(sealed) = &found.sealed else {
        return Err(Error::refused(format!(
            "the checkpoint {name:?} is not sealed"
        )));
    };
    Ok(SealedPackage {
        file: open_package(&found)?,
        bytes: sealed.bytes,
        _reading,
    })
}

/// Where a checkpoint that will be sealed is dumped: in memory.
#[derive(Debug)]
pub(crate) struct Sealing {
    memory: Memory,
    kept: Draft,
}

impl Sealing {
    /// Prepares it, before anything is frozen. `kept` is where it will lie; `bytes` it will roughly have.
    ///
    /// # Errors
    /// [`Kind::Refused`] where it cannot be done.
    pub(crate) fn prepare(store: &Store, kept: Draft, bytes: u64) -> Result<Self> {
        let refused = |error: Error| {
            let message = format!("no checkpoint can be sealed here: {}", error.one_line());
            Error::refused(message).hint(
                "without --encrypt-to it can be taken, and exported with --encrypt-to: then it lies on this node in \
                 clear",
            )
        };
        let prepare = || {
            room(bytes, "dumped")?;
            mounted_for(store)
        };
        Ok(Self {
            memory: prepare().map_err(refused)?,
            kept,
        })
    }

    /// Where it will lie.
    pub(crate) fn place(&self) -> &Path {
        self.kept.place()
    }

    /// The draft in memory.
    ///
    /// # Errors
    /// It cannot be made.
    pub(crate) fn draft(&self) -> Result<Draft> {
        Ok(self.memory.dir().store().draft(self.kept.name())?)
    }

    /// Encrypts what was dumped; nothing of it is in memory afterwards.
    ///
    /// # Errors
    /// It cannot be read, or not be written.
    pub(crate) fn seal(
        self,
        checkpoint: &Checkpoint,
        options: &ExportOptions,
        progress: &dyn Progress,
    ) -> Result<Checkpoint> {
        progress.bytes("seal", checkpoint.manifest.size());
        let file = new_package(&self.kept)?;
        let out = Hashed::new(BufWriter::with_capacity(1 << 20, file));
        let out = export(checkpoint, options, out, &mut *progress.counter())?;
        let digest = digest_of_manifest(checkpoint)?;
        let sealed = Sealed::new(package_file(out.finish().1), &checkpoint.manifest, digest);
        Ok(self.kept.commit_sealed(sealed)?)
    }
}

fn new_package(draft: &Draft) -> Result<File> {
    let path = draft.dir().join(PACKAGE_FILE);
    let mut open = OpenOptions::new();
    open.write(true).create_new(true).mode(0o600);
    let file = open.open(&path);
    file.with_context(|| format!("cannot make {}", path.display()))
}

fn digest_of_manifest(checkpoint: &Checkpoint) -> Result<String> {
    let path = checkpoint.dir.join(manifest::MANIFEST_FILE);
    let json = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(sha256_hex(json))
}

fn package_file(through: Through) -> manifest::File {
    manifest::File {
        path: PACKAGE_FILE.to_owned(),
        size: through.size,
        sha256: through.sha256,
    }
}

/// Keeps an encrypted package sealed, as it comes; meanwhile it is opened in memory, to see that all of it is right.
/// `name` is what it is called until its own name is known.
///
/// # Errors
/// Nothing of it is left then.
pub(crate) fn keep_sealed(
    package: impl Read,
    store: &Store,
    name: &str,
    options: &ImportOptions,
    progress: &dyn Progress,
) -> Result<Checkpoint> {
    let draft = store.draft(name)?;
    let memory = memory_to_look(store, 0)?;
    let mut package = Kept::new(package, &draft, options.max_bytes)?;
    let checkpoint = look_through(&mut package, &memory, options, progress)?;
    let kept = package_file(package.file.finish().1);
    let digest = digest_of_manifest(&checkpoint)?;
    let draft = draft.renamed(store, &checkpoint.manifest.name)?;
    Ok(draft.commit_sealed(Sealed::new(kept, &checkpoint.manifest, digest))?)
}

/// The same of one that was fetched in pieces, and is whole.
///
/// # Errors
/// Nothing of it is left then.
pub(crate) fn keep_fetched(
    fetched: FetchedPackage,
    store: &Store,
    memory: &Memory,
    options: &ImportOptions,
) -> Result<Checkpoint> {
    let mut package = Hashed::new(fetched.open()?);
    let checkpoint = look_through(&mut package, memory, options, &Silent)?;
    let kept = package_file(package.finish().1);
    let digest = digest_of_manifest(&checkpoint)?;
    let draft = fetched.into_draft(store, &checkpoint.manifest.name)?;
    Ok(draft.commit_sealed(Sealed::new(kept, &checkpoint.manifest, digest))?)
}

/// Memory in which a package with `bytes` is looked through.
///
/// # Errors
/// There is none, or too little.
pub(crate) fn memory_to_look(store: &Store, bytes: u64) -> Result<Memory> {
    room(bytes, "opened").map_err(cannot_stay_sealed)?;
    mounted_for(store).map_err(cannot_stay_sealed)
}

/// Reads a package to its end, and opens it in memory.
fn look_through(
    package: &mut impl Read,
    memory: &Memory,
    options: &ImportOptions,
    progress: &dyn Progress,
) -> Result<Checkpoint> {
    let there = memory.dir().store();
    let imported = match import(&mut *package, &there, options, &mut *progress.counter()) {
        // What there is room for is memory here, and not the disk.
        Err(error @ PackageError::TooLarge { bytes, .. }) if bytes <= options.max_bytes => {
            room(bytes, "opened").map_err(cannot_stay_sealed)?;
            return Err(error.into());
        }
        imported => imported?,
    };
    let Imported::Checkpoint(checkpoint) = imported else {
        return Err(Error::failed(
            "what is encrypted is no checkpoint of transship",
        ));
    };
    io::copy(package, &mut io::sink()).map_err(PackageError::reading)?;
    Ok(checkpoint)
}

/// A package that is written to a file while it is read.
struct Kept<R> {
    package: R,
    /// Bytes that are still taken.
    left: u64,
    most: u64,
    of: &'static str,
    path: PathBuf,
    file: Hashed<File>,
}

impl<R> Kept<R> {
    /// In the draft, `most` bytes, and no more than there is room for: what stands behind the files in a package, its
    /// manifest says nothing of.
    fn new(package: R, draft: &Draft, most: u64) -> Result<Self> {
        let room = room_on_disk(draft.dir())?;
        let (most, of) = match most <= room {
            true => (most, OF_MAX_SIZE),
            false => (room, OF_ROOM),
        };
        Ok(Self {
            package,
            left: most,
            most,
            of,
            path: draft.dir().join(PACKAGE_FILE),
            file: Hashed::new(new_package(draft)?),
        })
    }
}

impl<R: Read> Read for Kept<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.package.read(buffer)?;
        let Some(left) = self.left.checked_sub(read as u64) else {
            return Err(io::Error::other(PackageError::TooLarge {
                bytes: self.most.saturating_add(read as u64 - self.left),
                limit: self.most,
                of: self.of,
            }));
        };
        self.left = left;
        let written = self.file.write_all(&buffer[..read]);
        // Whoever reads takes it for a fault of the package.
        let written = written.during("write", &self.path);
        written.map_err(|error| io::Error::other(PackageError::from(error)))?;
        Ok(read)
    }
}

/// Memory that nobody else finds, half of what is available.
fn mounted_for(store: &Store) -> Result<Memory> {
    let memory = Memory::of_store(store, InMemory::for_dump)?;
    memory.dir().mount(room(0, "opened")?, Holds::Sealed)?;
    Ok(memory)
}

fn cannot_stay_sealed(error: Error) -> Error {
    let message = format!(
        "it is encrypted, and cannot be kept so here: {}",
        error.one_line()
    );
    Error::refused(message).hint("--in-clear: it lies on the disk of this node in clear")
}

/// The keys that node.toml names; none when it names no file.
///
/// # Errors
/// The file cannot be read, or others than its owner can read it.
pub fn identities_of_node(config: &Path) -> Result<Identities> {
    let config = NodeConfig::read(config).context("cannot tell which key this node has")?;
    let path = &config.checkpoints.identity;
    let mut identities = Identities::default();
    if path.as_os_str().is_empty() {
        return Ok(identities);
    }
    let named = || format!("the identity in {NODE_CONFIG} cannot be used");
    let meta = std::fs::metadata(path)
        .with_context(|| format!("cannot look at {}", path.display()))
        .with_context(named)?;
    if meta.mode() & 0o077 != 0 {
        let path = path.display();
        let message = format!("{}: others than its owner may read {path}", named());
        return Err(Error::refused(message).hint(format!("chmod 600 {path}")));
    }
    identities.add_file(path).with_context(named)?;
    Ok(identities)
}

/// Opens a sealed checkpoint with this node's key, for a pod whose annotation asks for it. It stays opened; who asks
/// keeps it from being removed.
///
/// # Errors
/// As [`open`].
pub fn open_for_pod(store: &Store, name: &str, config: &Path) -> Result<()> {
    let identities = identities_of_node(config)?;
    if identities.is_empty() {
        let message = format!(
            "the checkpoint {name:?} is sealed, and this node has no key: its operator can name the file, by \
             identity under [checkpoints] in {NODE_CONFIG}"
        );
        return Err(Error::refused(message));
    }
    open(store, name, identities, &crate::Silent)?.stay();
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// The manifest of a package says how large its files are, and nothing of what stands behind them.
    #[test]
    fn a_package_that_is_kept_has_an_end() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path());
        let draft = store.draft("sealed").unwrap();
        let bytes = vec![7; 3 << 20];
        let mut kept = Kept::new(&bytes[..], &draft, 1 << 20).unwrap();
        let error = io::copy(&mut kept, &mut io::sink()).unwrap_err();
        let error = PackageError::reading(error).to_string();
        assert!(error.contains("--max-size"), "{error}");
        let written = fs::metadata(draft.dir().join(PACKAGE_FILE)).unwrap().len();
        assert!(written <= 1 << 20, "{written}");
    }

    #[test]
    fn others_may_not_read_the_key_of_the_node() {
        let dir = tempfile::tempdir().unwrap();
        let (config, key) = (dir.path().join("node.toml"), dir.path().join("key"));
        assert!(identities_of_node(&config).unwrap().is_empty());
        let named = format!("[checkpoints]\nidentity = \"{}\"\n", key.display());
        fs::write(&config, named).unwrap();
        let absent = identities_of_node(&config).unwrap_err().one_line();
        assert!(absent.contains("cannot look at"), "{absent}");
        fs::write(&key, include_bytes!("../../package/tests/fixtures/age.key")).unwrap();
        fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
        let refused = identities_of_node(&config).unwrap_err();
        assert_eq!(refused.kind(), Kind::Refused);
        assert_eq!(refused.hints(), [format!("chmod 600 {}", key.display())]);
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(!identities_of_node(&config).unwrap().is_empty());
    }
}
