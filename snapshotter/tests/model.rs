//! The snapshots as a state machine against a `BTreeMap`: any sequence of calls gives the answers that
//! containerd's rules give, and leaves what they say. Runs without root, in memory.
#![allow(clippy::tests_outside_test_module, reason = "the whole file is tests")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use transship_snapshotter::error::SnapshotError;
use transship_snapshotter::fault::Faults;
use transship_snapshotter::filter::Filter;
use transship_snapshotter::metadata::{self, Metadata};
use transship_snapshotter::mounts::SnapshotPaths;
use transship_snapshotter::record::Kind;
use transship_snapshotter::snapshots::{Options, Snapshots};

#[derive(Debug, Clone)]
enum Call {
    Prepare(u8, Option<u8>),
    View(u8, Option<u8>),
    Commit(u8, u8),
    Remove(u8),
    Label(u8, u8, Option<u8>),
    Mounts(u8),
    Cleanup,
}

/// Few keys, so that calls meet each other.
fn key() -> impl Strategy<Value = u8> {
    0..8_u8
}

fn call() -> impl Strategy<Value = Call> {
    let parent = || prop::option::weighted(0.8, key());
    prop_oneof![
        4 => (key(), parent()).prop_map(|(key, parent)| Call::Prepare(key, parent)),
        1 => (key(), parent()).prop_map(|(key, parent)| Call::View(key, parent)),
        4 => (key(), key()).prop_map(|(name, key)| Call::Commit(name, key)),
        3 => key().prop_map(Call::Remove),
        1 => (key(), 0..3_u8, prop::option::of(0..3_u8)).prop_map(|(k, l, v)| Call::Label(k, l, v)),
        1 => key().prop_map(Call::Mounts),
        1 => Just(Call::Cleanup),
    ]
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Expected {
    kind: Kind,
    parent: String,
    labels: BTreeMap<String, String>,
    /// What the directory is marked with.
    mark: u32,
}

#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Done,
    NotFound,
    ParentNotFound,
    ParentNotCommitted,
    AlreadyExists,
    NotActive,
    NoMounts,
    HasChildren,
}

fn answer<T>(result: Result<T, SnapshotError>) -> Answer {
    match result {
        Ok(_) => Answer::Done,
        Err(SnapshotError::NotFound { .. }) => Answer::NotFound,
        Err(SnapshotError::ParentNotFound { .. }) => Answer::ParentNotFound,
        Err(SnapshotError::ParentNotCommitted { .. }) => Answer::ParentNotCommitted,
        Err(SnapshotError::AlreadyExists { .. }) => Answer::AlreadyExists,
        Err(SnapshotError::NotActive { .. }) => Answer::NotActive,
        Err(SnapshotError::NoMounts { .. }) => Answer::NoMounts,
        Err(SnapshotError::HasChildren { .. }) => Answer::HasChildren,
        Err(other) => panic!("{other:?}"),
    }
}

#[derive(Debug, Default)]
struct Model {
    snapshots: BTreeMap<String, Expected>,
    marks: u32,
}

impl Model {
    fn create(&mut self, kind: Kind, key: &str, parent: &str) -> Answer {
        match self.snapshots.get(parent) {
            None if !parent.is_empty() => return Answer::ParentNotFound,
            Some(found) if found.kind != Kind::Committed => return Answer::ParentNotCommitted,
            _ if self.snapshots.contains_key(key) => return Answer::AlreadyExists,
            _ => {}
        }
        self.marks += 1;
        let (parent, labels, mark) = (parent.to_owned(), BTreeMap::new(), self.marks);
        self.snapshots.insert(
            key.to_owned(),
            Expected {
                kind,
                parent,
                labels,
                mark,
            },
        );
        Answer::Done
    }

    fn commit(&mut self, name: &str, key: &str) -> Answer {
        let Some(found) = self.snapshots.get(key) else {
            return Answer::NotFound;
        };
        if self.snapshots.contains_key(name) {
            return Answer::AlreadyExists;
        }
        if found.kind != Kind::Active {
            return Answer::NotActive;
        }
        let found = self.snapshots.remove(key).unwrap();
        let committed = Expected {
            kind: Kind::Committed,
            labels: BTreeMap::new(),
            ..found
        };
        self.snapshots.insert(name.to_owned(), committed);
        Answer::Done
    }

    fn remove(&mut self, key: &str) -> Answer {
        if !self.snapshots.contains_key(key) {
            return Answer::NotFound;
        }
        if self.snapshots.values().any(|other| other.parent == key) {
            return Answer::HasChildren;
        }
        self.snapshots.remove(key);
        Answer::Done
    }

    fn label(&mut self, key: &str, label: &str, value: Option<u8>) -> Answer {
        let Some(found) = self.snapshots.get_mut(key) else {
            return Answer::NotFound;
        };
        match value {
            Some(value) => drop(found.labels.insert(label.to_owned(), value.to_string())),
            None => drop(found.labels.remove(label)),
        }
        Answer::Done
    }
}

