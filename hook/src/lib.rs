//! The OCI runtime front `transship-runc` and the OCI hook `transship-hook`.
//!
//! ```text
//! containerd-shim --argv--> front: argv --> Command
//!                              create   sandbox: adds the hook to config.json, execs the runtime
//!                                       staged:  runs `runtime restore`, held, below a guard
//!                              start    lets a held restore go
//!                              restore  repairs namespaces and images, runs the runtime
//!                              checkpoint  adds the options of the annotations
//!                              delete   takes away what the restore left
//!                              kill     of one that is held: all of it, before it runs
//!                              else     execs the runtime, untouched
//!                           config.json, /run/transship <--- transship-checkpoint (spec), transship-sandbox
//!
//! CRIU --action script--> hold_script: own_networks are made before the sockets; freezes (freezer) what
//!                                      is about to run
//!
//!      restore_guard: the parent of the runtime in a restore, which ends what it has left;  killed_restore: and takes it away
//!      first_task: whoever waits for the first task of a restore hears of it
//!      lazy_pages: the server of memory that comes when it is touched;  descendants: processes below another one
//!      origin: whether a checkpoint is one that this node restores
//!      start_time: whether a number is that of the same process
//!      runtime_log, restore_log: why the runtime has failed, and what is kept of it
//!
//! runtime --state JSON--> hook: createRuntime  pins the sandbox's namespaces, stages its restores
//!                               poststop       removes both
//! ```
//!
//! The front stands in the way of every container of the node, so it starts in a millisecond and
//! does nothing to those that carry no annotation of ours, in whatever state it finds them.

pub mod argv;
mod descendants;
mod first_task;
mod freezer;
pub mod front;
pub mod hold_script;
pub mod hook;
mod killed_restore;
pub mod lazy_pages;
pub mod origin;
mod own_networks;
pub mod restore_guard;
pub mod restore_log;
pub mod runtime;
mod runtime_log;
mod start_time;

use std::error::Error;

use transship_checkpoint::shown_text::printable;

/// The chain of an error on one line, as logs and shims want it. Names and texts of others in it cannot deceive a terminal.
#[must_use]
pub fn one_line(error: &dyn Error) -> String {
    let line = transship_path_error::one_line(error);
    printable(&line.replace('\n', " "))
}
