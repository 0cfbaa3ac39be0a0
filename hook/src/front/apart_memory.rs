//! Puts into a held process the memory that CRIU has not restored; see
//! [`transship_checkpoint::criu_images::memory_apart`].

use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use nix::sys::uio::{RemoteIoVec, process_vm_writev};
use nix::unistd::Pid;
use transship_checkpoint::criu_images::memory_apart::{Batch, MemoryApart};

use super::held::pid_in_container;
use crate::descendants::tree;
use crate::start_time::{check_same, start_time};

/// Threads that write, at most: each has a buffer of 1 MiB, and more only wait for the kernel's locks.
const MOST_WRITERS: usize = 8;

/// Writes it into its process below `root`, which does not run; `progress` is called after each piece.
///
/// # Errors
/// There is no such process, the images cannot be read, or the container may not have so much memory.
pub(super) fn put_in(
    root: i32,
    memory: &MemoryApart,
    progress: impl Fn() + Sync,
) -> io::Result<()> {
    let pid = find(root, memory.pid())?;
    let began = start_time(pid.as_raw())?;
    let (next, batches) = (AtomicUsize::new(0), memory.batches());
    let write = || {
        let mut bytes = Vec::new();
        while let Some(batch) = batches.get(next.fetch_add(1, Ordering::Relaxed)) {
            let written = { memory.read(batch, &mut bytes) }
                // Whoever stands still for long may find its number with another one.
                .and_then(|()| check_same(pid.as_raw(), began))
                .and_then(|()| write_batch(pid, batch, &bytes))
                .inspect(|()| memory.done_with(batch))
                .inspect(|()| progress());
            if written.is_err() {
                // The others need not go on.
                next.fetch_max(batches.len(), Ordering::Relaxed);
                return written;
            }
        }
        Ok(())
    };
    let writers = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let writers = (0..writers.min(MOST_WRITERS)).map(|_| scope.spawn(write));
        // All of them, before the first is waited for.
        let writers: Vec<_> = writers.collect();
        let ended = writers.into_iter().map(|writer| {
            let panicked = |_| Err(io::Error::other("who writes memory has panicked"));
            writer.join().unwrap_or_else(panicked)
        });
        ended.fold(Ok(()), Result::and)
    })
}

/// The process below `root` that has this number in the container.
fn find(root: i32, inside: u32) -> io::Result<Pid> {
    let mut tasks = tree(root)?.into_iter();
    let found = tasks.find(|pid| pid_in_container(*pid) == Some(inside));
    found.map(Pid::from_raw).ok_or_else(|| {
        let message = format!("no process that was restored is {inside} in the container");
        io::Error::other(message)
    })
}

fn write_batch(pid: Pid, batch: &Batch, bytes: &[u8]) -> io::Result<()> {
    let ranges = batch.ranges().iter().map(|(start, length)| {
        Ok(RemoteIoVec {
            base: usize::try_from(*start).map_err(io::Error::other)?,
            len: usize::try_from(*length).map_err(io::Error::other)?,
        })
    });
    let ranges = ranges.collect::<io::Result<Vec<_>>>()?;
    let written = process_vm_writev(pid, &[IoSlice::new(bytes)], &ranges)?;
    if written < bytes.len() {
        // The kernel says why only when nothing could be written.
        let message = "the rest of its memory cannot be written: is the container's memory limit below what it had?";
        return Err(io::Error::other(message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_found_by_its_number_inside() {
        let own = std::process::id();
        let root = own.cast_signed();
        assert_eq!(find(root, own).unwrap().as_raw(), root);
        assert!(find(root, u32::MAX).is_err());
    }
}
