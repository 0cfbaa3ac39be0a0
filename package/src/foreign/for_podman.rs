//! What podman wants of a container that it restores, and containerd's has not.
//!
//! ```text
//! config.dump        podman's ContainerConfig: id, image by the digest of its config, no network of podman's own
//! mountpoints-*.img  files that are hidden: crun, podman's runtime on Debian, has their paths as names, runc /dev/null
//! files.img          the root: podman's has no rights to write, and CRIU compares them
//! ```
//!
//! Seen with podman 5.8.6, crun 1.28 and CRIU 4.2.1.

use std::collections::BTreeMap;
use std::fs;

use serde_json::{Value, json};
use transship_checkpoint::criu_images::mounts::{Fate, change};
use transship_checkpoint::criu_images::regular_files::set_mode;
use transship_checkpoint::manifest::{Container, IMAGES_DIR};
use transship_checkpoint::store::Checkpoint;
use transship_digest::sha256_hex;
use transship_path_error::During as _;

use crate::error::PackageError;
use crate::times::rfc3339;

/// A directory that can be read and entered, as podman makes the root of a container.
const ROOT_MODE: u32 = 0o040_555;
const NULL: &str = "/dev/null";

/// Why a container cannot go to podman.
pub(super) enum NotForPodman {
    Refused(String),
    Failed(PackageError),
}

impl<E: Into<PackageError>> From<E> for NotForPodman {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// A container on its way to podman.
pub(super) struct ForPodman<'a> {
    container: &'a Container,
    created: u64,
    image: &'a str,
    /// Images of CRIU that are changed, by their path.
    images: BTreeMap<String, Vec<u8>>,
}

impl<'a> ForPodman<'a> {
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        container: &'a Container,
        image_config: &'a str,
    ) -> Result<Self, NotForPodman> {
        if !container.joined.is_empty() {
            let shared = container.joined.join(", ");
            let reason = format!("it shares namespaces with a sandbox ({shared})");
            return Err(NotForPodman::Refused(reason));
        }
        // What is changed is changed in a copy.
        let copies = tempfile::tempdir_in(&checkpoint.dir).during("make", &checkpoint.dir)?;
        let from = checkpoint.container_dir(container).join(IMAGES_DIR);
        let mut names = Vec::new();
        for file in &container.files {
            let name = file.path.strip_prefix("checkpoint/").unwrap_or_default();
            if name == "files.img" || name.starts_with("mountpoints-") {
                fs::copy(from.join(name), copies.path().join(name))
                    .during("copy", from.join(name))?;
                names.push(name);
            }
        }
        change(copies.path(), |mount| match mount.external.as_deref() {
            Some(NULL) => Fate::External(mount.destination.clone()),
            _ => Fate::Kept,
        })?;
        set_mode(copies.path(), "/", ROOT_MODE)?;
        let mut images = BTreeMap::new();
        for name in names {
            let path = copies.path().join(name);
            let bytes = fs::read(&path).during("read", &path)?;
            images.insert(format!("{IMAGES_DIR}/{name}"), bytes);
        }
        Ok(Self {
            container,
            created: checkpoint.manifest.created,
            image: image_config.trim_start_matches("sha256:"),
            images,
        })
    }

    /// The image at `path` of the archive, when it is changed.
    pub(super) fn image(&self, path: &str) -> Option<&[u8]> {
        self.images.get(path).map(Vec::as_slice)
    }

    /// Podman's configuration; it makes what is not said.
    pub(super) fn config(&self, spec: &Value) -> Value {
        let id = &self.container.id;
        let is_hex = id.len() == 64 && id.bytes().all(|it| it.is_ascii_hexdigit());
        let id = match is_hex {
            true => id.clone(),
            // podman's ids are such; this one is always the same.
            false => sha256_hex(format!("{id} {}", self.created)),
        };
        json!({
            "id": id,
            "name": self.container.name,
            "rootfsImageID": self.image,
            "rootfsImageName": self.container.image.name,
            "RawImageName": self.container.image.name,
            "idMappingsOptions": { "HostUIDMapping": true, "HostGIDMapping": true },
            "noShm": true,
            "createNetNS": false,
            "command": spec["process"]["args"],
            "stopSignal": 15,
            "stopTimeout": 10,
            "createdTime": rfc3339(self.created),
            "cgroupManager": "cgroupfs",
            "cgroupsMode": "enabled",
            "cgroupParent": "/libpod_parent",
            "logDriver": "k8s-file",
            "runtime": "crun",
            "umask": "0022",
        })
    }
}
