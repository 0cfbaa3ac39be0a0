//! The end of a migration whose command has ended before it knew which copy runs.
//!
//! ```text
//!  the source        the record, and the target's answer (or a person's)
//!  another           its id has been given to a container that was made since: the record goes
//!  (any)             the record says that the copy runs: it is ended, then the target is asked for its disk
//!  runs              somebody has let it run: it has its network again, the record goes
//!  paused, or gone   runs       it is ended, and removed
//!                    aborted    it runs on
//!                    lost       a person decides: it ran there, and is gone
//!                    (none)     it stays as it is; asked again
//! ```
//!
//! Nobody has the record's lock while the target is asked, which may not answer for days: a person may decide meanwhile.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use containerd_client::types::v1::{Process, Status};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::{Instant, sleep};
use transship_checkpoint::criu_options::Tcp;
use transship_checkpoint::store::Store;
use transship_checkpoint::wire::Outcome;
use transship_containerd::Containerd;

use super::ask::Question;
use super::record::{Pending, Record, Records};
use super::{LOCKS, RECORDS, network, record};
use crate::conversation::LINK_PATIENCE;
use crate::durable_record::remove_unfinished;
use crate::error::{Context, Error, Kind, Result};
use crate::frozen::Committed;
use crate::interrupt::Interrupt;
use crate::oci_runtime::OciRuntime;
use crate::receive::{Arrivals, settle_all};
use crate::restart_policy;
use crate::task_to_freeze::TaskToFreeze;

/// How long somebody else may look at a migration: the guard of its command, the service of the node and a person hear
/// from the target at one moment.
const TURN: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(200);

/// Who decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// The other node; it is asked until it answers, or for this long.
    Ask(Option<Duration>),
    /// A person: the copy does not run, and never will.
    SourceRuns,
    /// A person: the copy runs.
    TargetRuns,
}

/// What was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decided {
    /// The source runs on.
    SourceRuns,
    /// The copy runs; the source has been ended and removed, or kept as it was asked for.
    TargetRuns,
    /// The copy runs; the source has been ended. Whether the copy is on the disk there is not known, so
    /// its files stay here.
    TargetRunsFilesStay,
    /// Neither runs: the source has ended here, and the copy never ran.
    Ended,
    /// The source has been removed here, and its id is another container's, which is left as it is.
    Replaced,
}

/// What was decided, and what stood in the way of the rest.
#[derive(Debug, Default)]
pub struct Recovered {
    /// What became of each migration.
    pub decided: Vec<(Pending, Result<Decided>)>,
    /// Records that cannot be read, and arrivals that cannot be brought to their end.
    pub failed: Vec<Error>,
}

/// The migrations that have not been decided, of all of containerd's namespaces.
///
/// # Errors
/// The records cannot be listed.
pub fn pending() -> Result<Records> {
    record::list(Path::new(RECORDS))
}

