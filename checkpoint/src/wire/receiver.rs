//! The receiving half of a stream: every byte of it is hostile.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Read, Seek as _, SeekFrom, Write};
use std::iter;
use std::mem;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::statvfs::statvfs;
use serde::Deserialize;

use super::check::Running;
use super::compression::Decompression;
use super::contents_dir::{ContentsDir, free_of};
use super::{
    ALIVE, COMPRESSED, Check, DATA, DATA_LIMIT, MAGIC, MESSAGE, MESSAGE_LIMIT, Message,
    SHORT_MESSAGE, Signed, WireError, ZEROS, unexpected, zeros,
};
use crate::manifest::{self, Manifest, check_name};
use crate::shown_text::printable;

/// What a file or a directory costs beside its content, in bytes: so a stream of empty ones has an end as well.
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

/// What comes next. Data is in the receiver's buffer.
enum Frame {
    Message(Message),
    Data,
    Zeros,
    Compressed,
}

/// The receiving half.
#[derive(Debug)]
pub struct Receiver<R> {
    input: R,
    begun: bool,
    payload: Vec<u8>,
    decompression: Decompression,
}

/// What has come of a checkpoint so far, through one stream or several.
#[derive(Debug)]
pub struct Arriving {
    dir: PathBuf,
    limits: Limits,
    check: Check,
    /// Where contents of files go that come before their layer, by their directories in the checkpoint.
    contents: BTreeMap<String, ContentsDir>,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    bytes: u64,
    look_at: u64,
    /// Bytes of all names, which are kept to the end.
    names: usize,
    /// By their paths in the checkpoint.
    files: BTreeMap<String, manifest::File>,
}

impl Arriving {
    /// What a file counts against the limit, in bytes.
    #[must_use]
    pub fn cost_of(file: &manifest::File) -> u64 {
        file.size.saturating_add(FILE_COST)
    }

    /// Nothing yet, into `dir`, which is empty.
    pub fn into_dir(dir: impl Into<PathBuf>, limits: Limits, check: Check) -> Self {
        Self {
            dir: dir.into(),
            limits,
            check,
            contents: BTreeMap::new(),
            taken: Mutex::default(),
        }
    }

    /// The same, with the directories, which are empty, that take the contents of files, each by its directory in the
    /// checkpoint: [`CONTENTS_DIR`](manifest::CONTENTS_DIR). Files of other names are taken into the checkpoint.
    #[must_use]
    pub fn with_contents(self, contents: BTreeMap<String, ContentsDir>) -> Self {
        Self { contents, ..self }
    }

