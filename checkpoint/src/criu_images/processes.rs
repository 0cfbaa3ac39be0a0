//! What a dump has of processes and their memory, for people who look into it.
//!
//! ```text
//! pstree.img           1 pid  2 ppid  5 threads                       one entry a process
//! core-<pid>.img       3 tc: 1 task_state  6 comm      5 thread_core: 10 creds: 1 uid
//! mm-<pid>.img         8, 9 mm_arg_start, end   12 exe_file_id
//!                      14 vmas: 1 start  2 end  4 shmid  5 prot  7 status
//! pagemap-<pid>.img    see pagemap.rs
//! pages-<pages_id>.img the pages of the pagemap, one after the other
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufReader, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use super::descriptors::{self, FileTable};
use super::pagemap::{PagePlace, Pagemap};
use super::{Image, ImageError, Kind, Room, list, shown};
use crate::beneath::{Links, open_regular};

/// Longest command line that is shown, in bytes.
const ARGUMENTS_LIMIT: u64 = 4096;

/// A process of a dump.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Process {
    /// Its id in the container.
    pub pid: u32,
    /// Its parent's; 0 for the first one.
    pub parent: u32,
    /// Name of the program.
    pub name: String,
    /// Its command line; empty where its memory is not there.
    pub arguments: Vec<String>,
    /// The file that it executes.
    pub executable: Option<String>,
    /// What it does: `running`, `stopped` or `zombie`.
    pub state: &'static str,
    /// User id.
    pub uid: u32,
    /// How many threads.
    pub threads: usize,
    /// Bytes of memory that the dump has of it.
    pub memory: u64,
    /// Its mappings with memory in the dump, or of files.
    pub mappings: Vec<Mapping>,
}

