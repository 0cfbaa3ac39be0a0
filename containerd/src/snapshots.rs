//! Snapshots, and where their directories are.

use std::collections::HashMap;
use std::path::PathBuf;

use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, Info, MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
    StatSnapshotRequest, ViewSnapshotRequest,
};
use containerd_client::types::Mount;

use super::{During, Node, NodeError, present};

/// The directories of an overlay snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OverlayDirs {
    /// What the container has written.
    pub upperdir: PathBuf,
    /// The image's layers, nearest first.
    pub lowerdirs: Vec<PathBuf>,
}

impl OverlayDirs {
    /// Reads them out of the mounts that a snapshotter gives for an active snapshot. None: it is
    /// not an overlay.
    pub fn of(mounts: &[Mount]) -> Option<Self> {
        let [mount] = mounts else { return None };
        match mount.r#type.as_str() {
            "overlay" => {
                let option = |name: &str| {
                    mount
                        .options
                        .iter()
                        .find_map(|option| option.strip_prefix(name))
                };
                Some(Self {
                    upperdir: option("upperdir=")?.into(),
                    lowerdirs: option("lowerdir=")?.split(':').map(PathBuf::from).collect(),
                })
            }
            // A snapshot without a parent is bind mounted: all of it is upperdir.
            "bind" => Some(Self {
                upperdir: mount.source.clone().into(),
                lowerdirs: Vec::new(),
            }),
            _ => None,
        }
    }
}

impl Node {
    fn snapshots(&self) -> SnapshotsClient<containerd_client::tonic::transport::Channel> {
        SnapshotsClient::new(self.channel())
    }

    /// The snapshot's record.
    pub async fn snapshot(&self, snapshotter: &str, key: &str) -> Result<Info, NodeError> {
        let act = || format!("read the snapshot {key:?} of {snapshotter}");
        let request = StatSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: key.to_owned(),
        };
        let answer = self
            .snapshots()
            .stat(self.request(request))
            .await
            .during(act)?;
        present(answer.into_inner().info, "info", act)
    }

    /// The mounts of an active snapshot.
    pub async fn mounts(&self, snapshotter: &str, key: &str) -> Result<Vec<Mount>, NodeError> {
        let request = MountsRequest {
            snapshotter: snapshotter.to_owned(),
            key: key.to_owned(),
        };
        let answer = self
            .snapshots()
            .mounts(self.request(request))
            .await
            .during(|| format!("get the mounts of {key:?} from {snapshotter}"))?;
        Ok(answer.into_inner().mounts)
    }

    /// Makes an active snapshot.
    pub async fn prepare(
        &self,
        snapshotter: &str,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<Vec<Mount>, NodeError> {
        let request = PrepareSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels,
        };
        let answer = self
            .snapshots()
            .prepare(self.request(request))
            .await
            .during(|| format!("prepare the snapshot {key:?} of {snapshotter}"))?;
        Ok(answer.into_inner().mounts)
    }

    /// Makes a view of a committed snapshot.
    pub async fn view(
        &self,
        snapshotter: &str,
        key: &str,
        parent: &str,
    ) -> Result<Vec<Mount>, NodeError> {
        let request = ViewSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: HashMap::new(),
        };
        let answer = self
            .snapshots()
            .view(self.request(request))
            .await
            .during(|| format!("view the snapshot {parent:?} of {snapshotter}"))?;
        Ok(answer.into_inner().mounts)
    }

    /// Turns an active snapshot into a committed one.
    pub async fn commit(&self, snapshotter: &str, name: &str, key: &str) -> Result<(), NodeError> {
        let request = CommitSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            name: name.to_owned(),
            key: key.to_owned(),
            ..CommitSnapshotRequest::default()
        };
        self.snapshots()
            .commit(self.request(request))
            .await
            .during(|| format!("commit the snapshot {name:?} of {snapshotter}"))?;
        Ok(())
    }

    /// Removes a snapshot; one that does not exist is fine.
    pub async fn remove_snapshot(&self, snapshotter: &str, key: &str) -> Result<(), NodeError> {
        let request = RemoveSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: key.to_owned(),
        };
        match self
            .snapshots()
            .remove(self.request(request))
            .await
            .during(|| format!("remove the snapshot {key:?} of {snapshotter}"))
        {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            r#type: kind.into(),
            source: source.into(),
            target: String::new(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        }
    }

    #[test]
    fn directories_come_from_the_options() {
        let overlay = mount(
            "overlay",
            "overlay",
            &["index=off", "workdir=/w", "upperdir=/u", "lowerdir=/b:/a"],
        );
        assert_eq!(
            OverlayDirs::of(&[overlay]),
            Some(OverlayDirs {
                upperdir: "/u".into(),
                lowerdirs: vec!["/b".into(), "/a".into()]
            })
        );
        let bind = mount("bind", "/snapshots/1/fs", &["rbind", "rw"]);
        assert_eq!(
            OverlayDirs::of(&[bind]).unwrap().upperdir,
            PathBuf::from("/snapshots/1/fs")
        );
        assert_eq!(OverlayDirs::of(&[mount("ext4", "/dev/loop0", &[])]), None);
        assert_eq!(
            OverlayDirs::of(&[mount("overlay", "overlay", &["lowerdir=/b:/a"])]),
            None
        );
    }
}