    /// The directory and the number of a content in the stream; none: it is a file of the checkpoint.
    fn content<'p>(&self, path: &'p str) -> Option<(&ContentsDir, &'p str)> {
        let (dir, number) = path.rsplit_once('/')?;
        let is_number = !number.is_empty() && number.bytes().all(|digit| digit.is_ascii_digit());
        Some((self.contents.get(dir).filter(|_| is_number)?, number))
    }

    /// Compares what has come with the manifest that has come last.
    ///
    /// # Errors
    /// [`WireError::Damaged`] names the first file that differs, or a manifest that is none.
    pub fn compare(self, manifest: &Manifest) -> Result<Manifest, WireError> {
        let taken = self.taken.into_inner();
        let mut arrived = taken.unwrap_or_else(PoisonError::into_inner).files;
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

    fn taken(&self) -> MutexGuard<'_, Taken> {
        // One that panicked has counted, or has not.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The manifest names them all again, and is one message.
    fn add_name(&self, path: &str) -> Result<(), WireError> {
        let mut taken = self.taken();
        taken.names = taken.names.saturating_add(path.len());
        match taken.names > MESSAGE_LIMIT {
            true => Err(WireError::Protocol {
                what: "longer names of files than a manifest holds".to_owned(),
            }),
            false => Ok(()),
        }
    }

    fn add(&self, bytes: u64) -> Result<(), WireError> {
        let mut taken = self.taken();
        taken.bytes = taken.bytes.saturating_add(bytes);
        if taken.bytes > self.limits.max_bytes {
            return Err(WireError::TooLarge {
                limit: self.limits.max_bytes,
            });
        }
        if taken.bytes >= taken.look_at {
            taken.look_at = taken.bytes.saturating_add(ROOM_INTERVAL);
            drop(taken);
            self.check_room()?;
        }
        Ok(())
    }

    fn check_room(&self) -> Result<(), WireError> {
        let of_draft = statvfs(&self.dir).map(|stat| free_of(&stat));
        let contents = self.contents.values();
        let contents = contents.map(|dir| (dir.path(), dir.free_bytes()));
        for (path, free) in iter::once((&*self.dir, of_draft.map_err(Into::into))).chain(contents) {
            let free = free.map_err(|source| WireError::File {
                act: "ask for the free space of",
                path: path.to_path_buf(),
                source,
            })?;
            if free < self.limits.keep_free {
                return Err(WireError::NoRoom {
                    path: path.to_path_buf(),
                    free,
                    kept: self.limits.keep_free,
                });
            }
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
            payload: Vec::new(),
            decompression: Decompression::default(),
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
            _ => Err(WireError::Protocol {
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
                Frame::Data => mem::take(&mut self.payload),
                Frame::Compressed => self.decompression.unpack(&self.payload, DATA_LIMIT)?,
                Frame::Message(other) => return Err(unexpected("data", &other)),
                Frame::Zeros => return Err(misplaced()),
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

    /// Receives files of a checkpoint, until another message comes; gives that.
    ///
    /// # Errors
    /// Anything that is not as announced, or more than is taken.
    pub fn receive_files(
        &mut self,
        arriving: &Arriving,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Message, WireError> {
        loop {
            let Frame::Message(message) = self.frame("a file of the checkpoint")? else {
                return Err(misplaced());
            };
            match message {
                Message::File { path } => {
                    arriving.add(FILE_COST)?;
                    arriving.add_name(&path)?;
                    // One that came before is there, and is not written to.
                    let file = self.receive_file(&path, arriving, progress)?;
                    arriving.taken().files.insert(path, file);
                }
                other => return Ok(other),
            }
        }
    }

    /// Makes the directories of a file of the checkpoint, and gives its path.
    fn make_directories(path: &str, arriving: &Arriving) -> Result<PathBuf, WireError> {
        let mut full = arriving.dir.clone();
        let mut parts = path.split('/').peekable();
        while let Some(part) = parts.next() {
            check_name("the path in the stream", part)?;
            full.push(part);
            if parts.peek().is_some() {
                match DirBuilder::new().mode(0o700).create(&full) {
                    Ok(()) => arriving.add(FILE_COST)?,
                    Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {}
                    Err(source) => {
                        return Err(WireError::File {
                            act: "make the directory",
                            path: full,
                            source,
                        });
                    }
                }
            }
        }
        Ok(full)
    }

    fn receive_file(
        &mut self,
        path: &str,
        arriving: &Arriving,
        progress: &mut dyn FnMut(u64),
    ) -> Result<manifest::File, WireError> {
        let (full, made) = match arriving.content(path) {
            Some((dir, number)) => (dir.path().join(number), dir.make_file(number)),
            None => {
                let full = Self::make_directories(path, arriving)?;
                // Never through a link, never over a file that came before.
                let mut new = OpenOptions::new();
                let made = new.write(true).create_new(true).mode(0o600).open(&full);
                (full, made)
            }
        };
        let failed = |act, source| WireError::File {
            act,
            path: full.clone(),
            source,
        };
        let mut file = made.map_err(|e| failed("make", e))?;
        let mut hasher = Running::of(arriving.check);
        let mut size = 0;
        let said = loop {
            let mut frame = self.frame("the rest of a file")?;
            if matches!(frame, Frame::Compressed) && arriving.check == Check::Xxh3 {
                self.payload = self.decompression.unpack(&self.payload, DATA_LIMIT)?;
                frame = Frame::Data;
            }
            match frame {
                Frame::Data => {
                    let piece = &self.payload;
                    arriving.add(piece.len() as u64)?;
                    hasher.update(piece);
                    size += piece.len() as u64;
                    file.write_all(piece).map_err(|e| failed("write", e))?;
                    progress(piece.len() as u64);
                }
                // Read again as zeros, and no disk has them.
                Frame::Zeros if arriving.check == Check::Xxh3 => {
                    let count = zeros::count(&self.payload, DATA_LIMIT)?;
                    arriving.add(count as u64)?;
                    self.payload.clear();
                    self.payload.resize(count, 0);
                    hasher.update(&self.payload);
                    size += count as u64;
                    file.set_len(size)
                        .and_then(|()| file.seek(SeekFrom::Start(size)))
                        .map_err(|e| failed("write", e))?;
                }
                Frame::Zeros | Frame::Compressed => return Err(misplaced()),
                Frame::Message(Message::FileEnd { xxh3 }) => break xxh3,
                Frame::Message(other) => return Err(unexpected("the rest of a file", &other)),
            }
        };
        let done = hasher.finish();
        if done.xxh3.is_some() && done.xxh3 != said {
            return Err(WireError::Damaged {
                path: path.to_owned(),
            });
        }
        Ok(manifest::File {
            path: path.to_owned(),
            size,
            sha256: done.sha256,
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
            DATA | ZEROS | COMPRESSED => DATA_LIMIT,
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
        let mut payload = mem::take(&mut self.payload);
        payload.resize(length, 0);
        self.read(&mut payload, expected)?;
        self.payload = payload;
        match kind {
            DATA => return Ok(Frame::Data),
            ZEROS => return Ok(Frame::Zeros),
            COMPRESSED => return Ok(Frame::Compressed),
            _ => {}
        }
        match parse(&self.payload) {
            Ok(Message::Failed { reason, facts }) => Err(WireError::Failed {
                reason: printable(&reason),
                facts,
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

fn misplaced() -> WireError {
    WireError::Protocol {
        what: "data came where none belongs".to_owned(),
    }
}

/// A login shell or a banner that prints to stdout is the usual cause: its text helps.
fn describe_stray_bytes(bytes: &[u8]) -> String {
    format!("it begins with {:?}", String::from_utf8_lossy(bytes))
}

/// A message. Serde keeps all fields of one until it knows which it is, in sixteen times its length: of a long one that is
/// looked for first, which keeps nothing.
fn parse(json: &[u8]) -> serde_json::Result<Message> {
    #[derive(Deserialize)]
    struct Kind {
        message: String,
    }
    #[derive(Deserialize)]
    struct End {
        manifest: Box<Manifest>,
        #[serde(default)]
        signed: Option<Box<Signed>>,
    }
    if json.len() <= SHORT_MESSAGE {
        return serde_json::from_slice(json);
    }
    let Kind { message } = serde_json::from_slice(json)?;
    match message.as_str() {
        "offer" => serde_json::from_slice(json).map(Message::Offer),
        "end" => {
            let End { manifest, signed } = serde_json::from_slice(json)?;
            Ok(Message::End { manifest, signed })
        }
        _ => {
            let long = format!("{} bytes", json.len());
            Err(serde::de::Error::custom(long))
        }
    }
}
