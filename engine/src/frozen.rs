//! Containers that stand still, and what can be done with them.
//!
//! ```text
//!  Frozen::freeze ──> Frozen ── thaw ──────────> they run
//!                       │ ├──── kill ──────────> they have ended, without another instruction
//!                       │ ├──── leave ─────────> they stay paused
//!                       │ └──── (dropped) ─────> the guard lets them run
//!                       └ commit ──> Committed ── thaw, kill
//!                                        └──── (dropped) ─> they stay paused
//! ```
//!
//! A [`Frozen`] cannot be forgotten: its guard, a process of its own, lets the containers run unless it
//! has been told that they do. [`Committed`] is the one state in which nobody but the caller may
//! decide: a copy may run elsewhere.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_client::services::v1::Container as Record;
use containerd_client::types::v1::{Process, Status};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use transship_containerd::Containerd;
use transship_sandbox::{SandboxError, lock_network, unlock_network};

use crate::error::{Error, Result, StillPaused, one_line};
use crate::freeze_guard::FreezeGuard;
use crate::frozen_pids::pids_of_frozen;
use crate::interrupt::Interrupt;
use crate::kill;
use crate::moved_mark::Mark;
use crate::oci_runtime::OciRuntime;
use crate::restart_policy;
use crate::stuck_dump;
use crate::thaw::{self, Seen};
use crate::vfork;

pub use crate::task_to_freeze::TaskToFreeze;

/// How long containerd may take to freeze a container: a runtime on a busy node tries again for seconds.
const FREEZE_PATIENCE: Duration = Duration::from_secs(30);
/// How long containerd may take to let a container run; then the guard goes on.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(100);
/// What runc says when it has not seen all tasks frozen in time, on cgroup v1, and has let them go
/// again. On a busy node the next try may do.
const NOT_FROZEN: &str = "unable to freeze";
/// How often a freeze is tried.
const FREEZES: u32 = 5;
/// How often a freeze is tried while one waits for a child that has not executed its program yet: a program that starts
/// others all the time is within vfork for a part of it.
const VFORKS: u32 = 40;
const VFORK_PAUSE: Duration = Duration::from_millis(25);

/// Containers that stand still until they are thawed or killed.
#[derive(Debug)]
pub struct Frozen {
    tasks: Tasks,
    guard: FreezeGuard,
    since: Instant,
    pids: Pids,
}

/// The processes of frozen containers, by id. None ends while they are frozen; what somebody is just starting in one may
/// still join them, and is frozen, too.
#[derive(Debug, Default, Clone)]
pub(crate) struct Pids(BTreeMap<String, Vec<u32>>);

/// Frozen containers that nobody but the caller may let run.
#[derive(Debug)]
pub struct Committed(Tasks);

#[derive(Debug)]
struct Tasks {
    node: Containerd,
    tasks: Vec<TaskToFreeze>,
    draft: Option<PathBuf>,
}

impl TaskToFreeze {
    /// The task of a container record.
    pub fn of(node: &Containerd, record: &Record, task: &Process) -> Self {
        Self {
            id: record.id.clone(),
            pid: task.pid,
            runtime: OciRuntime::of_record(record, node.namespace()),
            was_paused: task.status() == Status::Paused,
            network_is_locked: false,
            given_away: Vec::new(),
            hides_policy: false,
            marked: None,
        }
    }

    async fn lock_network(&self) -> Result<()> {
        self.network(lock_network).await
    }

    /// Lets packets come and go again, if they were kept.
    pub(crate) async fn unlock_network(&self) -> Result<()> {
        self.network(unlock_network).await
    }

    async fn network(&self, act: fn(&Path) -> Result<(), SandboxError>) -> Result<()> {
        let namespace = PathBuf::from(format!("/proc/{}/ns/net", self.pid));
        if !self.network_is_locked || namespace.symlink_metadata().is_err() {
            return Ok(());
        }
        Ok(tokio::task::spawn_blocking(move || act(&namespace)).await??)
    }
}