/// Decides all migrations that are `wanted`, side by side: one whose node does not answer keeps no other
/// waiting. What was arriving here and was cut off comes to its end first, because others may wait for that; where it
/// cannot, that is told, and keeps nobody waiting either.
///
/// # Errors
/// The records cannot be listed. What became of each is told with it.
pub async fn recover_all(
    node: &Containerd,
    store: &Store,
    wanted: impl Fn(&Pending) -> bool,
    decision: Decision,
    interrupt: &Interrupt,
) -> Result<Recovered> {
    let mut failed = Vec::new();
    match settle_all(node, store, &Arrivals::default()).await {
        Ok(settled) => {
            for migration in settled.lost {
                tracing::warn!(
                    "the copy of the migration {migration} was told to run here, and is gone, or this node was down since"
                );
            }
            failed.extend(settled.failed);
        }
        Err(error) => failed.push(error),
    }
    failed.extend(remove_unfinished(Path::new(RECORDS), Path::new(LOCKS)).err());
    // The draft of a command that was killed after `Commit`: nobody guards the source any more then.
    failed.extend(store.remove_orphans().err().map(Error::from));
    let Records { pending, unread } = pending()?;
    let has_record = |namespace: &str, id: &str| {
        { pending.iter() }.any(|it| it.namespace == namespace && it.ids().contains(&id))
    };
    if unread.is_empty() {
        failed.extend(restart_policy::put_back_left(node, has_record).await.err());
    }
    failed.extend(unread.into_iter().map(|(_, error)| error));
    let wanted: Vec<Pending> = pending.into_iter().filter(wanted).collect();
    let (node, interrupt) = (node.clone(), interrupt.clone());
    // A thread of their own: a conversation stays in the one that it was begun in. Nobody waits for that thread
    // when the program ends.
    let (sender, answer) = oneshot::channel();
    let runtime = Handle::current();
    let ask = move || {
        let ask_all = async move {
            let mut asked = JoinSet::new();
            for (at, pending) in wanted.into_iter().enumerate() {
                let (node, interrupt) = (node.clone(), interrupt.clone());
                asked.spawn_local(async move {
                    let decided = recover(&node, &pending, decision, &interrupt).await;
                    decided.transpose().map(|decided| (at, pending, decided))
                });
            }
            asked
                .join_all()
                .await
                .into_iter()
                .flatten()
                .collect::<Vec<_>>()
        };
        let asked = runtime.block_on(LocalSet::new().run_until(ask_all));
        // Who has asked may have gone.
        drop(sender.send(asked));
    };
    let thread = std::thread::Builder::new().name("recover".to_owned());
    thread.spawn(ask).context("cannot start a thread")?;
    let mut all = answer.await.context("the thread that asks has ended")?;
    all.sort_by_key(|(at, ..)| *at);
    let told = all
        .into_iter()
        .map(|(_, pending, decided)| (pending, decided));
    Ok(Recovered {
        decided: told.collect(),
        failed,
    })
}

/// How far one look at a migration leads.
enum Look {
    /// It has been decided meanwhile, by somebody else.
    Gone,
    Decided(Decided),
    /// The target has to be asked.
    Ask(Box<Pending>),
}

/// Decides one migration; none where that has been done meanwhile.
///
/// # Errors
/// [`Kind::Uncertain`]: it is not known which copy runs, and the source stays as it is.
pub(super) async fn recover(
    node: &Containerd,
    listed: &Pending,
    decision: Decision,
    interrupt: &Interrupt,
) -> Result<Option<Decided>> {
    let node = node.in_namespace(&listed.namespace)?;
    let (said, patience) = match decision {
        Decision::SourceRuns => (Some(Outcome::Aborted), None),
        Decision::TargetRuns => (Some(Outcome::Runs), None),
        Decision::Ask(patience) => (None, patience),
    };
    let mut look = decide(&node, listed, decision, said).await?;
    if let Look::Ask(pending) = look {
        let answer = ask(&pending, patience, interrupt).await;
        if !record::is_open(Path::new(RECORDS), &pending) {
            return Ok(None);
        }
        look = decide(&node, listed, decision, Some(answer?)).await?;
    }
    match look {
        Look::Decided(decided) => Ok(Some(decided)),
        Look::Gone => Ok(None),
        Look::Ask(pending) => Err(undecided(&pending, Outcome::Undecided)),
    }
}

