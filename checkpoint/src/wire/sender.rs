//! The sending half of a stream.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::check::Running;
use super::compression::{Compressed, Compression, Link, Next, Queue};
use super::zeros::{Part, parts};
use super::{
    ALIVE, COMPRESSED, Check, DATA, DATA_LIMIT, MAGIC, MESSAGE, Message, WireError, ZEROS,
};
use crate::manifest;

/// How long a file that does not grow at the moment is left alone.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(1);

/// The sending half. Clones write to the same stream, a frame at a time.
#[derive(Debug)]
pub struct Sender<W> {
    out: Arc<Mutex<Out<W>>>,
    compression: Arc<Compression>,
}

#[derive(Debug)]
struct Out<W> {
    out: W,
    begun: bool,
}

/// How a file is sent.
pub struct How<'a> {
    /// How the other side finds damage.
    pub check: Check,
    /// Says that the file is whole; until then it is followed while it grows.
    pub complete: &'a dyn Fn() -> bool,
    /// Gets the length of each piece.
    pub progress: &'a mut dyn FnMut(u64),
    /// Is raised by the bytes that were sent of it.
    pub sent: u64,
}

impl std::fmt::Debug for How<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("How")
            .field("check", &self.check)
            .finish_non_exhaustive()
    }
}

impl<'a> How<'a> {
    /// A file that is whole.
    pub fn whole(check: Check, progress: &'a mut dyn FnMut(u64)) -> Self {
        Self {
            check,
            complete: &|| true,
            progress,
            sent: 0,
        }
    }
}

impl<W> Clone for Sender<W> {
    fn clone(&self) -> Self {
        Self {
            out: Arc::clone(&self.out),
            compression: Arc::clone(&self.compression),
        }
    }
}

impl<W: Write> Sender<W> {
    /// Sends to `out`, which should not be buffered: frames are.
    pub fn new(out: W) -> Self {
        Self {
            out: Arc::new(Mutex::new(Out { out, begun: false })),
            compression: Arc::default(),
        }
    }

    /// Sends to `out`, which shares this one's link: what is known of it holds for both.
    #[must_use]
    pub fn beside(&self, out: W) -> Self {
        Self {
            compression: Arc::clone(&self.compression),
            ..Self::new(out)
        }
    }

    /// Its link, for what goes through that beside the streams.
    #[must_use]
    pub fn link(&self) -> Link {
        Link(Arc::clone(&self.compression))
    }

    /// What has gone compressed so far, through this one and those beside it.
    #[must_use]
    pub fn compressed(&self) -> Compressed {
        self.compression.compressed()
    }

    /// Sends one message.
    ///
    /// # Errors
    /// [`WireError::Stream`].
    pub fn send(&self, message: &Message) -> Result<(), WireError> {
        let json = serde_json::to_vec(message).map_err(|e| WireError::Protocol {
            what: format!("a message cannot be written: {e}"),
        })?;
        self.frame(MESSAGE, &json)
    }

    /// Says that this side is alive.
    ///
    /// # Errors
    /// [`WireError::Stream`].
    pub fn alive(&self) -> Result<(), WireError> {
        self.frame(ALIVE, &[])
    }

    /// Sends a file of a checkpoint and returns its entry for the manifest. `path` is its path in
    /// the container's directory `dir`.
    ///
    /// # Errors
    /// [`WireError::File`] and [`WireError::Stream`].
    pub fn send_file(
        &self,
        container: &str,
        dir: &Path,
        path: &str,
        how: &mut How<'_>,
    ) -> Result<manifest::File, WireError> {
        let full = dir.join(path);
        let failed = |act, source| WireError::File {
            act,
            path: full.clone(),
            source,
        };
        let mut file = File::open(&full).map_err(|e| failed("open", e))?;
        let mut sending = self.begin_file(container, path, how.check)?;
        let mut buffer = vec![0; DATA_LIMIT];
        let mut filled = 0;
        // Asked when there is nothing to read, as it may take a look at a directory; what was written until then
        // is read after it.
        let mut whole = false;
        loop {
            let read = file
                .read(&mut buffer[filled..])
                .map_err(|e| failed("read", e))?;
            filled += read;
            if read == 0 && !whole {
                whole = (how.complete)();
                if !whole {
                    std::thread::sleep(FOLLOW_INTERVAL);
                }
                continue;
            }
            // Pages of zeros are found at their beginning.
            if read > 0 && filled < buffer.len() && how.check == Check::Xxh3 {
                continue;
            }
            if filled == 0 {
                break;
            }
            sending.write(&buffer[..filled])?;
            (how.progress)(filled as u64);
            filled = 0;
        }
        sending.end(&mut how.sent)
    }

