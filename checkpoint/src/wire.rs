//! The stream between two nodes: through a pipe, `ssh`, or a file.
//!
//! ```text
//! stream   := "transship stream 1\n" frame*
//! frame    := kind:u8  length:u32le  payload[length]
//!   'm'       one Message as JSON, at most 64 MiB
//!   'd'       bytes of the file or blob announced by the message before, at most 1 MiB
//!
//! one way (send | receive):
//!   Begin  (File data* FileEnd)*  End
//!
//! migration (source >, target <):
//!   > Offer            what is coming; the target checks all that it can
//!   < Need             the blobs of the image that it lacks
//!   > (Blob data*)*  ImageEnd
//!   < Ready            the image is unpacked: the source freezes the container
//!   > Begin (File data* FileEnd)* End     the first while CRIU still writes it
//!   < Received         all digests are right
//!   > Restore
//!   < Restored         the copy exists and is held before its first instruction
//!   > Commit
//!   < Running
//!   either side, instead of its next message: Failed
//! ```
//!
//! Data frames after `Blob` add up to exactly the announced size. A file has no size before its end,
//! because it may still grow; its digest comes in the manifest, so that it is read once.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::manifest::{self, Container, Manifest, ManifestError, check_name};
use crate::store::hex;

const MAGIC: &[u8] = b"transship stream 1\n";
const MESSAGE: u8 = b'm';
const DATA: u8 = b'd';
const MESSAGE_LIMIT: usize = 64 << 20;
const DATA_LIMIT: usize = 1 << 20;
/// How long a file that does not grow at the moment is left alone.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(1);

/// A failure of the stream.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The other side went away.
    #[error("the connection ended while waiting for {expected}")]
    Ended {
        /// What was to come.
        expected: &'static str,
    },
    /// The other side gave up and says why.
    #[error("the other side failed: {reason}")]
    Failed {
        /// Its reason.
        reason: String,
    },
    /// Something that is not this protocol.
    #[error("this is not a stream of this program: {what}")]
    Protocol {
        /// What is wrong.
        what: String,
    },
    /// A name in the stream that could lead elsewhere.
    #[error("the stream holds a name that is not plain")]
    Name(#[from] ManifestError),
    /// A file of the stream differs from its digest.
    #[error("{path} arrived damaged: its digest differs from the manifest's")]
    Damaged {
        /// Path inside of the checkpoint.
        path: String,
    },
    /// Reading or writing the stream failed.
    #[error("cannot {act} the stream")]
    Stream {
        /// The act.
        act: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Reading or writing a file failed.
    #[error("cannot {act} {path}")]
    File {
        /// The act.
        act: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What a migration is about to bring.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The container, without files.
    pub container: Container,
    /// Its OCI spec as JSON.
    pub spec: String,
    /// Machine of the source as in `uname -m`.
    pub architecture: String,
    /// What the target is asked to make of it.
    pub target: Target,
    /// The image's blobs in containerd's content store, the target descriptor first.
    pub blobs: Vec<Blob>,
    /// Bytes of memory and upperdir, as far as they can be known before the freeze.
    pub estimate: u64,
}

/// What the target of a restore makes of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Target {
    /// Container id; none: that of the source.
    pub id: Option<String>,
    /// containerd's namespace; none: that of the source.
    pub namespace: Option<String>,
    /// Container whose namespaces are joined.
    pub sandbox: Option<String>,
    /// Whether shared namespaces become the container's own.
    pub new_namespaces: bool,
    /// Snapshotter; none: `transship` where the node has it, else the source's.
    pub snapshotter: Option<String>,
    /// OCI runtime front; none: the one that lies beside the program.
    pub runtime_binary: Option<String>,
    /// Where the output goes, a URI of containerd's; none: nowhere.
    pub log_uri: Option<String>,
}

/// One blob of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// Digest with its algorithm, `sha256:...`.
    pub digest: String,
    /// Length in bytes.
    pub size: u64,
    /// Media type of the descriptor that names it.
    pub media_type: String,
    /// Labels in the source's content store: they keep children from garbage collection.
    pub labels: std::collections::BTreeMap<String, String>,
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "message")]
pub enum Message {
    /// A container is offered for migration.
    Offer(Box<Offer>),
    /// The blobs that the target lacks.
    Need {
        /// Their digests.
        digests: Vec<String>,
    },
    /// A blob follows.
    Blob {
        /// Its digest.
        digest: String,
        /// Its length in bytes.
        size: u64,
    },
    /// No more blobs.
    ImageEnd,
    /// The target waits for the checkpoint.
    Ready,
    /// A checkpoint follows.
    Begin {
        /// Its name.
        name: String,
    },
    /// A file of the checkpoint follows.
    File {
        /// `<container>/<path>`.
        path: String,
    },
    /// The file is whole.
    FileEnd,
    /// The checkpoint is whole.
    End {
        /// Its manifest.
        manifest: Box<Manifest>,
    },
    /// The checkpoint has arrived and its digests are right.
    Received,
    /// The target shall restore.
    Restore,
    /// The copy exists and does not run.
    Restored,
    /// The copy shall run.
    Commit,
    /// The copy runs.
    Running {
        /// Its process id on the target.
        pid: u32,
    },
    /// The side that sends this has given up and cleaned up.
    Failed {
        /// Why, for people.
        reason: String,
    },
}

/// What comes next.
enum Frame {
    Message(Message),
    Data(Vec<u8>),
}

