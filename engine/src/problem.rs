//! What went wrong, for people and for scripts: the exit code, and what to do next.

use std::fmt;
use std::process::ExitCode;

use crate::error::Error;
pub use crate::error::Kind;

/// A problem with its kind and what to do about it. It can stand anywhere in a chain of errors.
#[derive(Debug)]
pub struct Problem {
    kind: Kind,
    message: String,
    hints: Vec<String>,
}

impl Problem {
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            hints: Vec::new(),
        }
    }

    /// The problem that an error is, has as its context, or comes from.
    pub fn in_chain(error: &anyhow::Error) -> Option<&Self> {
        // A context can be had from the error only, not from its chain.
        error
            .downcast_ref::<Self>()
            .or_else(|| error.chain().find_map(|cause| cause.downcast_ref::<Self>()))
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What to do next, a line each.
    pub fn hints(&self) -> &[String] {
        &self.hints
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Problem {}

/// Prints the error with its causes and hints, and gives the exit code.
pub fn report(error: &anyhow::Error) -> ExitCode {
    eprintln!("transship: {}", one_line(error));
    let found = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<Error>());
    let (kind, hints) = match (Problem::in_chain(error), found) {
        (Some(problem), _) => (
            problem.kind,
            problem.hints.iter().map(String::as_str).collect(),
        ),
        (None, Some(error)) => (error.kind(), error.hints()),
        (None, None) => (Kind::Failed, Vec::new()),
    };
    for hint in hints {
        eprintln!("  {hint}");
    }
    ExitCode::from(match kind {
        Kind::Failed => 1,
        Kind::NotFound => 3,
        Kind::Refused => 4,
        Kind::Target => 5,
        Kind::Uncertain => 6,
    })
}

/// An error and its causes in one line; a cause that the error before it already tells is left out.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string();
        if line.is_empty() {
            line = text;
        } else if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        let error = anyhow::Error::from(std::io::Error::other("disk full"))
            .context("cannot write x: disk full")
            .context("the checkpoint was not taken");
        assert_eq!(
            one_line(&error),
            "the checkpoint was not taken: cannot write x: disk full"
        );
    }

    #[test]
    fn the_kind_is_found_at_any_depth() {
        let problem = || Problem::new(Kind::NotFound, "no container \"x\"");
        let below = anyhow::Error::from(problem()).context("cannot migrate");
        assert_eq!(report(&below), ExitCode::from(3));
        let above = anyhow::anyhow!("broken pipe")
            .context(problem())
            .context("cannot migrate");
        assert_eq!(report(&above), ExitCode::from(3));
    }
}
