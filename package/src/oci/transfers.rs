//! Several transfers at once.

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::PackageError;

/// Transfers at once.
pub(super) const MOST_THREADS: usize = 8;
/// Reports of progress that wait.
const REPORTS: usize = 64;

pub(super) fn threads() -> usize {
    std::thread::available_parallelism()
        .map_or(1, NonZero::get)
        .clamp(2, MOST_THREADS)
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does `transfer` for each item, several at once, and gives what came of them, in their order. `transfer` is given
/// whom to tell the bytes that it has moved.
///
/// # Errors
/// The first one; nothing is begun after it.
pub(super) fn in_threads<I: Sync, T: Send>(
    items: &[I],
    progress: &mut dyn FnMut(u64),
    transfer: impl Fn(&I, &dyn Fn(u64)) -> Result<T, PackageError> + Sync,
) -> Result<Vec<T>, PackageError> {
    let next = AtomicUsize::new(0);
    let (done, failed) = (Mutex::new(Vec::new()), Mutex::new(None));
    let (told, reports) = sync_channel::<u64>(REPORTS);
    std::thread::scope(|scope| {
        for _ in 0..threads().min(items.len()) {
            let told = told.clone();
            let (next, done, failed, transfer) = (&next, &done, &failed, &transfer);
            scope.spawn(move || {
                // Who counts is there until all threads are gone.
                let tell = |bytes| told.send(bytes).unwrap_or_default();
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(at) else { return };
                    if lock(failed).is_some() {
                        return;
                    }
                    match transfer(item, &tell) {
                        Ok(result) => lock(done).push((at, result)),
                        Err(error) => {
                            lock(failed).get_or_insert(error);
                        }
                    }
                }
            });
        }
        drop(told);
        reports.iter().for_each(&mut *progress);
    });
    if let Some(error) = lock(&failed).take() {
        return Err(error);
    }
    let mut done = std::mem::take(&mut *lock(&done));
    done.sort_by_key(|(at, _)| *at);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}
