//! A reader that tells how far it is.

use std::io::{self, Read};

/// Tells the bytes that are read.
pub struct Counted<'p, R> {
    /// What is read.
    pub inner: R,
    /// Gets the number of bytes of each read.
    pub progress: &'p mut dyn FnMut(u64),
}

impl<R> std::fmt::Debug for Counted<'_, R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Counted").finish_non_exhaustive()
    }
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        (self.progress)(read as u64);
        Ok(read)
    }
}
