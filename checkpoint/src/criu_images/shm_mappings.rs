//! `mm-<pid>.img`: where a task has System V shared memory attached.
//!
//! ```text
//! mm_entry { ..., vmas (14): repeated vma_entry, ... }
//! vma_entry { start, end, pgoff, shmid, prot, flags, status, fd, madv?, fdflags? }
//! ```
//!
//! CRIU attaches a segment that the same restore has made, and no other: a mapping of a segment
//! that is not in `ipcns-shm-*.img` fails the restore (`open_shmem_sysv` in `criu/shmem.c`). So the
//! mapping of a segment that an earlier restore has made becomes private memory in the image, and
//! the held task attaches the segment in its place. All else in the image stays byte for byte.

use std::ops::Range;
use std::path::Path;

use super::ipcns::{IpcKind, IpcObject};
use super::{Image, ImageError, Kind, list};

/// `VMA_AREA_REGULAR`, `VMA_ANON_PRIVATE`, `VMA_AREA_SYSVIPC` of `criu/include/image.h`.
const REGULAR: u32 = 1;
const ANON_PRIVATE: u32 = 1 << 9;
const SYSVIPC: u32 = 1 << 10;
/// `MAP_PRIVATE | MAP_ANONYMOUS`.
const PRIVATE_ANONYMOUS: u32 = 0x22;
const VMAS_FIELD: u64 = 14;

/// A segment that a task has attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// The task, by its pid in the container.
    pub pid: u32,
    /// Id of the segment.
    pub shm: u32,
    /// Where, and how far the segment reaches there.
    pub range: Range<u64>,
    /// Whether it was attached for writing.
    pub writable: bool,
    /// The protection (`PROT_*`) of each piece of the range.
    pub protections: Vec<(Range<u64>, u32)>,
}

/// `vma_entry` of `images/vma.proto`.
#[derive(Clone, PartialEq, prost::Message)]
struct VmaEntry {
    #[prost(uint64, required, tag = "1")]
    start: u64,
    #[prost(uint64, required, tag = "2")]
    end: u64,
    #[prost(uint64, required, tag = "3")]
    pgoff: u64,
    #[prost(uint64, required, tag = "4")]
    shmid: u64,
    #[prost(uint32, required, tag = "5")]
    prot: u32,
    #[prost(uint32, required, tag = "6")]
    flags: u32,
    #[prost(uint32, required, tag = "7")]
    status: u32,
    #[prost(sint64, required, tag = "8")]
    fd: i64,
    #[prost(uint64, optional, tag = "9")]
    madv: Option<u64>,
    #[prost(uint32, optional, tag = "10")]
    fdflags: Option<u32>,
}

/// The part of `mm_entry` that counts here.
#[derive(Clone, PartialEq, prost::Message)]
struct MmEntry {
    #[prost(message, repeated, tag = "14")]
    vmas: Vec<VmaEntry>,
}

/// Makes private memory of the mappings in `dir` whose segments are in `present`, and returns what
/// has to be attached there.
///
/// # Errors
/// An image that cannot be read or replaced.
pub fn detach(dir: &Path, present: &[IpcObject]) -> Result<Vec<Attachment>, ImageError> {
    let here = |vma: &VmaEntry| {
        let of_segment = |it: &IpcObject| it.kind == IpcKind::Shm && u64::from(it.id) == vma.shmid;
        vma.status & SYSVIPC != 0 && present.iter().any(of_segment)
    };
    let mut attachments = Vec::new();
    if !present.iter().any(|object| object.kind == IpcKind::Shm) {
        return Ok(attachments);
    }
    for (pid, path) in list(dir, Kind::Mm)? {
        let image = Image::read(&path, Kind::Mm)?;
        let mut entries = image.entries();
        let Some(mm) = entries.next::<MmEntry>()? else {
            continue;
        };
        if !mm.vmas.iter().any(here) {
            continue;
        }
        for vma in mm.vmas.iter().filter(|vma| here(vma)) {
            collect(&mut attachments, pid, vma);
        }
        let message = &image.body()[4..entries.position()];
        let edited = with_vmas(message, |vma| here(vma).then(|| private(vma)));
        let edited = edited.ok_or_else(|| entries.cut_off())?;
        let len = u32::try_from(edited.len()).map_err(|_| entries.cut_off())?;
        let mut body = len.to_le_bytes().to_vec();
        body.extend(edited);
        body.extend(&image.body()[entries.position()..]);
        image.with_body(body).replace(&path)?;
    }
    Ok(attachments)
}

/// The pieces of one attachment follow each other; the first begins the segment.
fn collect(attachments: &mut Vec<Attachment>, pid: u32, vma: &VmaEntry) {
    let shm = u32::try_from(vma.shmid).expect("it is the id of an object");
    // Images without the flags: with all that is allowed, as CRIU does.
    let writable = vma.fdflags.is_none_or(|flags| flags == read_write());
    let piece = (vma.start..vma.end, vma.prot);
    if vma.pgoff > 0
        && let Some(last) = attachments.last_mut()
        && (last.pid, last.shm, last.range.end) == (pid, shm, vma.start)
    {
        last.range.end = vma.end;
        last.writable |= writable;
        last.protections.push(piece);
        return;
    }
    attachments.push(Attachment {
        pid,
        shm,
        range: vma.start..vma.end,
        writable,
        protections: vec![piece],
    });
}

