//! `start ID`: lets a held restore go. Everything else starts as ever.
//!
//! A container of a pod that comes with a migration stays held when it is started: kubelet starts the next one when
//! this one has been started, and none may run before all are there and the source has committed itself. Then
//! `transship-release ID` lets each of them go.

use std::io;

use transship_sandbox::admission::node_config::NodeConfig;
use transship_sandbox::consumed::remove_records_of_the_gone;
use transship_sandbox::opened::remove_all_unused;
use transship_sandbox::{Arrival, PodDir, Staged};

use transship_path_error::During as _;

use super::bundle::{Bundle, Marker, Phase};
use super::held::{Hold, release};
use super::tell::Event;
use super::{FitError, Front, FrontError, Outcome, RestoreError, create_aside, memory_fill};
use crate::start_time::is_same;
use crate::{own_networks, restore_guard};

impl Front<'_> {
    pub(super) fn start(&self, id: &str) -> Result<Option<Outcome>, FrontError> {
        let Some(bundle) = self.bundle_of(id) else {
            return Ok(None);
        };
        let work = bundle.path("work");
        let look = || match is_given_up(&bundle) {
            true => Err(io::Error::other("its migration was given up")),
            false => Ok(()),
        };
        create_aside::wait(&work, look).map_err(|source| create_aside::failed(id, source))?;
        let Some(marker) = bundle.marker()? else {
            return Ok(None);
        };
        if marker.phase == Phase::Done {
            return self.start_done(id, &bundle, marker).map(Some);
        }
        if !marker.was_held() {
            return Ok(None);
        }
        // The watch of the hold ends what is not started in time: it or this.
        let _lock = restore_guard::lock(&work).during("lock", &work)?;
        let Some(mut marker) = bundle.marker()? else {
            return Ok(None);
        };
        if memory_fill::is_begun(&work) {
            let root = (marker.pid, marker.start_time);
            let patience = NodeConfig::read(&self.env.node_config)?.restore_patience();
            memory_fill::wait(&work, root, patience).map_err(|source| {
                let id = id.to_owned();
                FrontError::from(RestoreError::NotFilled { id, source })
            })?;
        }
        // Whoever was starting it may have been killed before the shim knew, which asks again.
        if marker.phase != Phase::Running && marker.comes_with_migration {
            check_is_there(id, &marker)?;
            let staged = { marker.restore.as_ref() }.map(|it| Staged::at(it.staged.clone()));
            let pod = staged.as_ref().and_then(PodDir::of_staged);
            // Nobody would let it go.
            if let Some(pod) = pod
                && pod.arrival()? == Some(Arrival::GivenUp)
            {
                let id = id.to_owned();
                return Err(FrontError::from(FitError::MigrationGivenUp { id }));
            }
            marker.phase = Phase::Awaiting;
            bundle.write_marker(&marker)?;
            if let Some(staged) = staged {
                let own = std::path::absolute(bundle.dir()).during("find", bundle.dir())?;
                staged.set_started(&own)?;
            }
            return Ok(Some(Outcome::Exit(0)));
        }
        self.let_go(id, &bundle, marker)?;
        Ok(Some(Outcome::Exit(0)))
    }

    /// Lets a started container go that awaits its migration; one that has been let go runs.
    pub(super) fn release(&self, id: &str) -> Result<Option<Outcome>, FrontError> {
        let not_held = || FrontError::from(RestoreError::NotAwaiting { id: id.to_owned() });
        let bundle = self.bundle_of(id).ok_or_else(not_held)?;
        let work = bundle.path("work");
        let _lock = restore_guard::lock(&work).during("lock", &work)?;
        let marker = bundle.marker()?.ok_or_else(not_held)?;
        match marker.phase {
            Phase::Awaiting | Phase::Running => self.let_go(id, &bundle, marker)?,
            Phase::Restoring | Phase::Held | Phase::Done => return Err(not_held()),
        }
        Ok(Some(Outcome::Exit(0)))
    }

    /// Lets its tasks go, also those that somebody has let go half who was killed at it.
    fn let_go(&self, id: &str, bundle: &Bundle, mut marker: Marker) -> Result<(), FrontError> {
        check_is_there(id, &marker)?;
        if marker.phase != Phase::Running {
            if let Some(restore) = &marker.restore {
                self.consume(restore)?;
            }
            own_networks::open(&bundle.path("work"), marker.pid)?;
            // Before the first task goes: from then on it has run, whoever is killed when.
            marker.phase = Phase::Running;
            marker.is_let_go = true;
            bundle.write_marker(&marker)?;
        }
        let pid = marker.pid;
        let hold = marker.frozen.clone().map_or(Hold::Stopped, Hold::Frozen);
        let released = release(pid, &hold, &marker.stopped);
        released.during("let go the tasks of", format!("/proc/{pid}"))?;
        if marker.is_let_go {
            marker.is_let_go = false;
            // It runs; what the marker says besides matters to one that is frozen again.
            drop(bundle.write_marker(&marker));
        }
        own_networks::announce(&bundle.path("work"), marker.pid);
        if let Some(restore) = &marker.restore {
            // What is left says less than the record does.
            let staged = Staged::at(restore.staged.clone());
            drop(staged.remove());
            self.take_away(restore);
            if let Some(pod) = PodDir::of_staged(&staged) {
                drop(pod.remove_if_empty());
            }
            self.publish(id, Event::Restored, Some(&restore.checkpoint), None);
            // Nor are the records of others in the way of this container.
            let (records, run_dir) = (&self.env.consumed, &self.env.run_dir);
            drop(remove_records_of_the_gone(records, run_dir));
            if let Some(opened) = self.env.store.opened() {
                drop(remove_all_unused(run_dir, opened));
            }
        }
        Ok(())
    }
}

/// Whether the migration that it comes with was, as far as that is known.
fn is_given_up(bundle: &Bundle) -> bool {
    let marker = bundle.marker().ok().flatten();
    let pod = marker
        .and_then(|marker| marker.restore)
        .and_then(|restore| PodDir::of_staged(&Staged::at(restore.staged)));
    pod.is_some_and(|pod| matches!(pod.arrival(), Ok(Some(Arrival::GivenUp))))
}

/// It may have been killed while it was held, and its pid given to another.
fn check_is_there(id: &str, marker: &Marker) -> Result<(), FrontError> {
    let pid = marker.pid;
    match is_same(pid, marker.start_time) {
        true => Ok(()),
        false => Err(FrontError::from(RestoreError::Gone {
            id: id.to_owned(),
            pid,
        })),
    }
}
