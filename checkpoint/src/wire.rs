//! The stream between two nodes: through a pipe, `ssh`, or a file.
//!
//! ```text
//! stream   := "transship stream 1\n" frame*
//! frame    := kind:u8  length:u32le  payload[length]
//!   'm'       one Message as JSON, at most 64 MiB
//!   'd'       bytes of the file or blob announced by the message before, at most 1 MiB
//!   'a'       empty: the sender is alive and has nothing to say yet (migrations only)
//!   'z'       instead of 'd': zeros, see zeros.rs (migrations only)
//!   'c'       instead of 'd': compressed, see compression.rs (migrations only)
//!
//! one way (send | receive):
//!   Begin  (File data* FileEnd)*  End
//!
//! migration (source >, target <):
//!   > Offer            what is coming, one container or those of a pod; the target checks all that it can
//!   < Need             the blobs of the images that it lacks, where it can be reached directly, and what its node is like
//!   > (Blob data*)*  ImageEnd            which says how many direct connections there are: n
//!   < Ready            the images are unpacked, and a pod has its sandbox; which files may come before the freeze
//!   n = 0:
//!   > Begin (File data* FileEnd)* End    files and memory before the freeze; files of the dump
//!   n > 0:
//!   > Begin End                          and through each direct connection, a stream of its own:
//!     > (File data* FileEnd)* FilesEnd
//!   < Received         all of it is right
//!   > Restore
//!   < Restored         the copies exist and are held before their first instruction
//!   > Commit
//!   < Running
//!   < AllPages         of a lazy migration, whose pages have come meanwhile: see missing_pages.rs
//!   < Durable          a power cut of the target loses nothing: the source is removed
//!   either side, instead of its next message: Failed    with what its node is like, where that is Need
//!   < Waiting          before Ready and before Restored, as often as it likes: somebody else makes the pod there
//!   > GoOn
//!
//! what became of a migration whose connection broke after Commit (source >, target <):
//!   > Ask              its name
//!   < Answer
//! ```
//!
//! How the container is made on the target (its id, namespace, snapshotter, runtime, output) is
//! said by the arguments of `transship receive` there, never by the stream: an operator who fixes them
//! (`ssh -o command=`, a unit) has fixed all that a sender can choose.
//!
//! What the data frames after `Blob` stand for adds up to exactly the announced size. A file has no size before its end,
//! because it may still grow. Its digest comes in the manifest, so that it is read once; in a migration, whose
//! files outlive it on neither node, the XXH3 of it comes with `FileEnd`: it finds what a network or a disk has
//! damaged, and who may send a container needs no collision to send another one.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::manifest::{Container, Manifest, ManifestError, NotRunning, Pod};
use crate::shown_text::printable;

mod check;
mod compression;
mod contents_dir;
pub mod missing_pages;
mod receiver;
mod sender;
mod zeros;

pub use compression::{Compressed, Link};
pub use contents_dir::ContentsDir;
pub use receiver::{Arriving, Limits, Receiver};
pub use sender::{How, Sender, SendingFile};

/// The version of the messages of a migration. Both sides must speak the same.
pub const PROTOCOL: u32 = 13;

const MAGIC: &[u8] = b"transship stream 1\n";
const MESSAGE: u8 = b'm';
const DATA: u8 = b'd';
const ALIVE: u8 = b'a';
const ZEROS: u8 = b'z';
const COMPRESSED: u8 = b'c';
const MESSAGE_LIMIT: usize = 64 << 20;
/// Of all messages but [`Message::Offer`] and [`Message::End`]: the digests of 4096 blobs, and what a node is like.
const SHORT_MESSAGE: usize = 1 << 20;
const DATA_LIMIT: usize = 1 << 20;

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
        /// Its reason, printable.
        reason: String,
        /// What its node is like, of one that has refused an offer; else empty.
        facts: String,
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
    /// More than this node takes.
    #[error("the stream holds more than {limit} bytes, the most that is taken (--max-size)")]
    TooLarge {
        /// The most that is taken, in bytes.
        limit: u64,
    },
    /// The disk would be full.
    #[error("only {free} bytes are free below {path}, and {kept} are kept free")]
    NoRoom {
        /// Where the files go.
        path: PathBuf,
        /// Bytes that are free.
        free: u64,
        /// Bytes that are kept free.
        kept: u64,
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
    /// [`PROTOCOL`] of the source; 0: one that did not say it yet.
    #[serde(default)]
    pub protocol: u32,
    /// What both sides call this migration: 32 hexadecimal digits that nobody guesses.
    #[serde(default)]
    pub migration: String,
    /// What tells the source's containerd from all others; empty: not known.
    #[serde(default)]
    pub node: String,
    /// Machine of the source as in `uname -m`.
    pub architecture: String,
    /// What moves: one container, or those of a pod.
    #[serde(default)]
    pub containers: Vec<OfferedContainer>,
    /// The pod that they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Box<OfferedPod>>,
    /// Bytes of memory and upperdirs, as far as they can be known before the freeze.
    pub estimate: u64,
    /// The source's public key for direct connections: a SubjectPublicKeyInfo in base64; empty: it makes none.
    #[serde(default)]
    pub key: String,
    /// Whether pages of memory come when the copy runs already, through a direct connection of their own.
    #[serde(default)]
    pub lazy: bool,
    /// Whether memory and files come while the source stands still, all of them.
    #[serde(default)]
    pub at_once: bool,
}

