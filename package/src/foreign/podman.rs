//! What podman puts into every container of its own, which no other node has, and what becomes of it.
//!
//! ```text
//! /etc/hosts /etc/hostname /etc/resolv.conf /run/.containerenv /run/secrets
//!              bind mounts of <storage>/overlay-containers/<id>/userdata/...   left out: the image's show again
//! /dev/shm     the same, of a tmpfs whose content is in devshm-checkpoint.tar  a tmpfs of the container's own
//! annotations  org.systemd.property.*, io.container.manager, ...               left out
//! root.path, linux.cgroupsPath                                                 this node's
//! ```
//!
//! CRIU mounts what its images say, so they are changed with the spec.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use serde_json::{Value, json};
use transship_checkpoint::criu_images::mounts::{NewTmpfs, make_own, mounts};
use transship_checkpoint::manifest::{IMAGES_DIR, RuntimeOptions};
use transship_path_error::During as _;

use crate::error::PackageError;

/// The member with the content of /dev/shm.
pub(super) const SHM_FILE: &str = "devshm-checkpoint.tar";
/// Longest content of /dev/shm that is read, in bytes.
pub(super) const SHM_LIMIT: u64 = 64 << 20;
const SHM: &str = "/dev/shm";
/// Where podman keeps what it mounts.
const USERDATA: [&str; 2] = ["/overlay-containers/", "/userdata/"];
/// crun hides a directory behind this one.
const EMPTY_OF_CRUN: &str = "/.empty-directory";

/// Changes the images in `dir` and the spec; `shm` is the content of /dev/shm.
pub(super) fn make_portable(
    dir: &Path,
    spec: &mut Value,
    shm: Option<&[u8]>,
) -> Result<Option<RuntimeOptions>, PackageError> {
    let is_podmans = |mount: &Value| {
        let source = mount["source"].as_str().unwrap_or_default();
        mount["type"] == "bind" && USERDATA.iter().all(|part| source.contains(part))
    };
    let mut removed = Vec::new();
    let mut has_shm = false;
    for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
        let Some(destination) = mount["destination"].as_str().filter(|_| is_podmans(mount)) else {
            continue;
        };
        if destination == SHM {
            has_shm = true;
            *mount = json!({ "destination": SHM, "type": "tmpfs", "source": "shm",
                             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] });
        } else {
            removed.push(destination.to_owned());
        }
    }
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        mounts.retain(|it| {
            !it["destination"]
                .as_str()
                .is_some_and(|it| removed.iter().any(|gone| gone == it))
        });
    }
    let images = dir.join(IMAGES_DIR);
    let tmpfs = NewTmpfs {
        destination: if has_shm { SHM } else { "" },
        source: "shm",
        options: "mode=1777,size=65536k",
    };
    let device = make_own(&images, &removed, tmpfs)?;
    if let Some(device) = device {
        let path = images.join(format!("tmpfs-dev-{device}.tar.gz.img"));
        let file = File::create_new(&path).during("make", &path)?;
        let mut packed = flate2::write::GzEncoder::new(file, flate2::Compression::default());
        // A tar without members ends, too.
        let content = shm.unwrap_or(&[0; 1024]);
        packed.write_all(content).during("write", &path)?;
        packed.finish().during("write", &path)?;
    }
    for (part, value) in [("annotations", json!({})), ("root", root(spec))] {
        spec[part] = value;
    }
    if let Some(linux) = spec["linux"].as_object_mut() {
        linux.remove("cgroupsPath");
    }
    let all = mounts(&images)?;
    let of_crun = { all.iter().flatten() }.any(|it| {
        it.external
            .as_ref()
            .is_some_and(|key| key.ends_with(EMPTY_OF_CRUN))
    });
    Ok(of_crun.then(|| RuntimeOptions {
        binary_name: "crun".to_owned(),
        ..RuntimeOptions::default()
    }))
}

fn root(spec: &Value) -> Value {
    match spec["root"]["readonly"].as_bool() {
        Some(true) => json!({ "path": "rootfs", "readonly": true }),
        _ => json!({ "path": "rootfs" }),
    }
}
