//! A whole checkpoint: its files, compared with its manifest.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use transship_digest::Hashed;
use transship_path_error::During as _;

use super::{StoreError, lock};
use crate::beneath::{Links, open_regular, read_regular, require_directory};
use crate::manifest::{self, LINKED_PREFIX, Manifest};
use crate::sealed::Sealed;

/// Longest spec that is read, in bytes.
const SPEC_LIMIT: u64 = 16 << 20;
/// Bytes of a file that are read at once.
const PIECE: usize = 1 << 20;

/// A whole checkpoint.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// Its directory.
    pub dir: PathBuf,
    /// Its manifest; of one that is sealed, what of it is in clear.
    pub manifest: Manifest,
    /// That it is sealed.
    pub sealed: Option<Box<Sealed>>,
}

impl Checkpoint {
    /// Bytes that its files take.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match &self.sealed {
            Some(sealed) => sealed.package.size,
            None => self.manifest.size(),
        }
    }

    /// Whether a restore has links to its images, which it locks as long as it needs them.
    #[must_use]
    pub fn is_being_restored(&self) -> bool {
        let containers = self.manifest.containers.iter();
        containers
            .filter_map(|container| fs::read_dir(self.container_dir(container)).ok())
            .flatten()
            .flatten()
            .filter(|entry| {
                let name = entry.file_name();
                name.to_string_lossy().starts_with(LINKED_PREFIX)
            })
            .any(|entry| {
                let Ok(dir) = File::open(entry.path()) else {
                    return false;
                };
                Flock::lock(dir, FlockArg::LockSharedNonblock).is_err()
            })
    }

    /// Keeps it from being removed until the lock is dropped.
    ///
    /// # Errors
    /// It is gone, or is being removed.
    pub fn lock_for_reading(&self) -> Result<Flock<File>, StoreError> {
        lock(&self.dir, FlockArg::LockSharedNonblock)
    }

    /// Directory of one container.
    #[must_use]
    pub fn container_dir(&self, container: &manifest::Container) -> PathBuf {
        self.dir.join(&container.name)
    }

    /// Opens a file in one of its directories: a regular one, to which no link leads.
    ///
    /// # Errors
    /// It is none, or a system call failed.
    pub fn open_file(&self, directory: &str, file: &str) -> Result<File, StoreError> {
        let path = Path::new(directory).join(file);
        let opened = open_regular(&self.dir, &path, Links::Refused);
        Ok(opened.during("open", self.dir.join(path))?)
    }

    /// The spec that a container was dumped with, as it is in its directory.
    ///
    /// # Errors
    /// See [`Self::open_file`]; or it is longer than any spec.
    pub fn read_spec(&self, container: &manifest::Container) -> Result<Vec<u8>, StoreError> {
        let path = Path::new(&container.name).join(manifest::SPEC_FILE);
        let json = read_regular(&self.dir, &path, Links::Refused, SPEC_LIMIT);
        Ok(json.during("read", self.dir.join(path))?)
    }

    /// Compares the lengths of a container's files with the manifest, which takes no time. CRIU
    /// 4.2 reads for ever from a file of pages that is cut off.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] names the first that differs; or a link leads to one.
    pub fn check_lengths(&self, container: &manifest::Container) -> Result<(), StoreError> {
        let dir = self.container_dir(container);
        let images = Path::new(&container.name).join(manifest::IMAGES_DIR);
        require_directory(&self.dir, &images).during("open", self.dir.join(images))?;
        for file in &container.files {
            let path = dir.join(&file.path);
            let opened = self.open_file(&container.name, &file.path)?;
            let length = opened.metadata().during("stat", &path)?.len();
            if length != file.size {
                let what = format!("it has {length} bytes, and {} in the manifest", file.size);
                return Err(StoreError::Damaged { path, what });
            }
        }
        Ok(())
    }

    /// Compares every file with the manifest.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] names the first file that is missing, more, or different.
    pub fn verify(&self) -> Result<(), StoreError> {
        for (name, files) in self.manifest.directories() {
            let dir = self.dir.join(name);
            require_directory(&self.dir, Path::new(name)).during("open", &dir)?;
            let found = list_files(&dir)?;
            let damaged = |path: &str, what: &str| StoreError::Damaged {
                path: dir.join(path),
                what: what.to_owned(),
            };
            let mut known: BTreeMap<&str, &manifest::File> = files
                .iter()
                .map(|file| (file.path.as_str(), file))
                .collect();
            for path in &found {
                let Some(file) = known.remove(path.as_str()) else {
                    return Err(damaged(path, "the manifest does not know it"));
                };
                if digest_file(&dir, path)? != *file {
                    return Err(damaged(path, "its digest differs from the manifest's"));
                }
            }
            if let Some(path) = known.into_keys().next() {
                return Err(damaged(path, "it is missing"));
            }
        }
        Ok(())
    }
}

/// Digests of all regular files below `dir`, sorted by path.
///
/// # Errors
/// A failing system call, or a file name that is not UTF-8 (CRIU and runc write none).
pub fn digest_files(dir: &Path) -> Result<Vec<manifest::File>, StoreError> {
    list_files(dir)?
        .iter()
        .map(|path| digest_file(dir, path))
        .collect()
}

/// Paths of all regular files below `dir`, relative to it, sorted.
///
/// # Errors
/// A failing system call, or a file name that is not UTF-8 (CRIU and runc write none).
pub fn list_files(dir: &Path) -> Result<Vec<String>, StoreError> {
    fn collect(dir: &Path, prefix: &str, into: &mut Vec<String>) -> Result<(), StoreError> {
        for entry in fs::read_dir(dir).during("list", dir)? {
            let entry = entry.during("list", dir)?;
            let name = entry
                .file_name()
                .into_string()
                .map_err(|name| StoreError::Damaged {
                    path: dir.join(name),
                    what: "its name is not UTF-8".to_owned(),
                })?;
            if name.starts_with(LINKED_PREFIX) {
                continue;
            }
            let kind = entry.file_type().during("stat", entry.path())?;
            if kind.is_dir() {
                collect(&entry.path(), &format!("{prefix}{name}/"), into)?;
            } else if kind.is_file() {
                into.push(format!("{prefix}{name}"));
            }
        }
        Ok(())
    }
    let mut paths = Vec::new();
    collect(dir, "", &mut paths)?;
    paths.sort_unstable();
    Ok(paths)
}

fn digest_file(dir: &Path, path: &str) -> Result<manifest::File, StoreError> {
    let full = dir.join(path);
    let file = open_regular(dir, Path::new(path), Links::Refused);
    let file = file.during("open", &full)?;
    let mut file = Hashed::new(file);
    let mut buffer = vec![0; PIECE];
    while file.read(&mut buffer).during("read", &full)? > 0 {}
    let (_, found) = file.finish();
    Ok(manifest::File {
        path: path.to_owned(),
        size: found.size,
        sha256: found.sha256,
    })
}
