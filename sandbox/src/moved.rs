//! Pods that have been moved away: kubelet must not make a second copy of one where it was.
//!
//! ```text
//! /var/lib/transship/moved/<pod uid>     JSON: Moved
//! ```
//!
//! `transship checkpoint --pod POD --moved` writes the mark before the freeze, and removes it when the
//! checkpoint fails. As long as it is there the runtime front refuses `create` of every container of that pod:
//! a liveness probe that fails while the pod stands still would have kubelet start it again, cold, beside
//! its copy. A pod keeps its uid for its life, and a new one of the same name has another. The mark goes with
//! `transship recover --pod POD --source-runs`, or with the next one that is written 30 days after kubelet has
//! forgotten the pod.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use transship_checkpoint::manifest::check_name;

use transship_path_error::During as _;

use crate::DEFAULT_RUN_DIR;
use crate::consumed::living_pods;
use crate::error::SandboxError;
use crate::files::{make_dir, remove_file, replace_durably};

/// Where the marks are.
pub const DEFAULT_MOVED_DIR: &str = "/var/lib/transship/moved";
/// How long the mark of a pod is kept that kubelet does not know.
const KEPT: Duration = Duration::from_secs(30 * 24 * 60 * 60);
const KUBELET_PODS: &str = "/var/lib/kubelet/pods";

/// A pod that has been moved away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// Its Kubernetes namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The checkpoint that it has become.
    pub checkpoint: String,
}

/// Writes the mark of the pod with this uid, beyond a power cut.
///
/// # Errors
/// A uid that could lead elsewhere, or a failed system call.
pub fn mark(dir: &Path, uid: &str, moved: &Moved) -> Result<(), SandboxError> {
    check_name("the pod's uid", uid)?;
    make_dir(dir)?;
    remove_of_the_gone(dir)?;
    let json = serde_json::to_vec(moved).expect("strings are JSON");
    replace_durably(&dir.join(uid), &json)
}

/// The mark of the pod with this uid.
///
/// # Errors
/// A uid that could lead elsewhere, a damaged mark, or a failed system call.
pub fn find(dir: &Path, uid: &str) -> Result<Option<Moved>, SandboxError> {
    check_name("the pod's uid", uid)?;
    let path = dir.join(uid);
    let json = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        json => json.during("read", &path)?,
    };
    let moved = serde_json::from_slice(&json).map_err(|error| SandboxError::Damaged {
        path,
        what: error.to_string(),
    })?;
    Ok(Some(moved))
}

/// Whether any pod has been moved away: asked before the uid of a container is looked for.
#[must_use]
pub fn is_any(dir: &Path) -> bool {
    fs::read_dir(dir).is_ok_and(|mut marks| marks.next().is_some())
}

/// Removes the mark of the pod with this uid. It is no error when there is none.
///
/// # Errors
/// A uid that could lead elsewhere, or a failed system call.
pub fn unmark(dir: &Path, uid: &str) -> Result<(), SandboxError> {
    check_name("the pod's uid", uid)?;
    remove_file(&dir.join(uid))
}

fn remove_of_the_gone(dir: &Path) -> Result<(), SandboxError> {
    let living = living_pods(Path::new(DEFAULT_RUN_DIR));
    for entry in fs::read_dir(dir).during("list", dir)? {
        let path = entry.during("list", dir)?.path();
        let age = fs::metadata(&path).and_then(|meta| meta.modified());
        let age = age.map(|then| SystemTime::now().duration_since(then).unwrap_or_default());
        // kubelet's directory may be another one (--root-dir).
        let known = path.file_name().is_some_and(|uid| {
            Path::new(KUBELET_PODS).join(uid).is_dir() || living.iter().any(|it| uid == it.as_str())
        });
        if age.is_ok_and(|age| age > KEPT) && !known {
            remove_file(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_one_pods() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("moved");
        assert!(!is_any(&dir));
        let moved = Moved {
            namespace: "shop".into(),
            name: "web".into(),
            checkpoint: "web-1".into(),
        };
        mark(&dir, "uid-1", &moved).unwrap();
        assert!(is_any(&dir));
        assert_eq!(find(&dir, "uid-1").unwrap(), Some(moved));
        assert_eq!(find(&dir, "uid-2").unwrap(), None);
        assert!(find(&dir, "../uid-1").is_err());
        unmark(&dir, "uid-1").unwrap();
        unmark(&dir, "uid-1").unwrap();
        assert!(!is_any(&dir));
    }
}
