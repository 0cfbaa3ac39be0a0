//! The JSON files of foreign archives.
//!
//! ```text
//! config.dump   id  name  rootfsImageName  rootfsImageRef  rootfsImage  rootfsImageID (podman)
//!               runtime  createdTime  checkpointedTime
//! spec.dump     annotations: io.kubernetes.cri.*            (containerd)
//!                            io.container.manager: cri-o, io.kubernetes.cri-o.*, io.kubernetes.pod.*
//!                            io.container.manager: libpod   (podman)
//! ```

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use transship_checkpoint::cri_names::{annotations, labels};
use transship_checkpoint::manifest::Pod;

use super::Engine;
use crate::error::PackageError;

/// Parses the JSON of a member.
pub(super) fn parse<T: DeserializeOwned>(member: &str, json: &[u8]) -> Result<T, PackageError> {
    serde_json::from_slice(json).map_err(|error| PackageError::Member {
        member: member.to_owned(),
        reason: format!("it cannot be parsed: {error}"),
    })
}

/// `config.dump`, as far as it says something here.
pub(super) struct ConfigDump {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) image_name: String,
    pub(super) image_digest: String,
    /// Seconds since 1970.
    pub(super) checkpointed: u64,
}

impl ConfigDump {
    pub(super) fn parse(json: &[u8]) -> Result<Self, PackageError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase", default)]
        #[derive(Default)]
        struct Raw {
            id: String,
            name: String,
            rootfs_image_name: String,
            rootfs_image_ref: String,
            rootfs_image: String,
            #[serde(rename = "rootfsImageID")]
            rootfs_image_id: String,
            checkpointed_time: String,
            created_time: String,
        }
        let raw: Raw = parse("config.dump", json)?;
        if raw.id.is_empty() {
            return Err(PackageError::Member {
                member: "config.dump".to_owned(),
                reason: "it names no container".to_owned(),
            });
        }
        let digest = |text: &str| {
            let hex = text.rsplit("sha256:").next().unwrap_or_default();
            let is_digest = hex.len() == 64 && hex.bytes().all(|it| it.is_ascii_hexdigit());
            is_digest.then(|| format!("sha256:{hex}"))
        };
        let image_digest = [
            &raw.rootfs_image_ref,
            &raw.rootfs_image_id,
            &raw.rootfs_image,
        ]
        .into_iter()
        .find_map(|text| digest(text));
        let times = [&raw.checkpointed_time, &raw.created_time];
        let mut taken = times.into_iter().filter_map(|text| seconds(text));
        Ok(Self {
            id: raw.id,
            name: raw.name,
            image_name: match raw.rootfs_image_name.as_str() {
                "" => raw.rootfs_image,
                _ => raw.rootfs_image_name,
            },
            image_digest: image_digest.unwrap_or_default(),
            // Go writes the year 1 for a time that was not set.
            checkpointed: taken.find(|it| *it > 0).unwrap_or_default(),
        })
    }
}

/// Seconds since 1970 of `2026-11-26T09:27:01.5+01:00`; 0 for what lies before.
fn seconds(text: &str) -> Option<u64> {
    let number = |range: std::ops::Range<usize>| text.get(range)?.parse::<i64>().ok();
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let offset = match text.as_bytes().get(text.len().checked_sub(6)?)? {
        sign @ (b'+' | b'-') => {
            let end = text.len();
            let minutes = number(end - 5..end - 3)? * 60 + number(end - 2..end)?;
            if *sign == b'+' { minutes } else { -minutes }
        }
        _ => 0,
    };
    // Howard Hinnant's days_from_civil: the year begins in March.
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468;
    let all = days * 86_400 + hour * 3_600 + (minute - offset) * 60 + second;
    Some(u64::try_from(all).unwrap_or_default())
}

/// What an archive calls its container.
pub(super) struct Named {
    pub(super) engine: Engine,
    pub(super) container: String,
    pub(super) pod: Option<Pod>,
    pub(super) labels: BTreeMap<String, String>,
}