/// Decides one migration by what has been said of it, as far as that is needed. It is nobody else's meanwhile.
async fn decide(
    node: &Containerd,
    listed: &Pending,
    decision: Decision,
    said: Option<Outcome>,
) -> Result<Look> {
    let Some(record) = take_in_turn(listed).await? else {
        return Ok(Look::Gone);
    };
    // Its command may have come to its end, and the container be here again.
    let pending = { record.read()? }.filter(|it| it.migration == listed.migration);
    let Some(pending) = &pending else {
        return Ok(Look::Gone);
    };
    if pending.names_others(&created(node, &pending.ids()).await?) {
        // Nothing of it is the source's.
        record.clear()?;
        return Ok(Look::Decided(Decided::Replaced));
    }
    let ends = pending.copy_runs && decision != Decision::SourceRuns;
    let tasks = tasks_of(node, pending).await?;
    let is = |status| tasks.iter().any(|(_, it)| *it == status);
    // Of a pod somebody may have let go one, and the others stand still.
    let is_mixed = is(Status::Running) && is(Status::Paused) && !ends;
    if is(Status::Running) && !ends && !is_mixed {
        connect(pending, &tasks).await;
        let_be(node, &record, pending).await?;
        return Ok(Look::Decided(Decided::SourceRuns));
    }
    let pid = tasks.first().map_or(0, |(task, _)| task.pid);
    let (left, ended): (Vec<_>, Vec<_>) = tasks.into_iter().partition(|(_, status)| {
        // What is being ended is in any state.
        *status == Status::Paused || (ends && *status != Status::Stopped)
    });
    let of = |tasks: Vec<(TaskToFreeze, _)>| tasks.into_iter().map(|(task, _)| task).collect();
    let (left, ended): (Vec<_>, Vec<_>) = (of(left), of(ended));
    let mut source = (!left.is_empty()).then(|| Committed::of(node, left));
    if ends {
        end(node, pending, source.take(), &ended).await?;
    }
    let Some(outcome) = said else {
        return Ok(Look::Ask(Box::new(pending.clone())));
    };
    let decided = match (outcome, source) {
        // What runs here is not ended without a word of the person who has let it go.
        (Outcome::Runs, _) if is_mixed => return Err(undecided(pending, Outcome::Undecided)),
        (Outcome::Runs, source) => {
            end(node, pending, source, &ended).await?;
            let by_hand = decision == Decision::TargetRuns;
            match pending.keep_source || by_hand {
                true => super::keep_source(node, pending).await?,
                false => super::remove_source(node, pending).await?,
            }
            record.clear()?;
            match by_hand {
                true => Decided::TargetRunsFilesStay,
                false => Decided::TargetRuns,
            }
        }
        (Outcome::Aborted, Some(source)) => {
            let taken_back = network::take_back(pending, pid).await;
            // Without its network it had better run than stand still.
            source.thaw().await?;
            let_be(node, &record, pending).await?;
            if let Err(error) = taken_back {
                tracing::warn!("{}", error.one_line());
            }
            Decided::SourceRuns
        }
        (Outcome::Aborted, None) => {
            release_ended(&ended).await?;
            let_be(node, &record, pending).await?;
            Decided::Ended
        }
        (Outcome::Undecided | Outcome::Lost, _) => return Err(undecided(pending, outcome)),
    };
    Ok(Look::Decided(decided))
}

/// Takes the record of a migration when whoever else looks at it has done so; none where they have decided it.
///
/// # Errors
/// [`Kind::Refused`]: its command is at work.
async fn take_in_turn(listed: &Pending) -> Result<Option<Record>> {
    let (records, locks) = (Path::new(RECORDS), Path::new(LOCKS));
    let deadline = Instant::now() + TURN;
    loop {
        match Record::take(records, locks, &listed.namespace, &listed.container) {
            Err(error) if error.kind() == Kind::Refused && Instant::now() < deadline => {
                if !record::is_open(records, listed) {
                    return Ok(None);
                }
                sleep(PAUSE).await;
            }
            taken => return taken.map(Some),
        }
    }
}

/// When containerd has made the records of these containers, as far as they are there.
pub(super) async fn created(node: &Containerd, ids: &[&str]) -> Result<BTreeMap<String, String>> {
    let mut created = BTreeMap::new();
    for id in ids {
        let record = match node.container(id).await {
            Err(error) if error.is_not_found() => continue,
            record => record?,
        };
        if let Some(at) = record.created_at {
            let at = format!("{}.{:09}", at.seconds, at.nanos);
            created.insert((*id).to_owned(), at);
        }
    }
    Ok(created)
}

/// The tasks that are left, and the state that containerd gives them.
async fn tasks_of(node: &Containerd, pending: &Pending) -> Result<Vec<(TaskToFreeze, Status)>> {
    let mut tasks = Vec::new();
    for id in pending.ids() {
        let process = match node.task(id).await {
            Err(error) if error.is_not_found() => continue,
            Err(error) if error.is_silent() => told_by_runtime(node, id).await?,
            process => process?,
        };
        let task = TaskToFreeze {
            was_paused: pending.was_paused,
            // Whether it was is not in the record; unlocking does nothing where it was not.
            network_is_locked: network::is_locked(pending, Tcp::Established),
            given_away: network::given_away(pending),
            ..TaskToFreeze::of(node, &node.container(id).await?, &process)
        };
        tasks.push((task, process.status()));
    }
    Ok(tasks)
}

