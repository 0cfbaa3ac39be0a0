//! As [`crate::error`], for the modules whose errors are still those of `anyhow`.

use std::fmt;

pub use crate::error::Kind;

/// A problem with its kind and what to do about it. It can stand anywhere in a chain of errors.
#[derive(Debug)]
pub struct Problem {
    kind: Kind,
    message: String,
    hints: Vec<String>,
}

impl Problem {
    /// A problem of this kind.
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

    /// Adds a line that says what to do next.
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
}
