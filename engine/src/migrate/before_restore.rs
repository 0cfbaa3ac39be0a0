//! The command that runs here while neither copy does.

use std::process::Stdio;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::error::{Context, Error, Result};
use crate::interrupt::Interrupt;

/// Runs it through the shell.
///
/// # Errors
/// It cannot be run, or fails; or an interrupt, with which it ends.
pub(super) async fn run(command: &str, interrupt: &Interrupt) -> Result<()> {
    let failed = || format!("cannot run {command:?}");
    let mut child = tokio::process::Command::new("sh")
        .args(["-c", command])
        .stdin(Stdio::null())
        // The caller's stdout is for the result.
        .stdout(std::io::stderr())
        .process_group(0)
        .spawn()
        .with_context(failed)?;
    let group = ProcessGroup::of(&child);
    let status = tokio::select! {
        status = child.wait() => status.with_context(failed)?,
        interrupted = interrupt.wait() => return Err(interrupted.into()),
    };
    // What it has left running on purpose goes on.
    group.forget();
    match status.success() {
        true => Ok(()),
        false => Err(Error::failed(format!(
            "the command before the restore failed ({status}): {command}"
        ))),
    }
}

/// A command and all that it has started: killed when the wait for it is given up.
struct ProcessGroup(Option<Pid>);

impl ProcessGroup {
    /// That of a child which leads its own, and has not been waited for.
    fn of(child: &tokio::process::Child) -> Self {
        let leader = child.id().and_then(|id| i32::try_from(id).ok());
        Self(leader.map(Pid::from_raw))
    }

    fn forget(mut self) {
        self.0 = None;
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // One that has ended meanwhile is as good.
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}