/// The sending half.
#[derive(Debug)]
pub struct Sender<W> {
    out: W,
    begun: bool,
    /// Bytes written so far.
    pub bytes: u64,
}

/// The receiving half.
#[derive(Debug)]
pub struct Receiver<R> {
    input: R,
    begun: bool,
    /// Bytes read so far.
    pub bytes: u64,
}

impl<W: Write> Sender<W> {
    /// Sends to `out`, which should not be buffered: frames are.
    pub fn new(out: W) -> Self {
        Self {
            out,
            begun: false,
            bytes: 0,
        }
    }

    /// Sends one message.
    ///
    /// # Errors
    /// [`WireError::Stream`].
    pub fn send(&mut self, message: &Message) -> Result<(), WireError> {
        let json = serde_json::to_vec(message).map_err(|e| WireError::Protocol {
            what: format!("a message cannot be written: {e}"),
        })?;
        self.frame(MESSAGE, &json)?;
        self.out.flush().map_err(|source| WireError::Stream {
            act: "write",
            source,
        })
    }

    /// Sends a file of a checkpoint and returns its entry for the manifest. `path` is its path in
    /// the container's directory `dir`; `progress` gets the length of each piece. A file that is
    /// still being written is followed until `complete` says that it is whole.
    ///
    /// # Errors
    /// [`WireError::File`] and [`WireError::Stream`].
    pub fn send_file(
        &mut self,
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
    pub fn send_data(&mut self, data: &[u8]) -> Result<(), WireError> {
        data.chunks(DATA_LIMIT)
            .try_for_each(|piece| self.frame(DATA, piece))
    }

    fn frame(&mut self, kind: u8, payload: &[u8]) -> Result<(), WireError> {
        let length = u32::try_from(payload.len()).map_err(|_| WireError::Protocol {
            what: format!("a message of {} bytes", payload.len()),
        })?;
        let mut header = Vec::with_capacity(MAGIC.len() + 5);
        if !self.begun {
            header.extend_from_slice(MAGIC);
            self.begun = true;
        }
        header.push(kind);
        header.extend_from_slice(&length.to_le_bytes());
        self.bytes += (header.len() + payload.len()) as u64;
        self.out
            .write_all(&header)
            .and_then(|()| self.out.write_all(payload))
            .map_err(|source| WireError::Stream {
                act: "write",
                source,
            })
    }
}

impl<R: Read> Receiver<R> {
    /// Receives from `input`.
    pub fn new(input: R) -> Self {
        Self {
            input,
            begun: false,
            bytes: 0,
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
    /// Anything that is not as announced.
    pub fn receive_files(
        &mut self,
        dir: &Path,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Manifest, WireError> {
        let mut arrived: Vec<(String, manifest::File)> = Vec::new();
        let manifest = loop {
            match self.receive("a file of the checkpoint")? {
                Message::File { path } => {
                    let file = self.receive_file(dir, &path, progress)?;
                    arrived.push((path, file));
                }
                Message::End { manifest } => break manifest,
                other => return Err(unexpected("a file of the checkpoint", &other)),
            }
        };
        // The names inside were not checked by the generic parser.
        let manifest = Manifest::parse(&manifest.to_json())?;
        let mut expected = Vec::new();
        for (dir, files) in manifest.directories() {
            for file in files {
                expected.push((format!("{dir}/{}", file.path), file.clone()));
            }
        }
        for (path, file) in &expected {
            let same = arrived
                .iter()
                .any(|(p, f)| p == path && f.size == file.size && f.sha256 == file.sha256);
            if !same {
                return Err(WireError::Damaged { path: path.clone() });
            }
        }
        if let Some((path, _)) = arrived
            .iter()
            .find(|(p, _)| !expected.iter().any(|(e, _)| e == p))
        {
            return Err(WireError::Damaged { path: path.clone() });
        }
        Ok(manifest)
    }

    fn receive_file(
        &mut self,
        dir: &Path,
        path: &str,
        progress: &mut dyn FnMut(u64),
    ) -> Result<manifest::File, WireError> {
        let mut full = dir.to_path_buf();
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

    /// The next frame; a message that the other side gives up is an error wherever it comes.
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
        let mut header = [0; 5];
        self.read(&mut header, expected)?;
        let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
        let limit = match header[0] {
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
        if header[0] == DATA {
            return Ok(Frame::Data(payload));
        }
        match serde_json::from_slice(&payload) {
            Ok(Message::Failed { reason }) => Err(WireError::Failed { reason }),
            Ok(message) => Ok(Frame::Message(message)),
            Err(error) => Err(WireError::Protocol {
                what: format!(
                    "{expected} was expected, a message came that cannot be read ({error})"
                ),
            }),
        }
    }

    fn read(&mut self, buffer: &mut [u8], expected: &'static str) -> Result<(), WireError> {
        self.bytes += buffer.len() as u64;
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

/// The error for a message that does not belong here.
#[must_use]
pub fn unexpected(expected: &'static str, found: &Message) -> WireError {
    let json = serde_json::to_string(found).unwrap_or_default();
    let kind: String = json.chars().take(60).collect();
    WireError::Protocol {
        what: format!("{expected} was expected, {kind} came"),
    }
}

/// A login shell or a banner that prints to stdout is the usual cause: its text helps.
fn describe_stray_bytes(bytes: &[u8]) -> String {
    format!("it begins with {:?}", String::from_utf8_lossy(bytes))
}

#[cfg(test)]
mod tests;
