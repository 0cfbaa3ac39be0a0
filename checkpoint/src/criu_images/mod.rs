//! The images of CRIU that are read or edited before a restore, or shown to people.
//!
//! ```text
//! <name>.img
//!   u32 LE   0x54564319                 head of every image but the inventory (since CRIU 2.0)
//!   u32 LE   magic of this kind of image
//!   repeated:
//!     u32 LE   n
//!     n bytes  protobuf message
//!     [raw]    bytes that only the kind of image explains (System V messages and semaphores)
//! ```
//!
//! Magic numbers: `criu/include/magic.h`; fields: `images/*.proto` of CRIU 3.17 to 4.2, between
//! which the messages below did not change.

pub mod addresses;
pub mod c_strings;
pub mod cgroups;
pub mod conntrack;
pub mod descriptors;
pub mod dump_stats;
pub mod file_names;
mod files_image;
pub mod ghost_files;
pub mod inet_sockets;
pub mod inventory;
pub mod ipc_sysctls;
pub mod ipcns;
mod kernel_messages;
pub mod lazy_memory;
pub mod memory_apart;
pub mod mounts;
pub mod named_files;
pub mod network_images;
pub mod open_files;
pub mod packet_rules;
mod page_levels;
pub mod pagemap;
pub mod pipe_data;
pub mod posix_timers;
pub mod processes;
pub mod queued_files;
pub mod regular_files;
pub mod seccomp;
pub mod shm_mappings;
mod strict;
pub mod tasks;
pub mod terminals;
pub mod threads;
pub mod timers;
pub mod unix_sockets;
pub mod user_namespace;
pub mod utsns;
pub mod watches;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::beneath::{Links, open_regular, read_regular};

/// Largest image that is read here, in bytes. Those with memory pages are never read.
const IMAGE_LIMIT: u64 = 64 << 20;
/// Most that is shown of what processes have open, and of what they have mapped, in bytes of memory: images may name one long
/// path a million times.
const NAMES_LIMIT: usize = 256 << 20;
/// Largest entry before bytes that are not read.
const FIRST_ENTRY: u64 = 64 << 10;
const HEAD_MAGIC: u32 = 0x5456_4319;
/// Head of the files that are no part of the dump (`IMG_SERVICE_MAGIC`).
const SERVICE_MAGIC: u32 = 0x5510_5940;
const HEADER_LEN: usize = 8;

