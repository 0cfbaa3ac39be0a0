//! Fills a new upperdir with the files of a checkpoint, before anybody can mount it.
//!
//! Asked for by the label `containerd.io/snapshot/transship.import=<directory>` at Prepare. The
//! directory lies below the configured `import_dir` and holds `rootfs-diff.tar`, an OCI layer, plain,
//! gzip or zstd, which came from another node and is not trusted: it is opened beneath `import_dir`
//! without following a single symlink (openat2, Linux 5.6), and its entries cannot leave the upperdir.

use std::fs::File;
use std::io::BufReader;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;
use transship_layer::{ImportOptions, OverlayXattrs, decompress, import_into_upperdir};

use crate::error::{IoContext, Result, SnapshotError};
use crate::labels;

/// The layer in a checkpoint directory.
const LAYER: &str = "rootfs-diff.tar";

/// Applies the layer of the checkpoint directory `source` to the empty upperdir `fs`.
///
/// `allowed` is the directory below which `source` must lie; `lowerdirs` are the layers beneath,
/// nearest first; `userxattr` says how the overlay will be mounted.
///
/// # Errors
/// A source elsewhere, a layer that is not there or is refused, I/O errors. The upperdir is then half
/// filled and must be thrown away.
pub fn fill_upperdir(
    source: &str,
    allowed: &Path,
    fs: &Path,
    lowerdirs: &[PathBuf],
    userxattr: bool,
) -> Result<()> {
    let path = Path::new(source).join(LAYER);
    let file = open_beneath(allowed, &path)?;
    let tar = decompress(BufReader::with_capacity(1 << 20, file)).during("read", &path)?;
    let options = ImportOptions {
        overlay_xattrs: if userxattr {
            OverlayXattrs::User
        } else {
            OverlayXattrs::Trusted
        },
        ..ImportOptions::default()
    };
    let stats = import_into_upperdir(tar, fs, lowerdirs, &options).map_err(|source| {
        SnapshotError::Import {
            path: path.clone(),
            source: Arc::new(source),
        }
    })?;
    tracing::info!(path = %path.display(), stats.entries, stats.bytes, "imported");
    Ok(())
}

fn open_beneath(allowed: &Path, path: &Path) -> Result<File> {
    let refused = |why: &str| SnapshotError::Invalid {
        reason: format!("label {}: {} {why}", labels::IMPORT, path.display()),
    };
    let relative = path
        .strip_prefix(allowed)
        .map_err(|_| refused(&format!("is not below {}", allowed.display())))?;
    if !relative
        .components()
        .all(|part| matches!(part, Component::Normal(_)))
    {
        return Err(refused("is not a plain path"));
    }
    let base = open(
        allowed,
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .during("open", allowed)?;
    // O_NONBLOCK: a FIFO in the place of the file must not hold the call for ever.
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    let file: OwnedFd = openat2(&base, relative, how).during("open", path)?;
    let file = File::from(file);
    if !file.metadata().during("stat", path)?.is_file() {
        return Err(refused("is not a regular file"));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Read;
    use std::os::unix::fs::symlink;

    #[test]
    fn only_plain_files_beneath_the_allowed_directory_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let allowed = dir.path().join("allowed");
        fs::create_dir_all(allowed.join("a/b")).unwrap();
        fs::create_dir(allowed.join("dir")).unwrap();
        fs::create_dir(allowed.join("dir").join(LAYER)).unwrap();
        fs::write(allowed.join("a/b").join(LAYER), "good").unwrap();
        fs::write(dir.path().join(LAYER), "outside").unwrap();
        symlink("a/b", allowed.join("link")).unwrap();
        fs::create_dir(allowed.join("leaf")).unwrap();
        symlink("../a/b/rootfs-diff.tar", allowed.join("leaf").join(LAYER)).unwrap();
        fs::create_dir(allowed.join("fifo")).unwrap();
        nix::unistd::mkfifo(&allowed.join("fifo").join(LAYER), Mode::S_IRUSR).unwrap();

        let open = |source: PathBuf| {
            let mut content = String::new();
            open_beneath(&allowed, &source.join(LAYER))
                .map_err(|error| crate::error::chain(&error))
                .map(|mut file| file.read_to_string(&mut content).map(|_| content))
        };
        assert_eq!(open(allowed.join("a/b")).unwrap().unwrap(), "good");
        for source in [
            "link", "leaf", "fifo", "dir", "missing", "..", "a/../..", "a/b/../b",
        ] {
            open(allowed.join(source)).expect_err(source);
        }
        for source in ["/etc", "relative", "", "/"] {
            let error = open(PathBuf::from(source)).expect_err(source);
            assert!(error.contains("is not below"), "{error}");
        }
    }
}
