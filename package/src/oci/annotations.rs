//! By what names engines and tools know a checkpoint: three families of annotations that say the same.
//!
//! ```text
//! org.criu.checkpoint.*                           checkpointctl, containerd, kubelet
//! io.kubernetes.cri-o.annotations.checkpoint.*    CRI-O
//! io.podman.annotations.checkpoint.*              podman
//! ```
//!
//! They are on the artifact alone. An image whose manifest or index has them is taken for a checkpoint of theirs by
//! containerd's CRI (`org.criu.checkpoint.container.name`, 2.0 to 2.3), by CRI-O and by podman, which look for the files
//! of a dump in it and could not start it any more.

use std::collections::BTreeMap;

use transship_checkpoint::manifest::{Container, Manifest};

use crate::times::rfc3339;

const CRIU: &str = "org.criu.checkpoint.";
const CRIO: &str = "io.kubernetes.cri-o.annotations.checkpoint.";
const PODMAN: &str = "io.podman.annotations.checkpoint.";
/// When the files were as they are there; of OCI.
pub(super) const CREATED: &str = "org.opencontainers.image.created";

/// What the family calls a thing; none: it has no name for it.
type Names = [Option<&'static str>; 3];

/// Those of a checkpoint. Of a pod they name all containers, with commas between. `image_ids` are the digests of the
/// configs of their images, as far as they are known.
pub(super) fn annotations_of(
    manifest: &Manifest,
    image_ids: &[String],
) -> BTreeMap<String, String> {
    let (source, pod) = (&manifest.source, manifest.pod.as_ref());
    let of_all = |text: fn(&Container) -> &str| {
        let texts: Vec<_> = manifest.containers.iter().map(text).collect();
        match texts.iter().all(|it| it.is_empty()) {
            true => String::new(),
            false => texts.join(","),
        }
    };
    let or_none = |text: &Option<String>| text.clone().unwrap_or_default();
    let image = of_all(|it| &it.image.name);
    let runtime_version = [&source.runc, &source.crun].into_iter().flatten().next();
    let cgroups = source.cgroups.map(|version| format!("v{version}"));
    let own_version = env!("CARGO_PKG_VERSION").to_owned();
    let table: [(Names, String); 17] = [
        (all("container.name", "name", "name"), of_all(|it| &it.name)),
        (first("engine.name"), "transship".to_owned()),
        (first("engine.version"), own_version),
        (
            first("pod.name"),
            pod.map_or_else(String::new, |it| it.name.clone()),
        ),
        (
            first("pod.namespace"),
            pod.map_or_else(String::new, |it| it.namespace.clone()),
        ),
        (
            first("pod.uid"),
            pod.map_or_else(String::new, |it| it.uid.clone()),
        ),
        (same("rawImageName"), image.clone()),
        (same("rootfsImageName"), image.clone()),
        (first("rootfsImageUserRequested"), image),
        (first("rootfsImageSha"), of_all(|it| &it.image.digest)),
        (same("rootfsImageID"), image_ids.join(",")),
        (of_two("runtime.name"), of_all(|it| &it.runtime)),
        (
            of_two("runtime.version"),
            runtime_version.cloned().unwrap_or_default(),
        ),
        (same("criu.version"), or_none(&source.criu)),
        (of_two("host.arch"), source.architecture.clone()),
        (of_two("host.kernel"), source.kernel.clone()),
        (
            [Some("cgroup.version"), None, Some("cgroups.version")],
            cgroups.unwrap_or_default(),
        ),
    ];
    let mut annotations = BTreeMap::from([(CREATED.to_owned(), rfc3339(manifest.created))]);
    for (names, value) in table {
        if value.is_empty() {
            continue;
        }
        for (family, name) in [CRIU, CRIO, PODMAN].into_iter().zip(names) {
            if let Some(name) = name {
                annotations.insert(format!("{family}{name}"), value.clone());
            }
        }
    }
    annotations
}

fn all(criu: &'static str, crio: &'static str, podman: &'static str) -> Names {
    [Some(criu), Some(crio), Some(podman)]
}

fn same(name: &'static str) -> Names {
    [Some(name); 3]
}

/// Of CRIU and podman.
fn of_two(name: &'static str) -> Names {
    [Some(name), None, Some(name)]
}

/// Of CRIU.
fn first(name: &'static str) -> Names {
    [Some(name), None, None]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::package_tests::checkpoint_of;

    #[test]
    fn each_family_has_the_names() {
        let root = tempfile::tempdir().unwrap();
        let mut manifest = checkpoint_of(root.path(), b"pages").manifest;
        manifest.source.criu = Some("4.2".to_owned());
        manifest.source.cgroups = Some(2);
        manifest.containers[0].image.name = "docker.io/library/web:1".to_owned();
        let annotations = annotations_of(&manifest, &["sha256:1".to_owned()]);
        for (name, value) in [
            ("org.criu.checkpoint.container.name", "c"),
            ("io.kubernetes.cri-o.annotations.checkpoint.name", "c"),
            ("io.podman.annotations.checkpoint.name", "c"),
            ("org.criu.checkpoint.engine.name", "transship"),
            (
                "org.criu.checkpoint.rootfsImageName",
                "docker.io/library/web:1",
            ),
            (
                "io.kubernetes.cri-o.annotations.checkpoint.rawImageName",
                "docker.io/library/web:1",
            ),
            ("io.podman.annotations.checkpoint.criu.version", "4.2"),
            ("io.podman.annotations.checkpoint.rootfsImageID", "sha256:1"),
            ("org.criu.checkpoint.cgroup.version", "v2"),
            ("io.podman.annotations.checkpoint.cgroups.version", "v2"),
            ("org.opencontainers.image.created", "2023-11-14T22:13:20Z"),
        ] {
            assert_eq!(
                annotations.get(name).map(String::as_str),
                Some(value),
                "{name}"
            );
        }
        assert!(!annotations.contains_key("org.criu.checkpoint.pod.name"));
        let second = manifest.containers[0].clone();
        manifest.containers.push(second);
        let annotations = annotations_of(&manifest, &[]);
        assert_eq!(annotations["org.criu.checkpoint.container.name"], "c,c");
    }
}
