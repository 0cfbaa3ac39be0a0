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
    free: Mutex<usize>,
    freed: Condvar,
}

/// A turn; somebody else has it when this is dropped.
#[derive(Debug)]
pub struct LargeWindowTurn<'w>(&'w LargeWindows);

impl LargeWindows {
    /// So many at once.
    #[must_use]
    pub fn new(at_once: usize) -> Self {
        Self {
            free: Mutex::new(at_once),
            freed: Condvar::new(),
        }
    }

    /// Waits for a turn, unless nobody waits for the layer any more.
    ///
    /// # Errors
    /// It was given up.
    pub(crate) fn take(&self, is_given_up: &dyn Fn() -> bool) -> io::Result<LargeWindowTurn<'_>> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        while *free == 0 {
            if is_given_up() {
                return Err(io::Error::other("given up"));
            }
            let waited = self.freed.wait_timeout(free, LOOK_UP);
            free = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        *free -= 1;
        Ok(LargeWindowTurn(self))
    }
}

impl Drop for LargeWindowTurn<'_> {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
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