fn open(root: &Path) -> Arc<Snapshots> {
    let metadata = Metadata::open(&root.join(metadata::FILE), 1 << 20).unwrap();
    let paths = SnapshotPaths::below(root).unwrap();
    Arc::new(Snapshots::open(paths, metadata, Options::default(), Faults::default()).unwrap())
}

/// The directory of the snapshot itself, which only a mount of its own or of a child names.
fn own_directory(snapshots: &Snapshots, key: &str) -> PathBuf {
    let mount = &snapshots.mounts(key).unwrap()[0];
    let upperdir = mount
        .options
        .iter()
        .find_map(|option| option.strip_prefix("upperdir="));
    PathBuf::from(upperdir.unwrap_or(&mount.source))
}

fn name(n: u8) -> String {
    format!("k{n}")
}

fn run(calls: &[Call]) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let snapshots = open(dir.path());
    let mut model = Model::default();
    for call in calls {
        let none = BTreeMap::new;
        let (got, expected) = match call {
            Call::Prepare(key, parent) => {
                let (key, parent) = (name(*key), parent.map_or_else(String::new, name));
                let got = answer(snapshots.prepare(&key, &parent, none()));
                let expected = model.create(Kind::Active, &key, &parent);
                if got == Answer::Done {
                    let mark = own_directory(&snapshots, &key).join("mark");
                    std::fs::write(mark, model.marks.to_string()).unwrap();
                }
                (got, expected)
            }
            Call::View(key, parent) => {
                let (key, parent) = (name(*key), parent.map_or_else(String::new, name));
                let got = answer(snapshots.view(&key, &parent, none()));
                (got, model.create(Kind::View, &key, &parent))
            }
            Call::Commit(layer, key) => {
                let (layer, key) = (name(*layer), name(*key));
                (
                    answer(snapshots.commit(&layer, &key, none())),
                    model.commit(&layer, &key),
                )
            }
            Call::Remove(key) => {
                let key = name(*key);
                (answer(snapshots.remove(&key)), model.remove(&key))
            }
            Call::Label(key, label, value) => {
                let (key, label) = (name(*key), format!("l{label}"));
                let labels = value
                    .iter()
                    .map(|v| (label.clone(), v.to_string()))
                    .collect();
                let got = answer(snapshots.update(&key, labels, &[format!("labels.{label}")]));
                (got, model.label(&key, &label, *value))
            }
            Call::Mounts(key) => {
                let key = name(*key);
                let expected = match model.snapshots.get(&key).map(|found| found.kind) {
                    None => Answer::NotFound,
                    Some(Kind::Committed) => Answer::NoMounts,
                    Some(_) => Answer::Done,
                };
                (answer(snapshots.mounts(&key)), expected)
            }
            Call::Cleanup => (answer(snapshots.cleanup()), Answer::Done),
        };
        assert_eq!(got, expected, "{call:?}");
    }
    compare(&snapshots, &model, dir.path());
}

fn compare(snapshots: &Arc<Snapshots>, model: &Model, root: &Path) {
    let infos: Vec<_> = snapshots
        .list(Filter::default())
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(infos.len(), model.snapshots.len());
    for (info, (key, expected)) in infos.iter().zip(&model.snapshots) {
        assert_eq!(*info, snapshots.stat(key).unwrap());
        let (kind, parent, labels) = (info.kind, &info.parent, &info.labels);
        assert_eq!((key, kind), (&info.name, expected.kind));
        assert_eq!((parent, labels), (&expected.parent, &expected.labels));
        snapshots.usage(key).unwrap();
        // A child's lowerdirs are the directories of its ancestors, with what was put there.
        let (mut marks, mut parent) = (Vec::new(), expected.parent.as_str());
        while let Some(layer) = model.snapshots.get(parent) {
            marks.push(layer.mark.to_string());
            parent = &layer.parent;
        }
        if expected.kind == Kind::Active && !marks.is_empty() {
            let options = &snapshots.mounts(key).unwrap()[0].options;
            let lowerdirs = options
                .iter()
                .find_map(|o| o.strip_prefix("lowerdir="))
                .unwrap();
            let found: Vec<_> = lowerdirs
                .split(':')
                .map(|dir| std::fs::read_to_string(Path::new(dir).join("mark")).unwrap())
                .collect();
            assert_eq!(found, marks);
        }
    }
    snapshots.stop();
    let directories = std::fs::read_dir(root.join("snapshots")).unwrap().count();
    assert_eq!(
        directories,
        model.snapshots.len(),
        "one directory per snapshot"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_calls_agree_with_the_model(calls in prop::collection::vec(call(), 1..80)) {
        run(&calls);
    }
}
