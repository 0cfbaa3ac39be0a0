//! Which Commits wait until what they commit is on the disk.

use serde::Deserialize;

/// How containerd's clients begin the key of a snapshot that a layer of an image is unpacked into
/// (`snapshots.UnpackKeyPrefix`).
const UNPACK_KEY_PREFIX: &str = "extract-";

/// Before which answers the file system is synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(from = "Value")]
pub enum DurableCommit {
    /// That of each Commit.
    Always,
    /// That of a Commit of a layer that was unpacked. Measured (bench/src/layers/durable.rs), it costs an import as
    /// much as one sync of it in the end, which no Commit could make: none knows that it is the last, and what one
    /// image has last may lie in the middle of another.
    #[default]
    Images,
    /// None.
    Never,
}

/// As it is written.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected \"images\", true or false")]
enum Value {
    Of(Part),
    All(bool),
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Part {
    Images,
}

impl From<Value> for DurableCommit {
    fn from(value: Value) -> Self {
        match value {
            Value::Of(Part::Images) => Self::Images,
            Value::All(true) => Self::Always,
            Value::All(false) => Self::Never,
        }
    }
}

impl DurableCommit {
    /// Whether the Commit of the active snapshot `key` waits. Of containerd's keys
    /// (`<namespace>/<number>/<key of the client>`) the last part counts.
    #[must_use]
    pub fn covers(self, key: &str) -> bool {
        match self {
            Self::Always => true,
            Self::Images => {
                let of_client = key.rsplit('/').next().unwrap_or(key);
                of_client.starts_with(UNPACK_KEY_PREFIX)
            }
            Self::Never => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_of_images_are_told_by_their_keys() {
        let unpack = "default/17/extract-372045678-_x-9 sha256:0a1b";
        for (key, covered) in [
            (unpack, true),
            ("extract-1-abcd sha256:00", true),
            ("default/18/web", false),
            ("default/19/my-extract-1", false),
            ("extract-1/20/web", false),
        ] {
            assert_eq!(DurableCommit::Images.covers(key), covered, "{key}");
            assert!(DurableCommit::Always.covers(key) && !DurableCommit::Never.covers(key));
        }
    }
}
