//! The directories that the containers of a pod share: which mounts of a spec they are, and where
//! they are in a checkpoint.
//!
//! ```text
//! /dev/shm   bind mount of <state of containerd>/sandboxes/<sandbox id>/shm, a tmpfs of the sandbox
//! emptyDir   bind mount of <kubelet>/pods/<uid>/volumes/kubernetes.io~empty-dir/<volume>, or of
//!            <kubelet>/pods/<uid>/volume-subpaths/<volume>/<container>/<n> (`subPath`); medium
//!            Memory is a tmpfs that kubelet mounts there
//! ```
//!
//! CRIU takes bind mounts for given: it opens the files in them again by their paths and dumps no
//! content. What is unlinked but open (ghost files) CRIU keeps by itself.

use std::path::{Path, PathBuf};

use transship_checkpoint::manifest::check_name;
use transship_checkpoint::shared_dirs::SharedDir;
use transship_checkpoint::spec::Spec;

const EMPTY_DIR: &str = "kubernetes.io~empty-dir";
const SUB_PATHS: &str = "volume-subpaths";

/// A mount of a container on such a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedMount {
    /// What it is.
    pub dir: SharedDir,
    /// Where it is in the container.
    pub destination: PathBuf,
    /// Where the whole of it is on the node.
    pub source: PathBuf,
    /// Whether the container sees only a part of it.
    pub part: bool,
    /// Whether the container may write to it.
    pub is_writable: bool,
}

impl SharedMount {
    /// Whether it may get the content of a checkpoint, as a directory of the pod `uid`: the container may write to it, or it
    /// is that pod's own. The path of another pod's directory looks the same, and a host path may be one.
    #[must_use]
    pub fn may_be_filled(&self, uid: Option<&str>) -> bool {
        // <kubelet>/pods/<uid>/volumes/kubernetes.io~empty-dir/<volume>
        let of_pod = self.source.ancestors().nth(3);
        let of_pod = of_pod.filter(|it| it.parent().is_some_and(|it| it.ends_with("pods")));
        let of_pod = of_pod.and_then(|it| it.file_name()?.to_str());
        self.is_writable || (of_pod.is_some() && of_pod == uid)
    }
}

/// The shared directories that a container of the sandbox `sandbox` has mounted. What belongs to
/// the node (`/dev/shm` of a pod that shares the node's IPC namespace) is none.
#[must_use]
pub fn shared_mounts(spec: &Spec, sandbox: &str) -> Vec<SharedMount> {
    spec.mounts()
        .filter_map(|(destination, source)| {
            let mount = shared_dir(Path::new(source), sandbox)?;
            Some(SharedMount {
                destination: destination.into(),
                is_writable: !spec.is_read_only(destination),
                ..mount
            })
        })
        .collect()
}

fn shared_dir(source: &Path, sandbox: &str) -> Option<SharedMount> {
    let parts: Vec<&str> = source
        .iter()
        .map(|part| part.to_str())
        .collect::<Option<_>>()?;
    let found = |dir, source: PathBuf, part| {
        let destination = PathBuf::new();
        Some(SharedMount {
            dir,
            destination,
            source,
            part,
            is_writable: false,
        })
    };
    match parts.as_slice() {
        [.., "sandboxes", id, "shm"] if *id == sandbox => {
            found(SharedDir::Shm, source.to_path_buf(), false)
        }
        [.., "volumes", EMPTY_DIR, volume] if check_name("the volume", volume).is_ok() => {
            let dir = SharedDir::EmptyDir((*volume).to_owned());
            found(dir, source.to_path_buf(), false)
        }
        [.., SUB_PATHS, volume, _, _] => {
            let pod = source.ancestors().nth(4)?;
            let whole = pod.join("volumes").join(EMPTY_DIR).join(volume);
            // A subPath may as well be of a volume of another kind.
            whole.is_dir().then(|| SharedMount {
                dir: SharedDir::EmptyDir((*volume).to_owned()),
                destination: PathBuf::new(),
                source: whole,
                part: true,
                is_writable: false,
            })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_mounts_that_a_pod_shares_are_known_by_their_sources() {
        let pod = tempfile::tempdir().unwrap();
        let volume = pod.path().join("volumes/kubernetes.io~empty-dir/work");
        fs::create_dir_all(&volume).unwrap();
        let part = pod.path().join("volume-subpaths/work/app/0");
        let other = pod.path().join("volume-subpaths/config/app/1");
        let spec = format!(
            r#"{{"mounts":[
              {{"destination":"/proc","type":"proc","source":"proc"}},
              {{"destination":"/dev/shm","source":"/run/containerd/x/sandboxes/s1/shm"}},
              {{"destination":"/host","source":"/dev/shm"}},
              {{"destination":"/data","source":"{}"}},
              {{"destination":"/part","source":"{}"}},
              {{"destination":"/conf","source":"{}"}},
              {{"destination":"/token","source":"/p/volumes/kubernetes.io~projected/t"}}]}}"#,
            volume.display(),
            part.display(),
            other.display(),
        );
        let spec_text = spec;
        let spec = Spec::parse(spec_text.as_bytes()).unwrap();
        let mounts = shared_mounts(&spec, "s1");
        let work = SharedDir::EmptyDir("work".to_owned());
        let found: Vec<_> = mounts.iter().map(|it| (&it.dir, it.part)).collect();
        assert_eq!(
            found,
            [(&SharedDir::Shm, false), (&work, false), (&work, true)]
        );
        // As another pod's directory may be mounted.
        let read_only = spec_text.replace("\"}", "\",\"options\":[\"rbind\",\"ro\"]}");
        let read_only = Spec::parse(read_only.as_bytes()).unwrap();
        for mount in shared_mounts(&read_only, "s1") {
            assert!(!mount.may_be_filled(Some("u1")) && !mount.may_be_filled(None));
        }
        assert!(mounts.iter().all(|mount| mount.may_be_filled(None)));
        let own = SharedMount {
            source: "/k/pods/u1/volumes/kubernetes.io~empty-dir/work".into(),
            is_writable: false,
            ..mounts[1].clone()
        };
        assert!(own.may_be_filled(Some("u1")) && !own.may_be_filled(Some("u2")));
        assert_eq!(mounts[1].source, volume);
        assert_eq!(mounts[2].source, volume);
        assert!(
            shared_mounts(&spec, "s2")
                .iter()
                .all(|it| it.dir != SharedDir::Shm)
        );
    }
}
