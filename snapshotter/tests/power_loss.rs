//! The metadata database on a disk in memory that loses power, fills up, or fails.
//!
//! The disk remembers what was synced of each file (the database, its journal); at a power cut any part
//! of what was written since is there or is not, each sector on its own.
#![allow(clippy::tests_outside_test_module, reason = "the whole file is tests")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use redb::{Database, StorageBackend};
use transship_snapshotter::error::SnapshotError;
use transship_snapshotter::metadata::Metadata;
use transship_snapshotter::record::{Kind, Record};

const SECTOR: usize = 512;

#[derive(Debug, Default)]
struct DiskState {
    database: DiskFile,
    journal: DiskFile,
    /// Calls until the power goes; `None`: it stays.
    power_cut_after: Option<usize>,
    /// No sector gets room any more; those that have it can be written.
    full: bool,
}

#[derive(Debug, Default, Clone)]
struct DiskFile {
    synced: Vec<u8>,
    current: Vec<u8>,
    /// Which sectors have room on the disk: a file grows without it, as with ftruncate.
    allocated: BTreeSet<usize>,
}

#[derive(Debug, Clone, Default)]
struct Disk(Arc<Mutex<DiskState>>);

/// An open file of a disk.
#[derive(Debug, Clone)]
struct OpenFile {
    disk: Disk,
    is_journal: bool,
}

impl Disk {
    fn open(&self) -> Result<Metadata, SnapshotError> {
        let journal = self.file(true);
        self.open_with(Some(Box::new(journal)))
    }

    fn open_with(
        &self,
        journal: Option<Box<dyn StorageBackend>>,
    ) -> Result<Metadata, SnapshotError> {
        let database = self.file(false);
        let open = move || Database::builder().create_with_backend(database.clone());
        Metadata::open_with(open, journal)
    }

    fn file(&self, is_journal: bool) -> OpenFile {
        OpenFile {
            disk: self.clone(),
            is_journal,
        }
    }

    fn set(&self, change: impl FnOnce(&mut DiskState)) {
        change(&mut self.0.lock().unwrap());
    }

    /// What is on the disk after the power cut; `chance` decides for each sector.
    fn after_power_cut(&self, mut chance: impl FnMut() -> bool) -> Self {
        let state = self.0.lock().unwrap();
        let state = DiskState {
            database: state.database.after_power_cut(&mut chance),
            journal: state.journal.after_power_cut(&mut chance),
            ..DiskState::default()
        };
        Self(Arc::new(Mutex::new(state)))
    }
}

impl DiskFile {
    fn after_power_cut(&self, mut chance: impl FnMut() -> bool) -> Self {
        // Growth that was not synced may be there, and then reads as zeros where nothing was written.
        let length = if chance() {
            self.current.len()
        } else {
            self.synced.len()
        };
        let mut image = self.synced.clone();
        image.resize(length, 0);
        for (n, sector) in image.chunks_mut(SECTOR).enumerate() {
            let start = n * SECTOR;
            let written = self.current.get(start..start + sector.len());
            if let Some(written) = written.filter(|_| chance()) {
                sector.copy_from_slice(written);
            }
        }
        Self {
            synced: image.clone(),
            current: image,
            ..Self::default()
        }
    }

    fn write(&mut self, start: usize, data: &[u8], is_full: bool) -> io::Result<()> {
        let sectors = start / SECTOR..(start + data.len()).div_ceil(SECTOR);
        let has_room = |sector| self.allocated.contains(&sector);
        if is_full && !sectors.clone().all(has_room) {
            return Err(io::Error::from_raw_os_error(
                nix::errno::Errno::ENOSPC as i32,
            ));
        }
        self.allocated.extend(sectors);
        let target = self.current.get_mut(start..start + data.len());
        target
            .ok_or(io::ErrorKind::UnexpectedEof)?
            .copy_from_slice(data);
        Ok(())
    }
}

impl OpenFile {
    /// A call that reaches the file, unless the power is gone.
    fn call<T>(&self, act: impl FnOnce(&mut DiskFile, bool) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.disk.0.lock().unwrap();
        match &mut state.power_cut_after {
            Some(0) => return Err(io::Error::other("no power")),
            Some(left) => *left -= 1,
            None => {}
        }
        let is_full = state.full;
        let file = if self.is_journal {
            &mut state.journal
        } else {
            &mut state.database
        };
        act(file, is_full)
    }
}

impl StorageBackend for OpenFile {
    fn len(&self) -> io::Result<u64> {
        self.call(|file, _| Ok(file.current.len() as u64))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        self.call(|file, _| {
            let source = file.current.get(start..start + out.len());
            out.copy_from_slice(source.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        })
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).unwrap();
        self.call(|file, _| {
            file.current.resize(len, 0);
            Ok(())
        })
    }

