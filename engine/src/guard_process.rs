//! A guard: this program once more, in a session of its own, at the end of a pipe.
//!
//! ```text
//!  transship ──── pipe ────> PROGRAM <argument>  ── starts itself once more, and ends
//!     │                                └──────> PROGRAM <argument> --alone
//!     │ JSON and newline: orders    reads them, and waits
//!     │ a byte: stand down          reads it: ends
//!     └ end of file                 does what its orders say
//! ```
//!
//! What ends its caller is not to end it: systemd kills all processes of a unit, or of a session, by their cgroup, and the
//! kernel some process when memory runs out. So it goes into a cgroup of its own, at the top
//! ([`leave_cgroup_of_caller`]). And a source whose command leads to this node by a local program ends that with all that is
//! below it, so it is below nobody.
//!
//! It is started before there is anything to guard, so that there is no moment without it.

use std::fs;
use std::io::{self, BufRead as _, BufReader, PipeWriter, Read as _, Write as _};
use std::process::{Command, Stdio};

use serde::Serialize;
use serde::de::DeserializeOwned;
use transship_sandbox::leave_cgroup_of_caller;

use crate::error::{Context, Error, Result};

/// Its oom_score_adj: as little as there is but for what is never killed.
const NOT_FOR_MEMORY: &str = "-999";

/// The program itself, also when it has been replaced.
const PROGRAM: &str = "/proc/self/exe";
/// The argument of the one that stays.
const ALONE: &str = "--alone";

/// Acts should this process vanish, or drop it without [`Self::stand_down`].
#[derive(Debug)]
pub(crate) struct GuardProcess {
    pipe: PipeWriter,
}

impl GuardProcess {
    /// Starts the guard whose first argument is `argument`.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub(crate) fn start(argument: &str, orders: &impl Serialize) -> Result<Self> {
        let failed = || format!("cannot start {argument}");
        let mut line = serde_json::to_vec(orders).with_context(failed)?;
        line.push(b'\n');
        let (reader, mut pipe) = io::pipe().with_context(failed)?;
        let started = Command::new(PROGRAM)
            .arg(argument)
            .stdin(reader)
            // It may outlive us, and whoever waits for the end of our output must not wait for it.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .with_context(failed)?;
        if !started.success() {
            return Err(Error::failed(format!("{} ({started})", failed())));
        }
        pipe.write_all(&line).with_context(failed)?;
        Ok(Self { pipe })
    }

    /// There is nothing left to guard.
    pub(crate) fn stand_down(mut self) {
        // A guard that is gone stands down as well.
        drop(self.pipe.write_all(b"."));
    }
}

/// The guard's side: its orders, when the pipe has ended; none when there is nothing to do, or another one waits for them:
/// the guard of `argument` that is not `alone` starts that one.
///
/// # Errors
/// They cannot be read.
pub(crate) async fn orders<O: DeserializeOwned + Send + 'static>(
    argument: &str,
    alone: bool,
) -> Result<Option<O>> {
    if !alone {
        // With our stdin.
        let mut guard = Command::new(PROGRAM);
        guard.args([argument, ALONE]);
        guard.spawn().context("cannot start the guard")?;
        return Ok(None);
    }
    // No signal of the terminal is meant for it.
    let _ = nix::unistd::setsid();
    // Where that cannot be done it guards all the same.
    drop(leave_cgroup_of_caller());
    drop(fs::write("/proc/self/oom_score_adj", NOT_FOR_MEMORY));
    tokio::task::spawn_blocking(read_orders).await?
}

fn read_orders<O: DeserializeOwned>() -> Result<Option<O>> {
    let mut input = BufReader::new(io::stdin());
    let mut line = String::new();
    let mut said = Vec::new();
    input
        .read_line(&mut line)
        .and_then(|_| input.read_to_end(&mut said))
        .context("cannot read the orders")?;
    // Without a whole line nothing was begun yet.
    if !line.ends_with('\n') || !said.is_empty() {
        return Ok(None);
    }
    let orders = serde_json::from_str(&line).context("cannot read the orders")?;
    Ok(Some(orders))
}
