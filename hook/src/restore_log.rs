//! What became of restores that failed: `/var/log/transship/restores.log`, a line each.
//!
//! ```text
//! 2026-01-02T03:04:05Z container=ID outcome=failed|started-cold REASON
//! ```
//!
//! A failure is told by the call that fails, too; a container that starts cold instead has no such
//! call, and the runtime's log goes away with its bundle.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use crate::runtime_log::now;

/// Where logs of restores are kept.
pub const LOG_DIR: &str = "/var/log/transship";
const LOG_FILE: &str = "restores.log";

/// What a failed restore leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The container, or the pod, does not start.
    Failed,
    /// It starts its own command on its own files.
    StartedCold,
}

/// Adds a line.
///
/// # Errors
/// A system call failed.
pub fn append(dir: &Path, id: &str, outcome: Outcome, reason: &str) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let outcome = match outcome {
        Outcome::Failed => "failed",
        Outcome::StartedCold => "started-cold",
    };
    let reason = reason.replace('\n', " ");
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(dir.join(LOG_FILE))?
        .write_all(format!("{} container={id} outcome={outcome} {reason}\n", now()).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_each() {
        let dir = tempfile::tempdir().unwrap();
        let logs = dir.path().join("logs");
        append(&logs, "c1", Outcome::Failed, "no such\ncheckpoint").unwrap();
        append(&logs, "c2", Outcome::StartedCold, "CRIU: x").unwrap();
        let text = fs::read_to_string(logs.join(LOG_FILE)).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0].ends_with("Z container=c1 outcome=failed no such checkpoint"),
            "{text}"
        );
        assert!(
            lines[1].ends_with(" container=c2 outcome=started-cold CRIU: x"),
            "{text}"
        );
    }
}
