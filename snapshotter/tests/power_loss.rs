//! The metadata database when the power goes at any moment.
//!
//! SQLite has no hook for a disk in memory that could be used without unsafe code, so the system calls of a real run
//! are recorded and what a disk would hold is worked out from them:
//!
//! ```text
//!  this program, again ──strace──> writes, syncs, deletions, and marks "begin 7", "end 7" in the order they happened
//!                                        |
//!                                        v   a cut between any two of them; of what was not synced any sector
//!  the files after the cut <──────── a model of the disk      (512 bytes), any growth, any name is there or not
//!        |
//!        v
//!  Metadata::open: everything acknowledged is there, the change in flight is there or not, no id comes back
//! ```
//!
//! Nothing is written by other ways than these calls.
#![allow(clippy::tests_outside_test_module, reason = "the whole file is tests")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use prost::Message as _;
use transship_snapshotter::error::SnapshotError;
use transship_snapshotter::metadata::Metadata;
use transship_snapshotter::record::{Kind, Record};

const SECTOR: usize = 512;
const DATABASE: &str = "metadata.sqlite";
const CACHE: usize = 1 << 20;
/// Changes that are recorded: some passes of the WAL.
const CHANGES: usize = 300;
/// Moments at which the power goes.
const CUTS: usize = 250;
/// Where the recorded run works; unset in an ordinary run.
const RECORDING: &str = "TRANSSHIP_RECORDED_RUN";

/// xorshift: the recorded run and the one that looks at it make the same changes.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next()).unwrap() % limit
    }

    fn chance(&mut self) -> bool {
        self.next() & 1 == 0
    }
}

#[derive(Debug, Clone)]
enum Change {
    Create(usize),
    Commit(usize),
    Remove(usize),
    Label(usize, usize),
    /// A label so long that the WAL is full after some of them.
    LongLabel(usize),
}

fn changes() -> Vec<Change> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut change = || match random.below(8) {
        0..3 => Change::Create(random.below(12)),
        3..5 => Change::Commit(random.below(12)),
        5 => Change::Remove(random.below(24)),
        6 => Change::Label(random.below(24), random.below(9)),
        _ => Change::LongLabel(random.below(24)),
    };
    (0..CHANGES).map(|_| change()).collect()
}

fn key(n: usize) -> String {
    format!("a key as long as those of containerd/{n}")
}

fn make(metadata: &Metadata, change: &Change) -> Result<(), SnapshotError> {
    let label = |n: usize, value: String| {
        let labels = [("l".to_owned(), value)].into();
        metadata.update(&key(n), labels, Vec::new(), 2).map(drop)
    };
    match change {
        Change::Create(n) => {
            let record = Record {
                id: metadata.allocate_id()?,
                kind_number: Kind::Active as u32,
                ..Record::default()
            };
            metadata.create(&key(*n), record)
        }
        Change::Commit(n) => {
            let id = metadata.get(&key(*n))?.map_or(0, |record| record.id);
            metadata
                .commit(&key(*n), &key(n + 12), id, None, BTreeMap::new(), 1)
                .map(drop)
        }
        Change::Remove(n) => metadata.remove(&key(*n)).map(drop),
        Change::Label(n, value) => label(*n, value.to_string()),
        Change::LongLabel(n) => label(*n, "long".repeat(100_000)),
    }
}

/// Keys, each with the hash of its record: many contents are kept, with long labels in them.
fn content(metadata: &Metadata) -> BTreeMap<String, u64> {
    let entries = metadata.walk().unwrap().map(Result::unwrap);
    let hash = |record: Record| {
        let mut hasher = DefaultHasher::new();
        record.encode_to_vec().hash(&mut hasher);
        hasher.finish()
    };
    entries.map(|(key, record)| (key, hash(record))).collect()
}

