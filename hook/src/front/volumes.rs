//! The volumes of the new pod: CRIU knows the mounts and files of the old one.
//!
//! ```text
//!  ConfigMap, Secret, projected, downward API (kubelet's AtomicWriter), CSI drivers that write as it does:
//!    <volume>/..data -> ..2026_01_02          key -> ..data/key
//!             ..2026_01_02/key                the images have this path, open or watched; each pod has another date
//!  a file that kubelet or containerd writes for each pod (etc-hosts, the termination log, a subPath of a ConfigMap):
//!    the same path, another length
//!  a volume that the old pod had not:         is added to the mount table of the images
//! ```

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use transship_checkpoint::criu_images::mounts::{self, NewMount};
use transship_checkpoint::criu_images::regular_files::{FoundFile, find_again};
use transship_checkpoint::criu_images::watches::find_watched_again;
use transship_checkpoint::spec::Spec;
use transship_sandbox::Request;
use transship_sandbox::admission::{Allowance, resolve_within};

use super::admission::root;
use super::bundle::{Bundle, Config};
use super::{FitError, Front, FrontError};

/// The link to the current content of a volume.
const CURRENT: &str = "..data";
const ATOMIC: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];
/// Of its volumes those have [`CURRENT`] whose driver keeps secrets and certificates.
const CSI: &str = "kubernetes.io~csi";

/// A bind mount of the new container.
struct Bind {
    destination: PathBuf,
    source: PathBuf,
}

impl Front<'_> {
    /// Makes the images in `dir` fit the volumes of the new container; `old` is the spec of the dump.
    ///
    /// # Errors
    /// The new pod lacks a file that is open, or has a volume of another kind.
    pub(super) fn fit_volumes(
        dir: &Path,
        config: &Config,
        bundle: &Bundle,
        old: &Spec,
        request: &Request,
    ) -> Result<(), FrontError> {
        let rootfs = root(&config.spec, bundle);
        let resolve = |path: &Path| resolve_within(&rootfs, path);
        let binds: Vec<Bind> = { config.spec.bind_mounts().into_iter() }
            .map(|(destination, source)| Bind {
                destination: resolve(&destination),
                source,
            })
            .collect();
        let error = |what: &str, path: &Path| {
            FrontError::from(FitError::Volume {
                checkpoint: request.checkpoint.clone(),
                container: request.container.clone(),
                path: path.to_path_buf(),
                what: what.to_owned(),
            })
        };
        for bind in &binds {
            let there = bind.destination.strip_prefix("/").map(|it| rootfs.join(it));
            let kinds =
                there.map(|there| (fs::symlink_metadata(there), fs::metadata(&bind.source)));
            if let Ok((Ok(there), Ok(source))) = kinds
                && there.is_dir() != source.is_dir()
            {
                let what =
                    "has a directory mounted where the new pod has a file, or the other way round";
                return Err(error(what, &bind.destination));
            }
        }
        find_again(dir, |name| match find_in_volumes(name, &binds) {
            Some(None) => Err(error(
                "has a file open that the new pod's volume lacks",
                Path::new(name),
            )),
            found => Ok(found.flatten()),
        })?;
        find_watched_again(dir, |name| match find_in_volumes(name, &binds) {
            Some(None) => Err(error(
                "watches a file that the new pod's volume lacks",
                Path::new(name),
            )),
            found => Ok(found.flatten().map(|file| file.name)),
        })?;
        let before = old.mount_destinations();
        let new: Vec<NewMount> = { Allowance::of(&config.spec, &resolve).mounts.into_iter() }
            .filter(|mount| mount.kind == "bind" && !before.contains(&mount.name))
            .map(|mount| NewMount {
                key: mount.name.to_string_lossy().into_owned(),
                destination: mount.destination.to_string_lossy().into_owned(),
                flags: mount.flags,
            })
            .collect();
        if !new.is_empty() {
            mounts::add(dir, &new)?;
        }
        Ok(())
    }
}

/// What a file is in the new pod: `None` if nothing is known of it, `Some(None)` if it is not there.
fn find_in_volumes(name: &str, binds: &[Bind]) -> Option<Option<FoundFile>> {
    let path = Path::new(name);
    let holds = |bind: &&Bind| path.starts_with(&bind.destination);
    let bind =
        { binds.iter().filter(holds) }.max_by_key(|it| it.destination.components().count())?;
    let below = path.strip_prefix(&bind.destination).ok()?;
    if below.as_os_str().is_empty() {
        let is_file = fs::metadata(&bind.source).is_ok_and(|meta| meta.is_file());
        return (is_file && is_of_pod(&bind.source)).then(|| found(name, &bind.source));
    }
    let mut parts = below.components();
    let Some(Component::Normal(version)) = parts.next().filter(|_| is_atomic(&bind.source)) else {
        return None;
    };
    let rest = parts.as_path();
    let plain = rest
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if !is_version(version) || !plain || bind.source.join(version).is_dir() {
        return None;
    }
    let current = fs::read_link(bind.source.join(CURRENT)).ok();
    let Some(current) = current.filter(|current| is_version(current.as_os_str())) else {
        return Some(None);
    };
    let below = match rest.as_os_str().is_empty() {
        true => current,
        false => current.join(rest),
    };
    let new = bind.destination.join(&below);
    Some(
        new.to_str()
            .and_then(|new| found(new, &bind.source.join(&below))),
    )
}