/// A piece of an address space.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mapping {
    /// What is mapped: a path, `[heap]`, `[stack]`, `[anonymous]`, ...
    pub what: String,
    /// Where it begins.
    pub start: u64,
    /// Its length in bytes.
    pub length: u64,
    /// Bytes of it that the dump has.
    pub memory: u64,
    /// As in `/proc/PID/maps`: `rwxp`.
    pub rights: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PstreeEntry {
    #[prost(uint32, required, tag = "1")]
    pid: u32,
    #[prost(uint32, required, tag = "2")]
    ppid: u32,
    #[prost(uint32, repeated, packed = "false", tag = "5")]
    threads: Vec<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CoreEntry {
    #[prost(message, optional, tag = "3")]
    tc: Option<TaskCoreEntry>,
    #[prost(message, optional, tag = "5")]
    thread_core: Option<ThreadCoreEntry>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct TaskCoreEntry {
    #[prost(uint32, required, tag = "1")]
    task_state: u32,
    #[prost(bytes = "vec", required, tag = "6")]
    comm: Vec<u8>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ThreadCoreEntry {
    #[prost(message, optional, tag = "10")]
    creds: Option<CredsEntry>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct CredsEntry {
    #[prost(uint32, required, tag = "1")]
    uid: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct MmEntry {
    #[prost(uint64, required, tag = "8")]
    arg_start: u64,
    #[prost(uint64, required, tag = "9")]
    arg_end: u64,
    #[prost(uint32, required, tag = "12")]
    exe_file_id: u32,
    #[prost(message, repeated, tag = "14")]
    vmas: Vec<VmaEntry>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct VmaEntry {
    #[prost(uint64, required, tag = "1")]
    start: u64,
    #[prost(uint64, required, tag = "2")]
    end: u64,
    #[prost(uint64, required, tag = "4")]
    shmid: u64,
    #[prost(uint32, required, tag = "5")]
    prot: u32,
    #[prost(uint32, required, tag = "7")]
    status: u32,
}

/// A range of addresses whose pages the dump has.
#[derive(Debug, Clone, Copy)]
struct Present {
    start: u64,
    end: u64,
    /// Where they are in the file of pages; none where that is another dump's.
    offset: Option<u64>,
}

/// Status bits of a mapping, of `criu/include/image.h`, by what is shown for them.
const SPECIAL: [(u32, &str); 10] = [
    (1 << 1, "[stack]"),
    (1 << 2, "[vsyscall]"),
    (1 << 3, "[vdso]"),
    (1 << 5, "[heap]"),
    (1 << 10, "[System V memory]"),
    (1 << 11, "[packet socket]"),
    (1 << 12, "[vvar]"),
    (1 << 13, "[aio ring]"),
    (1 << 14, "[memfd]"),
    (1 << 8, "[shared memory]"),
];
/// `VMA_FILE_PRIVATE`, `VMA_FILE_SHARED`.
const OF_FILE: u32 = 1 << 6 | 1 << 7;
/// `VMA_FILE_SHARED`, `VMA_ANON_SHARED`.
const SHARED: u32 = 1 << 7 | 1 << 8;

/// The processes in the images of `dir`, parents before their children. `page_size` is the source's, in
/// bytes. Files of pages that are not there cost only the command lines.
///
/// # Errors
/// An image that cannot be read; or there is more than can be shown.
pub fn processes(dir: &Path, page_size: u64) -> Result<Vec<Process>, ImageError> {
    let files = descriptors::files(dir)?;
    let cores: BTreeMap<_, _> = list(dir, Kind::Core)?.into_iter().collect();
    let tree = dir.join("pstree.img");
    let image = Image::read(&tree, Kind::Pstree)?;
    let mut entries = image.entries();
    let (mut found, mut room) = (Vec::new(), Room::new());
    let mut seen = BTreeSet::new();
    while let Some(entry) = entries.next::<PstreeEntry>()? {
        // The images of a process would be read again for each entry.
        if !seen.insert(entry.pid) {
            return Err(image.ambiguous());
        }
        let mut process = Process {
            pid: entry.pid,
            parent: entry.ppid,
            threads: entry.threads.len(),
            state: "running",
            ..Process::default()
        };
        if let Some(path) = cores.get(&entry.pid) {
            let core: Option<CoreEntry> = Image::read(path, Kind::Core)?.entries().next()?;
            if let Some(core) = core {
                fill_from_core(&mut process, &core);
            }
        }
        room.take::<Process>(process.name.len(), &tree)?;
        let mm = dir.join(format!("mm-{}.img", entry.pid));
        if mm.symlink_metadata().is_ok() {
            fill_from_memory(&mut process, (dir, &mm), &files, page_size, &mut room)?;
        }
        found.push(process);
    }
    Ok(found)
}

fn fill_from_core(process: &mut Process, core: &CoreEntry) {
    if let Some(tc) = &core.tc {
        process.name = shown(&tc.comm);
        // `COMPEL_TASK_*`.
        process.state = match tc.task_state {
            2 | 6 => "zombie",
            3 => "stopped",
            _ => "running",
        };
    }
    let creds = core.thread_core.as_ref().and_then(|it| it.creds);
    process.uid = creds.map_or(0, |creds| creds.uid);
}

fn fill_from_memory(
    process: &mut Process,
    (dir, path): (&Path, &Path),
    files: &FileTable,
    page_size: u64,
    room: &mut Room,
) -> Result<(), ImageError> {
    let image = Image::read(path, Kind::Mm)?;
    let Some(mm) = image.entries().next::<MmEntry>()? else {
        return Ok(());
    };
    let executable = files.path_of(mm.exe_file_id);
    room.take::<()>(executable.map_or(0, str::len), path)?;
    process.executable = executable.map(str::to_owned);
    let (pages_id, present) = pagemap(dir, process.pid, page_size)?;
    let covered = Covered::of(&present);
    process.memory = covered.below(u64::MAX);
    if let Some(id) = pages_id {
        process.arguments = arguments(dir, id, &present, (mm.arg_start, mm.arg_end));
        for argument in &process.arguments {
            room.take::<String>(argument.len(), path)?;
        }
    }
    for vma in &mm.vmas {
        let (start, end) = (covered.below(vma.start), covered.below(vma.end));
        let memory = end.saturating_sub(start);
        if memory == 0 && vma.status & OF_FILE == 0 {
            continue;
        }
        let what = what_is_mapped(vma, files);
        room.take::<Mapping>(what.len(), path)?;
        process.mappings.push(Mapping {
            what: what.to_owned(),
            start: vma.start,
            length: vma.end.saturating_sub(vma.start),
            memory,
            rights: rights(vma),
        });
    }
    Ok(())
}

/// The addresses that the dump has, each once.
struct Covered(Vec<(Present, u64)>);

impl Covered {
    /// Of ranges in their order.
    fn of(present: &[Present]) -> Self {
        let (mut covered, mut end, mut bytes) = (Vec::new(), 0, 0);
        for range in present.iter().filter(|it| it.start < it.end) {
            let start = range.start.max(end);
            if start < range.end {
                covered.push((Present { start, ..*range }, bytes));
                bytes += range.end - start;
                end = range.end;
            }
        }
        Self(covered)
    }

    /// How many bytes of them lie below an address.
    fn below(&self, address: u64) -> u64 {
        let after = self.0.partition_point(|(range, _)| range.start < address);
        let last = after.checked_sub(1).map(|last| &self.0[last]);
        last.map_or(0, |(range, before)| {
            before + (range.end.min(address) - range.start)
        })
    }
}

fn what_is_mapped<'f>(vma: &VmaEntry, files: &'f FileTable) -> &'f str {
    let of_file = vma.status & OF_FILE != 0;
    let file = u32::try_from(vma.shmid).ok().filter(|_| of_file);
    if let Some(path) = file.and_then(|id| files.path_of(id)) {
        return path;
    }
    let special = SPECIAL.iter().find(|(bit, _)| vma.status & bit != 0);
    special.map_or("[anonymous]", |(_, name)| name)
}

fn rights(vma: &VmaEntry) -> String {
    let of = |bit: u32, letter: char| if vma.prot & bit != 0 { letter } else { '-' };
    let sharing = if vma.status & SHARED != 0 { 's' } else { 'p' };
    [of(1, 'r'), of(2, 'w'), of(4, 'x'), sharing]
        .iter()
        .collect()
}

/// Which file the pages of a process are in, and what they are.
fn pagemap(
    dir: &Path,
    pid: u32,
    page_size: u64,
) -> Result<(Option<u32>, Vec<Present>), ImageError> {
    let path = dir.join(format!("pagemap-{pid}.img"));
    if path.symlink_metadata().is_err() {
        return Ok((None, Vec::new()));
    }
    let Pagemap { pages_id, runs } = Pagemap::read(&path)?;
    let mut present: Vec<Present> = Vec::new();
    let mut offset = 0_u64;
    for run in runs {
        let length = run.pages.saturating_mul(page_size);
        let here = run.place == PagePlace::File;
        present.push(Present {
            start: run.start,
            end: run.start.saturating_add(length),
            offset: here.then_some(offset),
        });
        if here {
            offset = offset.saturating_add(length);
        }
    }
    present.sort_unstable_by_key(|it| it.start);
    Ok((Some(pages_id), present))
}

/// The machine that the first process in the images of `dir` was dumped on, as in `uname -m`; none where the
/// images do not say it in a way that is known.
///
/// # Errors
/// An image that cannot be read.
pub fn architecture(dir: &Path) -> Result<Option<&'static str>, ImageError> {
    #[derive(Clone, Copy, PartialEq, prost::Message)]
    struct OnlyMachine {
        #[prost(uint32, required, tag = "1")]
        mtype: u32,
    }
    let cores = list(dir, Kind::Core)?;
    let Some((_, path)) = cores.first() else {
        return Ok(None);
    };
    let core: Option<OnlyMachine> = Image::read(path, Kind::Core)?.entries().next()?;
    // `march` of `images/core.proto`.
    Ok(core.and_then(|core| match core.mtype {
        1 => Some("x86_64"),
        3 => Some("aarch64"),
        4 => Some("ppc64le"),
        5 => Some("s390x"),
        7 => Some("loongarch64"),
        8 => Some("riscv64"),
        _ => None,
    }))
}

/// The first half of the SHA-256 of a page.
pub type PageDigest = [u8; 16];

/// Digests of the pages that the dump in `dir` has of the process `pid`, by address. Pages that are in a dump
/// before it are left out.
///
/// # Errors
/// An image cannot be read, or the file of pages ends before the last one.
pub fn page_digests(
    dir: &Path,
    pid: u32,
    page_size: u64,
) -> Result<BTreeMap<u64, PageDigest>, ImageError> {
    let mut digests = BTreeMap::new();
    let (Some(id), mut present) = pagemap(dir, pid, page_size)? else {
        return Ok(digests);
    };
    present.retain(|it| it.offset.is_some());
    present.sort_unstable_by_key(|it| it.offset);
    let name = format!("pages-{id}.img");
    let io = |act, source| ImageError::Io {
        act,
        path: dir.join(&name),
        source,
    };
    let pages = open_regular(dir, Path::new(&name), Links::Refused);
    let mut pages = BufReader::with_capacity(1 << 20, pages.map_err(|e| io("open", e))?);
    let mut page = vec![0; usize::try_from(page_size).unwrap_or_default()];
    for range in present {
        let mut at = range.start;
        while at < range.end {
            pages.read_exact(&mut page).map_err(|e| io("read", e))?;
            let mut digest = PageDigest::default();
            digest.copy_from_slice(&transship_digest::sha256(&page)[..16]);
            digests.insert(at, digest);
            at = at.saturating_add(page_size.max(1));
        }
    }
    Ok(digests)
}

/// The command line, as far as it can be read: it is only shown.
fn arguments(
    dir: &Path,
    pages_id: u32,
    present: &[Present],
    (start, end): (u64, u64),
) -> Vec<String> {
    let read = || {
        let range = present
            .iter()
            .find(|it| it.start <= start && start < it.end)?;
        let length = end.min(range.end).checked_sub(start)?.min(ARGUMENTS_LIMIT);
        let name = format!("pages-{pages_id}.img");
        let mut pages = open_regular(dir, Path::new(&name), Links::Refused).ok()?;
        let at = range.offset?.checked_add(start - range.start)?;
        pages.seek(SeekFrom::Start(at)).ok()?;
        let mut bytes = Vec::new();
        pages.take(length).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = bytes.strip_suffix(b"\0").unwrap_or(&bytes);
    if text.is_empty() {
        return Vec::new();
    }
    let words = text.split(|byte| *byte == 0);
    words.map(shown).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::{Image, push_entry};
    use super::*;
    use crate::criu_images::pagemap::PageRun;

    /// Ranges that lie over each other count once, and whoever has many of them is not asked about each.
    #[test]
    fn addresses_are_counted_once() {
        let of = |ranges: &[(u64, u64)]| {
            let present = ranges.iter().map(|(start, end)| Present {
                start: *start,
                end: *end,
                offset: None,
            });
            Covered::of(&present.collect::<Vec<_>>())
        };
        let covered = of(&[(10, 20), (12, 15), (18, 25), (30, 30), (40, u64::MAX)]);
        for (address, bytes) in [(0, 0), (10, 0), (13, 3), (25, 15), (39, 15), (41, 16)] {
            assert_eq!(covered.below(address), bytes, "{address}");
        }
        assert_eq!(covered.below(u64::MAX), u64::MAX - 25);
    }

    fn write(dir: &Path, name: &str, kind: Kind, entries: impl FnOnce(&mut Vec<u8>)) {
        let mut body = Vec::new();
        entries(&mut body);
        let path = dir.join(name);
        Image::new(&path, kind, body).replace(&path).unwrap();
    }

    fn dump(dir: &Path) {
        write(dir, "pstree.img", Kind::Pstree, |body| {
            for (pid, ppid) in [(1, 0), (7, 1)] {
                let threads = vec![pid, pid + 100];
                push_entry(body, &PstreeEntry { pid, ppid, threads });
            }
        });
        write(dir, "core-1.img", Kind::Core, |body| {
            let tc = TaskCoreEntry {
                task_state: 3,
                comm: "web".into(),
            };
            let thread_core = ThreadCoreEntry {
                creds: Some(CredsEntry { uid: 33 }),
            };
            push_entry(
                body,
                &CoreEntry {
                    tc: Some(tc),
                    thread_core: Some(thread_core),
                },
            );
        });
        let vma = |start, end, status| VmaEntry {
            start,
            end,
            shmid: 0,
            prot: 3,
            status,
        };
        write(dir, "mm-1.img", Kind::Mm, |body| {
            push_entry(
                body,
                &MmEntry {
                    arg_start: 0x9004,
                    arg_end: 0x900c,
                    exe_file_id: 9,
                    vmas: vec![
                        vma(0x1000, 0x5000, 1 << 5 | 1 << 9),
                        vma(0x6000, 0x7000, 1 << 9),
                        vma(0x9000, 0xa000, 1 << 1 | 1 << 9),
                    ],
                },
            );
        });
        let run = |start, pages| PageRun {
            start,
            pages,
            place: PagePlace::File,
            lazy: false,
        };
        let pagemap = Pagemap {
            pages_id: 2,
            runs: vec![run(0x2000, 2), run(0x9000, 1)],
        };
        fs::write(dir.join("pagemap-1.img"), pagemap.to_bytes()).unwrap();
        let mut pages = vec![0; 0x3000];
        pages[0x2004..0x200c].copy_from_slice(b"web\0-v 1");
        fs::write(dir.join("pages-2.img"), pages).unwrap();
    }

    #[test]
    fn processes_have_their_memory_and_their_arguments() {
        let dir = tempfile::tempdir().unwrap();
        dump(dir.path());
        let all = processes(dir.path(), 4096).unwrap();
        let [first, second] = all.as_slice() else {
            panic!("{all:?}");
        };
        assert_eq!(
            (first.name.as_str(), first.uid, first.threads),
            ("web", 33, 2)
        );
        assert_eq!((first.state, first.memory), ("stopped", 0x3000));
        assert_eq!(first.arguments, ["web", "-v 1"]);
        let mapped = |it: &Mapping| (it.what.clone(), it.memory, it.rights.clone());
        let mapped: Vec<_> = first.mappings.iter().map(mapped).collect();
        assert_eq!(
            mapped,
            [
                ("[heap]".to_owned(), 0x2000, "rw-p".to_owned()),
                ("[stack]".to_owned(), 0x1000, "rw-p".to_owned())
            ]
        );
        assert_eq!((second.parent, second.memory), (1, 0));
    }

    #[test]
    fn a_process_that_is_there_twice_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        dump(dir.path());
        write(dir.path(), "pstree.img", Kind::Pstree, |body| {
            for (pid, ppid) in [(1, 0), (7, 1), (1, 0)] {
                let threads = vec![pid];
                push_entry(body, &PstreeEntry { pid, ppid, threads });
            }
        });
        let refused = processes(dir.path(), 4096);
        assert!(
            matches!(refused, Err(ImageError::Ambiguous { .. })),
            "{refused:?}"
        );
    }

    #[test]
    fn pages_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        dump(dir.path());
        let digests = page_digests(dir.path(), 1, 4096).unwrap();
        let pages: Vec<_> = digests.keys().copied().collect();
        assert_eq!(pages, [0x2000, 0x3000, 0x9000]);
        assert!(digests[&0x2000] == digests[&0x3000] && digests[&0x2000] != digests[&0x9000]);
        assert!(page_digests(dir.path(), 7, 4096).unwrap().is_empty());
        fs::write(dir.path().join("pages-2.img"), [0; 0x2fff]).unwrap();
        assert!(page_digests(dir.path(), 1, 4096).is_err());
    }

    #[test]
    fn a_damaged_image_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        dump(dir.path());
        for name in ["pstree.img", "core-1.img", "mm-1.img", "pagemap-1.img"] {
            let path = dir.path().join(name);
            let whole = fs::read(&path).unwrap();
            fs::write(&path, &whole[..whole.len() - 1]).unwrap();
            assert!(processes(dir.path(), 4096).is_err(), "{name}");
            fs::write(&path, whole).unwrap();
        }
    }
}