fn read_write() -> u32 {
    nix::fcntl::OFlag::O_RDWR.bits().unsigned_abs()
}

fn private(vma: &VmaEntry) -> VmaEntry {
    VmaEntry {
        pgoff: 0,
        shmid: 0,
        flags: PRIVATE_ANONYMOUS,
        status: REGULAR | ANON_PRIVATE,
        fdflags: None,
        ..vma.clone()
    }
}

/// The message with some mappings replaced; `None` when it is no message.
fn with_vmas(message: &[u8], edit: impl Fn(&VmaEntry) -> Option<VmaEntry>) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(message.len());
    let mut rest = message;
    while !rest.is_empty() {
        let field = rest;
        let tag = varint(&mut rest)?;
        let mut vma = None;
        match tag & 7 {
            0 => drop(varint(&mut rest)?),
            1 => rest = rest.get(8..)?,
            5 => rest = rest.get(4..)?,
            2 => {
                let len = usize::try_from(varint(&mut rest)?).ok()?;
                let (bytes, after) = rest.split_at_checked(len)?;
                rest = after;
                if tag >> 3 == VMAS_FIELD {
                    vma = edit(&prost::Message::decode(bytes).ok()?);
                }
            }
            _ => return None,
        }
        match vma {
            // As the only field of a message it is written with its tag and length.
            Some(vma) => out.extend(prost::Message::encode_to_vec(&MmEntry { vmas: vec![vma] })),
            None => out.extend(&field[..field.len() - rest.len()]),
        }
    }
    Some(out)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    prost::encoding::decode_varint(bytes).ok()
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    fn vma(start: u64, pages: u64, pgoff: u64, shmid: u64, prot: u32) -> VmaEntry {
        VmaEntry {
            start,
            end: start + pages * 4096,
            pgoff,
            shmid,
            prot,
            flags: 1,
            status: REGULAR | SYSVIPC | 1 << 8,
            fd: -1,
            madv: Some(4),
            fdflags: Some(read_write()),
        }
    }

    #[test]
    fn only_the_mappings_of_present_segments_are_taken_out() {
        /// A field of `mm_entry` that this module does not know, and what comes after the mappings.
        #[derive(Clone, PartialEq, prost::Message)]
        struct Around {
            #[prost(uint64, required, tag = "1")]
            start_code: u64,
            #[prost(int32, required, tag = "15")]
            dumpable: i32,
        }
        let around = |start_code, dumpable| {
            Around {
                start_code,
                dumpable,
            }
            .encode_to_vec()
        };
        let vmas = vec![
            vma(0x1000, 1, 0, 7, 3),
            vma(0x2000, 2, 4096, 7, 1),
            vma(0x8000, 1, 0, 9, 3),
            VmaEntry {
                status: REGULAR,
                ..vma(0xa000, 1, 0, 7, 3)
            },
        ];
        let message = [
            around(0x40_0000, 1),
            MmEntry { vmas: vmas.clone() }.encode_to_vec(),
            around(0x50_0000, 2),
        ]
        .concat();
        let mut body = u32::try_from(message.len()).unwrap().to_le_bytes().to_vec();
        body.extend(&message);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mm-12.img");
        let bytes = [
            0x5456_4319_u32.to_le_bytes().to_vec(),
            0x5749_2820_u32.to_le_bytes().to_vec(),
            body,
        ]
        .concat();
        std::fs::write(&path, &bytes).unwrap();
        let object = |kind, id| IpcObject { kind, id, key: 1 };
        let others = [object(IpcKind::Sem, 7), object(IpcKind::Shm, 8)];
        assert_eq!(detach(dir.path(), &others).unwrap(), []);
        assert_eq!(std::fs::read(&path).unwrap(), bytes);

        let attachments = detach(dir.path(), &[object(IpcKind::Shm, 7)]).unwrap();
        let [one] = attachments.as_slice() else {
            panic!("{attachments:?}")
        };
        assert_eq!((one.pid, one.shm, one.writable), (12, 7, true));
        assert_eq!(one.range, 0x1000..0x4000);
        assert_eq!(one.protections, [(0x1000..0x2000, 3), (0x2000..0x4000, 1)]);
        let image = Image::read(&path, Kind::Mm).unwrap();
        let mm: MmEntry = image.entries().next().unwrap().unwrap();
        assert_eq!(mm.vmas[2..], vmas[2..]);
        for (now, before) in mm.vmas[..2].iter().zip(&vmas) {
            assert_eq!(
                (now.start, now.end, now.prot),
                (before.start, before.end, before.prot)
            );
            assert_eq!((now.status, now.flags), (REGULAR | ANON_PRIVATE, 0x22));
        }
        let rest = image.body().windows(around(0x50_0000, 2).len());
        assert!(rest.into_iter().any(|part| part == around(0x50_0000, 2)));
    }
}
