//! What a container begins with, and why its restore has failed, told where people look for it.
//!
//! ```text
//!  restored       the container's log (stderr)                  event /transship/restored
//!  started cold   the same, the runtime's log, restores.log     event /transship/started-cold
//!  not run again  the container's log                           event /transship/not-run-again
//! ```
//!
//! An event goes through containerd (`ctr events`). The front has no connection to it and does not wait:
//! `transship publish` does that by itself.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use transship_checkpoint::cri_names::CRI_NAMESPACE;

use super::Front;
use crate::restore_log::{self, LOG_DIR};

/// What has become of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// It runs on from a checkpoint.
    Restored,
    /// It starts from its image although a restore was asked for.
    StartedCold,
    /// It had ended, and does not run.
    NotRunAgain,
}

impl Event {
    /// The last part of the topic.
    fn name(self) -> &'static str {
        match self {
            Self::Restored => "restored",
            Self::StartedCold => "started-cold",
            Self::NotRunAgain => "not-run-again",
        }
    }
}

impl Front<'_> {
    /// Tells that a container starts its own command although a restore was asked for.
    pub(super) fn tell_cold_start(&self, id: &str, checkpoint: Option<&str>, reason: &str) {
        self.report(reason, false);
        // Nobody could be told that nobody can be told.
        drop(restore_log::append(
            Path::new(LOG_DIR),
            id,
            restore_log::Outcome::StartedCold,
            reason,
        ));
        say(&format!("not restored, starts cold: {reason}"));
        self.publish(id, Event::StartedCold, checkpoint, Some(reason));
    }

    /// Tells that a restored container is about to go on.
    pub(super) fn tell_restored(checkpoint: &str) {
        say(&format!("restored from the checkpoint {checkpoint:?}"));
    }

    /// Tells what a restored container lacks: to the node's log, and in the container's own.
    pub(super) fn tell_incomplete(id: &str, cri: bool, lost: &str) {
        // Nobody could be told that nobody can be told.
        let outcome = restore_log::Outcome::Incomplete;
        drop(restore_log::append(Path::new(LOG_DIR), id, outcome, lost));
        if cri {
            say(&format!("restored without: {lost}"));
        }
    }

    /// Tells that a container does not run again.
    pub(super) fn tell_done(&self, id: &str, checkpoint: &str, code: u8) {
        say(&format!(
            "not run again: it had ended with {code} when the checkpoint {checkpoint:?} was taken"
        ));
        self.publish(id, Event::NotRunAgain, Some(checkpoint), None);
    }

    /// Starts what publishes the event, and does not wait for it.
    pub(super) fn publish(
        &self,
        id: &str,
        event: Event,
        checkpoint: Option<&str>,
        reason: Option<&str>,
    ) {
        let mut command = self.tool();
        command.args(["publish", event.name(), id]);
        for (flag, value) in [("--checkpoint", checkpoint), ("--reason", reason)] {
            if let Some(value) = value {
                command.arg(format!("{flag}={value}"));
            }
        }
        let null = || Stdio::null();
        command.stdin(null()).stdout(null()).stderr(null());
        // What is sent to the group of a front that is given up is not for it. The shim reaps it.
        drop(command.process_group(0).spawn());
    }

    /// The program `transship`, with the containerd and the namespace that this call is for.
    pub(super) fn tool(&self) -> Command {
        // The shim keeps the states of each of containerd's namespaces in a directory of its own.
        let root = self.globals.root.as_deref().and_then(Path::file_name);
        let mut command = Command::new(&self.env.tool);
        command
            .arg("-n")
            .arg(root.unwrap_or(OsStr::new(CRI_NAMESPACE)));
        if let Some(address) = &self.env.containerd {
            command.arg("-a").arg(address);
        }
        command
    }
}

/// Writes a line to the container's log, where the pod's author looks; one that has no stderr any more goes
/// on all the same.
fn say(line: &str) {
    drop(writeln!(io::stderr(), "transship: {line}"));
}