impl Frozen {
    /// Freezes all of these tasks; one that somebody has paused before is left as it is.
    ///
    /// `draft` is the directory that will be dumped to: should this process be killed, the guard
    /// waits for that dump and removes the directory.
    ///
    /// # Errors
    /// When one cannot be frozen; then all run.
    pub async fn freeze(
        node: &Containerd,
        tasks: Vec<TaskToFreeze>,
        draft: Option<&Path>,
    ) -> Result<Self> {
        Self::freeze_marked(node, tasks, draft, (None, &Interrupt::never()), None).await
    }

    /// As [`Self::freeze`], for at most `most`, and unless somebody asks to give up. A mark is written when there is a
    /// guard that takes it back, and before anything stands still, which a kubelet takes for dead.
    ///
    /// # Errors
    /// As there; the mark stays.
    pub(crate) async fn freeze_marked(
        node: &Containerd,
        tasks: Vec<TaskToFreeze>,
        draft: Option<&Path>,
        (most, interrupt): (Option<Duration>, &Interrupt),
        mark: Option<&Mark>,
    ) -> Result<Self> {
        let guard = FreezeGuard::start(node, &tasks, draft)?;
        let tasks = Tasks {
            node: node.clone(),
            tasks,
            draft: draft.map(Path::to_path_buf),
        };
        // What is hidden from others is put back by the guard, too.
        let paused = {
            let pausing = async {
                mark.map_or(Ok(()), Mark::write)?;
                tasks.hide_policies().await?;
                tasks.pause_outside_of_vfork(most).await
            };
            tokio::pin!(pausing);
            tokio::select! {
                paused = &mut pausing => paused,
                signal = interrupt.wait() => {
                    // One that is cut off may freeze later than it is let go.
                    drop(timeout(thaw::ANSWER, pausing).await);
                    Err(signal.into())
                }
            }
        };
        let frozen = Self {
            tasks,
            guard,
            since: Instant::now(),
            pids: Pids::default(),
        };
        match paused {
            Ok((since, pids)) => Ok(Self {
                since,
                pids,
                ..frozen
            }),
            // No dump has begun: one that waits for this freeze has touched nothing, and is not waited for.
            Err(error) => Err(frozen.thaw_because(error).await),
        }
    }

    /// Their processes.
    pub(crate) fn pids(&self) -> &Pids {
        &self.pids
    }

    /// When the freeze that has lasted began.
    pub(crate) fn since(&self) -> Instant {
        self.since
    }

    /// Lets them run, and looks that they do.
    ///
    /// # Errors
    /// When one has not been seen to run in time; then the guard goes on trying.
    pub async fn thaw(self) -> Result<()> {
        // A guard that is not told to stand down takes over when it is dropped.
        self.tasks.thaw().await?;
        self.tasks.show_policies().await?;
        self.guard.stand_down();
        Ok(())
    }

    /// Waits for a dump that goes on without its caller, and ends it when it is stuck.
    pub async fn wait_for_dump(&self) {
        if let Some(draft) = &self.tasks.draft {
            let roots = self.tasks.tasks.iter().map(|task| task.pid).collect();
            stuck_dump::wait_for_end(draft, roots).await;
        }
    }

    /// As [`Self::thaw`], after something has failed: waits for a dump that may still go on. Gives the
    /// error; if something is still paused, that it is, with the error as the cause.
    pub async fn thaw_after(self, error: Error) -> Error {
        self.wait_for_dump().await;
        self.thaw_because(error).await
    }

    async fn thaw_because(self, error: Error) -> Error {
        match self.thaw().await {
            Ok(()) => error,
            Err(paused) => paused.after(error),
        }
    }