/// An image that cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// Not an image, or one of another kind.
    #[error("{path} is not a CRIU image of the expected kind")]
    Magic {
        /// The image.
        path: PathBuf,
    },
    /// Longer than any real one.
    #[error("{path} is larger than {IMAGE_LIMIT} bytes")]
    TooLarge {
        /// The image.
        path: PathBuf,
    },
    /// A few bytes that name the same again and again.
    #[error("{path} would take more than {NAMES_LIMIT} bytes to be shown")]
    TooMuch {
        /// The image.
        path: PathBuf,
    },
    /// Ends in the middle of an entry.
    #[error("{path} is cut off")]
    CutOff {
        /// The image.
        path: PathBuf,
    },
    /// An entry that is not the expected message.
    #[error("{path} cannot be decoded")]
    Decode {
        /// The image.
        path: PathBuf,
        /// Why.
        source: prost::DecodeError,
    },
    /// An entry that two readers could take for two things.
    #[error("{path} says something twice that CRIU writes once")]
    Ambiguous {
        /// The image.
        path: PathBuf,
    },
    /// A name that ends for CRIU before its end.
    #[error("{path} has a name with a NUL in it, as the kernel gives none")]
    Nul {
        /// The image.
        path: PathBuf,
    },
    /// Images in the old way, which can be read no more.
    #[error("{path} is of a CRIU before 3.12, whose images are not restored")]
    Outdated {
        /// The image.
        path: PathBuf,
    },
    /// Messages to the kernel that CRIU would send unseen.
    #[error("{path} has something else than tracked connections")]
    Conntrack {
        /// The image.
        path: PathBuf,
    },
    /// The same of the routes of a network.
    #[error("{path} has something else than addresses, routes and rules")]
    Routes {
        /// The image.
        path: PathBuf,
    },
    /// The same of the rules for packets of a network.
    #[error("{path} has something else than the rules that iptables and nft print")]
    PacketRules {
        /// The image.
        path: PathBuf,
    },
    /// A mount cannot be added to several tables, or to none.
    #[error("{dir} has {count} mount namespaces, and a mount can be added to one only")]
    MountNamespaces {
        /// The images.
        dir: PathBuf,
        /// How many there are.
        count: usize,
    },
    /// Pages in no order, or in no image.
    #[error("{path} names pages in no order, or pages that no image has")]
    Pages {
        /// The image.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("cannot {act} {path}")]
    Io {
        /// The act.
        act: &'static str,
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The kinds of image that are understood here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Core,
    Files,
    Mm,
    Utsns,
    IpcVar,
    IpcShm,
    IpcMsg,
    IpcSem,
    Pstree,
    Ids,
    Inventory,
    Mounts,
    Seccomp,
    Cgroup,
    UserNamespace,
    Pagemap,
    Fdinfo,
    Stats,
    Conntrack,
    Expectations,
    Remaps,
    Netns,
    Netdev,
    Pidns,
    Memfd,
    Ghost,
    SocketQueues,
}

impl Kind {
    /// What the file's name starts with; `.img` follows, with a number before it where the
    /// prefix ends in a dash.
    pub(crate) fn prefix(self) -> &'static str {
        match self {
            Self::Core => "core-",
            Self::Files => "files",
            Self::Mm => "mm-",
            Self::Utsns => "utsns-",
            Self::IpcVar => "ipcns-var-",
            Self::IpcShm => "ipcns-shm-",
            Self::IpcMsg => "ipcns-msg-",
            Self::IpcSem => "ipcns-sem-",
            Self::Pstree => "pstree",
            Self::Ids => "ids-",
            Self::Inventory => "inventory",
            Self::Mounts => "mountpoints-",
            Self::Seccomp => "seccomp",
            Self::Cgroup => "cgroup",
            Self::UserNamespace => "userns-",
            Self::Pagemap => "pagemap-",
            Self::Fdinfo => "fdinfo-",
            Self::Stats => "stats-dump",
            Self::Conntrack => "netns-ct-",
            Self::Expectations => "netns-exp-",
            Self::Remaps => "remap-fpath",
            Self::Netns => "netns-",
            Self::Netdev => "netdev-",
            Self::Pidns => "pidns-",
            Self::Memfd => "memfd",
            Self::Ghost => "ghost-file-",
            Self::SocketQueues => "sk-queues",
        }
    }

    /// Whether there may be several, each with a number.
    fn is_numbered(self) -> bool {
        self.prefix().ends_with('-')
    }

    /// The name of the only one.
    fn file_name(self) -> String {
        match self {
            // It has no suffix.
            Self::Stats => self.prefix().to_owned(),
            _ => format!("{}.img", self.prefix()),
        }
    }

    fn magic(self) -> u32 {
        match self {
            Self::Core => 0x5505_3847,
            Self::Files => 0x5630_3138,
            Self::Mm => 0x5749_2820,
            Self::Utsns => 0x5447_3203,
            Self::IpcVar => 0x5311_5007,
            Self::IpcShm => 0x4628_3044,
            Self::IpcMsg => 0x5545_3737,
            Self::IpcSem => 0x5957_3019,
            Self::Pstree => 0x5027_3030,
            Self::Ids => 0x5443_2030,
            Self::Inventory => 0x5831_3116,
            Self::Mounts => 0x5556_3928,
            Self::Seccomp => 0x6441_3049,
            Self::Cgroup => 0x5938_3330,
            Self::UserNamespace => 0x5547_4906,
            Self::Pagemap => 0x5608_4025,
            Self::Fdinfo => 0x5621_3732,
            Self::Stats => 0x5709_3306,
            Self::Remaps => 0x5913_3954,
            Self::Netns => 0x5593_3752,
            Self::Netdev => 0x5737_3951,
            Self::Pidns => 0x6115_7326,
            Self::Memfd => 0x4845_3499,
            Self::Ghost => 0x5258_3605,
            Self::SocketQueues => 0x5626_4026,
            // No head at all: what is in them is the kernel's.
            Self::Conntrack | Self::Expectations => 0,
        }
    }
}

