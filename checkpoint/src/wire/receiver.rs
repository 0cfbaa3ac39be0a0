//! The receiving half of a stream: every byte of it is hostile.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::{
    ALIVE, DATA, DATA_LIMIT, MAGIC, MESSAGE, MESSAGE_LIMIT, Message, WireError, printable,
    unexpected,
};
use crate::manifest::{self, Manifest, check_name};
use crate::store::hex;

/// What a file costs beside its content, in bytes: so a stream of empty files has an end as well.
const FILE_COST: u64 = 4096;
/// After this many bytes the free space is looked at again.
const ROOM_INTERVAL: u64 = 64 << 20;

/// How much of a checkpoint is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of all files, at most.
    pub max_bytes: u64,
    /// Bytes of the file system that stay free.
    pub keep_free: u64,
}

/// What comes next.
enum Frame {
    Message(Message),
    Data(Vec<u8>),
}

/// The receiving half.
#[derive(Debug)]
pub struct Receiver<R> {
    input: R,
    begun: bool,
}

/// What has been taken of a checkpoint so far.
struct Taken<'a> {
    dir: &'a Path,
    limits: &'a Limits,
    bytes: u64,
    look_at: u64,
}

impl Taken<'_> {
    fn add(&mut self, bytes: u64) -> Result<(), WireError> {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > self.limits.max_bytes {
            return Err(WireError::TooLarge {
                limit: self.limits.max_bytes,
            });
        }
        if self.bytes >= self.look_at {
            self.look_at = self.bytes.saturating_add(ROOM_INTERVAL);
            self.check_room()?;
        }
        Ok(())
    }

    fn check_room(&self) -> Result<(), WireError> {
        let stat = nix::sys::statvfs::statvfs(self.dir).map_err(|errno| WireError::File {
            act: "ask for the free space of",
            path: self.dir.to_path_buf(),
            source: errno.into(),
        })?;
        let free = stat.blocks_available().saturating_mul(stat.fragment_size());
        if free < self.limits.keep_free {
            return Err(WireError::NoRoom {
                path: self.dir.to_path_buf(),
                free,
                kept: self.limits.keep_free,
            });
        }
        Ok(())
    }
}

impl<R: Read> Receiver<R> {
    /// Receives from `input`.
    pub fn new(input: R) -> Self {
        Self {
            input,
            begun: false,
        }
    }

    /// Receives the next message. `expected` says what should come, for the error.
    ///
    /// # Errors
    /// [`WireError::Failed`] when the other side has given up, [`WireError::Ended`] when it is
    /// gone.
    pub fn receive(&mut self, expected: &'static str) -> Result<Message, WireError> {
        match self.frame(expected)? {
            Frame::Message(message) => Ok(message),
            Frame::Data(_) => Err(WireError::Protocol {
                what: format!("{expected} was expected, data came"),
            }),
        }
    }

    /// Receives the data of `size` bytes piece by piece.
    ///
    /// # Errors
    /// Those of the stream, and those of `sink`.
    pub fn receive_data(
        &mut self,
        size: u64,
        sink: &mut dyn FnMut(Vec<u8>) -> Result<(), WireError>,
    ) -> Result<(), WireError> {
        let mut left = size;
        while left > 0 {
            let piece = match self.frame("data")? {
                Frame::Data(piece) => piece,
                Frame::Message(other) => return Err(unexpected("data", &other)),
            };
            left = left
                .checked_sub(piece.len() as u64)
                .ok_or_else(|| WireError::Protocol {
                    what: "more data than announced".to_owned(),
                })?;
            sink(piece)?;
        }
        Ok(())
    }

