//! The process that lets frozen containers run again when the one that has frozen them cannot: killed
//! with SIGKILL in the middle of a freeze, or without an answer of containerd, it must not leave them
//! standing still for ever.
//!
//! ```text
//!  transship ──── pipe ────> PROGRAM freeze-guard              (see guard_process)
//!     └ end of file              waits for the dump, lets them run, removes the draft when no runtime works in it
//! ```
//!
//! It is started before the freeze. A dump that containerd or the runtime is taking goes on without its caller;
//! CRIU must come to its end, or it would leave its code in the tasks.
//!
//! It ends when it has seen each container run, or has seen that it is gone. Where containerd does not
//! answer, the OCI runtime lets the container run.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, timeout};
use transship_checkpoint::store::is_worked_in;
use transship_containerd::Containerd;
use transship_sandbox::moved::{self, DEFAULT_MOVED_DIR};

use crate::error::{Context, Error, Result};
use crate::guard_process::{self, GuardProcess};
use crate::locks::lock_if_free_for_dump;
use crate::memory_dir::remove_when_unused;
use crate::own_networks;
use crate::restart_policy;
use crate::stuck_dump;
use crate::task_to_freeze::TaskToFreeze;
use crate::thaw::{self, Seen};

/// The first argument of the guard's process.
const ARGUMENT: &str = "freeze-guard";
/// How long containerd may be silent before the OCI runtime is asked in its place.
const SILENCE: Duration = Duration::from_secs(5);
/// How long after that containerd is waited for, whose shim should hear of the runtime's work.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long a runtime may work in a draft whose maker is gone, with no CRIU: what that has frozen again waits.
const RUNTIME_PATIENCE: Duration = Duration::from_secs(10);
/// How long after the death of its caller a dump may begin.
const LATE_DUMP: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(200);

/// What the guard is told.
#[derive(Debug, Serialize, Deserialize)]
struct Orders {
    /// containerd's socket.
    address: PathBuf,
    /// containerd's namespace.
    namespace: String,
    /// The directory that a dump is being written to.
    draft: Option<PathBuf>,
    tasks: Vec<TaskToFreeze>,
    /// The uids of pods that are marked as moved meanwhile, also where others have paused all of their containers.
    #[serde(default)]
    marks: Vec<String>,
}

/// Lets containers run should this process vanish, or drop it without [`Self::stand_down`].
#[derive(Debug)]
pub struct FreezeGuard(GuardProcess);

impl FreezeGuard {
    /// Starts the guard of these tasks, whose dump is written below `draft`.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn start(node: &Containerd, tasks: &[TaskToFreeze], draft: Option<&Path>) -> Result<Self> {
        let to_thaw = tasks.iter().filter(|task| !task.was_paused);
        let orders = Orders {
            address: node.address().to_path_buf(),
            namespace: node.namespace().to_owned(),
            draft: draft.map(Path::to_path_buf),
            tasks: to_thaw.cloned().collect(),
            marks: { tasks.iter() }
                .filter_map(|it| it.marked.clone())
                .collect(),
        };
        GuardProcess::start(ARGUMENT, &orders).map(Self)
    }

    /// The containers run, or are to stay as they are.
    pub fn stand_down(self) {
        self.0.stand_down();
    }
}

/// The guard's own life, with its orders on stdin; one that is not `alone` yet starts the one that is.
///
/// # Errors
/// Its orders cannot be read, or the draft cannot be removed.
pub async fn run(alone: bool) -> Result<()> {
    let Some(orders) = guard_process::orders::<Orders>(ARGUMENT, alone).await? else {
        return Ok(());
    };
    if let Some(draft) = &orders.draft {
        let roots = orders.tasks.iter().map(|task| task.pid).collect();
        stuck_dump::wait_for_end(draft, roots).await;
    }
    let_all_run(&orders).await;
    for uid in &orders.marks {
        drop(moved::unmark(Path::new(DEFAULT_MOVED_DIR), uid));
    }
    let removed = match &orders.draft {
        Some(draft) => remove_draft(draft).await,
        None => Ok(()),
    };
    if orders.draft.is_some() {
        // CRIU freezes again what was frozen when it began, and one that began late has ended only now.
        for task in &orders.tasks {
            match lock_if_free_for_dump(&orders.namespace, &task.id) {
                // Who has begun with the container since has frozen it for itself, and has a guard of its own.
                Ok(None) => {}
                _in_use => let_run(&orders, task).await,
            }
        }
    }
    if let Some(draft) = &orders.draft {
        remove_when_unused(draft).await;
    }
    removed
}