/// An image in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Image {
    path: PathBuf,
    kind: Kind,
    body: Vec<u8>,
}

/// All of an image that is none of CRIU's own format: what it hands on to the kernel or to a program.
fn read_raw(path: &Path) -> Result<Vec<u8>, ImageError> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let name = Path::new(path.file_name().unwrap_or_default());
    read_regular(dir, name, Links::Refused, IMAGE_LIMIT).map_err(|source| ImageError::Io {
        act: "read",
        path: path.to_path_buf(),
        source,
    })
}

impl Image {
    /// Reads an image of a known kind.
    pub(crate) fn read(path: &Path, kind: Kind) -> Result<Self, ImageError> {
        let bytes = Self::read_bytes(path, IMAGE_LIMIT + 1)?;
        if bytes.len() as u64 > IMAGE_LIMIT {
            return Err(ImageError::TooLarge {
                path: path.to_path_buf(),
            });
        }
        Self::parse(path, kind, &bytes)
    }

    /// Reads its beginning, of an image whose first entry is followed by as many bytes as there are.
    pub(crate) fn read_first(path: &Path, kind: Kind) -> Result<Self, ImageError> {
        Self::parse(path, kind, &Self::read_bytes(path, FIRST_ENTRY)?)
    }

    /// The image if there is one.
    pub(crate) fn read_if_there(path: &Path, kind: Kind) -> Result<Option<Self>, ImageError> {
        match path.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            _ => Self::read(path, kind).map(Some),
        }
    }

    fn read_bytes(path: &Path, most: u64) -> Result<Vec<u8>, ImageError> {
        let io = |act, source| ImageError::Io {
            act,
            path: path.to_path_buf(),
            source,
        };
        let dir = path.parent().unwrap_or(Path::new("."));
        let name = Path::new(path.file_name().unwrap_or_default());
        let file = open_regular(dir, name, Links::Refused).map_err(|e| io("open", e))?;
        let mut bytes = Vec::new();
        file.take(most)
            .read_to_end(&mut bytes)
            .map_err(|e| io("read", e))?;
        Ok(bytes)
    }

    fn parse(path: &Path, kind: Kind, bytes: &[u8]) -> Result<Self, ImageError> {
        let (head, header_len) = match kind {
            Kind::Inventory => (u32_at(bytes, 0).map(|magic| (HEAD_MAGIC, magic)), 4),
            _ => (u32_at(bytes, 0).zip(u32_at(bytes, 4)), HEADER_LEN),
        };
        let expected = match kind {
            Kind::Stats => SERVICE_MAGIC,
            _ => HEAD_MAGIC,
        };
        if head != Some((expected, kind.magic())) {
            return Err(ImageError::Magic {
                path: path.to_path_buf(),
            });
        }
        Ok(Self {
            path: path.to_path_buf(),
            kind,
            body: bytes[header_len..].to_vec(),
        })
    }

    /// An image that is written to `path`.
    pub(crate) fn new(path: &Path, kind: Kind, body: Vec<u8>) -> Self {
        let path = path.to_path_buf();
        Self { path, kind, body }
    }

    /// The same image with other entries.
    pub(crate) fn with_body(&self, body: Vec<u8>) -> Self {
        Self {
            path: self.path.clone(),
            kind: self.kind,
            body,
        }
    }

    pub(crate) fn decode<M: prost::Message + Default>(
        &self,
        message: &[u8],
    ) -> Result<M, ImageError> {
        M::decode(message).map_err(|source| ImageError::Decode {
            path: self.path.clone(),
            source,
        })
    }

    pub(crate) fn ambiguous(&self) -> ImageError {
        let path = self.path.clone();
        ImageError::Ambiguous { path }
    }

    pub(crate) fn outdated(&self) -> ImageError {
        let path = self.path.clone();
        ImageError::Outdated { path }
    }

    pub(crate) fn body(&self) -> &[u8] {
        &self.body
    }

    pub(crate) fn entries(&self) -> Entries<'_> {
        Entries { image: self, at: 0 }
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_LEN + self.body.len());
        if self.kind != Kind::Inventory {
            bytes.extend(HEAD_MAGIC.to_le_bytes());
        }
        bytes.extend(self.kind.magic().to_le_bytes());
        bytes.extend(&self.body);
        bytes
    }

    /// Puts this image in the place of `path`, which may be a link into a checkpoint: the link is
    /// replaced, what it leads to is left as it is.
    pub(crate) fn replace(&self, path: &Path) -> Result<(), ImageError> {
        replace_by(path, |new| {
            let written = new.write_all(&self.to_bytes());
            written.map_err(|source| ImageError::Io {
                act: "write",
                path: path.to_path_buf(),
                source,
            })
        })
    }
}