/// The run that is recorded; nothing in an ordinary run.
#[test]
fn recorded_run() {
    let Some(dir) = std::env::var_os(RECORDING).map(PathBuf::from) else {
        return;
    };
    let metadata = Metadata::open(&dir.join(DATABASE), CACHE).unwrap();
    for (n, change) in changes().iter().enumerate() {
        fs::write(dir.join("mark"), format!("begin {n}")).unwrap();
        // Refusals are expected, and the same in each run.
        match make(&metadata, change) {
            Err(
                error @ (SnapshotError::Database { .. } | SnapshotError::UnknownOutcome { .. }),
            ) => {
                panic!("{error:?}")
            }
            _ => fs::write(dir.join("mark"), format!("end {n}")).unwrap(),
        }
    }
}

/// A system call that matters, on a file of the recorded directory.
#[derive(Debug)]
enum Event {
    Write(String, usize, Vec<u8>),
    Truncate(String, usize),
    Sync(String),
    /// Of the directory: its names.
    SyncNames,
    Create(String),
    Delete(String),
    Begin(usize),
    End(usize),
}

/// What is on the disk for sure and what may be.
#[derive(Debug, Default, Clone)]
struct DiskFile {
    synced: Vec<u8>,
    current: Vec<u8>,
}

#[derive(Debug, Default)]
struct Disk {
    files: BTreeMap<String, DiskFile>,
    /// Names that may be there or not.
    unsynced_names: BTreeSet<String>,
    /// Deleted, and may be back.
    deleted: BTreeMap<String, DiskFile>,
}

impl Disk {
    fn apply(&mut self, event: &Event) {
        match event {
            Event::Create(name) => {
                if !self.files.contains_key(name) {
                    self.files.insert(name.clone(), DiskFile::default());
                    self.unsynced_names.insert(name.clone());
                }
            }
            Event::Delete(name) => {
                if let Some(file) = self.files.remove(name) {
                    self.deleted.insert(name.clone(), file);
                }
            }
            Event::Write(name, offset, data) => {
                let current = &mut self.files.get_mut(name).unwrap().current;
                let end = offset + data.len();
                current.resize(current.len().max(end), 0);
                current[*offset..end].copy_from_slice(data);
            }
            Event::Truncate(name, length) => {
                self.files.get_mut(name).unwrap().current.resize(*length, 0);
            }
            Event::Sync(name) => {
                let file = self.files.get_mut(name).unwrap();
                file.synced.clone_from(&file.current);
            }
            Event::SyncNames => {
                self.unsynced_names.clear();
                self.deleted.clear();
            }
            Event::Begin(_) | Event::End(_) => {}
        }
    }

    /// Writes into `dir` what is on the disk after a power cut.
    fn write_after_cut(&self, dir: &Path, random: &mut Random) {
        let present = self.files.iter().chain(&self.deleted);
        for (name, file) in present {
            let is_unsure = self.unsynced_names.contains(name) || self.deleted.contains_key(name);
            if !(is_unsure && random.chance()) {
                fs::write(dir.join(name), file.after_cut(random)).unwrap();
            }
        }
    }
}

impl DiskFile {
    fn after_cut(&self, random: &mut Random) -> Vec<u8> {
        // A length that was not synced may be there, and then reads as zeros where nothing was written.
        let length = if random.chance() {
            self.current.len()
        } else {
            self.synced.len()
        };
        let mut image = self.synced.clone();
        image.resize(length, 0);
        for (n, sector) in image.chunks_mut(SECTOR).enumerate() {
            let start = n * SECTOR;
            let written = self.current.get(start..start + sector.len());
            if let Some(written) = written.filter(|written| *written != sector && random.chance()) {
                sector.copy_from_slice(written);
            }
        }
        image
    }
}