    /// Receives the files of a checkpoint into `dir`, which is empty, until [`Message::End`], and
    /// checks them against the manifest.
    ///
    /// # Errors
    /// Anything that is not as announced, or more than `limits`.
    pub fn receive_files(
        &mut self,
        dir: &Path,
        limits: &Limits,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Manifest, WireError> {
        let mut taken = Taken {
            dir,
            limits,
            bytes: 0,
            look_at: 0,
        };
        let mut arrived: BTreeMap<String, manifest::File> = BTreeMap::new();
        let manifest = loop {
            match self.receive("a file of the checkpoint")? {
                Message::File { path } => {
                    taken.add(FILE_COST)?;
                    // One that came before is there, and is not written to.
                    let file = self.receive_file(&path, &mut taken, progress)?;
                    arrived.insert(path, file);
                }
                Message::End { manifest } => break manifest,
                other => return Err(unexpected("a file of the checkpoint", &other)),
            }
        };
        // The names inside were not checked by the generic parser.
        let manifest = Manifest::parse(&manifest.to_json())?;
        for (dir, files) in manifest.directories() {
            for file in files {
                let path = format!("{dir}/{}", file.path);
                let same = arrived
                    .remove(&path)
                    .is_some_and(|found| found.size == file.size && found.sha256 == file.sha256);
                if !same {
                    return Err(WireError::Damaged { path });
                }
            }
        }
        match arrived.into_keys().next() {
            Some(path) => Err(WireError::Damaged { path }),
            None => Ok(manifest),
        }
    }

    fn receive_file(
        &mut self,
        path: &str,
        taken: &mut Taken<'_>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<manifest::File, WireError> {
        let mut full = taken.dir.to_path_buf();
        let mut parts = path.split('/').peekable();
        while let Some(part) = parts.next() {
            check_name("the path in the stream", part)?;
            full.push(part);
            if parts.peek().is_some() {
                match DirBuilder::new().mode(0o700).create(&full) {
                    Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                        return Err(WireError::File {
                            act: "make the directory",
                            path: full,
                            source,
                        });
                    }
                    _ => {}
                }
            }
        }
        let failed = |act, source| WireError::File {
            act,
            path: full.clone(),
            source,
        };
        // Never through a link, never over a file that came before.
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&full)
            .map_err(|e| failed("make", e))?;
        let mut hasher = Sha256::new();
        let mut size = 0;
        loop {
            match self.frame("the rest of a file")? {
                Frame::Data(piece) => {
                    taken.add(piece.len() as u64)?;
                    hasher.update(&piece);
                    file.write_all(&piece).map_err(|e| failed("write", e))?;
                    size += piece.len() as u64;
                    progress(piece.len() as u64);
                }
                Frame::Message(Message::FileEnd) => break,
                Frame::Message(other) => return Err(unexpected("the rest of a file", &other)),
            }
        }
        Ok(manifest::File {
            path: path.to_owned(),
            size,
            sha256: hex(&hasher.finalize()),
        })
    }

    /// The next frame that says something; a message that the other side gives up is an error
    /// wherever it comes.
    fn frame(&mut self, expected: &'static str) -> Result<Frame, WireError> {
        if !self.begun {
            let mut magic = [0; MAGIC.len()];
            self.read(&mut magic, expected)?;
            if magic != MAGIC {
                return Err(WireError::Protocol {
                    what: describe_stray_bytes(&magic),
                });
            }
            self.begun = true;
        }
        let (kind, length) = loop {
            let mut header = [0; 5];
            self.read(&mut header, expected)?;
            let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
            match (header[0], length) {
                (ALIVE, 0) => {}
                header => break header,
            }
        };
        let limit = match kind {
            MESSAGE => MESSAGE_LIMIT,
            DATA => DATA_LIMIT,
            other => {
                return Err(WireError::Protocol {
                    what: format!("a frame of kind {other:#x}"),
                });
            }
        };
        if length > limit {
            return Err(WireError::Protocol {
                what: format!("a frame of {length} bytes"),
            });
        }
        let mut payload = vec![0; length];
        self.read(&mut payload, expected)?;
        if kind == DATA {
            return Ok(Frame::Data(payload));
        }
        match serde_json::from_slice(&payload) {
            Ok(Message::Failed { reason }) => Err(WireError::Failed {
                reason: printable(&reason),
            }),
            Ok(message) => Ok(Frame::Message(message)),
            Err(error) => Err(WireError::Protocol {
                what: printable(&format!(
                    "{expected} was expected, a message came that cannot be read ({error})"
                )),
            }),
        }
    }

    fn read(&mut self, buffer: &mut [u8], expected: &'static str) -> Result<(), WireError> {
        self.input
            .read_exact(buffer)
            .map_err(|source| match source.kind() {
                io::ErrorKind::UnexpectedEof => WireError::Ended { expected },
                _ => WireError::Stream {
                    act: "read",
                    source,
                },
            })
    }
}

/// A login shell or a banner that prints to stdout is the usual cause: its text helps.
fn describe_stray_bytes(bytes: &[u8]) -> String {
    format!("it begins with {:?}", String::from_utf8_lossy(bytes))
}
