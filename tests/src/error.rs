//! What can go wrong with a testbed.

use std::time::Duration;

use transship_path_error::{PathError, one_line};

/// An error of the testbed; its `Display` leaves the cause to the chain.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TestbedError {
    /// A file or directory could not be used.
    #[error(transparent)]
    Io(#[from] PathError),
    /// A command could not be started.
    #[error("cannot start `{line}`")]
    Start {
        /// The command line.
        line: String,
        /// Why.
        source: std::io::Error,
    },
    /// A command ended with another status than 0.
    #[error("`{line}` ended with {status}: {stderr}")]
    Failed {
        /// The command line.
        line: String,
        /// Exit code or signal.
        status: std::process::ExitStatus,
        /// The last bytes that it wrote to stderr.
        stderr: String,
    },
    /// Something did not come about before its deadline.
    #[error("{what} did not happen within {waited:?}: {last}")]
    Deadline {
        /// What was waited for.
        what: String,
        /// For how long.
        waited: Duration,
        /// What was seen last.
        last: String,
    },
    /// A node's PID 1 could not build its world.
    #[error("node {node} did not come up: {reason}")]
    NodeStart {
        /// The node's name.
        node: String,
        /// What its PID 1 said.
        reason: String,
    },
    /// The machine or the build lacks something.
    #[error("{what} is missing: {remedy}")]
    Missing {
        /// What is missing.
        what: String,
        /// What to do about it.
        remedy: String,
    },
    /// The CRI refused or did not answer.
    #[error("the CRI cannot {act}: {reason}")]
    Cri {
        /// What was asked.
        act: &'static str,
        /// Its answer.
        reason: String,
    },
    /// Something answered in an unexpected form.
    #[error("{what} is not understood: {text:?}")]
    Unexpected {
        /// What was read.
        what: &'static str,
        /// The text itself.
        text: String,
    },
}

impl TestbedError {
    pub(crate) fn cri(act: &'static str, reason: impl std::error::Error) -> Self {
        // tonic's errors tell little by themselves and everything in their chain.
        let reason = one_line(&reason);
        Self::Cri { act, reason }
    }
}
