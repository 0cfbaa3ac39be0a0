//! Where the directories of a snapshot are.

use std::path::PathBuf;

use containerd_client::types::Mount;

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