/// Runs `recorded_run` under strace.
fn record(dir: &Path) -> Vec<Event> {
    let trace = dir.with_extension("trace");
    let status = Command::new("strace")
        .args(["-f", "-y", "-xx", "-qq", "-s", "100000000", "-o"])
        .arg(&trace)
        .args(["-e", "signal=none", "-e"])
        .arg("trace=openat,write,pwrite64,pwritev,ftruncate,fsync,fdatasync,unlink,unlinkat,rename,renameat,renameat2,fallocate")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "recorded_run"])
        .env(RECORDING, dir)
        .stdout(std::process::Stdio::null())
        .status();
    assert!(status.unwrap().success());
    let trace = fs::read_to_string(trace).unwrap();
    trace
        .lines()
        .filter_map(|line| parse(line, dir.to_str().unwrap()))
        .collect()
}

/// `PID call(arguments) = result`; names and data are in hexadecimal.
fn parse(line: &str, dir: &str) -> Option<Event> {
    let (_, line) = line.split_once(' ')?;
    let line = line.trim_start();
    let (call, rest) = line.split_once('(')?;
    let (arguments, result) = rest.rsplit_once(" = ")?;
    let result: i64 = result.split(['<', ' ']).next()?.parse().ok()?;
    let arguments = arguments.trim_end().strip_suffix(')')?;
    assert!(!line.contains("unfinished"), "{call}: one thread at a time");
    let texts: Vec<Vec<u8>> = arguments.split('"').skip(1).step_by(2).map(unhex).collect();
    // The descriptor's path is in angle brackets.
    let of_descriptor = || {
        let (_, path) = arguments.split_once('<')?;
        let path = String::from_utf8(unhex(path.split_once('>')?.0)).unwrap();
        Some(path.strip_prefix(dir)?.trim_start_matches('/').to_owned())
    };
    let of_argument = || {
        let path = String::from_utf8(texts.last()?.clone()).unwrap();
        Some(path.strip_prefix(dir)?.trim_start_matches('/').to_owned())
    };
    let last_number = || arguments.rsplit(", ").next().unwrap().parse::<usize>();
    if result < 0 {
        return None;
    }
    let matters = |name: String| (!name.ends_with(".reserve") && name != "mark").then_some(name);
    match call {
        "openat" if arguments.contains("O_CREAT") => Some(Event::Create(matters(of_argument()?)?)),
        "write" if of_descriptor()? == "mark" => {
            let text = String::from_utf8(texts[0].clone()).unwrap();
            let (what, n) = text.split_once(' ').unwrap();
            let n = n.parse().unwrap();
            Some(if what == "begin" {
                Event::Begin(n)
            } else {
                Event::End(n)
            })
        }
        "pwrite64" => {
            let name = matters(of_descriptor()?)?;
            let data = texts[0].clone();
            assert_eq!(i64::try_from(data.len()).unwrap(), result);
            Some(Event::Write(name, last_number().unwrap(), data))
        }
        "ftruncate" => Some(Event::Truncate(
            matters(of_descriptor()?)?,
            last_number().unwrap(),
        )),
        "fsync" | "fdatasync" => match of_descriptor()? {
            name if name.is_empty() => Some(Event::SyncNames),
            name => Some(Event::Sync(matters(name)?)),
        },
        "unlink" | "unlinkat" => Some(Event::Delete(matters(of_argument()?)?)),
        "openat" => None,
        _ => {
            let name = of_descriptor().or_else(of_argument)?;
            assert!(matters(name).is_none(), "not understood: {call}");
            None
        }
    }
}

/// Bytes of `\x61\x62`.
fn unhex(text: &str) -> Vec<u8> {
    if !text.starts_with("\\x") {
        return text.as_bytes().to_vec();
    }
    let byte = |digits: &str| u8::from_str_radix(digits, 16).unwrap();
    text.split("\\x").skip(1).map(byte).collect()
}

/// A directory in memory: what counts are the calls, not the disk below them.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

fn has_strace() -> bool {
    let found = Command::new("strace").arg("-V").output().is_ok();
    let required = std::env::var("REQUIRE").unwrap_or_default();
    assert!(
        found || required.is_empty(),
        "REQUIRE is set, but there is no strace"
    );
    if !found {
        eprintln!("skipped: needs strace");
    }
    found
}

