//! A container of a checkpoint as the archive of another engine: a plain tar, because containerd reads no
//! other. `rootfs-diff.tar` goes in as it lies there.
//!
//! ```text
//!                     containerd  CRI-O  podman
//! checkpoint/ ...     x           x      x   podman: with the names that crun has for mounts; for_podman.rs
//! stats-dump dump.log x           x      x
//! config.dump         x           x          rootfsImageRef: NAME@DIGEST
//!                                        x   podman's own configuration of a container; for_podman.rs
//! spec.dump           x           x      x   with the annotations by which each knows its own
//! status.dump status  x                      what containerd and checkpointctl read of the container
//! rootfs-diff.tar     x           x      x   CRI-O and podman take `.wh.` names for files ...
//! deleted.files                   x      x   ... so they are listed there, and what they delete
//! bind.mounts                     x          mounts that are made before the restore
//! network.status                         x   null
//! ```

use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};
use transship_checkpoint::beneath::{Links, open_regular, read_regular};
use transship_checkpoint::cri_names::{annotations, labels};
use transship_checkpoint::manifest::{
    Container, DUMP_LOG_FILE, DUMP_STATS_FILE, IMAGES_DIR, ROOTFS_DIFF_FILE, SPEC_FILE,
};
use transship_checkpoint::store::Checkpoint;
use transship_path_error::During as _;

use super::for_podman::{ForPodman, NotForPodman};
use super::{Engine, JSON_LIMIT};
use crate::error::PackageError;
use crate::layer_changes::{Change, Digests, LayerChanges, layer_changes};
use crate::tar_members::TarMembers;
use crate::times::rfc3339;

/// Writes the container `container` (of a checkpoint of one: that) for `engine`, and gives `out` back. podman knows an
/// image by the digest of its config: `image_config`.
///
/// # Errors
/// The format cannot say what the checkpoint has, a file is damaged, or `out` cannot be written.
pub fn write<W: Write>(
    checkpoint: &Checkpoint,
    container: Option<&str>,
    engine: Engine,
    image_config: Option<&str>,
    out: W,
    progress: &mut dyn FnMut(u64),
) -> Result<W, PackageError> {
    let manifest = &checkpoint.manifest;
    let container = manifest.container(container)?;
    let refused = |reason: &str| PackageError::Format {
        name: manifest.name.clone(),
        format: engine.name(),
        reason: reason.to_owned(),
    };
    let podman = match (engine, image_config) {
        (Engine::Podman, Some(config)) => Some(
            ForPodman::new(checkpoint, container, config).map_err(|error| match error {
                NotForPodman::Refused(reason) => refused(&reason),
                NotForPodman::Failed(error) => error,
            })?,
        ),
        (Engine::Podman, None) => return Err(refused("nobody knows the config of its image")),
        _ => None,
    };
    let dir = checkpoint.container_dir(container);
    let read = |path: &str| {
        let json = read_regular(&dir, Path::new(path), Links::Refused, JSON_LIMIT);
        json.during("read", dir.join(path))
    };
    let mut spec: Value = super::dump_files::parse(SPEC_FILE, &read(SPEC_FILE)?)?;
    annotate(&mut spec, checkpoint, container, engine);
    let path = dir.join(ROOTFS_DIFF_FILE);
    let layer = open_regular(&dir, Path::new(ROOTFS_DIFF_FILE), Links::Refused);
    let layer = layer.during("open", &path)?;
    let changes = layer_changes(layer, Digests::LeftOut).map_err(|source| PackageError::Layer {
        container: container.name.clone(),
        source,
    })?;
    let deleted = match engine {
        Engine::Crio | Engine::Podman => {
            deleted_files(&changes).map_err(|reason| refused(&reason))?
        }
        Engine::Containerd => Vec::new(),
    };
    let mut members = TarMembers::new(out, manifest.created, progress);
    members.directory(IMAGES_DIR)?;
    let taken = |path: &str| {
        let own = [DUMP_STATS_FILE, DUMP_LOG_FILE, ROOTFS_DIFF_FILE];
        path.starts_with("checkpoint/") || own.contains(&path)
    };
    for file in container.files.iter().filter(|file| taken(&file.path)) {
        match podman.as_ref().and_then(|it| it.image(&file.path)) {
            Some(changed) => members.bytes(&file.path, changed)?,
            None => members.file(&file.path, &dir, file)?,
        }
    }
    let config = match &podman {
        Some(podman) => podman.config(&spec),
        None => config_dump(checkpoint, container),
    };
    members.json("config.dump", &config)?;
    members.json(SPEC_FILE, &spec)?;
    if !deleted.is_empty() {
        members.json("deleted.files", &json!(deleted))?;
    }
    match engine {
        Engine::Crio => {
            members.json("bind.mounts", &bind_mounts(&spec))?;
        }
        Engine::Podman => members.json("network.status", &Value::Null)?,
        Engine::Containerd => {
            members.json("status.dump", &status_dump(checkpoint, container))?;
            members.json("status", &status(checkpoint))?;
        }
    }
    members.finish()
}

