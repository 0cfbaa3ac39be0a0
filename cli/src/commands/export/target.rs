//! Where a package is written.
//!
//! ```text
//!  -                          stdout
//!  a device, a FIFO           opened, and written as it comes
//!  a file, a link to one, or
//!  nothing yet                .FILE.PID.new beside it, then renamed
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::IsTerminal as _;
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use transship_engine::{Context as _, Error, Result};

/// Links that are followed, one after the other: as many as the kernel follows.
const MOST_LINKS: usize = 40;

/// Where a package is written.
pub(super) enum Target {
    /// What takes bytes, and keeps no older ones.
    Stream(File),
    /// A file, or a name for one.
    File(PathBuf),
}

impl Target {
    /// What `path` names.
    ///
    /// # Errors
    /// A directory, a terminal, or what cannot be opened.
    pub(super) fn of(path: &Path) -> Result<Self> {
        let file = if path == Path::new("-") {
            let stdout = std::io::stdout().as_fd().try_clone_to_owned();
            File::from(stdout.context("cannot open stdout")?)
        } else {
            match fs::metadata(path) {
                Ok(meta) if meta.is_dir() => {
                    return Err(Error::refused(format!("{} is no file", path.display())));
                }
                Ok(meta) if !meta.is_file() => {
                    let opened = OpenOptions::new().write(true).open(path);
                    opened.with_context(|| format!("cannot open {}", path.display()))?
                }
                _ => return Ok(Self::File(followed(path))),
            }
        };
        if file.is_terminal() {
            let message = "a package cannot be written to a terminal";
            return Err(Error::refused(message).hint("name a file, or redirect it"));
        }
        Ok(Self::Stream(file))
    }

    /// Has the package written, and gives the bytes of the file that it is now; none: it is none.
    ///
    /// # Errors
    /// Those of `write`, or the file cannot be made; an older one is as it was then.
    pub(super) fn write(self, write: impl FnOnce(File) -> Result<File>) -> Result<Option<u64>> {
        match self {
            Self::Stream(file) => write(file).map(|_| None),
            Self::File(path) => write_whole(&path, write).map(Some),
        }
    }
}

/// What a link leads to, whether it is there or not: the link stays.
fn followed(path: &Path) -> PathBuf {
    let mut path = path.to_path_buf();
    for _ in 0..MOST_LINKS {
        let Ok(to) = fs::read_link(&path) else { break };
        path = path.parent().unwrap_or(Path::new("")).join(to);
    }
    path
}

/// The package gets its name when it is whole and on the disk; until then an older one stays.
fn write_whole(path: &Path, write: impl FnOnce(File) -> Result<File>) -> Result<u64> {
    let name = path.file_name();
    let name = name.ok_or_else(|| Error::refused(format!("{} is no file", path.display())))?;
    let new = path.with_file_name(format!(
        ".{}.{}.new",
        name.to_string_lossy(),
        std::process::id()
    ));
    let mut open = OpenOptions::new();
    open.write(true).create_new(true).mode(0o600);
    let file = open.open(&new);
    let file = file.with_context(|| format!("cannot make {}", new.display()))?;
    let finished = write(file).and_then(|file| finish(&file, &new, path));
    if finished.is_err() {
        drop(fs::remove_file(&new));
    }
    finished
}

fn finish(file: &File, new: &Path, path: &Path) -> Result<u64> {
    let shown = || format!("cannot write {}", path.display());
    file.sync_all().with_context(shown)?;
    fs::rename(new, path).with_context(shown)?;
    Ok(file.metadata().with_context(shown)?.len())
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::fs::symlink;
    use std::process::Command;

    use super::*;

    /// A directory of this test.
    struct TempDir(PathBuf);

    impl TempDir {
        fn new(name: &str) -> Self {
            let name = format!("transship-{name}-{}", std::process::id());
            let dir = std::env::temp_dir().join(name);
            fs::create_dir(&dir).unwrap();
            Self(dir)
        }
    }

    impl Drop for TempDir {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn write(path: &Path) -> Result<Option<u64>> {
        Target::of(path)?.write(|mut file| {
            file.write_all(b"package").context("cannot write")?;
            Ok(file)
        })
    }

    #[test]
    fn what_is_there_and_no_file_stays_what_it_is() {
        let dir = TempDir::new("streams");
        let fifo = dir.0.join("fifo");
        let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
        assert!(made.success());
        let reader = {
            let fifo = fifo.clone();
            std::thread::spawn(move || {
                let mut text = String::new();
                File::open(fifo).unwrap().read_to_string(&mut text).unwrap();
                text
            })
        };
        assert_eq!(write(&fifo).unwrap(), None);
        assert_eq!(reader.join().unwrap(), "package");
        assert!(!fs::symlink_metadata(&fifo).unwrap().is_file());
        assert_eq!(write(Path::new("/dev/null")).unwrap(), None);
        write(Path::new("/dev/full")).unwrap_err();
        write(&dir.0).unwrap_err();
        assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 1);
    }

    #[test]
    fn links_stay_and_lead_to_the_package() {
        let dir = TempDir::new("links");
        let (link, more) = (dir.0.join("link"), dir.0.join("more"));
        let file = dir.0.join("sub/file");
        fs::create_dir(dir.0.join("sub")).unwrap();
        symlink("more", &link).unwrap();
        symlink("sub/file", &more).unwrap();
        for _ in 0..2 {
            assert_eq!(write(&link).unwrap(), Some(7));
            assert_eq!(fs::read(&file).unwrap(), b"package");
            assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        }
        assert_eq!(fs::read_dir(dir.0.join("sub")).unwrap().count(), 1);
    }
}
