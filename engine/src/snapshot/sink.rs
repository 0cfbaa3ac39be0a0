//! Where a layer is written to: a file, which appears when it is whole, a pipe or stdout.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Context, Error, Result};

/// A layer's destination; one that is not finished leaves nothing.
#[derive(Debug)]
pub struct Sink {
    out: Out,
    given_up: Arc<AtomicBool>,
}

#[derive(Debug)]
enum Out {
    Stdout(io::Stdout),
    Pipe(io::PipeWriter),
    File {
        file: File,
        /// None once it has its name.
        temporary: Option<PathBuf>,
        path: PathBuf,
    },
}

/// Makes the next write to the sink fail.
#[derive(Debug)]
pub(super) struct GiveUp(Arc<AtomicBool>);

impl GiveUp {
    pub(super) fn now(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Sink {
    /// The output of this process.
    pub fn stdout() -> Self {
        Self::of(Out::Stdout(io::stdout()))
    }

    /// Somebody else reads it.
    pub fn pipe(pipe: io::PipeWriter) -> Self {
        Self::of(Out::Pipe(pipe))
    }

    /// The file `path`, which appears when it is whole.
    ///
    /// # Errors
    /// When its directory cannot be written to.
    pub fn file(path: &Path) -> Result<Self> {
        let name = path
            .file_name()
            .ok_or_else(|| Error::refused(format!("{} is no name of a file", path.display())))?;
        let mut temporary = std::ffi::OsString::from(".");
        temporary.push(name);
        temporary.push(format!(".{}", transship_containerd::unique()));
        let temporary = path.with_file_name(temporary);
        let file = File::options()
            .write(true)
            .create_new(true)
            .open(&temporary)
            .with_context(|| format!("cannot create {}", temporary.display()))?;
        Ok(Self::of(Out::File {
            file,
            temporary: Some(temporary),
            path: path.to_owned(),
        }))
    }

    fn of(out: Out) -> Self {
        Self {
            out,
            given_up: Arc::default(),
        }
    }

    pub(super) fn give_up(&self) -> GiveUp {
        GiveUp(Arc::clone(&self.given_up))
    }

    /// The layer is whole.
    pub(super) fn finish(mut self) -> Result<()> {
        match &mut self.out {
            Out::Stdout(stdout) => stdout.flush().context("cannot write to stdout"),
            Out::Pipe(_) => Ok(()),
            Out::File {
                file,
                temporary,
                path,
            } => {
                file.sync_all()
                    .with_context(|| format!("cannot write {}", path.display()))?;
                if let Some(temporary) = temporary.take() {
                    fs::rename(&temporary, &*path)
                        .with_context(|| format!("cannot make {}", path.display()))?;
                }
                Ok(())
            }
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        if let Out::File {
            temporary: Some(temporary),
            ..
        } = &self.out
        {
            // What brought us here is told by whoever gave up.
            drop(fs::remove_file(temporary));
        }
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.given_up.load(Ordering::Relaxed) {
            return Err(io::Error::other("given up"));
        }
        match &mut self.out {
            Out::Stdout(stdout) => stdout.write(bytes),
            Out::Pipe(pipe) => pipe.write(bytes),
            Out::File { file, .. } => file.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.out {
            Out::Stdout(stdout) => stdout.flush(),
            Out::Pipe(pipe) => pipe.flush(),
            Out::File { file, .. } => file.flush(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_appears_when_it_is_whole() {
        let dir =
            std::env::temp_dir().join(format!("transship-sink-{}", transship_containerd::unique()));
        fs::create_dir(&dir).unwrap();
        let names = || fs::read_dir(&dir).unwrap().count();
        let path = dir.join("layer.tar");
        fs::write(&path, "before").unwrap();
        let mut sink = Sink::file(&path).unwrap();
        sink.write_all(b"half").unwrap();
        sink.give_up().now();
        assert!(sink.write_all(b"more").is_err());
        drop(sink);
        assert_eq!((names(), fs::read(&path).unwrap()), (1, b"before".to_vec()));
        let mut sink = Sink::file(&path).unwrap();
        sink.write_all(b"whole").unwrap();
        sink.finish().unwrap();
        assert_eq!((names(), fs::read(&path).unwrap()), (1, b"whole".to_vec()));
        fs::remove_dir_all(&dir).unwrap();
    }
}
