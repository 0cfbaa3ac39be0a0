//! `ipcns-{shm,msg,sem}-<n>.img`: the System V objects of an IPC namespace.
//!
//! ```text
//! shm:  ipc_shm_entry { desc, size, in_pagemaps }, then, unless in_pagemaps, size bytes, padded to 4
//! msg:  ipc_msg_entry { desc, qbytes, qnum }, then qnum times:
//!           ipc_msg { mtype, msize }, then msize bytes, padded to 8
//! sem:  ipc_sem_entry { desc, nsems }, then nsems u16, padded to 8
//! ```
//!
//! The dump of every container of a pod holds the objects of the whole pod, and CRIU makes them
//! with `IPC_EXCL`: the second container that joins the same namespace would fail. So an object
//! that an earlier restore has put into the namespace is taken out of the images.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::strict::is_ambiguous;
use super::{Image, ImageError, Kind, gather, list};

/// What kind of System V object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IpcKind {
    /// Shared memory.
    Shm,
    /// A message queue.
    Msg,
    /// A set of semaphores.
    Sem,
}

impl IpcKind {
    /// What ipcs(1) calls it, for messages.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Shm => "shared memory",
            Self::Msg => "message queue",
            Self::Sem => "semaphores",
        }
    }
}

/// One System V object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct IpcObject {
    /// What it is.
    pub kind: IpcKind,
    /// The id that `shmget` and the like return: the same in every namespace after a restore.
    pub id: u32,
    /// The key it was made with.
    pub key: u32,
}

/// `ipc_desc_entry` of `images/ipc-desc.proto`; the rest of it is the owner and the mode.
#[derive(Clone, PartialEq, prost::Message)]
struct Desc {
    #[prost(uint32, required, tag = "1")]
    key: u32,
    #[prost(uint32, required, tag = "7")]
    id: u32,
}

/// `ipc_shm_entry` of `images/ipc-shm.proto`.
#[derive(Clone, PartialEq, prost::Message)]
struct ShmEntry {
    #[prost(message, required, tag = "1")]
    desc: Desc,
    #[prost(uint64, required, tag = "2")]
    size: u64,
    #[prost(bool, optional, tag = "3")]
    in_pagemaps: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    hugetlb_flag: Option<u32>,
}

/// `ipc_msg_entry` of `images/ipc-msg.proto`.
#[derive(Clone, PartialEq, prost::Message)]
struct MsgEntry {
    #[prost(message, required, tag = "1")]
    desc: Desc,
    #[prost(uint32, required, tag = "3")]
    qnum: u32,
}

/// `ipc_msg` of `images/ipc-msg.proto`.
#[derive(Clone, PartialEq, prost::Message)]
struct Msg {
    #[prost(uint32, required, tag = "2")]
    msize: u32,
}

/// `ipc_sem_entry` of `images/ipc-sem.proto`.
#[derive(Clone, PartialEq, prost::Message)]
struct SemEntry {
    #[prost(message, required, tag = "1")]
    desc: Desc,
    #[prost(uint32, required, tag = "2")]
    nsems: u32,
}

const KINDS: [(IpcKind, Kind); 3] = [
    (IpcKind::Shm, Kind::IpcShm),
    (IpcKind::Msg, Kind::IpcMsg),
    (IpcKind::Sem, Kind::IpcSem),
];

/// The objects in the images of `dir`.
///
/// # Errors
/// An image that cannot be read.
pub fn objects(dir: &Path) -> Result<Vec<IpcObject>, ImageError> {
    let mut objects = Vec::new();
    for (ipc, kind) in KINDS {
        for (_, path) in list(dir, kind)? {
            let image = Image::read(&path, kind)?;
            objects.extend(split(&image, ipc)?.into_iter().map(|(object, _)| object));
        }
    }
    Ok(objects)
}

/// Whether a segment is of huge pages, of which a node has few.
///
/// # Errors
/// An image that cannot be read, or that says a thing twice.
pub fn has_huge_segment(dir: &Path) -> Result<bool, ImageError> {
    let mut found = false;
    for (_, path) in list(dir, Kind::IpcShm)? {
        let image = Image::read(&path, Kind::IpcShm)?;
        let mut entries = image.entries();
        while let Some(message) = entries.next_bytes()? {
            if is_ambiguous(message, &[]) {
                return Err(image.ambiguous());
            }
            let shm: ShmEntry = image.decode(message)?;
            if !shm.in_pagemaps.unwrap_or_default() {
                entries.skip(padded(shm.size, 4))?;
            }
            found |= shm.hugetlb_flag.is_some_and(|flag| flag != 0);
        }
    }
    Ok(found)
}

/// Takes those objects out of the images of `dir` that are in `present`.
///
/// # Errors
/// An image that cannot be read or replaced.
pub fn remove_objects(dir: &Path, present: &[IpcObject]) -> Result<(), ImageError> {
    for (ipc, kind) in KINDS {
        for (_, path) in list(dir, kind)? {
            let image = Image::read(&path, kind)?;
            let parts = split(&image, ipc)?;
            let count = parts.len();
            let kept: Vec<_> = parts
                .into_iter()
                .filter(|(object, _)| !present.contains(object))
                .map(|(_, range)| range)
                .collect();
            if kept.len() < count {
                image
                    .with_body(gather(image.body(), &kept))
                    .replace(&path)?;
            }
        }
    }
    Ok(())
}

/// Each object with the bytes of the image that belong to it.
fn split(
    image: &Image,
    ipc: IpcKind,
) -> Result<Vec<(IpcObject, std::ops::Range<usize>)>, ImageError> {
    let mut entries = image.entries();
    let mut parts = Vec::new();
    loop {
        let start = entries.position();
        let desc = match ipc {
            IpcKind::Shm => match entries.next::<ShmEntry>()? {
                Some(shm) => {
                    if !shm.in_pagemaps.unwrap_or_default() {
                        entries.skip(padded(shm.size, 4))?;
                    }
                    shm.desc
                }
                None => break,
            },
            IpcKind::Msg => match entries.next::<MsgEntry>()? {
                Some(queue) => {
                    for _ in 0..queue.qnum {
                        let Some(msg) = entries.next::<Msg>()? else {
                            return Err(entries.cut_off());
                        };
                        entries.skip(padded(msg.msize.into(), 8))?;
                    }
                    queue.desc
                }
                None => break,
            },
            IpcKind::Sem => match entries.next::<SemEntry>()? {
                Some(set) => {
                    entries.skip(padded(u64::from(set.nsems) * 2, 8))?;
                    set.desc
                }
                None => break,
            },
        };
        parts.push((
            IpcObject {
                kind: ipc,
                id: desc.id,
                key: desc.key,
            },
            start..entries.position(),
        ));
    }
    Ok(parts)
}

fn padded(len: u64, to: u64) -> u64 {
    len.checked_next_multiple_of(to).unwrap_or(u64::MAX)
}
