//! What lets frozen containers run again when this process cannot: killed with SIGKILL in the middle
//! of a freeze, it must not leave them standing still for ever.
//!
//! ```text
//!  transship ──── pipe ────> transship freeze-guard ID...      (a session of its own)
//!     │ a byte: done             reads it: ends
//!     └ killed: end of file      reads that: waits for the dump, resumes, removes the draft
//! ```
//!
//! It is started before the freeze, so that there is no moment without it, and does nothing as long
//! as the pipe is open. A dump that containerd or the runtime is taking goes on without its caller;
//! CRIU must come to its end, or it would leave its code in the tasks.

use std::fs;
use std::io::{self, PipeWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

use crate::{restart_policy, stuck_dump};
use transship_containerd::Node;

/// How long containerd may take until it can let them run.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long after the death of its caller a dump may begin.
const LATE_DUMP: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(200);

/// Lets containers run should this process vanish, or drop it without [`Self::stand_down`].
#[derive(Debug)]
pub struct FreezeGuard {
    pipe: PipeWriter,
    // Waited for by tokio when it has ended.
    _process: Child,
}

impl FreezeGuard {
    /// Starts the guard of the containers `ids`, whose dump is written below `draft`.
    pub fn start(node: &Node, ids: &[&str], draft: Option<&Path>) -> Result<Self> {
        let (reader, writer) = io::pipe().context("cannot make a pipe")?;
        let mut command = Command::new("/proc/self/exe");
        command.arg("-a").arg(node.address());
        command.args(["-n", node.namespace(), "freeze-guard"]);
        if let Some(draft) = draft {
            command.arg("--draft").arg(draft);
        }
        let process = command
            .arg("--")
            .args(ids)
            .stdin(reader)
            // It may outlive us, and whoever waits for the end of our output must not wait for it.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start the guard of the frozen containers")?;
        Ok(Self {
            pipe: writer,
            _process: process,
        })
    }

    /// The containers run, or are to stay as they are.
    pub fn stand_down(mut self) {
        // A guard that is gone stands down as well.
        drop(self.pipe.write_all(b"."));
    }
}

/// The guard's own life: does nothing until the pipe ends, and then only if nobody has said that
/// all is done. `connect` makes the connection to containerd, which is needed in that case alone.
pub async fn run(
    connect: impl AsyncFn() -> Result<Node>,
    ids: &[String],
    draft: Option<PathBuf>,
) -> Result<()> {
    // No signal of the terminal is meant for it.
    let _ = nix::unistd::setsid();
    let read = || {
        let mut said = Vec::new();
        io::stdin().read_to_end(&mut said).map(|_| said)
    };
    let said = tokio::task::spawn_blocking(read).await?;
    if said.is_ok_and(|said| !said.is_empty()) {
        return Ok(());
    }
    let deadline = Instant::now() + PATIENCE;
    let node = loop {
        match connect().await {
            Ok(node) => break node,
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => sleep(PAUSE).await,
        }
    };
    if let Some(draft) = &draft {
        let root = match ids.first() {
            Some(id) => node.task(id).await.ok().map(|task| task.pid),
            None => None,
        };
        stuck_dump::wait_for_end(draft, root).await;
    }
    for id in ids {
        while let Err(error) = node.resume(id).await {
            // One that has gone does not stand still.
            if error.is_not_found() || Instant::now() > deadline {
                break;
            }
            sleep(PAUSE).await;
        }
        // It runs, and containerd may look after it again.
        drop(restart_policy::put_back(&node, id).await);
    }
    match draft {
        Some(draft) => remove_draft(&draft).await,
        None => Ok(()),
    }
}

/// Removes what nobody else looks at any more; more than once, because a dump that was asked for at
/// the last moment begins after its caller's death, and makes its directory.
async fn remove_draft(draft: &Path) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut gone_since = Instant::now();
    while gone_since.elapsed() < LATE_DUMP {
        if draft.try_exists().unwrap_or(true) {
            stuck_dump::wait_for_end(draft, None).await;
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
