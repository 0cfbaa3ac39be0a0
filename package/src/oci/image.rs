//! The image that starts a container of a checkpoint cold: the image that the container was made of, and the files that
//! it has changed as one more layer.
//!
//! ```text
//! manifest   application/vnd.oci.image.manifest.v1+json
//!   annotations  org.opencontainers.image.created, .base.name, .base.digest
//!   config   that of the base, with one more diff id and one more entry of its history
//!   layers   those of the base, byte for byte; then image_layer.rs
//! ```

use std::collections::BTreeMap;

use serde_json::{Value, json};
use transship_checkpoint::manifest::{Manifest as CheckpointManifest, SPEC_FILE};

use super::annotations::CREATED;
use super::document::{Descriptor, MANIFEST, Manifest, Platform};
use super::image_layer::ImageLayer;
use crate::error::PackageError;
use crate::times::rfc3339;

/// Media type of an image's config.
pub(super) const IMAGE_CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// What Docker calls the layers that OCI has other names for.
const DOCKERS: &[(&str, &str)] = &[
    (
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.oci.image.layer.v1.tar",
    ),
    (
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.oci.image.layer.v1.tar+gzip",
    ),
    (
        "application/vnd.docker.image.rootfs.diff.tar.zstd",
        "application/vnd.oci.image.layer.v1.tar+zstd",
    ),
];

/// The image that a container was made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// Name of the container in the checkpoint.
    pub container: String,
    /// The config, JSON.
    pub config: Vec<u8>,
    /// The layers, lowest first.
    pub layers: Vec<BaseLayer>,
}

/// A layer of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseLayer {
    /// What names it.
    pub descriptor: Descriptor,
    /// Digest of its tar.
    pub diff_id: String,
    /// Repositories of the registry that may have it.
    pub repositories: Vec<String>,
}

/// The config of an image of which nothing but its layers is left: the program is that of the container.
///
/// # Errors
/// `spec` is no OCI runtime spec.
pub fn config_of_spec(spec: &[u8]) -> Result<Vec<u8>, PackageError> {
    let spec: Value = serde_json::from_slice(spec).map_err(|error| PackageError::Member {
        member: SPEC_FILE.to_owned(),
        reason: error.to_string(),
    })?;
    let process = &spec["process"];
    let user = &process["user"];
    let id = |name: &str| user[name].as_u64().unwrap_or_default();
    let config = json!({
        "Cmd": process["args"],
        "Env": process["env"],
        "WorkingDir": process["cwd"],
        "User": format!("{}:{}", id("uid"), id("gid")),
    });
    Ok(json!({ "config": config }).to_string().into_bytes())
}

/// A config and for which machine it is.
#[derive(Debug)]
pub(super) struct Config {
    pub(super) json: Vec<u8>,
    pub(super) platform: Platform,
}

impl Config {
    /// That of `base` with `top` above it.
    ///
    /// # Errors
    /// The base's config is no JSON object.
    pub(super) fn with_layer(
        base: &Base,
        top: Option<&ImageLayer>,
        checkpoint: &CheckpointManifest,
    ) -> Result<Self, PackageError> {
        let damaged = |reason: String| PackageError::Member {
            member: format!("the config of the image of {}", base.container),
            reason,
        };
        let mut config: Value =
            serde_json::from_slice(&base.config).map_err(|error| damaged(error.to_string()))?;
        if !config.is_object() {
            return Err(damaged("it is no object of JSON".to_owned()));
        }
        let created = rfc3339(checkpoint.created);
        let mut diff_ids: Vec<_> = base.layers.iter().map(|it| it.diff_id.as_str()).collect();
        let mut history = history_of(&config, diff_ids.len());
        if let Some(top) = top {
            diff_ids.push(&top.diff_id);
            history.push(json!({
                "created": created,
                "created_by": format!("transship checkpoint {}", base.container),
                "comment": format!("changed files of the checkpoint {}", checkpoint.name),
            }));
        }
        config["rootfs"] = json!({ "type": "layers", "diff_ids": diff_ids });
        config["history"] = json!(history);
        config["created"] = json!(created);
        let machine = go_architecture(&checkpoint.source.architecture);
        for (key, value) in [("architecture", machine), ("os", "linux")] {
            if config[key].as_str().is_none_or(str::is_empty) {
                config[key] = json!(value);
            }
        }
        let text = |key: &str| config[key].as_str().map(str::to_owned);
        let platform = Platform {
            architecture: text("architecture").unwrap_or_default(),
            os: text("os").unwrap_or_default(),
            variant: text("variant").filter(|it| !it.is_empty()),
        };
        Ok(Self {
            json: config.to_string().into_bytes(),
            platform,
        })
    }
}

/// The history of so many layers; tools refuse an image whose history has another number of them.
fn history_of(config: &Value, layers: usize) -> Vec<Value> {
    let history = config["history"].as_array().cloned().unwrap_or_default();
    let is_layer = |entry: &&Value| entry["empty_layer"] != true;
    match history.iter().filter(is_layer).count() == layers {
        true => history,
        false => vec![
            json!({ "comment": "a layer of the image that the container was made of" });
            layers
        ],
    }
}