    /// Begins a file that is made while it is sent. `path` is its path in the directory of `container`.
    ///
    /// # Errors
    /// [`WireError::Stream`].
    pub fn begin_file(
        &self,
        container: &str,
        path: &str,
        check: Check,
    ) -> Result<SendingFile<'_, W>, WireError> {
        self.send(&Message::File {
            path: format!("{container}/{path}"),
        })?;
        Ok(SendingFile {
            sender: self,
            path: path.to_owned(),
            of_migration: check == Check::Xxh3,
            queue: Queue::default(),
            hasher: Running::of(check),
            size: 0,
            sent: 0,
        })
    }

    /// Sends a piece of a blob, of any length: compressed, where the link is slow and it gets smaller.
    ///
    /// # Errors
    /// [`WireError::Stream`].
    pub fn send_blob(&self, data: &[u8]) -> Result<(), WireError> {
        let link = self.link();
        data.chunks(DATA_LIMIT)
            .try_for_each(|piece| match link.compress(piece) {
                Some(smaller) => {
                    // A piece is at most 1 MiB.
                    let size = u32::try_from(piece.len()).unwrap_or_default();
                    self.frame(COMPRESSED, &[&size.to_le_bytes(), &*smaller].concat())
                }
                None => self.frame(DATA, piece),
            })
    }

    fn frame(&self, kind: u8, payload: &[u8]) -> Result<(), WireError> {
        let length = u32::try_from(payload.len()).map_err(|_| WireError::Protocol {
            what: format!("a message of {} bytes", payload.len()),
        })?;
        // A writer that panicked has written a part of a frame at most; the other side finds that.
        let mut half = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        let mut header = Vec::with_capacity(MAGIC.len() + 5);
        if !half.begun {
            header.extend_from_slice(MAGIC);
            half.begun = true;
        }
        header.push(kind);
        header.extend_from_slice(&length.to_le_bytes());
        let out = &mut half.out;
        let mut write = || write_both(out, &header, payload);
        let written = match kind {
            DATA | COMPRESSED => self.compression.measured(payload.len(), write),
            _ => write(),
        };
        written
            .and_then(|()| match kind {
                DATA | ZEROS | COMPRESSED => Ok(()),
                _ => out.flush(),
            })
            .map_err(|source| WireError::Stream {
                act: "write",
                source,
            })
    }
}

/// A file that is made while it is sent. Nothing else is sent before its end.
pub struct SendingFile<'a, W> {
    sender: &'a Sender<W>,
    path: String,
    /// A stream of a checkpoint has data alone.
    of_migration: bool,
    queue: Queue,
    hasher: Running,
    size: u64,
    sent: u64,
}

impl<W> std::fmt::Debug for SendingFile<'_, W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SendingFile")
            .field("path", &self.path)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

impl<W: Write> SendingFile<'_, W> {
    /// Appends to it.
    ///
    /// # Errors
    /// [`WireError::Stream`].
    pub fn write(&mut self, data: &[u8]) -> Result<(), WireError> {
        self.hasher.update(data);
        self.size += data.len() as u64;
        for piece in data.chunks(DATA_LIMIT) {
            if !self.of_migration {
                self.frame(DATA, piece)?;
                continue;
            }
            let compression = &self.sender.compression;
            for part in parts(piece) {
                match part {
                    Part::Data(data) => {
                        if !self.queue.takes(compression, data) {
                            self.send_waiting(true)?;
                            self.frame(DATA, data)?;
                        }
                    }
                    Part::Zeros(bytes) => {
                        if !self.queue.takes_zeros(compression, bytes) {
                            self.frame(ZEROS, &bytes.to_le_bytes())?;
                        }
                    }
                }
                self.send_waiting(false)?;
            }
        }
        Ok(())
    }

    /// Sends what has been compressed; with `all`, whatever waits for it.
    fn send_waiting(&mut self, all: bool) -> Result<(), WireError> {
        let compression = &self.sender.compression;
        while let Some(next) = self.queue.next(compression, all)? {
            match next {
                Next::Data(data) => self.frame(DATA, &data)?,
                Next::Compressed(frame) => self.frame(COMPRESSED, &frame)?,
                Next::Zeros(bytes) => self.frame(ZEROS, &bytes.to_le_bytes())?,
            }
        }
        Ok(())
    }

    fn frame(&mut self, kind: u8, payload: &[u8]) -> Result<(), WireError> {
        self.sender.frame(kind, payload)?;
        if kind != ZEROS {
            self.sent += payload.len() as u64;
        }
        Ok(())
    }

    /// Ends it, and gives its entry for the manifest; `sent` is raised by the bytes that had to be sent of it.
    ///
    /// # Errors
    /// [`WireError::Stream`].
    pub fn end(mut self, sent: &mut u64) -> Result<manifest::File, WireError> {
        self.send_waiting(true)?;
        *sent += self.sent;
        let done = self.hasher.finish();
        self.sender.send(&Message::FileEnd { xxh3: done.xxh3 })?;
        Ok(manifest::File {
            path: self.path,
            size: self.size,
            sha256: done.sha256,
        })
    }
}

/// Writes both, in one call where that can be: each call wakes who reads.
fn write_both(out: &mut impl Write, header: &[u8], payload: &[u8]) -> io::Result<()> {
    let mut pieces = [IoSlice::new(header), IoSlice::new(payload)];
    let mut left: &mut [IoSlice<'_>] = &mut pieces;
    while left.iter().any(|piece| !piece.is_empty()) {
        match out.write_vectored(left) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut left, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