/// A container that is offered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferedContainer {
    /// What the manifest will say of it, without files.
    pub container: Container,
    /// Its OCI spec as JSON.
    pub spec: String,
    /// The image's blobs in containerd's content store, the target descriptor first.
    pub blobs: Vec<Blob>,
    /// Of a pod: the `ContainerConfig` that the source's CRI has made it of, as containerd writes it in JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<String>,
}

/// A pod that is offered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferedPod {
    /// What kubelet calls it.
    pub pod: Pod,
    /// The `PodSandboxConfig` that the source's CRI has made its sandbox of, as containerd writes it in JSON.
    pub config: String,
    /// The runtime handler of the sandbox; empty: the default one.
    pub runtime_handler: String,
    /// Its containers that do not run.
    #[serde(default)]
    pub not_running: Vec<NotRunning>,
}

/// Where the target can be reached directly.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataPlace {
    /// Addresses with their ports.
    pub addresses: Vec<SocketAddr>,
    /// The target's public key, as the source's in [`Offer`].
    pub key: String,
}

/// How the files of a stream are checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    /// By the SHA-256 in the manifest.
    Sha256,
    /// By the XXH3 (128 bits) after each file; the manifest has no digests.
    Xxh3,
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

/// What became of the copy of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It runs, or has run, and all of it is on the disk.
    Runs,
    /// It has never run, never will, and nothing of it is left.
    Aborted,
    /// The target is still at it.
    Undecided,
    /// It was told to run and is not there any more: nobody knows whether it has run.
    Lost,
}

/// A manifest as it was signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signed {
    /// Its bytes.
    pub json: String,
    /// The signature of them, as its file has it.
    pub signature: String,
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
        /// Where files can be sent directly.
        #[serde(default)]
        direct: Option<DataPlace>,
        /// What its node is like: what `transship check --node` prints there.
        facts: String,
    },
    /// A blob follows.
    Blob {
        /// Its digest.
        digest: String,
        /// Its length in bytes.
        size: u64,
    },
    /// No more blobs.
    ImageEnd {
        /// Direct connections that files will come through; 0: they come with the messages.
        #[serde(default)]
        direct: usize,
    },
    /// The target waits for the checkpoint.
    Ready {
        /// Directories of the checkpoint whose files may come before the freeze: the contents of large files.
        #[serde(default)]
        contents: Vec<String>,
        /// What tells the target from all other nodes; empty: one that does not say it.
        #[serde(default)]
        node: String,
    },
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
    FileEnd {
        /// Its XXH3 in hexadecimal digits, in a migration.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        xxh3: Option<String>,
    },
    /// No more files come through this direct connection.
    FilesEnd,
    /// The checkpoint is whole.
    End {
        /// Its manifest.
        manifest: Box<Manifest>,
        /// Its bytes with their signature, of one that is signed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        signed: Option<Box<Signed>>,
    },
    /// The checkpoint has arrived, and all of it is right.
    Received,
    /// The target shall restore.
    Restore,
    /// The copy exists and does not run.
    Restored,
    /// The target waits for somebody who makes the pod; does the source, too?
    Waiting,
    /// It does.
    GoOn,
    /// The copy shall run.
    Commit,
    /// The copy runs.
    Running {
        /// Its process id on the target.
        pid: u32,
    },
    /// The copy, which runs, has all pages of its memory.
    AllPages,
    /// Files, records and image of the copy are on the target's disk.
    Durable,
    /// What became of a migration?
    Ask {
        /// Its name.
        migration: String,
    },
    /// The answer.
    Answer {
        /// What became of the copy.
        outcome: Outcome,
        /// Who says so, as in `Ready`.
        #[serde(default)]
        node: String,
    },
    /// The side that sends this has given up and cleaned up.
    Failed {
        /// Why, for people.
        reason: String,
        /// What its node is like, as in `Need`: instead of that, so that the source can tell all reasons at once.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        facts: String,
    },
}

/// The error for a message that does not belong here.
#[must_use]
pub fn unexpected(expected: &'static str, found: &Message) -> WireError {
    let json = serde_json::to_string(found).unwrap_or_default();
    let kind: String = json.chars().take(60).collect();
    WireError::Protocol {
        what: format!("{expected} was expected, {} came", printable(&kind)),
    }
}

#[cfg(test)]
mod tests;
