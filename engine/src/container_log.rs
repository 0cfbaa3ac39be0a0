//! Where the log of a container is.
//!
//! ```text
//!  of the CRI        LogPath in the metadata of its CRI plugin
//!  of others         stdout file:///PATH
//! ```

use std::path::PathBuf;

use containerd_client::services::v1::Container as Record;
use serde::Deserialize;

/// The extension of a container's record in which the CRI plugin keeps what it knows (containerd 1.6 to 2.x).
const CRI_METADATA: &str = "io.cri-containerd.container.metadata";
/// Output of a task that goes to a file.
const FILE_URI: &str = "file://";

/// The log file of a container with this record and this stdout.
pub fn path(record: &Record, stdout: &str) -> Option<PathBuf> {
    #[derive(Deserialize)]
    struct Versioned {
        #[serde(rename = "Metadata")]
        metadata: Metadata,
    }
    #[derive(Deserialize)]
    struct Metadata {
        #[serde(rename = "LogPath", default)]
        log_path: PathBuf,
    }
    let of_cri = record.extensions.get(CRI_METADATA).and_then(|any| {
        let versioned: Versioned = serde_json::from_slice(&any.value).ok()?;
        Some(versioned.metadata.log_path)
    });
    let of_file = || path_of_uri(stdout);
    of_cri.or_else(of_file).filter(|path| path.is_absolute())
}

/// The path in a URI of a file; what containerd adds after `?` is for its logger.
pub(crate) fn path_of_uri(uri: &str) -> Option<PathBuf> {
    let path = uri.strip_prefix(FILE_URI)?;
    let path = path.split('?').next()?;
    (path != "/dev/null").then(|| path.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_the_log_is() {
        let mut record = Record::default();
        assert_eq!(path(&record, "binary:///bin/logger"), None);
        assert_eq!(path(&record, "file:///dev/null"), None);
        assert_eq!(path(&record, "file:///l?x=y"), Some("/l".into()));
        let json = br#"{"Version":"v1","Metadata":{"ID":"x","LogPath":"/var/log/pods/p/c/0.log"}}"#;
        let of_cri = record.extensions.entry(CRI_METADATA.into()).or_default();
        of_cri.value = json.to_vec();
        assert_eq!(path(&record, ""), Some("/var/log/pods/p/c/0.log".into()));
    }
}
