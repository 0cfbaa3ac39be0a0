//! Labels by which containerd's garbage collector and its clients know what belongs together.

use std::collections::HashMap;
use std::time::SystemTime;

use prost_types::{FieldMask, Timestamp};

/// On an object that is kept for its own sake.
pub const GC_ROOT: &str = "containerd.io/gc.root";
/// On a lease: the moment at which it ends by itself, see [`rfc3339`].
pub const GC_EXPIRE: &str = "containerd.io/gc.expire";
/// Prefix of labels on a blob whose values are digests of blobs that it keeps.
pub const GC_REF_CONTENT: &str = "containerd.io/gc.ref.content";
/// Prefix of labels on a blob whose values are snapshots that it keeps; the snapshotter follows.
pub const GC_REF_SNAPSHOT: &str = "containerd.io/gc.ref.snapshot.";
/// Prefix of labels on a blob that tell where it comes from: the host of a registry follows, without its port, and the
/// value is the repositories there, with commas between.
pub const DISTRIBUTION_SOURCE: &str = "containerd.io/distribution.source.";
/// On a compressed layer: the digest of its uncompressed tar.
pub const UNCOMPRESSED: &str = "containerd.io/uncompressed";

/// A moment, to the second, as containerd's garbage collector reads it.
#[must_use]
pub fn rfc3339(time: SystemTime) -> String {
    let time = Timestamp::from(time);
    Timestamp { nanos: 0, ..time }.to_string()
}

pub(crate) fn owned(labels: &[(&str, &str)]) -> HashMap<String, String> {
    labels
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

/// Names the labels that an update sets; it leaves all others.
pub(crate) fn mask(labels: &HashMap<String, String>) -> FieldMask {
    FieldMask {
        paths: labels.keys().map(|name| format!("labels.{name}")).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn time_is_written_as_the_garbage_collector_reads_it() {
        let time = std::time::UNIX_EPOCH + Duration::from_millis(1_700_000_000_500);
        assert_eq!(rfc3339(time), "2023-11-14T22:13:20Z");
    }
}