    fn sync_data(&self) -> io::Result<()> {
        self.call(|file, _| {
            file.synced.clone_from(&file.current);
            Ok(())
        })
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        self.call(|file, is_full| file.write(start, data, is_full))
    }
}

#[derive(Debug, Clone)]
enum Change {
    Create(u8),
    Commit(u8),
    Remove(u8),
    Label(u8, u8),
    /// A label so long that the journal is full after some of them.
    LongLabel(u8),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        3 => (0..12_u8).prop_map(Change::Create),
        2 => (0..12_u8).prop_map(Change::Commit),
        1 => (0..24_u8).prop_map(Change::Remove),
        1 => (0..24_u8, 0..9_u8).prop_map(|(key, value)| Change::Label(key, value)),
        1 => (0..24_u8).prop_map(Change::LongLabel),
    ]
}

fn key(n: u8) -> String {
    format!("a key as long as those of containerd/{n}")
}

/// Makes one change; ids are noted before they are used.
fn make(
    metadata: &Metadata,
    change: &Change,
    ids: &mut BTreeSet<u64>,
) -> Result<(), SnapshotError> {
    match change {
        Change::Create(n) => {
            let id = metadata.allocate_id()?;
            assert!(ids.insert(id), "id {id} came back");
            let record = Record {
                id,
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
        Change::Label(n, value) => {
            let labels = [("l".to_owned(), value.to_string())].into();
            metadata.update(&key(*n), labels, Vec::new(), 2).map(drop)
        }
        Change::LongLabel(n) => {
            let labels = [("l".to_owned(), "long".repeat(100_000))].into();
            metadata.update(&key(*n), labels, Vec::new(), 3).map(drop)
        }
    }
}

fn content(metadata: &Metadata) -> BTreeMap<String, Record> {
    metadata.walk().unwrap().map(Result::unwrap).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// After a power cut at any call, everything acknowledged is there, the change in flight is there
    /// or not, nothing else happened, and no id comes back.
    #[test]
    fn power_cut_at_any_call(
        changes in prop::collection::vec(change(), 1..30),
        cut in 0..300_usize,
        seed in any::<u64>(),
    ) {
        let mut random = seed | 1;
        let mut chance = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random & 64 == 0
        };
        let disk = Disk::default();
        let mut ids = BTreeSet::new();
        let mut acknowledged = BTreeMap::new();
        let mut in_flight = None;
        {
            let metadata = disk.open().unwrap();
            disk.set(|state| state.power_cut_after = Some(cut));
            // The same changes on a disk that never fails tell what the one in flight would do.
            let twin = Disk::default().open().unwrap();
            for change in &changes {
                let outcome = make(&metadata, change, &mut ids);
                let twin_outcome = make(&twin, change, &mut BTreeSet::new());
                match outcome {
                    Err(SnapshotError::Database { .. } | SnapshotError::UnknownOutcome { .. }) => {
                        in_flight = Some(content(&twin));
                        break;
                    }
                    outcome => prop_assert_eq!(outcome.is_ok(), twin_outcome.is_ok()),
                }
                acknowledged = content(&twin);
            }
        }
        let metadata = disk.after_power_cut(&mut chance).open().unwrap();
        let found = content(&metadata);
        prop_assert!(
            found == acknowledged || in_flight.is_some_and(|after| after == found),
            "found {:?}\nacknowledged {:?}", found, acknowledged
        );
        prop_assert!(ids.insert(metadata.allocate_id().unwrap()));
    }
}

/// A full disk is an error that says so; what is there can be read meanwhile; when there is room
/// again, everything goes on.
#[test]
fn a_full_disk_is_survived() {
    // Nothing keeps room for what a journal holds here: see reserve.rs.
    let disk = Disk::default();
    let metadata = disk.open_with(None).unwrap();
    let mut ids = BTreeSet::new();
    let mut made = 0_u64;
    let error = loop {
        disk.set(|state| state.full = made >= 100);
        let record = Record {
            id: metadata.allocate_id().unwrap(),
            kind_number: Kind::Active as u32,
            ..Record::default()
        };
        match metadata.create(&format!("{made:0200}"), record) {
            Ok(()) => made += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(
        error.io_source().unwrap().kind(),
        io::ErrorKind::StorageFull,
        "{error:?}"
    );
    assert!(
        matches!(error, SnapshotError::Database { .. }),
        "the outcome is known: {error:?}"
    );
    assert_eq!(content(&metadata).len() as u64, made);
    disk.set(|state| state.full = false);
    make(&metadata, &Change::Create(1), &mut ids).unwrap();
    metadata.remove(&format!("{:0200}", 0)).unwrap();
    assert_eq!(content(&metadata).len() as u64, made);
}

/// A disk that refuses everything for a while: errors, and then it goes on.
#[test]
fn a_failing_disk_is_survived() {
    let disk = Disk::default();
    let metadata = disk.open().unwrap();
    let mut ids = BTreeSet::new();
    make(&metadata, &Change::Create(1), &mut ids).unwrap();
    disk.set(|state| state.power_cut_after = Some(0));
    let id = metadata.allocate_id().unwrap();
    metadata
        .create(
            "new",
            Record {
                id,
                ..Record::default()
            },
        )
        .unwrap_err();
    metadata.walk().map(Iterator::count).unwrap_err();
    disk.set(|state| state.power_cut_after = None);
    assert_eq!(content(&metadata).keys().collect::<Vec<_>>(), [&key(1)]);
    make(&metadata, &Change::Create(2), &mut ids).unwrap();
}

/// A journal that cannot be written to: each change is made or it is not, and its caller knows.
#[test]
fn a_failing_journal_is_survived() {
    #[derive(Debug)]
    struct Failing(OpenFile, Arc<Mutex<bool>>);
    impl StorageBackend for Failing {
        fn len(&self) -> io::Result<u64> {
            self.0.len()
        }
        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            self.0.read(offset, out)
        }
        fn set_len(&self, len: u64) -> io::Result<()> {
            self.0.set_len(len)
        }
        /// Both what was written and the error of the sync are real.
        fn sync_data(&self) -> io::Result<()> {
            self.0.sync_data()?;
            if *self.1.lock().unwrap() {
                return Err(io::Error::other("as planned"));
            }
            Ok(())
        }
        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.0.write(offset, data)
        }
    }
    let (disk, fails) = (Disk::default(), Arc::new(Mutex::new(false)));
    let journal = Failing(disk.file(true), Arc::clone(&fails));
    let metadata = disk.open_with(Some(Box::new(journal))).unwrap();
    let mut ids = BTreeSet::new();
    make(&metadata, &Change::Create(1), &mut ids).unwrap();
    *fails.lock().unwrap() = true;
    let mut expected: BTreeSet<_> = [key(1)].into();
    for n in 2..8 {
        match make(&metadata, &Change::Create(n), &mut ids) {
            Ok(()) => drop(expected.insert(key(n))),
            // The outcome is known: it was not made.
            Err(SnapshotError::Database { .. }) => {}
            Err(error) => panic!("{error:?}"),
        }
    }
    *fails.lock().unwrap() = false;
    make(&metadata, &Change::Create(8), &mut ids).unwrap();
    expected.insert(key(8));
    let found: BTreeSet<_> = content(&metadata).into_keys().collect();
    assert_eq!(found, expected);
    let before = content(&metadata);
    drop(metadata);
    assert_eq!(content(&disk.open().unwrap()), before);
}

/// A database made anew does not take up what the journal holds of the one before, nor does one that was
/// brought back from a copy.
#[test]
fn a_journal_belongs_to_one_state_of_one_database() {
    let disk = Disk::default();
    let mut ids = BTreeSet::new();
    let metadata = disk.open().unwrap();
    make(&metadata, &Change::Create(1), &mut ids).unwrap();
    drop(metadata);
    let copy = disk.0.lock().unwrap().database.clone();
    let metadata = disk.open().unwrap();
    make(&metadata, &Change::Create(2), &mut ids).unwrap();
    // As if it was killed: nothing is written at the end.
    let killed = disk.after_power_cut(|| true);
    drop(metadata);
    assert_eq!(content(&killed.open().unwrap()).len(), 2);
    killed.set(|state| state.database = copy);
    assert_eq!(content(&killed.open().unwrap()).len(), 1);
    killed.set(|state| state.database = DiskFile::default());
    assert_eq!(content(&killed.open().unwrap()).len(), 0);
}

/// Callers of one batch all get their own answer.
#[test]
fn changes_of_many_threads_share_transactions() {
    let batches = Arc::new(Mutex::new(Vec::new()));
    let observed = Arc::clone(&batches);
    let metadata = Disk::default()
        .open()
        .unwrap()
        .observed_by(move |size| observed.lock().unwrap().push(size));
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
    assert_eq!(metadata.len().unwrap(), 800);
    assert_eq!(batches.lock().unwrap().iter().sum::<usize>(), 1600);
}
