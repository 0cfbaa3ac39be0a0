//! An OCI image layout: a directory of blobs, which skopeo, umoci and others read, and in which checkpoints
//! share what is the same.
//!
//! ```text
//! oci-layout              {"imageLayoutVersion": "1.0.0"}
//! index.json              the tags: descriptors with org.opencontainers.image.ref.name
//! blobs/sha256/<digest>   each appears whole, by rename
//! .new-<pid>-<n>          one that is written; locked (flock) by who writes it
//! ```
//!
//! The directory itself is locked by who makes it a layout, and by who changes the tags.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use nix::fcntl::{Flock, FlockArg};
use transship_checkpoint::beneath::{Links, open_regular, read_regular};
use transship_path_error::During as _;

use super::blobs::Blobs;
use super::digests::{check_digest, digest_of};
use super::document::{Descriptor, INDEX, Index};
use crate::error::PackageError;

const BLOBS: &str = "blobs/sha256";
const NEW: &str = ".new-";
/// What is written has its lock by then.
const OLD: Duration = Duration::from_secs(60);
const TAG: &str = "org.opencontainers.image.ref.name";
/// Longest `index.json` that is read, in bytes.
const INDEX_LIMIT: u64 = 4 << 20;

/// A layout.
#[derive(Debug)]
pub struct Layout {
    dir: PathBuf,
}

impl Layout {
    /// The layout at `dir`; it is made when there is none.
    ///
    /// # Errors
    /// There is something else, or a system call failed.
    pub fn create(dir: &Path) -> Result<Self, PackageError> {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(dir).during("make", dir)?;
        let layout = Self {
            dir: dir.to_path_buf(),
        };
        let _lock = layout.lock()?;
        let is_new = !dir.join("oci-layout").is_file();
        let has_other = fs::read_dir(dir).is_ok_and(|mut it| it.next().is_some());
        if is_new && has_other {
            return Err(PackageError::Unknown {
                reason: format!("{} is a directory of something else", dir.display()),
            });
        }
        let blobs = dir.join(BLOBS);
        builder.create(&blobs).during("make", &blobs)?;
        layout.remove_abandoned();
        if is_new {
            layout.replace("oci-layout", b"{\"imageLayoutVersion\": \"1.0.0\"}")?;
        }
        Ok(layout)
    }

    /// The layout at `dir`.
    ///
    /// # Errors
    /// There is none.
    pub fn open(dir: &Path) -> Result<Self, PackageError> {
        let marker = dir.join("oci-layout");
        fs::metadata(&marker).during("find", &marker)?;
        Ok(Self {
            dir: dir.to_path_buf(),
        })
    }

    /// Its tags, in their order.
    ///
    /// # Errors
    /// The index cannot be read.
    pub fn tags(&self) -> Result<Vec<String>, PackageError> {
        let entries = self.index()?.manifests.into_iter();
        Ok({ entries }
            .filter_map(|mut it| it.annotations.remove(TAG))
            .collect())
    }

    fn index(&self) -> Result<Index, PackageError> {
        let path = Path::new("index.json");
        match read_regular(&self.dir, path, Links::Refused, INDEX_LIMIT) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Index::default()),
            read => Index::parse(&read.during("read", self.dir.join(path))?),
        }
    }

    fn blob(&self, digest: &str) -> Result<PathBuf, PackageError> {
        let hex = check_digest(digest)?;
        Ok(self.dir.join(BLOBS).join(hex))
    }

    fn lock(&self) -> Result<Flock<File>, PackageError> {
        let dir = File::open(&self.dir).during("open", &self.dir)?;
        let lock = Flock::lock(dir, FlockArg::LockExclusive);
        Ok(lock.map_err(|(_, errno)| errno).during("lock", &self.dir)?)
    }

    /// Removes what others have begun to write and nobody writes any more.
    fn remove_abandoned(&self) {
        let is_old = |path: &Path| {
            let modified = fs::symlink_metadata(path).and_then(|it| it.modified());
            let age = modified
                .ok()
                .and_then(|it| SystemTime::now().duration_since(it).ok());
            age.is_some_and(|age| age > OLD)
        };
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry
                .file_name()
                .as_encoded_bytes()
                .starts_with(NEW.as_bytes())
                && is_old(&path)
                && let Ok(file) =
                    open_regular(&self.dir, entry.file_name().as_ref(), Links::Refused)
                && let Ok(_lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            {
                drop(fs::remove_file(&path));
            }
        }
    }

    /// Puts a file in its place whole.
    fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), PackageError> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let new = self
            .dir
            .join(format!("{NEW}{}-{count}", std::process::id()));
        let mut open = OpenOptions::new();
        open.write(true).create_new(true).mode(0o600);
        let file = open.open(&new).during("make", &new)?;
        let write = || {
            let file = Flock::lock(file, FlockArg::LockExclusiveNonblock);
            let mut file = file.map_err(|(_, errno)| errno).during("lock", &new)?;
            file.write_all(bytes).during("write", &new)?;
            let path = self.dir.join(name);
            Ok(fs::rename(&new, &path).during("rename to", &path)?)
        };
        let written = write();
        if written.is_err() {
            drop(fs::remove_file(&new));
        }
        written
    }
}

impl Blobs for Layout {
    fn has(&self, digest: &str, size: u64) -> Result<bool, PackageError> {
        let path = self.blob(digest)?;
        Ok(fs::symlink_metadata(path).is_ok_and(|it| it.is_file() && it.len() == size))
    }

    fn put(&self, digest: &str, bytes: &[u8]) -> Result<(), PackageError> {
        let hex = check_digest(digest)?;
        self.replace(&format!("{BLOBS}/{hex}"), bytes)
    }

