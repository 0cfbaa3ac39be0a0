//! The mark of a pod on the node that it leaves, by which no kubelet starts it again there.
//!
//! ```text
//!  checkpoint --moved:  guard, mark, freeze, dump  ──> paused, and marked: kubelet starts no second copy
//!                         └ failed: unmarked, runs;  it was marked and paused before: so it stays
//!  migrate --pod:       guard, mark, freeze, ...   ──> moved, and marked
//! ```

use std::path::Path;

use transship_checkpoint::manifest::Pod;
use transship_sandbox::moved::{self, DEFAULT_MOVED_DIR, Moved};

use crate::error::{Error, Result};
use crate::source::SourceContainer;

/// The mark of a pod that is about to move.
#[derive(Debug)]
pub(crate) struct Mark {
    uid: String,
    moved: Moved,
    /// What it was marked with before.
    earlier: Option<Moved>,
}

impl Mark {
    /// Nothing is written yet: the guard of the freeze, which takes it back, comes first.
    ///
    /// # Errors
    /// It would keep nobody from starting the pod again, or an earlier one cannot be read.
    pub(crate) fn of(
        pod: &Pod,
        containers: &[SourceContainer],
        checkpoint: &str,
        will_be_deleted: bool,
    ) -> Result<Self> {
        if !will_be_deleted {
            check_front(pod, containers).map_err(|error| {
                error.hint(
                    "--source-pod-will-be-deleted says that you delete the pod before its probes fail",
                )
            })?;
        }
        let moved = Moved {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            checkpoint: checkpoint.to_owned(),
        };
        Ok(Self {
            uid: pod.uid.clone(),
            moved,
            earlier: moved::find(Path::new(DEFAULT_MOVED_DIR), &pod.uid)?,
        })
    }

    /// # Errors
    /// It cannot be written.
    pub(crate) fn write(&self) -> Result<()> {
        let dir = Path::new(DEFAULT_MOVED_DIR);
        Ok(moved::mark(dir, &self.uid, &self.moved)?)
    }

    /// The uid of the pod, if it was not marked before: who takes the mark back knows of no earlier one.
    pub(crate) fn new_for(&self) -> Option<String> {
        self.earlier.is_none().then(|| self.uid.clone())
    }

    /// The pod does not move by this; the error says why. Where it has moved before it stays so.
    pub(crate) fn take_back(self, error: Error) -> Error {
        let dir = Path::new(DEFAULT_MOVED_DIR);
        let taken_back = match &self.earlier {
            Some(earlier) => moved::mark(dir, &self.uid, earlier),
            None => moved::unmark(dir, &self.uid),
        };
        match taken_back {
            Ok(()) => error,
            Err(left) => Error::from(left).after(error),
        }
    }
}

/// Whether the mark would keep kubelet from starting the pod again.
///
/// # Errors
/// Another runtime makes its containers.
pub(crate) fn check_front(pod: &Pod, containers: &[SourceContainer]) -> Result<()> {
    let Some(foreign) = containers.iter().find(|it| !it.runtime.is_front()) else {
        return Ok(());
    };
    Err(Error::refused(format!(
        "nothing would keep kubelet from starting {}/{} again here: the runtime of {} is {}, and not \
         transship's front",
        pod.namespace,
        pod.name,
        foreign.called,
        foreign.runtime.name(),
    )))
}
