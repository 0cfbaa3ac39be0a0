//! The labels that mean something to the snapshotter, and the id mappings two of them carry.
//!
//! Labels are not trusted: containerd passes every annotation `containerd.io/snapshot/*` of a layer's descriptor
//! in an image's manifest to Prepare. No label may name a file of the host.

use std::collections::BTreeMap;

use crate::error::{Result, SnapshotError};

/// User ids of the container on the host, `container:host:size[,..]` (containerd 2.x).
pub(crate) const UID_MAPPING: &str = "containerd.io/snapshot/uidmapping";
/// Group ids of the container on the host, `container:host:size[,..]` (containerd 2.x).
pub(crate) const GID_MAPPING: &str = "containerd.io/snapshot/gidmapping";
/// Shown (never stored) with `upperdir_label`: the path of the snapshot's upperdir.
pub(crate) const UPPERDIR: &str = "containerd.io/snapshot/overlay.upperdir";

/// Names the layer that is unpacked into a snapshot (containerd's unpacker).
const UNPACKED_LAYER: &str = "containerd.io/snapshot.ref";

/// The labels that a snapshot gets. To containerd an empty value means "no such label". An id mapping is that of
/// a container, and is not taken for what a layer is unpacked into: there the author of an image says it, and
/// every other image with this layer has the same snapshot.
pub(crate) fn accepted(
    key: &str,
    labels: impl IntoIterator<Item = (String, String)>,
) -> BTreeMap<String, String> {
    let mut accepted: BTreeMap<String, String> = { labels.into_iter() }
        .filter(|(_, value)| !value.is_empty())
        .collect();
    if is_of_layer(key) || accepted.contains_key(UNPACKED_LAYER) {
        accepted.remove(UID_MAPPING);
        accepted.remove(GID_MAPPING);
    }
    accepted
}

/// Whether a layer is unpacked into the snapshot: `<namespace>/<n>/extract-<n> <chain id>`. No id of a container has
/// a blank.
fn is_of_layer(key: &str) -> bool {
    let name = key.rsplit('/').next().unwrap_or_default();
    name.starts_with("extract-") && name.contains(' ')
}

/// The host's uid and gid of the container's root, when the labels carry id mappings.
///
/// # Errors
/// One label without the other, a mapping that is not `container:host:size[,..]`, or one that does
/// not map id 0.
pub(crate) fn mapped_root(labels: &BTreeMap<String, String>) -> Result<Option<(u32, u32)>> {
    let (uid, gid) = (labels.get(UID_MAPPING), labels.get(GID_MAPPING));
    if uid.is_none() && gid.is_none() {
        return Ok(None);
    }
    let root = |label: &str, map: Option<&String>| {
        map.and_then(|map| host_id_of_root(map)).ok_or_else(|| SnapshotError::Invalid {
            reason: format!(
                "label {label}={:?} does not map id 0 (expected container:host:size, and both the uid \
                 and the gid label)",
                map.map_or("", String::as_str)
            ),
        })
    };
    Ok(Some((root(UID_MAPPING, uid)?, root(GID_MAPPING, gid)?)))
}

fn host_id_of_root(map: &str) -> Option<u32> {
    let mut found = None;
    for entry in map.split(',') {
        let mut numbers = entry.split(':').map(|n| n.trim().parse::<u32>().ok());
        let (container, host, size) = (numbers.next()??, numbers.next()??, numbers.next()??);
        if numbers.next().is_some() || size == 0 || host.checked_add(size - 1).is_none() {
            return None;
        }
        if container == 0 && found.is_none() {
            found = Some(host);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_has_no_id_mapping() {
        let mapping = [(UID_MAPPING, "0:1000:10"), (GID_MAPPING, "0:1000:10")];
        for (key, more, kept) in [
            ("default/1/web", None, true),
            ("default/1/extract-web", None, true),
            ("default/2/extract-17-x sha256:12", None, false),
            ("default/3/web", Some((UNPACKED_LAYER, "sha256:12")), false),
        ] {
            let labels = mapping.into_iter().chain(more);
            let labels = labels.map(|(name, value)| (name.to_owned(), value.to_owned()));
            let labels = accepted(key, labels);
            assert_eq!(labels.contains_key(UID_MAPPING), kept, "{key}");
            assert_eq!(labels.contains_key(GID_MAPPING), kept, "{key}");
        }
        let empty = accepted("x", [("a".to_owned(), String::new())]);
        assert!(empty.is_empty());
    }

    #[test]
    fn root_of_id_mappings() {
        let cases = [
            (Some("0:1000:10"), Some("0:2000:10"), Ok(Some((1000, 2000)))),
            (
                Some("5:7:1,0:1000:10"),
                Some("0:2000:10"),
                Ok(Some((1000, 2000))),
            ),
            (None, None, Ok(None)),
            (Some("0:1000:10"), None, Err(())),
            (None, Some("0:1000:10"), Err(())),
            (Some("1:1000:10"), Some("0:2000:10"), Err(())),
            (Some("0:1000"), Some("0:2000:10"), Err(())),
            (Some("0:1000:0"), Some("0:2000:10"), Err(())),
            (Some("0:4294967295:2"), Some("0:2000:10"), Err(())),
            (Some("0:1000:10:3"), Some("0:2000:10"), Err(())),
            (Some(""), Some("0:2000:10"), Err(())),
        ];
        for (uid, gid, expected) in cases {
            let labels: BTreeMap<String, String> = [(UID_MAPPING, uid), (GID_MAPPING, gid)]
                .into_iter()
                .filter_map(|(k, v)| Some((k.to_owned(), v?.to_owned())))
                .collect();
            assert_eq!(
                mapped_root(&labels).map_err(|_| ()),
                expected,
                "{uid:?} {gid:?}"
            );
        }
    }
}
