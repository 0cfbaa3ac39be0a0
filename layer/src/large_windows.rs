//! Turns for layers with a large zstd window: several at once would take more memory than one service has.
//!
//! ```text
//! 28 b5 2f fd | descriptor | window            Window_Size = 2^(10 + w / 8) * (1 + (w % 8) / 8), RFC 8878 3.1.1.1.2
//!               bit 5: one segment, no window byte: Window_Size = Frame_Content_Size
//! ```

use std::io;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Largest window that needs no turn, as a power of two: 8 MiB, the most that zstd uses up to level 19.
pub(crate) const SMALL_WINDOW_LOG: u32 = 23;
/// How often somebody who waits looks whether he still has to.
const LOOK_UP: Duration = Duration::from_millis(100);

/// Turns for large windows.
#[derive(Debug)]
pub struct LargeWindows {
    turns: Mutex<Turns>,
    freed: Condvar,
    most_waiting: usize,
}

#[derive(Debug)]
struct Turns {
    free: usize,
    waiting: usize,
}

/// A turn; somebody else has it when this is dropped.
#[derive(Debug)]
pub struct LargeWindowTurn<'w>(&'w LargeWindows);

impl LargeWindows {
    /// So many at once, and as many more that wait for it: who waits holds up others, with small windows.
    #[must_use]
    pub fn new(at_once: usize) -> Self {
        Self {
            turns: Mutex::new(Turns {
                free: at_once,
                waiting: 0,
            }),
            freed: Condvar::new(),
            most_waiting: at_once,
        }
    }

    /// Waits for a turn, unless nobody waits for the layer any more.
    ///
    /// # Errors
    /// It was given up; or as many wait as may, and another reader is to have it.
    pub(crate) fn take(&self, is_given_up: &dyn Fn() -> bool) -> io::Result<LargeWindowTurn<'_>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        if turns.free == 0 && turns.waiting == self.most_waiting {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "its zstd window is larger than 8 MiB, and too many others have such ones",
            ));
        }
        turns.waiting += 1;
        let mut given_up = false;
        while turns.free == 0 && !given_up {
            let waited = self.freed.wait_timeout(turns, LOOK_UP);
            turns = waited.unwrap_or_else(PoisonError::into_inner).0;
            given_up = is_given_up();
        }
        turns.waiting -= 1;
        if turns.free == 0 {
            return Err(io::Error::other("given up"));
        }
        turns.free -= 1;
        Ok(LargeWindowTurn(self))
    }
}

impl Drop for LargeWindowTurn<'_> {
    fn drop(&mut self) {
        let turns = self.0.turns.lock();
        turns.unwrap_or_else(PoisonError::into_inner).free += 1;
        self.0.freed.notify_one();
    }
}

/// Bytes of a frame that tell its window.
pub(crate) const HEADER_BYTES: usize = 18;

/// Whether the frame that begins so has a small window; not when that is not told.
pub(crate) fn has_small_window(start: &[u8]) -> bool {
    let [0x28, 0xb5, 0x2f, 0xfd, descriptor, rest @ ..] = start else {
        return false;
    };
    let small = 1_u64 << SMALL_WINDOW_LOG;
    if descriptor & 0x20 == 0 {
        return rest.first().is_some_and(|window| {
            let base = 1_u64 << (10 + (window >> 3));
            base + base / 8 * u64::from(window & 7) <= small
        });
    }
    let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let length = [1, 2, 4, 8][usize::from(descriptor >> 6)];
    rest.get(dictionary..dictionary + length).is_some_and(|it| {
        let mut bytes = [0; 8];
        bytes[..length].copy_from_slice(it);
        // That of two bytes begins at 256, which changes nothing here.
        u64::from_le_bytes(bytes) <= small
    })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;
    use std::thread;

    use super::*;

    #[test]
    fn as_many_wait_as_have_a_turn() {
        let windows = LargeWindows::new(1);
        let turn = windows.take(&|| false).unwrap();
        let (waits, is_waiting) = sync_channel(1);
        thread::scope(|scope| {
            let second = scope.spawn(|| {
                let looks = || {
                    // Once is enough.
                    let _ = waits.try_send(());
                    false
                };
                windows.take(&looks).map(drop)
            });
            is_waiting.recv().unwrap();
            let third = windows.take(&|| false).unwrap_err();
            assert_eq!(
                third.kind(),
                io::ErrorKind::Unsupported,
                "for another reader"
            );
            drop(turn);
            second.join().unwrap().unwrap();
        });
        windows.take(&|| true).unwrap();
    }
}
