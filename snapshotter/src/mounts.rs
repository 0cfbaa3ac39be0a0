//! From a snapshot's chain to the mount that shows it. Pure: nothing is touched.
//!
//! The cases and the order of the options are those of containerd 2.x's overlayfs snapshotter:
//!
//! ```text
//! no parents, active      bind     rw,rbind  of its own fs
//! no parents, view        bind     ro,rbind  of its own fs
//! one parent, view        bind     ro,rbind  of the parent's fs
//! more parents, view      overlay  lowerdir=<parent>:<grandparent>:...
//! parents, active         overlay  workdir=,upperdir=,lowerdir=
//! ```
//!
//! `uidmap=`/`gidmap=` (from the labels of the snapshot) come first, the configured options last and
//! only on overlays. containerd itself shortens lowerdirs that exceed the page of mount data.

use std::path::{Path, PathBuf};

use crate::error::{Result, SnapshotError};
use crate::labels;
use crate::record::{Kind, Record};

/// A mount for the client to perform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// "bind" or "overlay".
    pub fs_type: &'static str,
    /// The directory to bind, or "overlay".
    pub source: String,
    /// Options in the order in which they are passed to the kernel.
    pub options: Vec<String>,
}

/// Where the directories of snapshots are.
#[derive(Debug, Clone)]
pub struct SnapshotPaths {
    snapshots: PathBuf,
    prefix: String,
}

impl SnapshotPaths {
    /// The paths below `root`.
    ///
    /// # Errors
    /// A root that overlayfs options or gRPC strings cannot carry: not UTF-8, relative, or with one
    /// of the characters `,` `:` `\` that separate options and lowerdirs.
    pub fn below(root: &Path) -> Result<Self> {
        let invalid = |why: &str| SnapshotError::Invalid {
            reason: format!("the root directory {} {why}", root.display()),
        };
        let text = root.to_str().ok_or_else(|| invalid("is not valid UTF-8"))?;
        if !root.is_absolute() {
            return Err(invalid("is not an absolute path"));
        }
        if text.contains([',', ':', '\\']) {
            return Err(invalid(
                "contains one of , : \\ which overlayfs takes for separators",
            ));
        }
        let snapshots = root.join("snapshots");
        let prefix = format!("{}/", snapshots.display());
        Ok(Self { snapshots, prefix })
    }

    /// The directory that holds one directory per snapshot.
    #[must_use]
    pub fn snapshots(&self) -> &Path {
        &self.snapshots
    }

    /// `snapshots/<id>`.
    #[must_use]
    pub fn dir(&self, id: u64) -> PathBuf {
        PathBuf::from(format!("{}{id}", self.prefix))
    }

    /// `snapshots/<id>/fs`: what the snapshot adds to its parents.
    #[must_use]
    pub fn fs(&self, id: u64) -> String {
        format!("{}{id}/fs", self.prefix)
    }

    /// `snapshots/<id>/work`: scratch space of overlayfs.
    #[must_use]
    pub fn work(&self, id: u64) -> String {
        format!("{}{id}/work", self.prefix)
    }

    /// `snapshots/new-<id>`: a directory that is being made.
    #[must_use]
    pub fn new_dir(&self, id: u64) -> PathBuf {
        PathBuf::from(format!("{}new-{id}", self.prefix))
    }

    /// `snapshots/gone-<id>`: a directory that is being deleted.
    #[must_use]
    pub fn gone_dir(&self, id: u64) -> PathBuf {
        PathBuf::from(format!("{}gone-{id}", self.prefix))
    }
}

