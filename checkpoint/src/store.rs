//! The directory of checkpoints, `/var/lib/transship/checkpoints`.
//!
//! ```text
//! <root>/<name>/             a checkpoint: whole, because it got its name by rename
//! <root>/.new-<name>.<pid>/  a draft; its directory is locked (flock) while its maker lives, or a runtime that dumps into it
//! <root>/.new-aside.*/       the same of files that will take the place of others
//! <root>/.pulls/             drafts that a registry has not given all of; see package/src/oci/partial.rs
//! <opened>/<key>/files/      a store in memory, with a checkpoint of this one that lies sealed; see sealed.rs
//! ```
//!
//! A draft that nobody holds a lock on was left by a process that died; the next draft removes it. So is
//! a checkpoint that is being removed. `<root>` itself is locked while names in it change, so that
//! nobody meets a directory that its maker has not locked yet.

mod checkpoint;
mod draft;

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::Deserialize;
use transship_path_error::{During as _, PathError};

pub use self::checkpoint::{Checkpoint, digest_files, list_files};
use self::draft::open_own;
pub use self::draft::{Aside, Draft, Durability, is_worked_in, open_to_work};
use crate::annotations::is_of_migration;
use crate::beneath::{Links, open_regular};
use crate::manifest::{MANIFEST_FILE, MANIFEST_LIMIT, Manifest, ManifestError, check_name};
use crate::sealed::{SEALED_FILE, Sealed};

/// Where checkpoints are kept unless somebody says otherwise.
pub const DEFAULT_ROOT: &str = "/var/lib/transship/checkpoints";
/// Where those of them that lie sealed are opened.
pub const DEFAULT_OPENED: &str = "/run/transship/opened";
/// The store of an opened checkpoint, in its directory.
pub const OPENED_FILES: &str = "files";
const DRAFT_PREFIX: &str = ".new-";

/// A failure of the checkpoint directory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// There is no checkpoint of this name.
    #[error("there is no checkpoint {name:?} in {root}")]
    NotFound {
        /// The name asked for.
        name: String,
        /// The store.
        root: PathBuf,
    },
    /// It is encrypted, and nobody has opened it.
    #[error("the checkpoint {name:?} is sealed, and can be used only by who has a key of it")]
    Sealed {
        /// The name asked for.
        name: String,
    },
    /// The name is taken.
    #[error("a checkpoint {name:?} exists already")]
    Exists {
        /// The name asked for.
        name: String,
    },
    /// Somebody reads it.
    #[error("the checkpoint {name:?} is being read at this moment")]
    InUse {
        /// The name asked for.
        name: String,
    },
    /// The manifest cannot be used.
    #[error("the checkpoint {name:?} cannot be used")]
    Manifest {
        /// Name of the checkpoint.
        name: String,
        /// Why.
        source: ManifestError,
    },
    /// A file is not what the manifest says.
    #[error("{path} of the checkpoint is damaged: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] PathError),
}

/// The directory of checkpoints.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    /// Where sealed checkpoints are opened; none: nowhere.
    opened: Option<PathBuf>,
}

/// A checkpoint's name, and the checkpoint or why it cannot be read.
pub type Listed = (String, Result<Checkpoint, StoreError>);

/// Whose a checkpoint is, and no more of its manifest: one of the longest would take 16 times its length.
#[derive(Deserialize)]
struct Owned {
    pod: OwnPod,
}

#[derive(Deserialize)]
struct OwnPod {
    namespace: String,
}