    fn get(&self, descriptor: &Descriptor, limit: u64) -> Result<Vec<u8>, PackageError> {
        let path = Path::new(BLOBS).join(check_digest(&descriptor.digest)?);
        let read = read_regular(&self.dir, &path, Links::Refused, limit);
        let bytes = read.map_err(|error| match error.kind() {
            ErrorKind::NotFound => PackageError::Missing {
                member: descriptor.digest.clone(),
            },
            _ => PackageError::reading(error),
        })?;
        descriptor.check(&bytes, limit)?;
        Ok(bytes)
    }

    fn manifest(&self, reference: &str, limit: u64) -> Result<Vec<u8>, PackageError> {
        if reference.starts_with("sha256:") {
            let size = fs::metadata(self.blob(reference)?).map_or(0, |it| it.len());
            let descriptor = Descriptor {
                digest: reference.to_owned(),
                size,
                ..Descriptor::default()
            };
            return self.get(&descriptor, limit);
        }
        let index = self.index()?;
        let named = { index.manifests.iter() }.find(|it| it.annotation(TAG) == Some(reference));
        let descriptor = named.ok_or_else(|| PackageError::Missing {
            member: format!("the tag {reference:?}"),
        })?;
        self.get(descriptor, limit)
    }

    fn put_manifest(
        &self,
        media_type: &str,
        bytes: &[u8],
        tag: Option<&str>,
    ) -> Result<(), PackageError> {
        let digest = digest_of(bytes);
        self.put(&digest, bytes)?;
        let Some(tag) = tag else { return Ok(()) };
        let _lock = self.lock()?;
        let mut index = self.index()?;
        index.manifests.retain(|it| it.annotation(TAG) != Some(tag));
        let mut descriptor = Descriptor::new(media_type, bytes);
        descriptor
            .annotations
            .insert(TAG.to_owned(), tag.to_owned());
        index.manifests.push(descriptor);
        index.media_type = INDEX.to_owned();
        // What it names must be there before it.
        let dir = File::open(&self.dir).during("open", &self.dir)?;
        nix::unistd::syncfs(&dir).during("sync", &self.dir)?;
        self.replace("index.json", &index.to_json())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_move_and_blobs_stay() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(&dir.path().join("store")).unwrap();
        let blob = b"content";
        let descriptor = Descriptor::new("x", blob);
        assert!(!layout.has(&descriptor.digest, 7).unwrap());
        layout.put(&descriptor.digest, blob).unwrap();
        assert!(layout.has(&descriptor.digest, 7).unwrap());
        assert_eq!(layout.get(&descriptor, 100).unwrap(), blob);
        for manifest in [&b"{\"a\": 1}"[..], b"{\"a\": 2}"] {
            layout.put_manifest("m", manifest, Some("web")).unwrap();
            assert_eq!(layout.manifest("web", 100).unwrap(), manifest);
            let digest = digest_of(manifest);
            assert_eq!(layout.manifest(&digest, 100).unwrap(), manifest);
        }
        assert_eq!(layout.tags().unwrap(), ["web"]);
        assert!(layout.manifest("db", 100).is_err());
        let path = layout.blob(&descriptor.digest).unwrap();
        fs::write(path, b"contend").unwrap();
        assert!(layout.get(&descriptor, 100).is_err());
        for digest in ["", "sha256:../../etc/passwd", "md5:00"] {
            assert!(layout.put(digest, blob).is_err(), "{digest}");
        }
        fs::write(dir.path().join("other"), b"").unwrap();
        assert!(Layout::create(dir.path()).is_err());
    }

    #[test]
    fn many_at_once_lose_no_tag() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("layout");
        std::thread::scope(|scope| {
            for tag in 0..16 {
                let dir = &dir;
                scope.spawn(move || {
                    let layout = Layout::create(dir).unwrap();
                    let tag = format!("tag-{tag}");
                    layout
                        .put_manifest("m", tag.as_bytes(), Some(&tag))
                        .unwrap();
                });
            }
        });
        assert_eq!(Layout::open(&dir).unwrap().tags().unwrap().len(), 16);
    }

    #[test]
    fn nothing_is_left_of_what_was_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        fs::create_dir(dir.path().join("blobs/sha256/busy")).unwrap();
        layout.replace("blobs/sha256/busy", b"x").unwrap_err();
        let new = || {
            let entries = fs::read_dir(dir.path()).unwrap();
            let names = entries.map(|it| it.unwrap().file_name().into_string().unwrap());
            names.filter(|it| it.starts_with(NEW)).collect::<Vec<_>>()
        };
        assert!(new().is_empty());
        let held = {
            let old = SystemTime::now() - 2 * OLD;
            let make = |name: &str| {
                let file = File::create(dir.path().join(name)).unwrap();
                file.set_modified(old).unwrap();
                file
            };
            drop(make(".new-1-0"));
            Flock::lock(make(".new-1-1"), FlockArg::LockExclusive).unwrap()
        };
        fs::write(dir.path().join(".new-1-2"), b"").unwrap();
        Layout::create(dir.path()).unwrap();
        let mut left = new();
        left.sort();
        assert_eq!(left, [".new-1-1", ".new-1-2"]);
        drop(held);
    }

    /// The directory may be somebody else's archive, unpacked.
    #[test]
    fn a_blob_is_a_regular_file() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::create(dir.path()).unwrap();
        let descriptor = Descriptor::new("m", b"content");
        let path = layout.blob(&descriptor.digest).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        layout.get(&descriptor, 100).unwrap_err();
        assert!(!layout.has(&descriptor.digest, 0).unwrap());
        fs::remove_file(&path).unwrap();
        let elsewhere = dir.path().join("elsewhere");
        fs::write(&elsewhere, b"content").unwrap();
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        layout.get(&descriptor, 100).unwrap_err();
    }
}