/// What Go calls a machine of `uname -m`.
fn go_architecture(machine: &str) -> &str {
    match machine {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The manifest of the image.
pub(super) fn manifest_of(
    base: &Base,
    top: Option<&ImageLayer>,
    config: Descriptor,
    checkpoint: &CheckpointManifest,
) -> Manifest {
    let layers = base.layers.iter().map(|it| Descriptor {
        media_type: oci_name(&it.descriptor.media_type).to_owned(),
        ..it.descriptor.clone()
    });
    let top = top.map(|it| it.descriptor.clone());
    let containers = checkpoint.containers.iter();
    let image = { containers }.find(|it| it.name == base.container);
    let mut annotations = BTreeMap::from([(CREATED.to_owned(), rfc3339(checkpoint.created))]);
    for (key, value) in [
        ("name", image.map(|it| &it.image.name)),
        ("digest", image.map(|it| &it.image.digest)),
    ] {
        if let Some(value) = value.filter(|it| !it.is_empty()) {
            let key = format!("org.opencontainers.image.base.{key}");
            annotations.insert(key, value.clone());
        }
    }
    Manifest {
        media_type: MANIFEST.to_owned(),
        config,
        layers: layers.chain(top).collect(),
        annotations,
        ..Manifest::default()
    }
}

fn oci_name(media_type: &str) -> &str {
    let known = DOCKERS.iter().find(|(docker, _)| *docker == media_type);
    known.map_or(media_type, |(_, oci)| oci)
}

#[cfg(test)]
mod tests {
    use std::io::{Seek as _, Write as _};

    use super::*;
    use crate::package_tests::{checkpoint_of, tar_of};

    fn base(config: &str) -> Base {
        Base {
            container: "c".into(),
            config: config.into(),
            layers: vec![BaseLayer {
                descriptor: Descriptor::new(DOCKERS[1].0, b"layer"),
                diff_id: "sha256:1".into(),
                repositories: Vec::new(),
            }],
        }
    }

    fn top() -> ImageLayer {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&tar_of(&[])).unwrap();
        file.rewind().unwrap();
        ImageLayer::measure(file).unwrap()
    }

    #[test]
    fn a_config_has_one_more_layer_and_all_the_rest() {
        let root = tempfile::tempdir().unwrap();
        let checkpoint = checkpoint_of(root.path(), b"pages").manifest;
        let top = top();
        let of = |json: &str| {
            let config = Config::with_layer(&base(json), Some(&top), &checkpoint).unwrap();
            let value: Value = serde_json::from_slice(&config.json).unwrap();
            (value, config.platform)
        };
        let (config, platform) = of(
            r#"{"architecture": "arm", "variant": "v7", "os": "linux", "config": {"Env": ["A=b"]},
                "history": [{"created_by": "a"}, {"empty_layer": true}],
                "rootfs": {"type": "layers", "diff_ids": ["sha256:1"]}}"#,
        );
        assert_eq!(config["config"]["Env"], json!(["A=b"]));
        assert_eq!(
            config["rootfs"]["diff_ids"],
            json!(["sha256:1", top.diff_id])
        );
        assert_eq!(config["history"].as_array().unwrap().len(), 3);
        assert_eq!(config["history"][0]["created_by"], "a");
        assert_eq!(config["created"], "2023-11-14T22:13:20Z");
        assert_eq!(platform.variant.as_deref(), Some("v7"));
        // One that says no more than it must, and one whose history is that of other layers.
        for json in ["{}", r#"{"history": [{"created_by": "a"}, {}, {}]}"#] {
            let (config, platform) = of(json);
            assert_eq!(config["history"].as_array().unwrap().len(), 2, "{config}");
            assert_eq!(
                (platform.architecture.as_str(), platform.os.as_str()),
                ("amd64", "linux")
            );
        }
        for json in ["[]", "no JSON", ""] {
            let error = Config::with_layer(&base(json), Some(&top), &checkpoint).unwrap_err();
            assert!(error.to_string().contains("the image of c"), "{error}");
        }
    }

    #[test]
    fn a_config_is_made_of_the_spec_where_none_is_left() {
        let spec = br#"{"process": {"args": ["/web", "-v"], "env": ["A=b"], "cwd": "/srv",
                                    "user": {"uid": 33, "gid": 34}}}"#;
        let config: Value = serde_json::from_slice(&config_of_spec(spec).unwrap()).unwrap();
        assert_eq!(
            config["config"],
            json!({"Cmd": ["/web", "-v"], "Env": ["A=b"], "WorkingDir": "/srv", "User": "33:34"})
        );
        assert!(config_of_spec(b"no JSON").is_err());
    }

    #[test]
    fn layers_have_the_names_of_oci() {
        let root = tempfile::tempdir().unwrap();
        let checkpoint = checkpoint_of(root.path(), b"pages").manifest;
        let config = Descriptor::new(IMAGE_CONFIG, b"{}");
        let manifest = manifest_of(&base("{}"), Some(&top()), config, &checkpoint);
        let types: Vec<_> = manifest
            .layers
            .iter()
            .map(|it| it.media_type.as_str())
            .collect();
        assert_eq!(types, ["application/vnd.oci.image.layer.v1.tar+gzip"; 2]);
        // By these it would be taken for a checkpoint, and not started.
        let json = String::from_utf8(manifest.to_json()).unwrap();
        assert!(!json.contains("checkpoint."), "{json}");
    }
}