/// Puts what `write` writes in the place of `path`, which may be a link into a checkpoint: the link is replaced, what it
/// leads to is left as it is.
fn replace_by(
    path: &Path,
    write: impl FnOnce(&mut File) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    let io = |act, source| ImageError::Io {
        act,
        path: path.to_path_buf(),
        source,
    };
    let new = path.with_extension("img.new");
    // Whatever has this name is part of what was given to us: no link is written through.
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io("write", error)),
        _ => {}
    }
    let mut file = File::create_new(&new).map_err(|error| io("write", error))?;
    let replaced = write(&mut file)
        .and_then(|()| fs::rename(&new, path).map_err(|error| io("replace", error)));
    if replaced.is_err() {
        // What failed is what is told.
        drop(fs::remove_file(&new));
    }
    replaced
}

/// Walks over the entries of an image.
#[derive(Debug)]
pub(crate) struct Entries<'a> {
    image: &'a Image,
    at: usize,
}

impl<'a> Entries<'a> {
    /// Where the next entry starts.
    pub(crate) fn position(&self) -> usize {
        self.at
    }

    /// The next message, `None` at the end of the image.
    pub(crate) fn next<M: prost::Message + Default>(&mut self) -> Result<Option<M>, ImageError> {
        let image = self.image;
        let bytes = self.next_bytes()?;
        bytes.map(|bytes| image.decode(bytes)).transpose()
    }

    /// The next message as it is in the image.
    pub(crate) fn next_bytes(&mut self) -> Result<Option<&'a [u8]>, ImageError> {
        let body = &self.image.body;
        if self.at == body.len() {
            return Ok(None);
        }
        let start = self.at + 4;
        let len = u32_at(body, self.at).ok_or_else(|| self.cut_off())? as usize;
        let bytes = start.checked_add(len).and_then(|end| body.get(start..end));
        let bytes = bytes.ok_or_else(|| self.cut_off())?;
        self.at = start + len;
        Ok(Some(bytes))
    }

    /// Steps over raw bytes that belong to the entry before.
    pub(crate) fn skip(&mut self, len: u64) -> Result<(), ImageError> {
        let end = usize::try_from(len)
            .ok()
            .and_then(|len| self.at.checked_add(len));
        match end {
            Some(end) if end <= self.image.body.len() => self.at = end,
            _ => return Err(self.cut_off()),
        }
        Ok(())
    }

    pub(crate) fn cut_off(&self) -> ImageError {
        ImageError::CutOff {
            path: self.image.path.clone(),
        }
    }
}

/// Adds one entry to the body of an image.
pub(crate) fn push_entry(body: &mut Vec<u8>, message: &impl prost::Message) {
    push_bytes(body, &message.encode_to_vec());
}

/// The same of a message that is encoded.
pub(crate) fn push_bytes(body: &mut Vec<u8>, message: &[u8]) {
    let len = u32::try_from(message.len()).expect("an image has a limit far below 4 GiB");
    body.extend(len.to_le_bytes());
    body.extend(message);
}

