//! The process that ends a restore which nobody starts.
//!
//! ```text
//!  shim ── front ── hold watch        started before the restore; the pipe on its stdin ends with the front
//!            └──── guard ── runc ── CRIU ── tasks
//!
//!  the marker says, when the front is gone:
//!    running, awaiting,     the container was started, or deleted: ends
//!    or nothing
//!    restoring              the front was killed: what the runtime has made is deleted, with a guard that does not end
//!    held                   the same, if the front was killed before it could say so; else, of the CRI,
//!                           if `start` does not come within PATIENCE; elsewhere, if containerd has no such container
//! ```
//!
//! A shim whose call of `create` has passed its deadline kills the front, at any moment. What the runtime
//! has made by then, and the file system that it has mounted for CRIU, have no container in the shim: nobody
//! would delete them, and containerd removes the bundle. And a call that passes its
//! deadline between `create` and `start` leaves containerd (seen with 2.1.9) with a task that its CRI
//! plugin does not know: neither the container nor its pod can be removed, until somebody deletes the task.
//! The CRI has one call for both, so what is held there without a start has been given up. Elsewhere a
//! created container may wait for its start as long as it likes. But when the caller of `create` has gone, containerd
//! (seen with 2.1.9) forgets the shim and leaves it with its container and bundle, which nobody can delete any more; and
//! no other container of this id can be made. If its record goes as well, this ends all of it.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::{ChildStdin, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use transship_path_error::During as _;
use transship_sandbox::Staged;
use transship_sandbox::forgotten_bundle::{self, kill_who_works_in};

use super::bundle::{Bundle, Marker, Phase};
use super::{Environment, Front, FrontError};
use crate::argv::{self, Arguments, Invocation};
use crate::descendants::kill_if_same;
use crate::restore_guard;
use crate::restore_log::{self, LOG_DIR};
use crate::start_time::is_same;

/// First argument of the front as watch; the rest are those of the call of `create`.
pub const ROLE: &str = "transship-hold-watch";
/// How long after `create` the start of a container of the CRI may come. One that comes later fails,
/// and the next attempt is restored again.
const PATIENCE: Duration = Duration::from_secs(20);
/// The same where whoever migrates the pod has made it, and takes it away if it is given up: its shim makes the other
/// containers first, which may take a while. `receive` holds nothing for longer.
const PATIENCE_OF_MIGRATION: Duration = Duration::from_secs(600);
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// When containerd is asked whether it has a held container, and how often at least.
const ASK_FIRST: Duration = Duration::from_secs(1);
const ASK_AGAIN: Duration = Duration::from_secs(30);

/// Whether it came into a pod that whoever receives the migration has made.
fn is_of_migration(marker: &Marker) -> bool {
    let restore = marker
        .restore
        .as_ref()
        .filter(|_| marker.comes_with_migration);
    restore.is_some_and(|restore| Staged::at(restore.staged.clone()).once().is_some())
}

/// The front's end of the pipe to its watch, which sees when the front is gone.
#[derive(Debug)]
pub(super) struct HoldWatch(Option<ChildStdin>);

impl HoldWatch {
    /// The container is held, and the caller is about to hear of it.
    pub(super) fn held(mut self) {
        // A watch that is gone watches nothing.
        drop(self.0.as_mut().map(|pipe| pipe.write_all(b"\n")));
    }
}

