//! `start ID`: lets a held restore go. Everything else starts as ever.

use super::bundle::Phase;
use super::held::{release, start_time};
use super::{Front, FrontContext, FrontError, Outcome};

impl Front<'_> {
    pub(super) fn start(&self, id: &str) -> Result<Option<Outcome>, FrontError> {
        let Some(bundle) = self.bundle_of(id) else {
            return Ok(None);
        };
        let Some(mut marker) = bundle.marker()? else {
            return Ok(None);
        };
        if marker.phase != Phase::Held {
            return Ok(None);
        }
        let pid = marker.pid;
        // Killed while it was held, and its pid perhaps given to another.
        if start_time(pid).ok() != Some(marker.start_time) {
            return Err(FrontError::Gone {
                id: id.to_owned(),
                pid,
            });
        }
        release(pid, &marker.stopped).during("let go the tasks of", format!("/proc/{pid}"))?;
        // After the signals: a start that was cut off can be repeated.
        marker.phase = Phase::Running;
        bundle.write_marker(&marker)?;
        Ok(Some(Outcome::Exit(0)))
    }
}
