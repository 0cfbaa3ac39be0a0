//! Bytes that are counted, and whose digest is taken, on their way through.

use std::io::{self, Read, Write};

use crate::beside::{HashedBeside, Through};

/// A reader or writer, and what has gone through it. The digest of much is taken on a thread.
#[derive(Debug)]
pub struct Hashed<I> {
    inner: I,
    hasher: HashedBeside,
}

impl<I> Hashed<I> {
    /// Nothing has gone through it yet.
    pub fn new(inner: I) -> Self {
        Self {
            inner,
            hasher: HashedBeside::new(),
        }
    }

    /// The inner one, and what has gone through.
    pub fn finish(self) -> (I, Through) {
        (self.inner, self.hasher.finish())
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes two bytes at a time.
    struct Short(Vec<u8>);

    impl Write for Short {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let some = &bytes[..bytes.len().min(2)];
            self.0.extend_from_slice(some);
            Ok(some.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_went_through_is_told_and_nothing_else() {
        let wanted = Through {
            size: 5,
            sha256: crate::sha256_hex(b"bytes"),
        };
        let mut out = Hashed::new(Short(Vec::new()));
        out.write_all(b"bytes").unwrap();
        let (short, written) = out.finish();
        assert_eq!((short.0.as_slice(), &written), (&b"bytes"[..], &wanted));
        let mut input = Hashed::new(&b"bytes, and more"[..]);
        input.read_exact(&mut [0; 5]).unwrap();
        let (rest, read) = input.finish();
        assert_eq!((rest, read), (&b", and more"[..], wanted));
    }
}