impl Front<'_> {
    /// Starts the watch of this call of `create`. It must be there until nothing is left of a failure.
    pub(super) fn watch_hold(
        &self,
        create: &Arguments,
        bundle: &Bundle,
    ) -> Result<HoldWatch, FrontError> {
        let (own, work) = (&self.env.own, bundle.path("work"));
        let dir = File::open(&work).during("open", &work)?;
        let mut child = { self.once_more(ROLE, create) }
            .stdin(Stdio::piped())
            // containerd may remove the bundle while the guard of the restore still has its lock.
            .stdout(dir)
            // That of the call is the container's, and this may outlive it.
            .stderr(Stdio::null())
            .spawn()
            .during("run", own)?;
        Ok(HoldWatch(child.stdin.take()))
    }

    /// `told`: the caller may have heard that the container is held.
    fn watch(&self, create: &Arguments, work: &File, told: bool) -> Result<(), FrontError> {
        let bundle = Bundle::of(create);
        let cri = bundle.any_config(&create.id)?.is_some_and(|it| it.cri);
        let began = Instant::now();
        let mut asks_after = ASK_FIRST;
        loop {
            // The guard of the restore may outlive the front; and a start that has begun is waited for.
            let lock = { work.try_clone() }
                .and_then(|work| restore_guard::wait_for_end(work, restore_guard::END_PATIENCE))
                .during("lock", bundle.path("work"))?;
            if !bundle.is_there() {
                if lock.is_none() {
                    let dir = work.metadata();
                    kill_who_works_in(&dir.during("look at", bundle.path("work"))?, None);
                }
                return self.delete_rest(&create.id, &bundle);
            }
            let Some(marker) = bundle.marker()? else {
                return Ok(());
            };
            match marker.phase {
                // What awaits its migration is that one's.
                Phase::Running | Phase::Done | Phase::Awaiting => return Ok(()),
                Phase::Held if told && lock.is_none() => continue,
                Phase::Held if told => {}
                Phase::Restoring | Phase::Held => {
                    drop(lock);
                    return self.end(&create.id, &bundle);
                }
            }
            if !cri {
                drop(lock);
                if began.elapsed() > asks_after {
                    if self.is_forgotten(&create.id) {
                        return self.end_forgotten(&create.id, &bundle);
                    }
                    asks_after += asks_after.min(ASK_AGAIN);
                }
                thread::sleep(LOOK_AGAIN);
                continue;
            }
            // One that has been killed, by the next attempt for instance, has been given up, too.
            let is_there = is_same(marker.pid, marker.start_time);
            let patience = match is_of_migration(&marker) {
                true => PATIENCE_OF_MIGRATION,
                false => PATIENCE,
            };
            if !is_there || began.elapsed() > patience {
                kill_if_same(marker.pid, marker.start_time);
                drop(lock);
                return self.end_given_up_hold(&create.id, &bundle);
            }
            drop(lock);
            thread::sleep(LOOK_AGAIN);
        }
    }

    fn end_given_up_hold(&self, id: &str, bundle: &Bundle) -> Result<(), FrontError> {
        let reason =
            "it was restored, and given up before it was started: the next attempt is restored";
        // Nobody could be told that nobody can be told.
        let failed = restore_log::Outcome::Failed;
        drop(restore_log::append(Path::new(LOG_DIR), id, failed, reason));
        // containerd has the shim delete it, which calls `delete`. What containerd does not know, the
        // shim may not know either.
        drop(self.tool().args(["delete-task", id]).output());
        self.end(id, bundle)
    }

    /// Whether containerd says that it has no such container.
    fn is_forgotten(&self, id: &str) -> bool {
        let asked = self.tool().args(["has-container", id]).output();
        asked.is_ok_and(|answer| answer.status.success() && answer.stdout.trim_ascii() == b"no")
    }

    /// Ends a held container whose record is gone, with the shim and the bundle that containerd does not know.
    fn end_forgotten(&self, id: &str, bundle: &Bundle) -> Result<(), FrontError> {
        // A task that it knows all the same is deleted in the usual way.
        drop(self.tool().args(["delete-task", id]).output());
        self.end(id, bundle)?;
        if !bundle.is_there() {
            return Ok(());
        }
        Ok(forgotten_bundle::remove(bundle.dir())?)
    }

    fn end(&self, id: &str, bundle: &Bundle) -> Result<(), FrontError> {
        self.delete(id, true)?;
        // Without a bundle it has done nothing.
        self.delete_rest(id, bundle)
    }

    /// Deletes what the runtime has of a container whose bundle is gone.
    fn delete_rest(&self, id: &str, bundle: &Bundle) -> Result<(), FrontError> {
        let Some(state) = self.state_dir(id) else {
            return Ok(());
        };
        if bundle.is_there() || !state.is_dir() {
            return Ok(());
        }
        self.kill_held(id);
        self.unmount_rest(id, bundle);
        // The log that the caller has named was in the bundle, and without it no runtime does anything.
        let mut args: Vec<OsString> = Vec::new();
        if let Some(root) = &self.globals.root {
            args.extend(["--root".into(), root.into()]);
        }
        if self.globals.systemd_cgroup {
            args.push("--systemd-cgroup".into());
        }
        args.extend(["delete".into(), "--force".into(), id.into()]);
        self.env.runtime.run(&self.env.own, &args)?;
        self.remove_aborted_restore(id, bundle);
        Ok(())
    }
}

/// The watch; `args` are those of a call of `create`.
///
/// # Errors
/// What was left could not be deleted.
pub fn serve_watch(env: &Environment, args: Vec<OsString>) -> Result<(), FrontError> {
    // A signal to the session of whoever made the container is not for this.
    let _ = rustix::process::setsid();
    let work = io::stdout().as_fd().try_clone_to_owned();
    let work = File::from(work.during("take", "the work directory")?);
    let mut said = Vec::new();
    drop(io::stdin().read_to_end(&mut said));
    let call = Invocation::read(args);
    let argv::Command::Create(create) = &call.command else {
        return Ok(());
    };
    Front::aside(env, &call.globals).watch(create, &work, !said.is_empty())
}
