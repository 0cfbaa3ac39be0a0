//! What containerd, or whoever has its sockets, says to the daemons.

use std::collections::BTreeMap;
use std::sync::Arc;

use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, ListSnapshotsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
    StatSnapshotRequest, UpdateSnapshotRequest, UsageRequest, ViewSnapshotRequest,
};
use containerd_client::services::v1::{ApplyRequest, DiffRequest};
use containerd_client::types::Mount;
use prost::Message;
use transship_layer::{MountFields, OverlayStack};
use transship_proto::node_api::{
    CheckpointPodRequest, ExportSnapshotRequest, ImportSnapshotRequest, RestorePodRequest,
};
use transship_proto::runc_options::{CheckpointOptions, Options as RuncOptions};
use transship_snapshotter::fault::Faults;
use transship_snapshotter::filter::Filter;
use transship_snapshotter::metadata::{self, Metadata};
use transship_snapshotter::mounts::SnapshotPaths;
use transship_snapshotter::record::{Kind, Record};
use transship_snapshotter::snapshots::{Options, Snapshots};

use crate::scratch::Scratch;

/// Bytes of the page cache of the database.
const CACHE: usize = 1 << 16;

/// Filter strings of List, a line each.
pub(crate) fn list_filter(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let Ok(filter) = Filter::parse(&text.lines().collect::<Vec<_>>()) else {
        return;
    };
    let record = Record {
        parent: "sha256:1".to_owned(),
        labels: [("containerd.io/gc.root".to_owned(), "x".to_owned())].into(),
        ..Record::default()
    };
    for kind in [Kind::View, Kind::Active, Kind::Committed] {
        let _passes = filter.matches("default/1/web", kind, &record);
    }
}

/// Calls of the snapshots service, one after the other on one store; messages of the other services.
///
/// ```text
/// calls := call*        call := which:u8  length:u16le  message
/// ```
pub(crate) fn grpc(mut data: &[u8]) {
    let mut store = None;
    while let Some(([which, low, high], rest)) = data.split_first_chunk() {
        let len = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (message, rest) = rest.split_at(len);
        data = rest;
        match which {
            0..8 => call(store.get_or_insert_with(Store::new), *which, message),
            8 => decode::<DiffRequest>(message, |it| {
                stack(&it.left);
                stack(&it.right);
            }),
            9 => decode::<ApplyRequest>(message, |it| stack(&it.mounts)),
            10 => decode::<CheckpointPodRequest>(message, drop),
            11 => decode::<RestorePodRequest>(message, drop),
            12 => decode::<ExportSnapshotRequest>(message, drop),
            13 => decode::<ImportSnapshotRequest>(message, drop),
            14 => decode::<CheckpointOptions>(message, drop),
            15 => decode::<RuncOptions>(message, drop),
            _ => return,
        }
    }
    if let Some(store) = store {
        store.snapshots.stop();
        store.scratch.check();
    }
}

/// A message that can be read can be written, and is the same then.
fn decode<M: Message + Default + PartialEq>(message: &[u8], look: impl FnOnce(M)) {
    let Ok(read) = M::decode(message) else { return };
    let again = M::decode(read.encode_to_vec().as_slice()).expect("it was written here");
    assert!(again == read, "a message does not come back as it was");
    look(read);
}

fn stack(mounts: &[Mount]) {
    let fields = mounts.iter().map(|mount| MountFields {
        fs_type: &mount.r#type,
        source: &mount.source,
        target: &mount.target,
        options: &mount.options,
    });
    drop(OverlayStack::from_mounts(fields));
}

struct Store {
    scratch: Scratch,
    snapshots: Arc<Snapshots>,
}

impl Store {
    fn new() -> Self {
        let scratch = Scratch::new();
        let root = scratch.dir();
        let paths = SnapshotPaths::below(&root).expect("it is a path");
        let metadata = Metadata::open(&root.join(metadata::FILE), CACHE).expect("it is new");
        let options = Options {
            remap_ids: true,
            upperdir_label: true,
            sync_remove: true,
            ..Options::default()
        };
        let snapshots = Snapshots::open(paths, metadata, options, Faults::default());
        Self {
            scratch,
            snapshots: Arc::new(snapshots.expect("it is empty")),
        }
    }
}

fn call(store: &Store, which: u8, message: &[u8]) {
    let snapshots = &store.snapshots;
    match which {
        0 => decode::<PrepareSnapshotRequest>(message, |it| {
            drop(snapshots.prepare(&it.key, &it.parent, sorted(it.labels)));
        }),
        1 => decode::<ViewSnapshotRequest>(message, |it| {
            drop(snapshots.view(&it.key, &it.parent, sorted(it.labels)));
        }),
        2 => decode::<CommitSnapshotRequest>(message, |it| {
            drop(snapshots.commit(&it.name, &it.key, sorted(it.labels)));
        }),
        3 => decode::<RemoveSnapshotRequest>(message, |it| drop(snapshots.remove(&it.key))),
        4 => decode::<StatSnapshotRequest>(message, |it| {
            drop((snapshots.stat(&it.key), snapshots.mounts(&it.key)));
        }),
        5 => decode::<UpdateSnapshotRequest>(message, |it| {
            let (Some(info), fields) = (it.info, it.update_mask.unwrap_or_default().paths) else {
                return;
            };
            drop(snapshots.update(&info.name, sorted(info.labels), &fields));
        }),
        6 => decode::<ListSnapshotsRequest>(message, |it| {
            let Ok(filter) = Filter::parse(&it.filters) else {
                return;
            };
            let listed = snapshots.list(filter).expect("the store is whole");
            assert!(
                { listed }.all(|entry| entry.is_ok()),
                "the store is damaged"
            );
        }),
        _ => decode::<UsageRequest>(message, |it| drop(snapshots.usage(&it.key))),
    }
}

fn sorted(labels: impl IntoIterator<Item = (String, String)>) -> BTreeMap<String, String> {
    labels.into_iter().collect()
}
