//! `start ID`: lets a held restore go. Everything else starts as ever.

use transship_sandbox::Staged;
use transship_sandbox::consumed::remove_records_of_the_gone;

use transship_path_error::During as _;

use super::bundle::Phase;
use super::held::{Hold, release, start_time};
use super::tell::Event;
use super::{Front, FrontError, Outcome, RestoreError};
use crate::restore_guard;

impl Front<'_> {
    pub(super) fn start(&self, id: &str) -> Result<Option<Outcome>, FrontError> {
        let Some(bundle) = self.bundle_of(id) else {
            return Ok(None);
        };
        let Some(mut marker) = bundle.marker()? else {
            return Ok(None);
        };
        if marker.phase == Phase::Done {
            if let Some(restore) = &marker.restore {
                self.consume(restore)?;
            }
            marker.phase = Phase::Running;
            bundle.write_marker(&marker)?;
            return Ok(None);
        }
        if marker.phase != Phase::Held {
            return Ok(None);
        }
        // The watch of the hold ends what is not started in time: it or this.
        let work = bundle.path("work");
        let _lock = restore_guard::lock(&work).during("lock", &work)?;
        let Some(mut marker) = bundle.marker()? else {
            return Ok(None);
        };
        let pid = marker.pid;
        // Killed while it was held, and its pid perhaps given to another.
        if start_time(pid).ok() != Some(marker.start_time) {
            return Err(FrontError::from(RestoreError::Gone {
                id: id.to_owned(),
                pid,
            }));
        }
        if let Some(restore) = &marker.restore {
            self.consume(restore)?;
        }
        // Before the first task goes: from then on it has run, whoever is killed when.
        marker.phase = Phase::Running;
        bundle.write_marker(&marker)?;
        let hold = marker.frozen.clone().map_or(Hold::Stopped, Hold::Frozen);
        release(pid, &hold, &marker.stopped)
            .during("let go the tasks of", format!("/proc/{pid}"))?;
        if let Some(restore) = &marker.restore {
            // What is left says less than the record does.
            let staged = Staged::at(restore.staged.clone());
            drop(staged.remove());
            self.take_away(restore);
            if let Some(pod) = staged.pod() {
                drop(pod.remove_if_empty());
            }
            self.publish(id, Event::Restored, Some(&restore.checkpoint), None);
            // Nor are the records of others in the way of this container.
            let (records, run_dir) = (&self.env.consumed, &self.env.run_dir);
            drop(remove_records_of_the_gone(records, run_dir));
        }
        Ok(Some(Outcome::Exit(0)))
    }
}