/// A reference by digest: the name, without its tag, and the digest.
fn by_digest(container: &Container) -> String {
    let image = &container.image;
    let name = match image.name.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => repository,
        _ => &image.name,
    };
    match (image.name.contains('@'), image.digest.as_str()) {
        (true, _) | (_, "") => image.name.clone(),
        (false, digest) => format!("{name}@{digest}"),
    }
}

fn config_dump(checkpoint: &Checkpoint, container: &Container) -> Value {
    let taken = rfc3339(checkpoint.manifest.created);
    json!({
        "id": container.id,
        "name": container.name,
        "rootfsImage": container.image.name,
        "rootfsImageRef": by_digest(container),
        "rootfsImageName": container.image.name,
        "runtime": container.runtime,
        "createdTime": taken,
        "checkpointedTime": taken,
        "restoredTime": "0001-01-01T00:00:00Z",
        "restored": false,
    })
}

/// The CRI's ContainerStatus, as Go writes it: numbers of enums, nanoseconds since 1970.
fn status_dump(checkpoint: &Checkpoint, container: &Container) -> Value {
    let created = checkpoint.manifest.created.saturating_mul(1_000_000_000);
    json!({
        "id": container.id,
        "metadata": { "name": container.name },
        // CONTAINER_RUNNING
        "state": 1,
        "created_at": created,
        "started_at": created,
        "image": { "image": container.image.name, "user_specified_image": container.image.name },
        "image_ref": by_digest(container),
        "labels": container.labels,
        "annotations": {},
    })
}

/// containerd's own record of a container's state, which its restore lays down again.
fn status(checkpoint: &Checkpoint) -> Value {
    let created = checkpoint.manifest.created.saturating_mul(1_000_000_000);
    json!({
        "Version": "v1", "Pid": 0, "CreatedAt": created, "StartedAt": 0, "FinishedAt": 0,
        "ExitCode": 0, "Reason": "", "Message": "",
    })
}

fn annotate(spec: &mut Value, checkpoint: &Checkpoint, container: &Container, engine: Engine) {
    let mut set = |name: &str, value: String| {
        if spec["annotations"].is_null() {
            spec["annotations"] = json!({});
        }
        spec["annotations"][name] = json!(value);
    };
    let pod = checkpoint.manifest.pod.clone().unwrap_or_default();
    match engine {
        Engine::Crio => {
            set("io.container.manager", "cri-o".to_owned());
            set(labels::CONTAINER_NAME, container.name.clone());
            set(labels::POD_NAME, pod.name);
            set(labels::POD_NAMESPACE, pod.namespace);
            set(labels::POD_UID, pod.uid);
            let metadata = json!({"name": container.name, "attempt": 0});
            set("io.kubernetes.cri-o.Metadata", metadata.to_string());
            set(
                "io.kubernetes.cri-o.Created",
                rfc3339(checkpoint.manifest.created),
            );
            // A restore fails without them.
            set("io.kubernetes.cri-o.Annotations", "{}".to_owned());
            set(
                "io.kubernetes.cri-o.Labels",
                json!(container.labels).to_string(),
            );
        }
        Engine::Podman => set("io.container.manager", "libpod".to_owned()),
        Engine::Containerd => {
            set(annotations::CONTAINER_NAME, container.name.clone());
            set(annotations::SANDBOX_NAME, pod.name);
            set(annotations::SANDBOX_NAMESPACE, pod.namespace);
        }
    }
}

/// What must be bound into the container before CRIU is called.
fn bind_mounts(spec: &Value) -> Value {
    let mounts = spec["mounts"].as_array().into_iter().flatten();
    let binds = mounts.filter(|it| it["type"] == "bind");
    let binds = binds.map(|it| {
        json!({
            "source": it["source"], "destination": it["destination"],
            "file_type": "directory", "permissions": 0o755,
        })
    });
    binds.collect()
}

/// The names of all whiteouts, which would be left as files, and what they delete.
fn deleted_files(changes: &LayerChanges) -> Result<Vec<String>, String> {
    let listed = changes.changes.len() as u64;
    if listed < changes.count {
        return Err(format!("its layer has more than {listed} changes"));
    }
    let mut deleted = Vec::new();
    for Change { path, change, .. } in &changes.changes {
        match *change {
            "opaque" => {
                return Err(format!(
                    "{path} hides what the image has there, which that format cannot say"
                ));
            }
            "deleted" => {
                let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
                deleted.push(path.clone());
                deleted.push(format!("{parent}/.wh.{name}"));
            }
            _ => {}
        }
    }
    Ok(deleted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_named_by_its_digest() {
        let of = |name: &str, digest: &str| {
            let mut container = Container::default();
            container.image.name = name.into();
            container.image.digest = digest.into();
            by_digest(&container)
        };
        assert_eq!(
            of("docker.io/library/web:1", "sha256:0"),
            "docker.io/library/web@sha256:0"
        );
        assert_eq!(of("host:5000/web", "sha256:0"), "host:5000/web@sha256:0");
        assert_eq!(of("web@sha256:1", "sha256:0"), "web@sha256:1");
        assert_eq!(of("web:1", ""), "web:1");
    }
}
