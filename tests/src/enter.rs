//! The door into a node: joins the node's cgroups, then becomes the command.
//!
//! `nsenter` enters namespaces but leaves the process in its old cgroups, where containerd, the
//! shims and CRIU would be counted (and looked for) outside of the node. So each command goes
//! through this role of the program:
//!
//! ```text
//! <executable> testbed-enter CGROUP.PROCS... -- COMMAND ARGUMENT...
//! ```

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

/// First argument that asks for this role.
pub(crate) const ROLE: &str = "testbed-enter";

/// Exit status of a shell for a command that could not be run.
const CANNOT_RUN: u8 = 126;

/// Joins the cgroups and execs; returns only when that fails.
pub(crate) fn become_command(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    for procs in arguments.by_ref().take_while(|argument| argument != "--") {
        let procs = PathBuf::from(procs);
        // "0" stands for the writing process, whatever PID namespace it is in.
        if let Err(error) = std::fs::write(&procs, "0") {
            eprintln!("cannot join cgroup {}: {error}", procs.display());
            return ExitCode::from(CANNOT_RUN);
        }
    }
    let Some(program) = arguments.next() else {
        eprintln!("no command after --");
        return ExitCode::from(CANNOT_RUN);
    };
    let error = Command::new(&program).args(arguments).exec();
    eprintln!("cannot run {}: {error}", program.display());
    ExitCode::from(CANNOT_RUN)
}
