//! The sending half of a stream.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::{ALIVE, DATA, DATA_LIMIT, MAGIC, MESSAGE, Message, WireError};
use crate::manifest;
use crate::store::hex;

/// How long a file that does not grow at the moment is left alone.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(1);

/// The sending half. Clones write to the same stream, a frame at a time.
#[derive(Debug)]
pub struct Sender<W> {
    out: Arc<Mutex<Out<W>>>,
}

#[derive(Debug)]
struct Out<W> {
    out: W,
    begun: bool,
}

impl<W> Clone for Sender<W> {
    fn clone(&self) -> Self {
        Self {
            out: Arc::clone(&self.out),
        }
    }
}

impl<W: Write> Sender<W> {
    /// Sends to `out`, which should not be buffered: frames are.
    pub fn new(out: W) -> Self {
        Self {
            out: Arc::new(Mutex::new(Out { out, begun: false })),
        }
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
    /// the container's directory `dir`; `progress` gets the length of each piece. A file that is
    /// still being written is followed until `complete` says that it is whole.
    ///
    /// # Errors
    /// [`WireError::File`] and [`WireError::Stream`].
    pub fn send_file(
        &self,
        container: &str,
        dir: &Path,
        path: &str,
        complete: &dyn Fn() -> bool,
        progress: &mut dyn FnMut(u64),
    ) -> Result<manifest::File, WireError> {
        let full = dir.join(path);
        let failed = |act, source| WireError::File {
            act,
            path: full.clone(),
            source,
        };
        let mut file = File::open(&full).map_err(|e| failed("open", e))?;
        self.send(&Message::File {
            path: format!("{container}/{path}"),
        })?;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; DATA_LIMIT];
        let mut size = 0;
        loop {
            // Asked before the read: what was written until then is seen by it.
            let whole = complete();
            let read = file.read(&mut buffer).map_err(|e| failed("read", e))?;
            if read > 0 {
                hasher.update(&buffer[..read]);
                self.frame(DATA, &buffer[..read])?;
                size += read as u64;
                progress(read as u64);
            } else if whole {
                break;
            } else {
                std::thread::sleep(FOLLOW_INTERVAL);
            }
        }
        self.send(&Message::FileEnd)?;
        Ok(manifest::File {
            path: path.to_owned(),
            size,
            sha256: hex(&hasher.finalize()),
        })
    }

    /// Sends a piece of a blob, of any length.
    ///
    /// # Errors
    /// [`WireError::Stream`].
    pub fn send_data(&self, data: &[u8]) -> Result<(), WireError> {
        data.chunks(DATA_LIMIT)
            .try_for_each(|piece| self.frame(DATA, piece))
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
        out.write_all(&header)
            .and_then(|()| out.write_all(payload))
            .and_then(|()| match kind {
                DATA => Ok(()),
                _ => out.flush(),
            })
            .map_err(|source| WireError::Stream {
                act: "write",
                source,
            })
    }
}