async fn let_all_run(orders: &Orders) {
    for task in &orders.tasks {
        let_run(orders, task).await;
    }
}

/// Lets a task run, and takes back what was to keep others from it meanwhile.
async fn let_run(orders: &Orders, task: &TaskToFreeze) {
    see_run(orders, task).await;
    let deadline = Instant::now() + PATIENCE;
    while task.hides_policy && put_back_policy(orders, task).await.is_err() {
        if Instant::now() > deadline {
            return;
        }
        sleep(PAUSE).await;
    }
}

async fn put_back_policy(orders: &Orders, task: &TaskToFreeze) -> Result<()> {
    let put_back = async {
        let node = Containerd::connect(&orders.address, &orders.namespace).await?;
        restart_policy::put_back(&node, &task.id).await
    };
    within_patience(put_back).await
}

/// Tries until the task has been seen to run, or is gone.
async fn see_run(orders: &Orders, task: &TaskToFreeze) {
    let mut silent_since = None;
    loop {
        // Without its network it had better run than stand still.
        drop(
            own_networks::give_back((&orders.namespace, &task.id), task.pid, &task.given_away)
                .await,
        );
        drop(task.unlock_network().await);
        match ask_containerd(orders, task).await {
            Ok(Seen::Running) => return,
            // containerd may have lost what still stands still.
            Ok(Seen::Gone) if !task.runtime.has_paused(&task.id).await => return,
            Ok(Seen::Gone) => drop(task.runtime.resume(&task.id).await),
            Ok(Seen::Paused) => silent_since = None,
            Ok(Seen::RunsUnseen) | Err(_) => {
                let since = *silent_since.get_or_insert_with(Instant::now);
                if since.elapsed() > SILENCE {
                    if task.runtime.has_paused(&task.id).await {
                        drop(task.runtime.resume(&task.id).await);
                    } else if since.elapsed() > PATIENCE {
                        return;
                    }
                }
            }
        }
        sleep(PAUSE).await;
    }
}

async fn ask_containerd(orders: &Orders, task: &TaskToFreeze) -> Result<Seen> {
    let ask = async {
        let node = Containerd::connect(&orders.address, &orders.namespace).await?;
        thaw::resume_once(&node, task).await
    };
    within_patience(ask).await
}

async fn within_patience<T>(asked: impl Future<Output = Result<T>>) -> Result<T> {
    timeout(thaw::ANSWER, asked)
        .await
        .unwrap_or_else(|_| Err(Error::failed("containerd does not answer")))
}

/// Removes what nobody else looks at any more; more than once, because a dump that was asked for at
/// the last moment begins after its caller's death, and makes its directory.
async fn remove_draft(draft: &Path) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let (mut gone_since, mut runtime_since) = (Instant::now(), None);
    while gone_since.elapsed() < LATE_DUMP {
        if draft.try_exists().unwrap_or(true) {
            let began = Instant::now();
            stuck_dump::wait_for_end(draft, Vec::new()).await;
            if began.elapsed() > PAUSE {
                // Its CRIU has ended now.
                runtime_since = None;
            }
            // A runtime that is about to start CRIU would have it begin without its configuration.
            if is_worked_in(draft) {
                let since = *runtime_since.get_or_insert_with(Instant::now);
                if since.elapsed() > RUNTIME_PATIENCE {
                    let message = format!("a runtime still works in {}", draft.display());
                    return Err(Error::failed(message));
                }
                gone_since = Instant::now();
                sleep(PAUSE).await;
                continue;
            }
            // One that is being written to is not empty again in the meantime.
            match fs::remove_dir_all(draft) {
                Err(error) if Instant::now() > deadline => {
                    return Err(error)
                        .with_context(|| format!("cannot remove {}", draft.display()));
                }
                _ => gone_since = Instant::now(),
            }
        }
        sleep(PAUSE).await;
    }
    Ok(())
}