impl Store {
    /// The store at `root`, which is made when the first checkpoint is.
    #[must_use]
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            opened: None,
        }
    }

    /// The store of this node.
    #[must_use]
    pub fn of_node() -> Self {
        Self::at(DEFAULT_ROOT).opened_at(DEFAULT_OPENED)
    }

    /// The same, whose sealed checkpoints are opened in `opened`.
    #[must_use]
    pub fn opened_at(self, opened: impl Into<PathBuf>) -> Self {
        Self {
            opened: Some(opened.into()),
            ..self
        }
    }

    /// Where its sealed checkpoints are opened.
    #[must_use]
    pub fn opened(&self) -> Option<&Path> {
        self.opened.as_deref()
    }

    /// Its directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Makes its directory, which root alone can look into: the names of checkpoints are those of pods.
    ///
    /// # Errors
    /// A failing system call.
    pub fn make_root(&self) -> Result<(), StoreError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.root)
            .during("make the directory", &self.root)?;
        let mode = fs::metadata(&self.root)
            .during("stat", &self.root)?
            .permissions()
            .mode();
        // Another place may be anybody's, such as /tmp: what is made in it is closed by itself.
        if mode & 0o077 != 0 && self.is_of_node() {
            // Somebody else has made it.
            let private = fs::Permissions::from_mode(0o700);
            fs::set_permissions(&self.root, private).during("set the mode of", &self.root)?;
        }
        Ok(())
    }

    /// Whether nobody else has anything in it.
    fn is_of_node(&self) -> bool {
        [DEFAULT_ROOT, DEFAULT_OPENED]
            .iter()
            .any(|own| self.root.starts_with(own))
    }

    /// Opens the checkpoint called `name`; of one that is sealed what somebody has opened.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Sealed`], or a manifest that cannot be read.
    pub fn open(&self, name: &str) -> Result<Checkpoint, StoreError> {
        let found = self.find(name)?;
        let Some(sealed) = &found.sealed else {
            return Ok(found);
        };
        let opened = self.opened_store(sealed).map(|it| it.find(name));
        match opened {
            None | Some(Err(StoreError::NotFound { .. })) => Err(StoreError::Sealed {
                name: name.to_owned(),
            }),
            Some(opened) => opened,
        }
    }

    /// Where this sealed checkpoint is opened, if it is.
    fn opened_store(&self, sealed: &Sealed) -> Option<Self> {
        let dir = self.opened.as_ref()?.join(sealed.opened_key());
        Some(Self::at(dir.join(OPENED_FILES)))
    }

    /// Where the checkpoint of a migration is that arrives in memory.
    fn migration_store(&self, name: &str) -> Option<Self> {
        let opened = self.opened.as_ref().filter(|_| is_of_migration(name))?;
        Some(Self::at(opened.join(name).join(OPENED_FILES)))
    }

    /// Finds the checkpoint called `name`, also that of a migration that arrives in memory; of one that is sealed what
    /// is in clear.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], or a manifest that cannot be read.
    pub fn find(&self, name: &str) -> Result<Checkpoint, StoreError> {
        let unusable = |source| StoreError::Manifest {
            name: name.to_owned(),
            source,
        };
        check_name("the checkpoint's name", name).map_err(unusable)?;
        let dir = self.root.join(name);
        if let Some(json) = read_json(&dir, MANIFEST_FILE)? {
            return Ok(Checkpoint {
                manifest: Manifest::parse(&json).map_err(unusable)?,
                sealed: None,
                dir,
            });
        }
        let Some(json) = read_json(&dir, SEALED_FILE)? else {
            let in_memory = self.migration_store(name).map(|it| it.find(name));
            return match in_memory {
                None | Some(Err(StoreError::NotFound { .. })) => Err(StoreError::NotFound {
                    name: name.to_owned(),
                    root: self.root.clone(),
                }),
                Some(found) => found,
            };
        };
        let sealed = Box::new(Sealed::parse(&json).map_err(unusable)?);
        Ok(Checkpoint {
            manifest: sealed.head.clone(),
            sealed: Some(sealed),
            dir,
        })
    }

    /// The Kubernetes namespace that the manifest of a checkpoint names, also of one that cannot be used.
    #[must_use]
    pub fn namespace_of(&self, name: &str) -> Option<String> {
        check_name("the checkpoint's name", name).ok()?;
        let json = read_json(&self.root.join(name), MANIFEST_FILE).ok()??;
        let manifest: Owned = serde_json::from_slice(&json).ok()?;
        Some(manifest.pod.namespace)
    }

    /// Whether a restore reads the checkpoint at this moment.
    ///
    /// # Errors
    /// As [`Self::find`].
    pub fn is_being_restored(&self, name: &str) -> Result<bool, StoreError> {
        let found = self.find(name)?;
        let opened = found.sealed.as_deref().and_then(|it| self.opened_store(it));
        Ok(match opened.map(|it| it.find(name)) {
            Some(Ok(opened)) => opened.is_being_restored(),
            Some(Err(_)) => false,
            None => found.is_being_restored(),
        })
    }

    /// All checkpoints by name, those that are sealed as [`Self::find`] has them; one that cannot be read is there
    /// with its error.
    ///
    /// # Errors
    /// The directory cannot be read. A directory that does not exist holds no checkpoint.
    pub fn list(&self) -> Result<Vec<Listed>, StoreError> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Ok(Err(error).during("list", &self.root)?),
        };
        let mut names = Vec::new();
        for entry in entries {
            let name = entry.during("list", &self.root)?.file_name();
            if let Some(name) = name.to_str().filter(|name| !name.starts_with('.')) {
                names.push(name.to_owned());
            }
        }
        names.sort_unstable();
        Ok(names
            .into_iter()
            .map(|name| {
                let found = self.find(&name);
                (name, found)
            })
            .collect())
    }

    /// Begins a checkpoint.
    ///
    /// # Errors
    /// [`StoreError::Exists`], a name that is not a plain one, or a failing system call.
    pub fn draft(&self, name: &str) -> Result<Draft, StoreError> {
        self.begin(name, new_dir)
    }

    /// Begins a directory for files that will take the place of those of a checkpoint.
    ///
    /// # Errors
    /// A failing system call.
    pub fn aside(&self) -> Result<Aside, StoreError> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let process = std::process::id();
        let _names = self.lock_names()?;
        let dir = self
            .root
            .join(format!("{DRAFT_PREFIX}aside.{process}.{count}"));
        let lock = new_dir(&dir)?;
        Ok(Aside { dir, _lock: lock })
    }

    /// Begins a checkpoint with the files of the directory `files`, which is on the same file system, and which
    /// `lock` is a lock on; it becomes the draft.
    ///
    /// # Errors
    /// As [`Self::draft`].
    pub fn draft_of(
        &self,
        name: &str,
        files: &Path,
        lock: Flock<File>,
    ) -> Result<Draft, StoreError> {
        self.begin(name, |dir| {
            fs::rename(files, dir).during("rename", files)?;
            Ok(lock)
        })
    }

    /// `make` makes the directory of the draft, and locks it.
    fn begin(
        &self,
        name: &str,
        make: impl FnOnce(&Path) -> Result<Flock<File>, StoreError>,
    ) -> Result<Draft, StoreError> {
        check_plain(name)?;
        self.make_root()?;
        let _names = self.lock_names()?;
        self.remove_orphaned_drafts()?;
        self.check_free(name)?;
        let target = self.root.join(name);
        let dir = self
            .root
            .join(format!("{DRAFT_PREFIX}{name}.{}", std::process::id()));
        let lock = make(&dir)?;
        Ok(Draft {
            dir,
            target,
            name: name.to_owned(),
            _lock: lock,
            committed: false,
        })
    }

    /// Checks that a checkpoint could have this name.
    ///
    /// # Errors
    /// [`StoreError::Exists`], or a name that is not a plain one.
    pub fn check_free(&self, name: &str) -> Result<(), StoreError> {
        check_plain(name)?;
        match self.root.join(name).symlink_metadata() {
            Ok(_) => Err(StoreError::Exists {
                name: name.to_owned(),
            }),
            Err(_) => Ok(()),
        }
    }

    /// Removes the drafts whose maker has ended without a word.
    ///
    /// # Errors
    /// A failing system call.
    pub fn remove_orphans(&self) -> Result<(), StoreError> {
        if !self.root.is_dir() {
            return Ok(());
        }
        let _names = self.lock_names()?;
        self.remove_orphaned_drafts()
    }

    /// Removes a checkpoint.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::InUse`], or a failing system call.
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        check_name("the checkpoint's name", name).map_err(|source| StoreError::Manifest {
            name: name.to_owned(),
            source,
        })?;
        let dir = self.root.join(name);
        let not_found = || StoreError::NotFound {
            name: name.to_owned(),
            root: self.root.clone(),
        };
        if !self.root.is_dir() {
            return Err(not_found());
        }
        // A rename first: a half removed checkpoint must not look like a whole one.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let process = std::process::id();
        let gone = format!("{DRAFT_PREFIX}gone-{name}.{process}.{count}");
        let gone = self.root.join(gone);
        let names = self.lock_names()?;
        let opened = match File::open(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(not_found()),
            opened => opened.during("open", &dir)?,
        };
        let _ours = match Flock::lock(opened, FlockArg::LockExclusiveNonblock) {
            Err((_, Errno::EWOULDBLOCK)) => {
                return Err(StoreError::InUse {
                    name: name.to_owned(),
                });
            }
            locked => locked.map_err(|(_, errno)| errno).during("lock", &dir)?,
        };
        fs::rename(&dir, &gone).during("remove", &dir)?;
        drop(names);
        Ok(fs::remove_dir_all(&gone).during("remove", &gone)?)
    }

    /// Held while a directory of the store gets its name and is not locked by its maker.
    fn lock_names(&self) -> Result<Flock<File>, StoreError> {
        lock(&self.root, FlockArg::LockExclusive)
    }

    /// Whether a draft has its maker, or somebody who works in it.
    #[must_use]
    pub fn has_draft_in_use(&self) -> bool {
        let entries = fs::read_dir(&self.root).into_iter().flatten().flatten();
        let mut drafts = entries.filter(|entry| {
            let name = entry.file_name();
            name.as_encoded_bytes().starts_with(DRAFT_PREFIX.as_bytes())
        });
        drafts.any(|draft| is_worked_in(&draft.path()))
    }

    fn remove_orphaned_drafts(&self) -> Result<(), StoreError> {
        for entry in fs::read_dir(&self.root).during("list", &self.root)? {
            let entry = entry.during("list", &self.root)?;
            if !entry
                .file_name()
                .to_string_lossy()
                .starts_with(DRAFT_PREFIX)
            {
                continue;
            }
            // Another process may be faster; then there is nothing left to do. Or it is somebody else's.
            let Ok(dir) = open_own(&entry.path()) else {
                continue;
            };
            if let Ok(_lock) = Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
                match fs::remove_dir_all(entry.path()) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Ok(Err(error).during("remove", entry.path())?);
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// Makes a directory that is locked from the beginning.
fn new_dir(dir: &Path) -> Result<Flock<File>, StoreError> {
    DirBuilder::new()
        .mode(0o700)
        .create(dir)
        .during("make the directory", dir)?;
    lock(dir, FlockArg::LockSharedNonblock)
}

/// Whether there is a draft of the checkpoint that has, or will have, this directory.
///
/// # Errors
/// The store cannot be listed.
pub fn has_draft(dir: &Path) -> io::Result<bool> {
    let (Some(root), Some(name)) = (dir.parent(), dir.file_name()) else {
        return Ok(false);
    };
    let entries = match fs::read_dir(root) {
        Err(error)
            if [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory].contains(&error.kind()) =>
        {
            return Ok(false);
        }
        entries => entries?,
    };
    let draft = format!("{DRAFT_PREFIX}{}.", name.display());
    for entry in entries {
        if entry?.file_name().to_string_lossy().starts_with(&draft) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The content of a file in the directory of a checkpoint; none where it is not.
fn read_json(dir: &Path, file: &str) -> Result<Option<Vec<u8>>, StoreError> {
    let path = dir.join(file);
    let opened = match open_regular(dir, Path::new(file), Links::Refused) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.during("open", &path)?,
    };
    let mut json = Vec::new();
    opened
        .take(MANIFEST_LIMIT + 1)
        .read_to_end(&mut json)
        .during("read", &path)?;
    Ok(Some(json))
}

/// The name of a checkpoint is one component, which begins with no dot.
fn check_plain(name: &str) -> Result<(), StoreError> {
    let checked =
        check_name("the checkpoint's name", name).and_then(|()| match name.starts_with('.') {
            true => Err(ManifestError::Name {
                what: "the checkpoint's name",
                name: name.to_owned(),
            }),
            false => Ok(()),
        });
    checked.map_err(|source| StoreError::Manifest {
        name: name.to_owned(),
        source,
    })
}

fn lock(dir: &Path, how: FlockArg) -> Result<Flock<File>, StoreError> {
    let file = File::open(dir).during("open", dir)?;
    Ok(Flock::lock(file, how)
        .map_err(|(_, errno)| errno)
        .during("lock", dir)?)
}

#[cfg(test)]
mod tests {
    use nix::sys::stat::Mode;

    use super::*;
    use crate::manifest::Container;

    fn manifest(name: &str, dir: &Path) -> Manifest {
        let files = digest_files(&dir.join("c")).unwrap();
        Manifest {
            name: name.into(),
            created: 0,
            shared: Default::default(),
            containers: vec![Container {
                name: "c".into(),
                files,
                ..Container::default()
            }],
            ..Manifest::default()
        }
    }

    fn fill(draft: &Draft) {
        fs::create_dir_all(draft.dir().join("c/checkpoint")).unwrap();
        fs::write(draft.dir().join("c/checkpoint/pages-1.img"), b"memory").unwrap();
        fs::write(draft.dir().join("c/spec.dump"), b"{}").unwrap();
    }

    #[test]
    fn a_checkpoint_appears_whole_or_not_at_all() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::at(temp.path().join("checkpoints"));
        assert!(store.list().unwrap().is_empty());

        let draft = store.draft("web").unwrap();
        fill(&draft);
        assert!(store.list().unwrap().is_empty());
        assert!(matches!(
            store.open("web"),
            Err(StoreError::NotFound { .. })
        ));
        let manifest = manifest("web", draft.dir());
        draft.commit(manifest.clone(), Durability::Synced).unwrap();

        let opened = store.open("web").unwrap();
        assert_eq!(opened.manifest, manifest);
        opened.verify().unwrap();
        assert!(matches!(store.draft("web"), Err(StoreError::Exists { .. })));
        store.remove("web").unwrap();
        assert_eq!(fs::read_dir(store.root()).unwrap().count(), 0);
    }

    #[test]
    fn who_makes_and_who_removes_do_not_meet() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::at(temp.path());
        std::thread::scope(|scope| {
            for name in ["a", "b", "c", "d"] {
                let store = &store;
                scope.spawn(move || {
                    for _ in 0..100 {
                        let draft = store.draft(name).unwrap();
                        fill(&draft);
                        let manifest = manifest(name, draft.dir());
                        draft.commit(manifest, Durability::Ephemeral).unwrap();
                        store.remove(name).unwrap();
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
    }

    #[test]
    fn one_that_is_being_read_stays() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::at(temp.path());
        let draft = store.draft("web").unwrap();
        fill(&draft);
        let manifest = manifest("web", draft.dir());
        let checkpoint = draft.commit(manifest, Durability::Ephemeral).unwrap();
        let reading = (
            checkpoint.lock_for_reading().unwrap(),
            checkpoint.lock_for_reading().unwrap(),
        );
        let refused = store.remove("web");
        assert!(
            matches!(refused, Err(StoreError::InUse { .. })),
            "{refused:?}"
        );
        store.open("web").unwrap().verify().unwrap();
        drop(reading);
        store.remove("web").unwrap();
        assert!(checkpoint.lock_for_reading().is_err());
    }

    #[test]
    fn a_dropped_draft_and_one_of_a_dead_process_go_away() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::at(temp.path());
        drop((store.draft("a").unwrap(), store.aside().unwrap()));
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
        let private = |name: &str| {
            let mut builder = DirBuilder::new();
            builder.mode(0o700).create(temp.path().join(name)).unwrap();
        };
        [".new-b.1", ".new-aside.1.0"]
            .iter()
            .for_each(|name| private(name));
        let is_made = |name: &str| has_draft(&temp.path().join(name)).unwrap();
        assert!(is_made("b") && !is_made("a") && !is_made("b.1"));
        let held = store.draft("c").unwrap();
        let other = store.draft("d").unwrap();
        let left = fs::read_dir(temp.path()).unwrap().count();
        assert_eq!(left, 2, "the orphans are gone, both live drafts are there");
        drop((held, other));
    }

    #[test]
    fn a_draft_stays_as_long_as_somebody_works_in_it() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::at(temp.path());
        let draft = store.draft("made").unwrap();
        assert!(is_worked_in(draft.dir()) && store.has_draft_in_use());
        drop(draft);
        assert!(!store.has_draft_in_use());
        // As its maker leaves it that is killed.
        let left = temp.path().join(".new-left.1");
        DirBuilder::new().mode(0o700).create(&left).unwrap();
        assert!(!is_worked_in(&left));
        let works = open_to_work(&left).unwrap();
        assert!(is_worked_in(&left) && store.has_draft_in_use());
        store.remove_orphans().unwrap();
        assert!(left.is_dir());
        drop(works);
        store.remove_orphans().unwrap();
        assert!(!left.is_dir() && !is_worked_in(&left));
        open_to_work(&left).unwrap_err();
        // What is somebody else's is not ours to remove, and not waited for.
        nix::unistd::mkfifo(&left, Mode::from_bits_truncate(0o600)).unwrap();
        assert!(is_worked_in(&left));
    }

    #[test]
    fn in_a_directory_of_others_theirs_stays_as_it_is() {
        let temp = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        let all = fs::Permissions::from_mode(0o1777);
        fs::set_permissions(temp.path(), all).unwrap();
        let theirs =
            [".new-fifo.1", ".new-open.1", ".new-link.1"].map(|name| temp.path().join(name));
        // Whoever opens it waits for one that writes.
        nix::unistd::mkfifo(&theirs[0], Mode::S_IRWXU).unwrap();
        fs::create_dir(&theirs[1]).unwrap();
        fs::set_permissions(&theirs[1], fs::Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::symlink("/tmp", &theirs[2]).unwrap();
        let draft = Store::at(temp.path()).draft("web").unwrap();
        assert_eq!((mode(temp.path()), mode(draft.dir())), (0o1777, 0o700));
        assert!(theirs.iter().all(|path| path.symlink_metadata().is_ok()));
    }

    #[test]
    fn of_two_with_one_name_the_first_stays() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::at(temp.path());
        // Two registries have one of this name: it is told when the draft has begun.
        let drafts = ["a", "b"].map(|name| {
            let draft = store.draft(name).unwrap().renamed(&store, "web").unwrap();
            fill(&draft);
            draft
        });
        let [first, second] = drafts.map(|draft| {
            let manifest = manifest("web", draft.dir());
            draft.commit(manifest, Durability::Ephemeral)
        });
        first.unwrap().verify().unwrap();
        assert!(
            matches!(second, Err(StoreError::Exists { .. })),
            "{second:?}"
        );
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
    }

    #[test]
    fn damage_is_named() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::at(temp.path());
        let draft = store.draft("web").unwrap();
        fill(&draft);
        let manifest = manifest("web", draft.dir());
        let checkpoint = draft.commit(manifest, Durability::Ephemeral).unwrap();
        fs::write(checkpoint.dir.join("c/checkpoint/pages-1.img"), b"mem0ry").unwrap();
        let error = checkpoint.verify().unwrap_err().to_string();
        assert!(
            error.contains("pages-1.img") && error.contains("digest"),
            "{error}"
        );
        fs::remove_file(checkpoint.dir.join("c/checkpoint/pages-1.img")).unwrap();
        assert!(
            checkpoint
                .verify()
                .unwrap_err()
                .to_string()
                .contains("missing")
        );
    }

    #[test]
    fn names_do_not_lead_out() {
        let temp = tempfile::tempdir().unwrap();
        let store = Store::at(temp.path().join("in"));
        for name in ["../x", "", ".hidden", "a/b", ".."] {
            assert!(store.draft(name).is_err(), "{name:?}");
        }
        for name in ["../x", "", "a/b", ".."] {
            assert!(
                matches!(store.open(name), Err(StoreError::Manifest { .. })),
                "{name:?}"
            );
            assert!(store.remove(name).is_err(), "{name:?}");
        }
    }
}