/// Plans the mount of an active snapshot or view.
///
/// `overlay_options` are the configured ones; `remap_ids` lets the id mapping labels through.
#[must_use]
pub fn plan(
    paths: &SnapshotPaths,
    record: &Record,
    kind: Kind,
    overlay_options: &[String],
    remap_ids: bool,
) -> Mount {
    let mut options = Vec::with_capacity(5 + overlay_options.len());
    if remap_ids {
        for (label, option) in [
            (labels::UID_MAPPING, "uidmap"),
            (labels::GID_MAPPING, "gidmap"),
        ] {
            if let Some(map) = record.labels.get(label) {
                options.push(format!("{option}={map}"));
            }
        }
    }
    let bind = |id: u64, access: &str, mut options: Vec<String>| {
        options.extend([access.to_owned(), "rbind".to_owned()]);
        Mount {
            fs_type: "bind",
            source: paths.fs(id),
            options,
        }
    };
    match (kind, record.ancestors.as_slice()) {
        (Kind::Active, []) => return bind(record.id, "rw", options),
        (Kind::View | Kind::Committed, []) => return bind(record.id, "ro", options),
        (Kind::View | Kind::Committed, [parent]) => return bind(*parent, "ro", options),
        (Kind::View | Kind::Committed, _) => {}
        (Kind::Active, _) => {
            options.push(format!("workdir={}", paths.work(record.id)));
            options.push(format!("upperdir={}", paths.fs(record.id)));
        }
    }
    let mut lowerdir = String::with_capacity(9 + record.ancestors.len() * (paths.prefix.len() + 8));
    lowerdir.push_str("lowerdir=");
    for (n, id) in record.ancestors.iter().enumerate() {
        if n > 0 {
            lowerdir.push(':');
        }
        lowerdir.push_str(&paths.fs(*id));
    }
    options.push(lowerdir);
    options.extend_from_slice(overlay_options);
    Mount {
        fs_type: "overlay",
        source: "overlay".to_owned(),
        options,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: Kind, ancestors: &[u64], labels: &[(&str, &str)]) -> Record {
        Record {
            id: 9,
            kind_number: kind as u32,
            ancestors: ancestors.to_vec(),
            labels: labels
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
            ..Record::default()
        }
    }

    type Case = (
        Kind,
        &'static [u64],
        &'static [(&'static str, &'static str)],
        &'static str,
        &'static str,
        &'static str,
    );

    #[test]
    fn mount_follows_kind_and_chain() {
        let paths = SnapshotPaths::below(Path::new("/r")).unwrap();
        let none: &[(&str, &str)] = &[];
        let maps: &[(&str, &str)] = &[
            (labels::UID_MAPPING, "0:1000:10"),
            (labels::GID_MAPPING, "0:2000:10"),
        ];
        let cases: &[Case] = &[
            (
                Kind::Active,
                &[],
                none,
                "bind",
                "/r/snapshots/9/fs",
                "rw rbind",
            ),
            (
                Kind::View,
                &[],
                none,
                "bind",
                "/r/snapshots/9/fs",
                "ro rbind",
            ),
            (
                Kind::View,
                &[4],
                none,
                "bind",
                "/r/snapshots/4/fs",
                "ro rbind",
            ),
            (
                Kind::View,
                &[4, 2],
                none,
                "overlay",
                "overlay",
                "lowerdir=/r/snapshots/4/fs:/r/snapshots/2/fs volatile index=off",
            ),
            (
                Kind::Active,
                &[4],
                none,
                "overlay",
                "overlay",
                "workdir=/r/snapshots/9/work upperdir=/r/snapshots/9/fs \
                 lowerdir=/r/snapshots/4/fs volatile index=off",
            ),
            (
                Kind::Active,
                &[4, 2, 1],
                maps,
                "overlay",
                "overlay",
                "uidmap=0:1000:10 gidmap=0:2000:10 workdir=/r/snapshots/9/work \
                 upperdir=/r/snapshots/9/fs \
                 lowerdir=/r/snapshots/4/fs:/r/snapshots/2/fs:/r/snapshots/1/fs volatile index=off",
            ),
            (
                Kind::Active,
                &[],
                maps,
                "bind",
                "/r/snapshots/9/fs",
                "uidmap=0:1000:10 gidmap=0:2000:10 rw rbind",
            ),
        ];
        let configured = ["volatile".to_owned(), "index=off".to_owned()];
        for (kind, ancestors, labels, fs_type, source, options) in cases {
            let mount = plan(
                &paths,
                &record(*kind, ancestors, labels),
                *kind,
                &configured,
                true,
            );
            assert_eq!(
                (
                    mount.fs_type,
                    mount.source.as_str(),
                    mount.options.join(" ").as_str()
                ),
                (*fs_type, *source, *options),
                "{kind:?} {ancestors:?}"
            );
        }
    }

    #[test]
    fn id_mapping_labels_need_remap_ids() {
        let paths = SnapshotPaths::below(Path::new("/r")).unwrap();
        let record = record(Kind::Active, &[], &[(labels::UID_MAPPING, "0:1000:10")]);
        assert_eq!(
            plan(&paths, &record, Kind::Active, &[], false).options,
            ["rw", "rbind"]
        );
    }

    #[test]
    fn roots_that_overlayfs_cannot_name_are_refused() {
        for root in [
            "relative/path",
            "/with:colon",
            "/with,comma",
            "/with\\backslash",
        ] {
            assert!(SnapshotPaths::below(Path::new(root)).is_err(), "{root}");
        }
    }
}