/// The images of one kind in a directory, with the number in their name, in order of the numbers.
pub(crate) fn list(dir: &Path, kind: Kind) -> Result<Vec<(u32, PathBuf)>, ImageError> {
    let io = |source| ImageError::Io {
        act: "list",
        path: dir.to_path_buf(),
        source,
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| {
            name.strip_prefix(kind.prefix())?
                .strip_suffix(".img")?
                .parse()
                .ok()
        });
        if let Some(number) = number {
            found.push((number, entry.path()));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Copies ranges of a body, in order.
pub(crate) fn gather(body: &[u8], ranges: &[Range<usize>]) -> Vec<u8> {
    ranges
        .iter()
        .flat_map(|range| &body[range.clone()])
        .copied()
        .collect()
}

/// Memory that is left for what is shown.
struct Room(usize);

impl Room {
    fn new() -> Self {
        Self(NAMES_LIMIT)
    }

    /// Takes it for one more `T` with a name of so many bytes, as `path` says.
    fn take<T>(&mut self, name: usize, path: &Path) -> Result<(), ImageError> {
        let wanted = name.saturating_add(size_of::<T>());
        let left = self.0.checked_sub(wanted);
        self.0 = left.ok_or_else(|| ImageError::TooMuch {
            path: path.to_path_buf(),
        })?;
        Ok(())
    }
}

/// A name for people: protobuf has them as text, and CRIU writes the bytes that a program has given.
fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(
        bytes.try_into().expect("four bytes were asked for"),
    ))
}

#[cfg(test)]
mod sample_tests;

#[cfg(test)]
mod tests {
    use super::*;

    /// `comm` alone: enough to tell an entry from noise.
    #[derive(Clone, PartialEq, prost::Message)]
    struct Word {
        #[prost(string, required, tag = "1")]
        word: String,
    }

    fn image(body: Vec<u8>) -> Image {
        Image {
            path: "x.img".into(),
            kind: Kind::Utsns,
            body,
        }
    }

    #[test]
    fn entries_come_back_in_order() {
        let mut body = Vec::new();
        push_entry(&mut body, &Word { word: "a".into() });
        body.extend([0; 8]);
        push_entry(&mut body, &Word { word: "b".into() });
        let image = Image::parse(Path::new("x.img"), Kind::Utsns, &image(body).to_bytes()).unwrap();
        let mut entries = image.entries();
        assert_eq!(entries.next::<Word>().unwrap().unwrap().word, "a");
        entries.skip(8).unwrap();
        assert_eq!(entries.next::<Word>().unwrap().unwrap().word, "b");
        assert!(entries.next::<Word>().unwrap().is_none());
    }

    #[test]
    fn hostile_bytes_are_errors() {
        let path = Path::new("x.img");
        for bytes in [&b""[..], b"\x19\x43\x56\x54", &[0; 64]] {
            assert!(matches!(
                Image::parse(path, Kind::Core, bytes),
                Err(ImageError::Magic { .. })
            ));
        }
        for body in [vec![1], vec![0xff; 4], vec![9, 0, 0, 0, 1], vec![0xff; 64]] {
            let image = image(body);
            assert!(
                matches!(
                    image.entries().next::<Word>(),
                    Err(ImageError::CutOff { .. })
                ),
                "{image:?}"
            );
        }
        let image = image(vec![2, 0, 0, 0, 0xff, 0xff]);
        assert!(matches!(
            image.entries().next::<Word>(),
            Err(ImageError::Decode { .. })
        ));
        assert!(image.entries().skip(u64::MAX).is_err());
    }

    #[test]
    fn replacing_a_link_leaves_its_target() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("original");
        fs::write(&target, b"untouched").unwrap();
        let link = dir.path().join("utsns-11.img");
        std::os::unix::fs::symlink(&target, &link).unwrap();
        image(vec![]).replace(&link).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"untouched");
        assert_eq!(fs::read(&link).unwrap().len(), HEADER_LEN);
        // Nor is one followed that has the name of the draft.
        std::os::unix::fs::symlink(&target, dir.path().join("utsns-11.img.new")).unwrap();
        image(vec![]).replace(&link).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"untouched");
        let read = Image::read(&dir.path().join("utsns-11.img"), Kind::Utsns);
        assert!(read.is_ok(), "{read:?}");
        std::os::unix::fs::symlink(&target, dir.path().join("utsns-12.img")).unwrap();
        let read = Image::read(&dir.path().join("utsns-12.img"), Kind::Utsns);
        assert!(matches!(read, Err(ImageError::Io { .. })), "{read:?}");
    }
}
