//! What can only be seen or changed in the network namespace of a process.

use std::fs::File;
use std::io;
use std::thread::{Builder, scope};

use nix::sched::{CloneFlags, setns};

/// Does something in the network namespace of a process, on a thread of its own: the caller's stays where it is.
///
/// # Errors
/// The process or its namespace is gone, or no thread could be had.
pub(crate) fn within<T: Send>(pid: u32, act: impl FnOnce() -> T + Send) -> io::Result<T> {
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    scope(|scope| {
        let enter = || {
            setns(&namespace, CloneFlags::CLONE_NEWNET)?;
            Ok(act())
        };
        let thread = Builder::new().name("network".to_owned());
        let done = thread.spawn_scoped(scope, enter)?.join();
        done.unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}