/// What the runtime says of a task whose shim does not answer: that it is paused and nobody has let it go must not be taken
/// for its end.
async fn told_by_runtime(node: &Containerd, id: &str) -> Result<Process> {
    let runtime = OciRuntime::of_record(&node.container(id).await?, node.namespace());
    let state = runtime.state(id).await?;
    let status = match state.status.as_str() {
        "paused" => Status::Paused,
        "running" => Status::Running,
        "created" => Status::Created,
        "stopped" => Status::Stopped,
        other => {
            return Err(Error::failed(format!(
                "what {id:?} does is not known: the runtime says {other:?}"
            )));
        }
    };
    Ok(Process {
        id: id.to_owned(),
        pid: state.pid,
        status: status.into(),
        ..Process::default()
    })
}

/// Ends what is left of a source whose copy runs; its files stay.
async fn end(
    node: &Containerd,
    pending: &Pending,
    source: Option<Committed>,
    ended: &[TaskToFreeze],
) -> Result<()> {
    if let Some(source) = source {
        { source.kill(async {}).await }.context("it could not be ended here")?;
    }
    release_ended(ended).await?;
    super::end_source(node, pending).await?;
    network::forget(pending).await
}

/// CRIU leaves the cgroup of a dump frozen, also when all in it have ended; the runtime deletes no paused container.
async fn release_ended(ended: &[TaskToFreeze]) -> Result<()> {
    for task in ended {
        if task.runtime.has_paused(&task.id).await {
            task.runtime.resume(&task.id).await?;
        }
    }
    Ok(())
}

/// Somebody has let it go past us, without what a thaw does beside that.
pub(super) async fn let_be_connected(
    node: &Containerd,
    record: &Record,
    pending: &Pending,
) -> Result<()> {
    connect(pending, &tasks_of(node, pending).await?).await;
    let_be(node, record, pending).await
}

/// Puts what runs into the networks again that it has given away, and lets packets come and go. Where that fails it runs
/// without, and is told of.
async fn connect(pending: &Pending, tasks: &[(TaskToFreeze, Status)]) {
    for (task, _) in tasks {
        // No packet comes before the addresses are here, which would end its connections.
        let taken_back = network::take_back(pending, task.pid).await;
        if let Err(error) = taken_back.and(task.unlock_network().await) {
            tracing::warn!("{}", error.one_line());
        }
    }
}

/// It is this node's alone again.
async fn let_be(node: &Containerd, record: &Record, pending: &Pending) -> Result<()> {
    for id in pending.ids() {
        restart_policy::put_back(node, id).await?;
    }
    super::unmark_moved(pending)?;
    record.clear()
}

async fn ask(
    pending: &Pending,
    patience: Option<Duration>,
    interrupt: &Interrupt,
) -> Result<Outcome> {
    let question = Question {
        to: &pending.to,
        remote_program: &pending.remote_program,
        namespace: &pending.namespace,
        migration: &pending.migration,
        node: &pending.node,
        link_patience: LINK_PATIENCE,
    };
    let is_wanted = || record::is_open(Path::new(RECORDS), pending);
    let answer = question.ask_on(patience, interrupt, is_wanted).await;
    answer.map_err(|error| undecided(pending, Outcome::Undecided).because(error))
}

/// The one state in which nobody may guess.
pub(super) fn undecided(pending: &Pending, outcome: Outcome) -> Error {
    let id = &pending.called();
    let to = &pending.to;
    let what = match outcome {
        Outcome::Lost => format!(
            "the copy of {id:?} was told to run through {to:?} and is not there any more: it has ended, \
             or its node went down; the source is left paused here"
        ),
        _ => format!(
            "it is not known whether the copy of {id:?} runs, which was told to through {to:?}; the \
             source is left paused here"
        ),
    };
    let recover = format!("transship -n {} recover {id}", pending.namespace);
    Error::new(Kind::Uncertain, what)
        .hint("ask the other node again:")
        .hint(format!("  {recover}"))
        .hint("or decide by hand, when you have looked there:")
        .hint(format!("  {recover} --source-runs"))
        .hint(format!("  {recover} --target-runs"))
}
