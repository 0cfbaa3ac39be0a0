//! Whether this node can checkpoint and restore, and whether a container can be moved: findings, a line
//! each.
//!
//! ```text
//!  host        kernel, cgroups, CRIU, runc, crun, our own programs, node.toml   (programs are run)
//!  containerd  version, snapshotter, differ, runtimes of the CRI                (its services are asked)
//!  layers      whether those of images reach our differ, where snapshots lie    (its configuration is read)
//!  container   the conditions that containers are in (engine::conditions)
//!  node_facts  this node for another one  --> compare: what a container would come up against there
//!                                              (instructions: which features of a processor count)
//!  lacking     that comparison as a migration makes it, before it freezes anything
//! ```

mod compare;
pub mod container;
pub mod containerd;
pub mod host;
mod instructions;
pub mod lacking;
mod layers;
pub mod node_facts;

use serde::Serialize;

pub use crate::version::Version;

/// How good it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Works, within a limit.
    Note,
    /// Does not work.
    Problem,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How good it is.
    pub verdict: Verdict,
    /// What was looked at.
    pub what: &'static str,
    /// What was found.
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Finding {
    /// As it should be.
    pub fn ok(what: &'static str, found: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Ok,
            what,
            found: found.into(),
            remedy: None,
        }
    }

    /// Works, within a limit; `remedy` says what to do about it.
    pub fn note(what: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            verdict: Verdict::Note,
            remedy: Some(remedy.into()),
            ..Self::ok(what, found)
        }
    }

    /// Does not work; `remedy` says what to do about it.
    pub fn problem(
        what: &'static str,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            verdict: Verdict::Problem,
            ..Self::note(what, found, remedy)
        }
    }

    /// What was found, and what to do about it.
    pub fn text(&self) -> String {
        let remedy = self.remedy.iter().map(|remedy| format!("; {remedy}"));
        let remedy: String = remedy.collect();
        format!("{}{remedy}", self.found)
    }

    /// For people.
    pub fn line(&self) -> String {
        let verdict = match self.verdict {
            Verdict::Ok => "ok",
            Verdict::Note => "note",
            Verdict::Problem => "problem",
        };
        format!("{verdict:<8} {:<12} {}\n", self.what, self.text())
    }
}
