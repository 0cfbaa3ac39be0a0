//! The engine's error: what failed, of which kind, what to do next, and why.
//!
//! ```text
//!  Error { "cannot do A", Refused, hints } --source--> Error { "cannot do B" } --source--> io::Error
//! ```
//!
//! `Display` prints the first sentence alone; [`Error::one_line`] prints the chain.

use std::error::Error as StdError;
use std::fmt;

use transship_checkpoint::annotations::AnnotationError;
use transship_checkpoint::criu_options::{ConfigLineError, OptionError};
use transship_checkpoint::manifest::ManifestError;
use transship_checkpoint::namespaces::NamespaceError;
use transship_checkpoint::store::StoreError;
use transship_checkpoint::wire::WireError;
use transship_containerd::ContainerdError;
use transship_layer::{ExportError, ImportError, UsageError};
use transship_package::PackageError;
use transship_package::encryption::EncryptionError;
use transship_package::oci::RegistryError;
use transship_package::signature::SignatureError;
pub use transship_path_error::one_line;
use transship_sandbox::SandboxError;

/// A result of the engine.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a caller can do about an error; the command line has an exit code for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// It was tried and failed; what was there before is there now.
    #[default]
    Failed,
    /// What was named does not exist.
    NotFound,
    /// Refused before anything was touched.
    Refused,
    /// The other node failed, or cannot be reached; the source runs on.
    Target,
    /// Nobody can know which of two copies runs.
    Uncertain,
}

/// Somebody has asked to give up.
#[derive(Debug, thiserror::Error)]
#[error("interrupted by {0}")]
pub struct Interrupted(pub(crate) &'static str);

/// A container that should run could not be let go in time.
#[derive(Debug, thiserror::Error)]
#[error("{containers} is still paused; a process in the background goes on trying to resume it")]
pub(crate) struct StillPaused {
    pub(crate) containers: String,
    pub(crate) source: Error,
}

type Cause = Box<dyn StdError + Send + Sync>;

/// A failure of the engine.
#[derive(Debug)]
pub struct Error {
    /// None where the cause says all there is to say.
    message: Option<String>,
    kind: Kind,
    hints: Vec<String>,
    source: Option<Cause>,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.message, &self.source) {
            (Some(message), _) => f.write_str(message),
            (None, Some(cause)) => cause.fmt(f),
            (None, None) => Ok(()),
        }
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        let cause = self.source.as_deref()? as &(dyn StdError + 'static);
        match self.message {
            Some(_) => Some(cause),
            None => cause.source(),
        }
    }
}

impl Error {
    /// An error of this kind; `message` says what failed, and on what.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            message: Some(message.into()),
            kind,
            hints: Vec::new(),
            source: None,
        }
    }

    /// Something that was tried and failed.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Kind::Failed, message)
    }

    /// Something that was refused before anything was touched.
    pub fn refused(message: impl Into<String>) -> Self {
        Self::new(Kind::Refused, message)
    }

    /// Something that does not exist.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, message)
    }

    /// An error that the cause has said all about.
    pub(crate) fn caused_by(cause: impl Into<Cause>) -> Self {
        Self {
            message: None,
            kind: Kind::Failed,
            hints: Vec::new(),
            source: Some(cause.into()),
        }
    }

    /// Adds a line that says what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Cause>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// This error, which has come up while `first` was being dealt with: that is the cause, and the
    /// causes of this one are told in its sentence.
    #[must_use]
    pub(crate) fn after(self, first: Self) -> Self {
        Self {
            message: Some(self.one_line()),
            kind: self.kind(),
            hints: self.hints().into_iter().map(str::to_owned).collect(),
            source: Some(first.into()),
        }
    }

    /// The kind of this error, or else of the first of its causes that has one.
    pub fn kind(&self) -> Kind {
        let kinds = chain(self).filter_map(|error| error.downcast_ref::<Self>());
        kinds
            .map(|error| error.kind)
            .find(|kind| *kind != Kind::Failed)
            .unwrap_or_default()
    }

    /// What to do next, a line each: the hints of this error and of its causes.
    pub fn hints(&self) -> Vec<&str> {
        let errors = chain(self).filter_map(|error| error.downcast_ref::<Self>());
        errors
            .flat_map(|error| error.hints.iter().map(String::as_str))
            .collect()
    }

    /// The first cause of type `E`.
    pub fn cause<E: StdError + 'static>(&self) -> Option<&E> {
        chain(self).find_map(|error| error.downcast_ref::<E>())
    }

    /// The error and its causes in one line.
    pub fn one_line(&self) -> String {
        one_line(self)
    }
}

fn chain<'e>(
    error: &'e (dyn StdError + 'static),
) -> impl Iterator<Item = &'e (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |&error| {
        match error.downcast_ref::<Error>() {
            // Also one that speaks for its cause has it.
            Some(error) => Some(error.source.as_deref()? as _),
            None => error.source(),
        }
    })
}

/// Says what was being done when something failed.
pub trait Context<T> {
    /// `message` becomes the error, and the failure its cause.
    ///
    /// # Errors
    /// Those of `self`.
    fn context(self, message: impl Into<String>) -> Result<T>;

    /// As [`Context::context`]; the message is made only if it is needed.
    ///
    /// # Errors
    /// Those of `self`.
    fn with_context<M: Into<String>>(self, message: impl FnOnce() -> M) -> Result<T>;
}

impl<T, E: Into<Cause>> Context<T> for std::result::Result<T, E> {
    fn context(self, message: impl Into<String>) -> Result<T> {
        self.map_err(|source| Error::failed(message).because(source))
    }

    fn with_context<M: Into<String>>(self, message: impl FnOnce() -> M) -> Result<T> {
        self.map_err(|source| Error::failed(message()).because(source))
    }
}

/// The errors of the crates below say by themselves what failed, and on what.
macro_rules! speaks_for_itself {
    ($($error:ty),* $(,)?) => {
        $(impl From<$error> for Error {
            fn from(error: $error) -> Self {
                Self::caused_by(error)
            }
        })*
    };
}

speaks_for_itself!(
    AnnotationError,
    EncryptionError,
    ExportError,
    ImportError,
    Interrupted,
    ManifestError,
    NamespaceError,
    ContainerdError,
    OptionError,
    PackageError,
    ConfigLineError,
    RegistryError,
    SandboxError,
    SignatureError,
    StoreError,
    UsageError,
    WireError,
);

impl From<tokio::task::JoinError> for Error {
    fn from(error: tokio::task::JoinError) -> Self {
        Self::failed("a thread of this program panicked").because(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let failed: std::io::Result<()> = Err(std::io::Error::other("disk full"));
        let failed = failed.context("cannot write x: disk full");
        let error = failed.context("the checkpoint was not taken").unwrap_err();
        assert_eq!(
            error.one_line(),
            "the checkpoint was not taken: cannot write x: disk full"
        );
    }

    #[test]
    fn kind_and_hints_are_found_at_any_depth() {
        let problem = || Error::not_found("no container \"x\"").hint("ctr containers ls");
        let below = Err::<(), _>(problem())
            .context("cannot migrate")
            .unwrap_err();
        assert_eq!(below.kind(), Kind::NotFound);
        assert_eq!(below.hints(), ["ctr containers ls"]);
        let above = problem().because(std::io::Error::other("broken pipe"));
        assert_eq!(above.kind(), Kind::NotFound);
        assert!(above.cause::<std::io::Error>().is_some());
        assert_eq!(Error::failed("disk full").kind(), Kind::Failed);
    }
}
