//! What podman puts into every container of its own, which no other node has, and what is done about it.
//!
//! ```text
//! /etc/hosts /etc/hostname /etc/resolv.conf /run/.containerenv /run/secrets
//!              bind mounts of <storage>/overlay-containers/<id>/userdata/...   left out: the image's show again
//! /dev/shm     the same, of a tmpfs whose content is in devshm-checkpoint.tar  a tmpfs of the container's own
//! annotations  org.systemd.property.*, io.container.manager, ...               left out
//! root.path, linux.cgroupsPath                                                 this node's
//! /proc/acpi and other masked directories: <crun's own>/.empty-directory       an empty tmpfs, as with runc
//! ```
//!
//! CRIU mounts what its images say, so they are changed with the spec.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use transship_checkpoint::criu_images::mounts::{Fate, change, mounts};
use transship_checkpoint::manifest::IMAGES_DIR;
use transship_path_error::During as _;

use crate::error::PackageError;

/// The member with the content of /dev/shm.
pub(super) const SHM_FILE: &str = "devshm-checkpoint.tar";
/// Longest content of /dev/shm that is read, in bytes.
pub(super) const SHM_LIMIT: u64 = 64 << 20;
const SHM: &str = "/dev/shm";
/// Where podman keeps what it mounts.
const USERDATA: [&str; 2] = ["/overlay-containers/", "/userdata/"];
/// Behind which a runtime hides a file: runc's images have this as its name, crun's the path that is hidden.
const NULL: &str = "/dev/null";
/// crun hides a directory behind this one of its own; runc, behind a tmpfs.
const EMPTY_OF_CRUN: &str = "/.empty-directory";

/// Changes the images in `dir` and the spec; `shm` is the content of /dev/shm.
pub(super) fn make_portable(
    dir: &Path,
    spec: &mut Value,
    shm: Option<&[u8]>,
) -> Result<(), PackageError> {
    let mut removed = BTreeSet::new();
    let mut has_shm = false;
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        mounts.retain_mut(|mount| {
            let source = mount["source"].as_str().unwrap_or_default();
            let destination = mount["destination"].as_str().unwrap_or_default().to_owned();
            if mount["type"] != "bind" || !USERDATA.iter().all(|part| source.contains(part)) {
                return true;
            }
            if destination != SHM {
                removed.insert(destination);
                return false;
            }
            has_shm = true;
            *mount = json!({ "destination": SHM, "type": "tmpfs", "source": "shm",
                             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] });
            true
        });
    }
    let images = dir.join(IMAGES_DIR);
    let mut shm_devices = BTreeSet::new();
    for mount in mounts(&images)?.iter().flatten() {
        if has_shm && mount.destination == SHM {
            shm_devices.insert(mount.device);
        }
    }
    let devices = change(&images, |mount| {
        let key = mount.external.as_deref().unwrap_or_default();
        match mount.destination.as_str() {
            SHM if has_shm => Fate::Tmpfs("mode=1777,size=65536k"),
            destination if removed.contains(destination) => Fate::Removed,
            _ if key.ends_with(EMPTY_OF_CRUN) => Fate::Tmpfs(""),
            destination if key == destination && mount.root == "/null" => {
                Fate::External(NULL.to_owned())
            }
            _ => Fate::Kept,
        }
    })?;
    for device in devices {
        let path = images.join(format!("tmpfs-dev-{device}.tar.gz.img"));
        // A tar without members ends, too.
        let content = shm.filter(|_| shm_devices.contains(&device));
        let content = content.unwrap_or(&[0; 1024]);
        let file = File::create_new(&path).during("make", &path)?;
        let mut packed = GzEncoder::new(file, Compression::default());
        packed.write_all(content).during("write", &path)?;
        packed.finish().during("write", &path)?;
    }
    for (part, value) in [("annotations", json!({})), ("root", root(spec))] {
        spec[part] = value;
    }
    if let Some(linux) = spec["linux"].as_object_mut() {
        linux.remove("cgroupsPath");
    }
    Ok(())
}

fn root(spec: &Value) -> Value {
    match spec["root"]["readonly"].as_bool() {
        Some(true) => json!({ "path": "rootfs", "readonly": true }),
        _ => json!({ "path": "rootfs" }),
    }
}