    /// Kills every process of theirs, and waits until all have ended: none executes another
    /// instruction.
    ///
    /// # Errors
    /// When a process cannot be killed, or does not end; then the guard lets run what is left.
    pub async fn kill(self) -> Result<()> {
        kill::kill_frozen(&self.tasks.node, &self.tasks.tasks, async {}).await?;
        self.tasks.show_policies().await?;
        self.guard.stand_down();
        Ok(())
    }

    /// Leaves them paused for somebody else to decide, and hidden from who would start them again.
    pub fn leave(self) {
        self.guard.stand_down();
    }

    /// From here on nobody but the caller may let them run: a copy may run elsewhere.
    #[must_use]
    pub fn commit(self) -> Committed {
        self.guard.stand_down();
        Committed(self.tasks)
    }
}

impl Committed {
    /// Paused tasks whose command has ended.
    pub(crate) fn of(node: &Containerd, tasks: Vec<TaskToFreeze>) -> Self {
        Self(Tasks {
            node: node.clone(),
            tasks,
            draft: None,
        })
    }

    /// Lets them run: no copy does.
    ///
    /// # Errors
    /// When one has not been seen to run in time; a guard goes on trying.
    pub async fn thaw(self) -> Result<()> {
        let Self(tasks) = self;
        // Where none can be started they are let go all the same.
        let guard = FreezeGuard::start(&tasks.node, &tasks.tasks, tasks.draft.as_deref());
        tasks.thaw().await?;
        if let Ok(guard) = guard {
            guard.stand_down();
        }
        Ok(())
    }

    /// As [`Frozen::kill`]: the copy runs. `killed` is for what holds the processes as well: it may let them go when it
    /// begins.
    ///
    /// # Errors
    /// When a process cannot be killed, or does not end.
    pub async fn kill(self, killed: impl Future<Output = ()>) -> Result<()> {
        kill::kill_frozen(&self.0.node, &self.0.tasks, killed).await
    }
}

impl Tasks {
    /// Those that this freeze pauses.
    fn ours(&self) -> impl Iterator<Item = &TaskToFreeze> {
        self.tasks.iter().filter(|task| !task.was_paused)
    }

    async fn hide_policies(&self) -> Result<()> {
        for task in self.ours().filter(|task| task.hides_policy) {
            let suspended = restart_policy::suspend(&self.node, &task.id);
            thaw::answered(FREEZE_PATIENCE, suspended).await?;
        }
        Ok(())
    }

    async fn show_policies(&self) -> Result<()> {
        for task in self.ours().filter(|task| task.hides_policy) {
            let shown = restart_policy::put_back(&self.node, &task.id);
            thaw::answered(FREEZE_PATIENCE, shown).await?;
        }
        Ok(())
    }

    /// Gives when they were paused, and their processes, each time for at most `most`. One that never is outside is left to
    /// CRIU, which says so.
    async fn pause_outside_of_vfork(&self, most: Option<Duration>) -> Result<(Instant, Pids)> {
        let mut tries = 1;
        loop {
            let since = Instant::now();
            let mut pauses = JoinSet::new();
            let paused = async {
                self.pause(&mut pauses).await?;
                let pids = self.pids().await?;
                let is_outside = tries == VFORKS || !self.are_within_vfork(&pids).await?;
                Ok(is_outside.then_some(pids))
            };
            let paused = at_most(most, since, paused).await;
            // None freezes later than it is let go.
            let rest = async { while pauses.join_next().await.is_some() {} };
            drop(timeout(thaw::ANSWER, rest).await);
            if let Some(pids) = paused? {
                return Ok((since, pids));
            }
            tries += 1;
            self.thaw().await?;
            sleep(VFORK_PAUSE).await;
        }
    }

    /// Their processes; the shim of each starts its runtime for that, which takes its time.
    async fn pids(&self) -> Result<Pids> {
        let mut asked = JoinSet::new();
        for task in &self.tasks {
            let (node, runtime, id) = (self.node.clone(), task.runtime.clone(), task.id.clone());
            asked.spawn(async move {
                let pids = pids_of_frozen(&node, &runtime, &id).await?;
                Ok((id, pids))
            });
        }
        let all: Result<_> = asked.join_all().await.into_iter().collect();
        Ok(Pids(all?))
    }

