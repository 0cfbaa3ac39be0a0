//! How a package is compressed and encrypted on its way out.
//!
//! ```text
//!  tar ──> zstd (several threads) ──> age ──> file
//! ```

use std::io::{self, Write};
use std::num::NonZero;

use age::stream::StreamWriter;
use zstd::stream::write::Encoder;

use crate::encryption::Recipients;
use crate::error::PackageError;

/// The level of zstd unless somebody says otherwise. Of memory, half of which compresses, the next two levels leave 3 %
/// less and take half as long again.
pub const DEFAULT_LEVEL: i32 = 1;
/// More threads than these take memory and no time: each has a job of 8 MiB in hand at the default level.
const MOST_THREADS: usize = 8;

/// Where a package goes, through all that changes it.
pub(crate) enum Sink<W: Write> {
    Plain(Encrypting<W>),
    Zstd(Box<Encoder<'static, Encrypting<W>>>),
}

pub(crate) enum Encrypting<W: Write> {
    Not(W),
    Age(Box<StreamWriter<W>>),
}

impl<W: Write> Sink<W> {
    /// `level` is that of zstd; none: nothing is compressed.
    pub(crate) fn new(
        out: W,
        level: Option<i32>,
        recipients: &Recipients,
    ) -> Result<Self, PackageError> {
        let out = match recipients.is_empty() {
            true => Encrypting::Not(out),
            false => Encrypting::Age(Box::new(recipients.encrypt(out)?)),
        };
        let Some(level) = level else {
            return Ok(Self::Plain(out));
        };
        let encoder = || {
            let mut encoder = Encoder::new(out, level)?;
            let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
            encoder.multithread(u32::try_from(threads.min(MOST_THREADS)).unwrap_or(1))?;
            encoder.include_checksum(true)?;
            Ok(encoder)
        };
        let encoder = encoder().map_err(PackageError::writing)?;
        Ok(Self::Zstd(Box::new(encoder)))
    }

    /// Writes what is left, and gives back where it went.
    pub(crate) fn finish(self) -> Result<W, PackageError> {
        let finish = || {
            let encrypting = match self {
                Self::Plain(out) => out,
                Self::Zstd(encoder) => encoder.finish()?,
            };
            let mut out = match encrypting {
                Encrypting::Not(out) => out,
                Encrypting::Age(writer) => writer.finish()?,
            };
            out.flush()?;
            Ok(out)
        };
        finish().map_err(PackageError::writing)
    }
}

impl<W: Write> Write for Sink<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(out) => out.write(bytes),
            Self::Zstd(encoder) => encoder.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        // What is compressed better in one piece stays in one: `finish` writes it.
        Ok(())
    }
}

impl<W: Write> Write for Encrypting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Not(out) => out.write(bytes),
            Self::Age(writer) => writer.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Not(out) => out.flush(),
            Self::Age(writer) => writer.flush(),
        }
    }
}