/// After a power cut at any moment, everything acknowledged is there, the change in flight is there or not,
/// nothing else happened, and no id comes back.
#[test]
fn power_cut_at_any_moment() {
    if !has_strace() {
        return;
    }
    // The content after each change, from a run that nothing disturbs.
    let calm = directory();
    let mut contents = vec![BTreeMap::new()];
    let metadata = Metadata::open(&calm.path().join(DATABASE), CACHE).unwrap();
    for change in changes() {
        drop(make(&metadata, &change));
        contents.push(content(&metadata));
    }
    drop(metadata);

    let recorded = directory();
    let dir = recorded.path().join("run");
    fs::create_dir(&dir).unwrap();
    let events = record(&dir);
    let syncs = |name: &str| {
        let is_sync = |event: &&Event| matches!(event, Event::Sync(synced) if synced == name);
        events.iter().filter(is_sync).count()
    };
    // When it is made, when the WAL is full, and at the end.
    assert!(syncs(DATABASE) >= 3, "the WAL was copied");
    assert!(syncs(&format!("{DATABASE}-wal")) > CHANGES / 4);

    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let mut cuts: Vec<_> = (0..CUTS).map(|_| random.below(events.len())).collect();
    cuts.sort_unstable();
    let (mut disk, mut done, mut begun, mut applied) = (Disk::default(), 0, 0, 0);
    for cut in cuts {
        for event in &events[applied..cut] {
            disk.apply(event);
            match event {
                Event::Begin(n) => begun = n + 1,
                Event::End(n) => done = n + 1,
                _ => {}
            }
        }
        applied = cut;
        let after = directory();
        disk.write_after_cut(after.path(), &mut random);
        let metadata = Metadata::open(&after.path().join(DATABASE), CACHE)
            .unwrap_or_else(|error| panic!("cut {cut} of {}: {error:?}", events.len()));
        let found = content(&metadata);
        assert!(
            contents[done..=begun].contains(&found),
            "cut {cut} of {}: found {:?}, acknowledged {:?}",
            events.len(),
            found.keys(),
            contents[done].keys()
        );
        // Each Create takes the next id, the first of all is 1.
        let is_create = |change: &&Change| matches!(change, Change::Create(_));
        let given_out = changes()[..begun].iter().filter(is_create).count();
        let id = metadata.allocate_id().unwrap();
        assert!(id > given_out as u64, "cut {cut}: id {id} came back");
    }
}

/// Callers of one batch all get their own answer.
#[test]
fn changes_of_many_threads_share_transactions() {
    let batches = Arc::new(Mutex::new(Vec::new()));
    let observer = Arc::clone(&batches);
    let dir = tempfile::tempdir().unwrap();
    let metadata = Metadata::open(&dir.path().join(DATABASE), CACHE)
        .unwrap()
        .observed_by(move |changes| observer.lock().unwrap().push(changes));
    std::thread::scope(|scope| {
        for thread in 0..16_u64 {
            let metadata = &metadata;
            scope.spawn(move || {
                for n in 0..50 {
                    let id = metadata.allocate_id().unwrap();
                    let record = Record {
                        id,
                        kind_number: Kind::Active as u32,
                        ..Record::default()
                    };
                    let key = format!("{thread}/{n}");
                    metadata.create(&key, record.clone()).unwrap();
                    let again = metadata.create(&key, record).unwrap_err();
                    assert!(matches!(again, SnapshotError::AlreadyExists { .. }));
                    assert_eq!(metadata.get(&key).unwrap().unwrap().id, id);
                }
            });
        }
    });
    assert_eq!(content(&metadata).len(), 800);
    let batches = batches.lock().unwrap();
    assert_eq!(batches.iter().sum::<usize>(), 1600);
}
