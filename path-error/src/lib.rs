//! An I/O error with the act that failed and the path that it was done to; and any error with its causes in one line.
//!
//! ```text
//!  io::Error, Errno ── during("read", path) ──> PathError ── ? ──> the error of the caller's subject
//! ```
//!
//! ```
//! use std::path::Path;
//! use transship_path_error::{During as _, PathError};
//!
//! #[derive(Debug)]
//! struct ManifestError(PathError);
//!
//! impl From<PathError> for ManifestError {
//!     fn from(error: PathError) -> Self {
//!         Self(error)
//!     }
//! }
//!
//! fn read(path: &Path) -> Result<String, ManifestError> {
//!     Ok(std::fs::read_to_string(path).during("read", path)?)
//! }
//!
//! let error = read(Path::new("/no/such/file")).unwrap_err();
//! assert_eq!(error.0.to_string(), "cannot read /no/such/file");
//! ```

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A call of the system that failed. `Display` leaves the reason to the source.
#[derive(Debug, Clone, thiserror::Error)]
#[error("cannot {act} {}", path.display())]
pub struct PathError {
    /// The act, as in "create".
    pub act: &'static str,
    /// What it was done to.
    pub path: PathBuf,
    /// Why it failed; shared, so that several callers of one act can be told.
    pub source: Arc<io::Error>,
}

impl PathError {
    /// What kind of error the system gave.
    #[must_use]
    pub fn kind(&self) -> io::ErrorKind {
        self.source.kind()
    }
}

/// Adds the act and the path to an error of the system.
pub trait During<T> {
    /// The error says that `act` failed on `path`.
    ///
    /// # Errors
    /// Those of `self`.
    fn during(self, act: &'static str, path: impl AsRef<Path>) -> Result<T, PathError>;
}

impl<T, E: Into<io::Error>> During<T> for Result<T, E> {
    fn during(self, act: &'static str, path: impl AsRef<Path>) -> Result<T, PathError> {
        self.map_err(|error| PathError {
            act,
            path: path.as_ref().to_path_buf(),
            source: Arc::new(error.into()),
        })
    }
}

/// An error and its causes in one line, as in "cannot read /x: No such file or directory"; a cause that the text before it
/// tells is left out.
#[must_use]
pub fn one_line(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
        next = cause.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot move {0}: {1}")]
    struct Told(&'static str, #[source] PathError);

    #[test]
    fn causes_are_told_once() {
        let read = || Err::<(), _>(io::Error::from(io::ErrorKind::NotFound)).during("read", "/x");
        let error = read().unwrap_err();
        assert_eq!(one_line(&error), "cannot read /x: entity not found");
        let error = Told("web", error);
        assert_eq!(
            one_line(&error),
            "cannot move web: cannot read /x: entity not found"
        );
    }
}
