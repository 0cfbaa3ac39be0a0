//! A runtime that dumps a container: begun, and waited for.
//!
//! ```text
//!  OciRuntime::begin_dump ──> BegunDump ── ready ──> CRIU waits for the freeze (dump_hold)
//!                                 ├─────── end ────> dumped, or why not
//!                                 └─────── (dropped) the runtime is killed, and with its hold CRIU, which has touched
//!                                                    nothing yet
//! ```

use std::fs;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, copy, sink};
use tokio::process::{Child, ChildStderr};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::dump_hold::DumpHold;
use crate::error::{Context, Error, Result};

/// Most that is kept of what a runtime says, in bytes.
const MOST_SAID: u64 = 64 << 10;
/// How long its last words are waited for: what it has started may still have its stderr.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A dump that goes on, or waits for its freeze.
#[derive(Debug)]
pub struct BegunDump {
    runtime: Child,
    /// What it writes to its stderr, when that has ended.
    said: Option<JoinHandle<String>>,
    /// Begins what is said of its failure.
    failed: String,
    /// Its configuration and its script, for as long as it runs.
    files: [Option<PathBuf>; 2],
}

impl BegunDump {
    /// `failed` begins what is said when it fails; `files` go when it has ended well.
    pub(crate) fn of(mut runtime: Child, failed: String, files: [Option<PathBuf>; 2]) -> Self {
        Self {
            said: { runtime.stderr.take() }.map(|stderr| tokio::spawn(read(stderr))),
            runtime,
            failed,
            files,
        }
    }

    /// Waits until CRIU waits for the freeze.
    ///
    /// # Errors
    /// The runtime has ended before, and why.
    pub(crate) async fn ready(&mut self, hold: &DumpHold) -> Result<()> {
        let ended = tokio::select! {
            () = hold.ready() => return Ok(()),
            ended = self.runtime.wait() => ended.context("cannot wait for the OCI runtime")?,
        };
        Err(self.failure(ended).await)
    }

    /// Waits for its end; one that was held is given up at its end.
    ///
    /// # Errors
    /// What the runtime says; CRIU's log is in its work directory.
    pub(crate) async fn end(mut self, hold: Option<&DumpHold>) -> Result<()> {
        let ended = self.runtime.wait().await;
        let ended = ended.context("cannot wait for the OCI runtime")?;
        if !ended.success() && !hold.is_some_and(DumpHold::has_ended_well) {
            return Err(self.failure(ended).await);
        }
        for path in self.files.into_iter().flatten() {
            fs::remove_file(path).context("cannot remove the dump's configuration")?;
        }
        Ok(())
    }

    async fn failure(&mut self, ended: ExitStatus) -> Error {
        let said = match self.said.take() {
            Some(said) => timeout(LAST_WORDS, said).await.ok().and_then(Result::ok),
            None => None,
        };
        let said = said.unwrap_or_default();
        let last = said.lines().rfind(|line| !line.is_empty());
        let why = last.map_or_else(|| format!("it ended with {ended}"), str::to_owned);
        Error::failed(format!("{}: {why}", self.failed))
    }
}

/// Reads to the end, so that nobody waits for a reader.
async fn read(mut stderr: ChildStderr) -> String {
    let mut said = Vec::new();
    // What cannot be read was not said.
    drop((&mut stderr).take(MOST_SAID).read_to_end(&mut said).await);
    drop(copy(&mut stderr, &mut sink()).await);
    String::from_utf8_lossy(&said).into_owned()
}
