//! The first task of a restore, for a `create` that answers when it is there.
//!
//! ```text
//!  <work>/create-aside   somebody waits for it (front::create_aside)
//!  <work>/first-task     "PID": by the guard, when CRIU is at `setup-namespaces`
//! ```

use std::fs;
use std::path::Path;

use transship_sandbox::{SandboxError, replace_file};

/// There as long as a restore goes on of which `create` does not wait for the end.
pub(crate) const ASIDE: &str = "create-aside";
pub(crate) const FILE: &str = "first-task";

/// Says that the first task is there, where somebody waits for that.
///
/// # Errors
/// A system call failed.
pub(crate) fn tell(work: &Path, pid: i32) -> Result<(), SandboxError> {
    match work.join(ASIDE).symlink_metadata() {
        Err(_) => Ok(()),
        Ok(_) => replace_file(&work.join(FILE), pid.to_string().as_bytes()),
    }
}

/// The first task, where that has been said.
pub(crate) fn read(work: &Path) -> Option<i32> {
    let text = fs::read_to_string(work.join(FILE)).ok()?;
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_waits_is_told() {
        let work = tempfile::tempdir().unwrap();
        tell(work.path(), 17).unwrap();
        assert_eq!(read(work.path()), None);
        fs::write(work.path().join(ASIDE), "").unwrap();
        tell(work.path(), 17).unwrap();
        assert_eq!(read(work.path()), Some(17));
    }
}