    async fn are_within_vfork(&self, pids: &Pids) -> Result<bool> {
        let all: Vec<_> = self.ours().map(|it| pids.of(&it.id).to_vec()).collect();
        let look = move || all.iter().any(|pids| vfork::is_going_on(pids));
        Ok(tokio::task::spawn_blocking(look).await?)
    }

    /// What is not done yet when this is given up is left in `pauses`.
    async fn pause(&self, pauses: &mut JoinSet<Result<()>>) -> Result<()> {
        for task in &self.tasks {
            task.lock_network().await?;
        }
        // Side by side, so that the first does not stand still for the others.
        for task in self.ours() {
            let (node, id) = (self.node.clone(), task.id.clone());
            pauses.spawn(async move { pause_one(&node, &id).await });
        }
        let mut all = Ok(());
        while let Some(paused) = pauses.join_next().await {
            all = all.and(paused.map_err(Error::from).flatten());
        }
        all
    }

    async fn thaw(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let (mut paused, mut why) = (Vec::new(), None);
        let mut unlocked = Ok(());
        for task in &self.tasks {
            unlocked = unlocked.and(task.unlock_network().await);
        }
        for task in self.ours() {
            if let Err(error) = self.thaw_one(task, deadline).await {
                paused.push(task.id.as_str());
                why = Some(error);
            }
        }
        match why {
            Some(why) => Err(still_paused(&paused, self.node.namespace(), why)),
            None => unlocked,
        }
    }

    /// At least one try, whatever the time.
    async fn thaw_one(&self, task: &TaskToFreeze, deadline: Instant) -> Result<()> {
        let id = &task.id;
        loop {
            let failed = match timeout(thaw::ANSWER, thaw::resume_once(&self.node, task)).await {
                Ok(Ok(Seen::Running | Seen::RunsUnseen | Seen::Gone)) => return Ok(()),
                Ok(Ok(Seen::Paused)) => Error::failed(format!("containerd cannot resume {id:?}")),
                Ok(Err(error)) => error,
                Err(_) => Error::failed("containerd does not answer"),
            };
            if Instant::now() > deadline {
                return Err(failed);
            }
            sleep(PAUSE).await;
        }
    }
}

impl Pids {
    /// Those of this container.
    pub(crate) fn of(&self, id: &str) -> &[u32] {
        self.0.get(id).map_or(&[], Vec::as_slice)
    }
}

async fn pause_one(node: &Containerd, id: &str) -> Result<()> {
    let mut tries = 1;
    loop {
        match thaw::answered(FREEZE_PATIENCE, node.pause(id)).await {
            Err(error) if tries < FREEZES && one_line(&error).contains(NOT_FROZEN) => {
                tries += 1;
                sleep(PAUSE).await;
            }
            paused => return paused,
        }
    }
}

/// Runs what is done while containers stand still, for at most `most` since `began`.
pub(crate) async fn at_most<T>(
    most: Option<Duration>,
    began: Instant,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    let Some(most) = most else {
        return work.await;
    };
    match tokio::time::timeout_at(began + most, work).await {
        Ok(done) => done,
        Err(_) => Err(Error::failed(format!(
            "it has stood still for {} ms, and not more is allowed (--max-freeze)",
            began.elapsed().as_millis()
        ))),
    }
}

/// What is said, wherever something could not be let go in time.
fn still_paused(ids: &[&str], namespace: &str, why: Error) -> Error {
    let names: Vec<String> = ids.iter().map(|id| format!("{id:?}")).collect();
    let error = Error::caused_by(StillPaused {
        containers: names.join(", "),
        source: why,
    });
    ids.iter().fold(error, |error, id| {
        error.hint(format!("ctr -n {namespace} tasks resume {id}"))
    })
}