fn found(name: &str, source: &Path) -> Option<FoundFile> {
    let meta = fs::symlink_metadata(source).ok()?;
    (meta.is_file() || meta.is_dir()).then(|| FoundFile {
        name: name.to_owned(),
        size: meta.len(),
        mode: meta.mode(),
    })
}

/// `..2026_01_02_03_04_05.123456789`
fn is_version(name: &OsStr) -> bool {
    let name = name.as_bytes();
    name.len() > 2 && name.starts_with(b"..") && name != CURRENT.as_bytes() && !name.contains(&b'/')
}

/// Whether kubelet, or a CSI driver, replaces the content of the volume in one step.
fn is_atomic(source: &Path) -> bool {
    let parts: Option<Vec<&str>> = source.iter().map(OsStr::to_str).collect();
    match parts.as_deref() {
        Some([.., "volumes", kind, _]) => ATOMIC.contains(kind),
        Some([.., "volumes", CSI, _, "mount"]) => true,
        _ => false,
    }
}

/// Whether kubelet or containerd has written the file for this pod. A file of the node, or of a volume that
/// outlives its pods, is the one that was open.
fn is_of_pod(source: &Path) -> bool {
    let Some(parts) = { source.iter() }
        .map(OsStr::to_str)
        .collect::<Option<Vec<_>>>()
    else {
        return false;
    };
    match parts.as_slice() {
        // The last one is what /dev/termination-log is, by the name of the container.
        [.., "pods", _, "etc-hosts"]
        | [.., "pods", _, "containers", _, _]
        | [.., "sandboxes", _, "hostname" | "hosts" | "resolv.conf"] => true,
        [.., "pods", _, "volume-subpaths", volume, _, _] => {
            let pod = source.ancestors().nth(4).map(|pod| pod.join("volumes"));
            pod.is_some_and(|all| {
                ATOMIC
                    .iter()
                    .any(|kind| all.join(kind).join(volume).is_dir())
            })
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_file_of_a_volume_is_found_under_the_new_date() {
        let root = tempfile::tempdir().unwrap();
        let pod = root.path().join("pods/u");
        let volume = pod.join("volumes/kubernetes.io~configmap/cfg");
        fs::create_dir_all(volume.join("..2026/sub")).unwrap();
        fs::write(volume.join("..2026/sub/key"), "longer").unwrap();
        symlink("..2026", volume.join(CURRENT)).unwrap();
        fs::write(pod.join("etc-hosts"), "hosts").unwrap();
        let (log, secrets) = (
            pod.join("containers/app/1a2b"),
            pod.join("volumes/kubernetes.io~csi/store/mount"),
        );
        for dir in [log.parent().unwrap(), &secrets.join("..7")] {
            fs::create_dir_all(dir).unwrap();
        }
        fs::write(&log, "up").unwrap();
        fs::write(secrets.join("..7/tls.crt"), "cert").unwrap();
        symlink("..7", secrets.join(CURRENT)).unwrap();
        let part = pod.join("volume-subpaths/cfg/app/0");
        fs::create_dir_all(part.parent().unwrap()).unwrap();
        fs::write(&part, "part").unwrap();
        let other = root.path().join("data");
        fs::create_dir_all(&other).unwrap();
        fs::write(other.join("file"), "of the node").unwrap();
        let bind = |destination: &str, source: &Path| Bind {
            destination: destination.into(),
            source: source.to_path_buf(),
        };
        let binds = [
            bind("/etc/cfg", &volume),
            bind("/etc/hosts", &pod.join("etc-hosts")),
            bind("/etc/part", &part),
            bind("/dev/termination-log", &log),
            bind("/certs", &secrets),
            bind("/data", &other),
            bind("/one", &other.join("file")),
        ];
        let find = |name: &str| {
            find_in_volumes(name, &binds).map(|it| it.map(|file| (file.name, file.size)))
        };
        let key = Some(Some(("/etc/cfg/..2026/sub/key".to_owned(), 6)));
        assert_eq!(find("/etc/cfg/..2025/sub/key"), key);
        assert_eq!(find("/etc/hosts"), Some(Some(("/etc/hosts".to_owned(), 5))));
        assert_eq!(find("/etc/part"), Some(Some(("/etc/part".to_owned(), 4))));
        let log = Some(Some(("/dev/termination-log".to_owned(), 2)));
        assert_eq!(find("/dev/termination-log"), log);
        let certificate = Some(Some(("/certs/..7/tls.crt".to_owned(), 4)));
        assert_eq!(find("/certs/..6/tls.crt"), certificate);
        assert_eq!(find("/etc/cfg/..2025/gone"), Some(None));
        for untouched in [
            "/etc/cfg/..2026/sub/key",
            "/etc/cfg/..2025/../../../../etc/shadow",
            "/etc/cfg/other",
            "/data/..2025/key",
            "/one",
            "/bin/sh",
        ] {
            assert_eq!(find(untouched), None, "{untouched}");
        }
        let dir = find("/etc/cfg/..2025").flatten().unwrap().0;
        assert_eq!(dir, "/etc/cfg/..2026");
    }
}
