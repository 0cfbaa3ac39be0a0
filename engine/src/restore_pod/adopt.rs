//! A checkpoint that lies elsewhere, taken into this node's store: what its manifest lists, and
//! nothing else that is in its directory.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use transship_checkpoint::store::{Checkpoint, Durability, Store};

use crate::error::{Context, Error, Kind, Result};
use crate::origin::Origins;
use crate::room::{KEEP_FREE, require_room};

/// A checkpoint of the node's store.
pub(super) struct Adopted {
    pub(super) name: String,
    pub(super) copied: bool,
}

/// What an annotation can name: a checkpoint of the store.
pub(super) fn adopt(store: &Store, path: &Path, origins: Origins<'_>) -> Result<Adopted> {
    let name = path.file_name().and_then(|name| name.to_str());
    let (Some(name), Some(parent)) = (name, path.parent()) else {
        return Err(Error::refused(format!(
            "{} is no directory of a checkpoint",
            path.display()
        )));
    };
    let missing = |error| {
        let message = format!("there is no checkpoint at {}", path.display());
        Error::new(Kind::NotFound, message).because(error)
    };
    let elsewhere = Store::at(parent);
    elsewhere.find(name).map_err(missing)?;
    if parent.canonicalize().ok() == store.root().canonicalize().ok() {
        let name = name.to_owned();
        return Ok(Adopted {
            name,
            copied: false,
        });
    }
    let checkpoint = elsewhere.open(name)?;
    origins.require(&checkpoint)?;
    let name = format!("pod-{}", transship_containerd::unique());
    let needed = checkpoint.manifest.size().saturating_add(KEEP_FREE);
    require_room(store.root(), needed)?;
    let draft = store.draft(&name)?;
    copy_files(&checkpoint, draft.dir())?;
    let mut manifest = checkpoint.manifest;
    manifest.name.clone_from(&name);
    // The copy, which nobody else can write to.
    let copy = Checkpoint {
        dir: draft.dir().to_path_buf(),
        manifest: manifest.clone(),
        sealed: None,
    };
    copy.verify()?;
    let adopted = draft.commit(manifest, Durability::Ephemeral)?;
    Origins::or_remove(store, &name, origins.made_here_for_now(&adopted))?;
    Ok(Adopted { name, copied: true })
}

/// Copies the files of the manifest; by reflink where the file system can (`copy_file_range`).
fn copy_files(checkpoint: &Checkpoint, to: &Path) -> Result<()> {
    let root = File::open(&checkpoint.dir)
        .with_context(|| format!("cannot open {}", checkpoint.dir.display()))?;
    for (name, files) in checkpoint.manifest.directories() {
        for file in files {
            let relative = Path::new(name).join(&file.path);
            let from = checkpoint.dir.join(&relative);
            let target = to.join(&relative);
            let copied = copy_file(&root, &relative, &target, file.size);
            copied.with_context(|| format!("cannot copy {}", from.display()))?;
        }
    }
    Ok(())
}

/// Regular files, never through a link, and never waiting for the other end of a FIFO.
fn copy_file(root: &File, relative: &Path, target: &Path, size: u64) -> io::Result<()> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    let source = File::from(openat2(root, relative, how)?);
    let metadata = source.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    if metadata.len() != size {
        return Err(io::Error::other("its size is not the manifest's"));
    }
    if let Some(parent) = target.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)?;
    }
    let mut new = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(target)?;
    // It may grow meanwhile.
    io::copy(&mut source.take(size), &mut new).map(drop)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::origin::tests::checkpoint_in;

    #[test]
    fn only_listed_regular_files_with_their_digest_are_taken() {
        let dir = tempfile::tempdir().unwrap();
        let (store, elsewhere) = (Store::at(dir.path().join("in")), dir.path().join("out"));
        let path = checkpoint_in(&Store::at(&elsewhere)).dir;
        let (config, records) = (dir.path().join("node.toml"), dir.path().join("origins"));
        let origins = Origins {
            config: &config,
            records: &records,
        };
        symlink("/etc/passwd", path.join("c/checkpoint/utsns-12.img.new")).unwrap();
        let adopted = adopt(&store, &path, origins).unwrap();
        let taken = store.open(&adopted.name).unwrap();
        assert!(adopted.copied);
        taken.verify().unwrap();
        assert!(!taken.dir.join("c/checkpoint/utsns-12.img.new").is_symlink());
        // A copy of its own: what is changed there later does not reach it.
        let pages = path.join("c/checkpoint/pages-1.img");
        fs::write(&pages, "m3mory").unwrap();
        taken.verify().unwrap();

        assert!(adopt(&store, &path, origins).is_err(), "another digest");
        let grown = fs::OpenOptions::new().write(true).open(&pages).unwrap();
        grown.set_len(1 << 40).unwrap();
        let error = adopt(&store, &path, origins).err().unwrap();
        assert!(error.one_line().contains("size"), "{error}");
        fs::remove_file(&pages).unwrap();
        fs::write(dir.path().join("memory"), "memory").unwrap();
        symlink(dir.path().join("memory"), &pages).unwrap();
        assert!(adopt(&store, &path, origins).is_err(), "a link");
        fs::remove_file(&pages).unwrap();
        nix::unistd::mkfifo(&pages, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(adopt(&store, &path, origins).is_err(), "a FIFO");
        fs::rename(path.join("c"), path.join("d")).unwrap();
        symlink("d", path.join("c")).unwrap();
        assert!(
            adopt(&store, &path, origins).is_err(),
            "a directory that is a link"
        );
        assert_eq!(store.list().unwrap().len(), 1);
    }
}