impl Named {
    pub(super) fn of(spec: &Value, config: &ConfigDump) -> Self {
        let annotation = |name: &str| spec["annotations"][name].as_str().map(str::to_owned);
        let engine = match annotation("io.container.manager").as_deref() {
            Some("libpod") => Engine::Podman,
            Some("cri-o") => Engine::Crio,
            _ => Engine::Containerd,
        };
        let (container, pod_names) = match engine {
            Engine::Podman => (None, None),
            Engine::Crio => (
                annotation(labels::CONTAINER_NAME),
                Some([labels::POD_NAME, labels::POD_NAMESPACE, labels::POD_UID]),
            ),
            Engine::Containerd => (
                annotation(annotations::CONTAINER_NAME),
                Some([
                    annotations::SANDBOX_NAME,
                    annotations::SANDBOX_NAMESPACE,
                    annotations::SANDBOX_UID,
                ]),
            ),
        };
        let pod = pod_names.and_then(|[name, namespace, uid]| {
            Some(Pod {
                name: annotation(name)?,
                namespace: annotation(namespace)?,
                uid: annotation(uid).unwrap_or_default(),
                service_account: None,
            })
        });
        let container = container.filter(|_| pod.is_some());
        let container = container.unwrap_or_else(|| match config.name.as_str() {
            "" => config.id.clone(),
            name => name.to_owned(),
        });
        let mut of_pod = BTreeMap::new();
        if let Some(pod) = &pod {
            of_pod.insert(labels::CONTAINER_NAME.to_owned(), container.clone());
            of_pod.insert(labels::POD_NAME.to_owned(), pod.name.clone());
            of_pod.insert(labels::POD_NAMESPACE.to_owned(), pod.namespace.clone());
            of_pod.insert(labels::POD_UID.to_owned(), pod.uid.clone());
        }
        Self {
            engine,
            container,
            pod,
            labels: of_pod,
        }
    }
}

/// The labels in `status.dump`.
pub(super) fn labels(status: &[u8]) -> Result<BTreeMap<String, String>, PackageError> {
    #[derive(Deserialize)]
    struct Status {
        #[serde(default)]
        labels: BTreeMap<String, String>,
    }
    let status: Status = parse("status.dump", status)?;
    Ok(status.labels)
}

/// The namespaces that the container shared with others, as the spec names them.
pub(super) fn joined(spec: &Value) -> Vec<String> {
    let namespaces = spec["linux"]["namespaces"].as_array().into_iter().flatten();
    let joined = namespaces.filter(|it| it["path"].as_str().is_some_and(|path| !path.is_empty()));
    joined
        .filter_map(|it| it["type"].as_str().map(str::to_owned))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn times_are_those_of_go() {
        for (text, expected) in [
            ("1970-01-01T00:00:00Z", Some(0)),
            ("2026-11-26T09:27:01Z", Some(1_795_685_221)),
            ("2026-11-26T10:27:01.123456789+01:00", Some(1_795_685_221)),
            ("2000-02-29T23:59:59-00:30", Some(951_870_599)),
            ("0001-01-01T00:00:00Z", Some(0)),
            ("yesterday", None),
            ("", None),
        ] {
            assert_eq!(seconds(text), expected, "{text}");
        }
    }

    #[test]
    fn engines_are_told_by_their_annotations() {
        let config = ConfigDump::parse(
            br#"{"id": "1f", "name": "web", "rootfsImageName": "docker.io/library/web:1",
                 "rootfsImageRef": "docker.io/library/web@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
                 "checkpointedTime": "2026-11-26T09:27:01Z"}"#,
        )
        .unwrap();
        assert!(config.image_digest.starts_with("sha256:0123"));
        let of = |annotations: Value| Named::of(&json!({ "annotations": annotations }), &config);
        let containerd = of(json!({
            "io.kubernetes.cri.container-name": "app", "io.kubernetes.cri.sandbox-name": "web",
            "io.kubernetes.cri.sandbox-namespace": "shop"}));
        assert_eq!(
            (containerd.engine, containerd.container.as_str()),
            (Engine::Containerd, "app")
        );
        assert_eq!(containerd.pod.unwrap().namespace, "shop");
        let crio = of(json!({
            "io.container.manager": "cri-o", "io.kubernetes.container.name": "app",
            "io.kubernetes.pod.name": "web", "io.kubernetes.pod.namespace": "shop"}));
        assert_eq!(
            (crio.engine, crio.container.as_str()),
            (Engine::Crio, "app")
        );
        let podman = of(json!({"io.container.manager": "libpod"}));
        assert_eq!(
            (podman.engine, podman.container.as_str()),
            (Engine::Podman, "web")
        );
        assert!(podman.pod.is_none());
        assert!(ConfigDump::parse(b"[]").is_err());
    }
}
