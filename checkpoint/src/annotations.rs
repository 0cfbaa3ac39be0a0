//! The annotations of an OCI spec that Transship reads, and the CRI's that it relies on.
//!
//! Under the CRI they reach the specs of the sandbox and of its containers through
//! `pod_annotations = ["dev.transship/*"]` in containerd's runtime configuration; with ctr through
//! `--annotation`.

use std::collections::HashMap;

use crate::cri_names::annotations as cri;
use crate::criu_options::{CriuOption, CriuOverrides};

/// What to restore: the name of a checkpoint. On a sandbox it covers the sandbox's containers.
pub const RESTORE: &str = "dev.transship/restore";
/// On a pod: the migration, 32 hexadecimal digits, that brings its containers. They are restored from the checkpoint
/// [`of_migration`] as it arrives, and held, also when they have been started, until their source has committed itself.
pub const RECEIVE: &str = "dev.transship/receive";
/// `true`: on a pod, the newest checkpoint of a pod of this namespace and name that nobody has consumed and that
/// was taken since a pod of that name last began to run here; without one it starts cold.
pub const RESTORE_LATEST: &str = "dev.transship/restore-latest";
/// On a pod: the checkpoint in a registry, by its digest. `transship serve` fetches it when node.toml allows that.
pub const RESTORE_IMAGE: &str = "dev.transship/restore-image";
/// `true`: on a pod or a container, the checkpoint is taken away from this node when it has been restored, and
/// nobody else restores it here.
pub const ONCE: &str = "dev.transship/once";
/// Which container of the checkpoint, when its name is not the container's own.
pub const RESTORE_CONTAINER: &str = "dev.transship/restore-container";
/// Outside of the CRI: the container whose namespaces are joined; its own id makes a sandbox.
pub const SANDBOX: &str = "dev.transship/sandbox";
/// `fail` (default) or `new`: what a restore does about a namespace path that is gone.
pub const MISSING_NAMESPACES: &str = "dev.transship/missing-namespaces";
/// `fail` (default) or `cold-start`: what a create does whose restore failed.
pub const ON_FAILURE: &str = "dev.transship/on-failure";
/// `start` or `refuse`: what a create does whose container the checkpoint does not have. Without it such a
/// container starts once another one of its pod has been restored.
pub const COLD_CONTAINERS: &str = "dev.transship/cold-containers";
/// `false` (default) or `true`: whether the sockets of MPTCP that a pod with a network of its own asks for are
/// such sockets; else they are those of TCP.
pub const MPTCP: &str = "dev.transship/mptcp";
/// `filled`: the files of the checkpoint are in the container's upperdir already.
pub const ROOTFS: &str = "dev.transship/rootfs";
/// Networks of CNI that a restored container of its own network is put into, as JSON: `transship_cni::Networks`.
/// Our own tool says this, of no container of a pod.
pub const NETWORKS: &str = "dev.transship/networks";
/// The prefix of all annotations of Transship. With a name of [`OPTIONS`](crate::criu_options::OPTIONS) it makes the
/// annotation of that option of CRIU.
pub const PREFIX: &str = "dev.transship/";

/// All that are not options of CRIU.
const KNOWN: [&str; 13] = [
    RESTORE,
    RECEIVE,
    RESTORE_LATEST,
    RESTORE_IMAGE,
    ONCE,
    RESTORE_CONTAINER,
    SANDBOX,
    MISSING_NAMESPACES,
    ON_FAILURE,
    COLD_CONTAINERS,
    MPTCP,
    ROOTFS,
    NETWORKS,
];

/// runc and crun read a CRIU configuration file from the path in this annotation; see runc's
/// `docs/checkpoint-restore.md`.
pub const CRIU_CONFIG: &str = "org.criu.config";

/// How many hexadecimal digits the name of a migration has.
pub const MIGRATION_DIGITS: usize = 32;

/// Whether it can be the name of a migration.
#[must_use]
pub fn is_migration(name: &str) -> bool {
    name.len() == MIGRATION_DIGITS && name.bytes().all(|digit| digit.is_ascii_hexdigit())
}

/// The checkpoint that a migration arrives in.
#[must_use]
pub fn of_migration(migration: &str) -> String {
    format!("migration-{migration}")
}

/// Whether a checkpoint is that of a migration.
#[must_use]
pub fn is_of_migration(checkpoint: &str) -> bool {
    checkpoint
        .strip_prefix("migration-")
        .is_some_and(is_migration)
}

/// What a container is to its sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// The container whose namespaces others join.
    Sandbox,
    /// A container that joins the namespaces of the sandbox with this id.
    Member {
        /// Container id of the sandbox.
        sandbox: String,
    },
    /// A container with namespaces of its own.
    Alone,
}

/// What to do about a namespace path that no longer exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MissingNamespaces {
    /// Refuse, and say which choices there are.
    #[default]
    Fail,
    /// Restore into new namespaces.
    New,
}

/// What a create does whose restore failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnFailure {
    /// Fails, with CRIU's reason.
    #[default]
    Fail,
    /// Starts the container's own command on its own files.
    ColdStart,
}

/// What a create does whose container the checkpoint does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ColdContainers {
    /// Starts it from its image, and says so, once another container of the pod has been restored: a
    /// pod of which the checkpoint has nothing is not meant.
    #[default]
    BesideRestored,
    /// The same, whatever has been restored.
    Start,
    /// Fails.
    Refuse,
}

/// How sockets of MPTCP are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mptcp {
    /// They are sockets of TCP, which CRIU can dump.
    #[default]
    Off,
    /// They are what was asked for.
    On,
}

/// What is in a container's upperdir before its restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rootfs {
    /// Nothing: the files of the checkpoint have to be put there.
    #[default]
    FromImage,
    /// The files of the checkpoint.
    Filled,
}

/// An annotation that means nothing.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum AnnotationError {
    /// Its value means nothing.
    #[error("annotation {annotation} is {value:?}; it can be {allowed}")]
    Value {
        /// The annotation.
        annotation: String,
        /// Its value.
        value: String,
        /// What its value can be.
        allowed: &'static str,
    },
    /// None of ours: one that is misspelt must not make a cold start of a restore.
    #[error("annotation {annotation} means nothing; there are {}", known())]
    Unknown {
        /// The annotation.
        annotation: String,
    },
}

fn known() -> String {
    let ours = KNOWN.iter().map(|key| key.trim_start_matches(PREFIX));
    ours.chain(CriuOverrides::names())
        .collect::<Vec<_>>()
        .join(", ")
}

/// The annotations of one spec, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Annotations {
    /// What the container is to its sandbox.
    pub role: Role,
    /// The checkpoint that [`RESTORE`] names, or [`RECEIVE`].
    pub restore: Option<String>,
    /// Whether it comes with a migration: [`RECEIVE`].
    pub receives: bool,
    /// See [`RESTORE_LATEST`].
    pub restore_latest: bool,
    /// See [`RESTORE_IMAGE`].
    pub restore_image: Option<String>,
    /// See [`ONCE`].
    pub once: bool,
    /// The container's name inside of that checkpoint, when the spec says it.
    pub container: Option<String>,
    /// What the pod calls the container, under the CRI.
    pub pod_container: Option<String>,
    /// The name of the pod, under the CRI.
    pub pod_name: Option<String>,
    /// The uid of the pod, under the CRI.
    pub pod_uid: Option<String>,
    /// The Kubernetes namespace of the pod, under the CRI.
    pub kubernetes_namespace: Option<String>,
    /// See [`MISSING_NAMESPACES`].
    pub missing_namespaces: MissingNamespaces,
    /// See [`ON_FAILURE`].
    pub on_failure: OnFailure,
    /// See [`COLD_CONTAINERS`].
    pub cold_containers: ColdContainers,
    /// See [`MPTCP`].
    pub mptcp: Mptcp,
    /// See [`ROOTFS`].
    pub rootfs: Rootfs,
    /// See [`NETWORKS`].
    pub networks: Option<String>,
    /// Choices about CRIU's options.
    pub criu: CriuOverrides,
    /// Whether any annotation of ours is present. If not, the runtime front stays out of the way.
    pub ours: bool,
}

impl Annotations {
    /// Reads the annotations of the container `id`.
    ///
    /// # Errors
    /// A value that is not one of those allowed, or an annotation with our prefix that is none of
    /// ours.
    pub fn read(
        id: &str,
        annotations: Option<&HashMap<String, String>>,
    ) -> Result<Self, AnnotationError> {
        let get = |key: &str| {
            annotations
                .and_then(|all| all.get(key))
                .filter(|v| !v.is_empty())
        };
        let role = match (get(SANDBOX), get(cri::CONTAINER_TYPE), get(cri::SANDBOX_ID)) {
            (_, Some(kind), _) if kind == "sandbox" => Role::Sandbox,
            (_, Some(kind), Some(sandbox)) if kind == "container" => Role::Member {
                sandbox: sandbox.clone(),
            },
            (Some(sandbox), ..) if sandbox == id => Role::Sandbox,
            (Some(sandbox), ..) => Role::Member {
                sandbox: sandbox.clone(),
            },
            _ => Role::Alone,
        };
        // The value of an annotation that is one of two words.
        let choose = |key: &str, first: &str, second: &str, allowed| match get(key) {
            None => Ok(false),
            Some(value) if value == first => Ok(false),
            Some(value) if value == second => Ok(true),
            Some(value) => Err(AnnotationError::Value {
                annotation: key.to_owned(),
                value: value.clone(),
                allowed,
            }),
        };
        let missing_namespaces =
            match choose(MISSING_NAMESPACES, "fail", "new", "\"fail\" or \"new\"")? {
                false => MissingNamespaces::Fail,
                true => MissingNamespaces::New,
            };
        let allowed = "\"fail\" or \"cold-start\"";
        let on_failure = match choose(ON_FAILURE, "fail", "cold-start", allowed)? {
            false => OnFailure::Fail,
            true => OnFailure::ColdStart,
        };
        let received = match get(RECEIVE) {
            // Only a pod can be held for longer than its start.
            Some(_) if get(cri::CONTAINER_TYPE).is_none() => {
                return Err(AnnotationError::Unknown {
                    annotation: RECEIVE.to_owned(),
                });
            }
            Some(migration) if is_migration(migration) => Some(of_migration(migration)),
            Some(migration) => {
                return Err(AnnotationError::Value {
                    annotation: RECEIVE.to_owned(),
                    value: migration.clone(),
                    allowed: "the name of a migration, which transship migrate --pod prints",
                });
            }
            None => None,
        };
        // A cold copy beside the source, which runs on, is what a migration must never make.
        let on_failure = match received {
            Some(_) => OnFailure::Fail,
            None => on_failure,
        };
        let allowed = "\"start\" or \"refuse\"";
        let cold_containers = match choose(COLD_CONTAINERS, "start", "refuse", allowed)? {
            false if get(COLD_CONTAINERS).is_some() => ColdContainers::Start,
            false => ColdContainers::BesideRestored,
            true => ColdContainers::Refuse,
        };
        Ok(Self {
            role,
            restore_latest: choose(RESTORE_LATEST, "false", "true", "\"false\" or \"true\"")?,
            restore_image: get(RESTORE_IMAGE).cloned(),
            // What comes with a migration is that one's to remove.
            once: choose(ONCE, "false", "true", "\"false\" or \"true\"")? && received.is_none(),
            container: get(RESTORE_CONTAINER)
                .or_else(|| get(cri::CONTAINER_NAME))
                .cloned(),
            pod_container: get(cri::CONTAINER_NAME).cloned(),
            pod_name: get(cri::SANDBOX_NAME).cloned(),
            pod_uid: get(cri::SANDBOX_UID).cloned(),
            kubernetes_namespace: get(cri::CONTAINER_TYPE)
                .map(|_| get(cri::SANDBOX_NAMESPACE).cloned().unwrap_or_default()),
            missing_namespaces,
            on_failure,
            cold_containers,
            mptcp: match choose(MPTCP, "false", "true", "\"false\" or \"true\"")? {
                false => Mptcp::Off,
                true => Mptcp::On,
            },
            // Only our own tool says this.
            rootfs: match get(ROOTFS).map(String::as_str) {
                Some("filled") => Rootfs::Filled,
                _ => Rootfs::FromImage,
            },
            receives: received.is_some(),
            restore: received.or_else(|| get(RESTORE).cloned()),
            networks: get(NETWORKS)
                .filter(|_| get(cri::CONTAINER_TYPE).is_none())
                .cloned(),
            criu: read_criu(annotations)?,
            ours: annotations.is_some_and(|all| all.keys().any(|key| key.starts_with(PREFIX))),
        })
    }
}

/// Whether an annotation is an option of CRIU: those stay with a container, for its next dump.
#[must_use]
pub fn is_criu_option(key: &str) -> bool {
    key.strip_prefix(PREFIX)
        .is_some_and(|name| CriuOption::named(name).is_some())
}

/// CRIU's options; every key with our prefix is one, or one of [`KNOWN`].
fn read_criu(
    annotations: Option<&HashMap<String, String>>,
) -> Result<CriuOverrides, AnnotationError> {
    let mut ours: Vec<_> = annotations
        .into_iter()
        .flatten()
        .filter(|(key, _)| key.starts_with(PREFIX) && !KNOWN.contains(&key.as_str()))
        .collect();
    // Of several that mean nothing always the same one is told.
    ours.sort();
    let mut criu = CriuOverrides::default();
    for (key, value) in ours {
        let name = &key[PREFIX.len()..];
        if CriuOption::named(name).is_none() {
            return Err(AnnotationError::Unknown {
                annotation: key.clone(),
            });
        }
        criu.set(name, value)
            .map_err(|error| AnnotationError::Value {
                annotation: key.clone(),
                value: value.clone(),
                allowed: error.allowed,
            })?;
    }
    Ok(criu)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Annotations, AnnotationError> {
        let map = pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        Annotations::read("me", Some(&map))
    }

    #[test]
    fn role_comes_from_the_cri_first() {
        let member = Role::Member {
            sandbox: "s".into(),
        };
        for (pairs, role) in [
            (vec![], Role::Alone),
            (vec![(SANDBOX, "me")], Role::Sandbox),
            (vec![(SANDBOX, "s")], member.clone()),
            (
                vec![(cri::CONTAINER_TYPE, "sandbox"), (cri::SANDBOX_ID, "me")],
                Role::Sandbox,
            ),
            (
                vec![(cri::CONTAINER_TYPE, "container"), (cri::SANDBOX_ID, "s")],
                member.clone(),
            ),
            (
                vec![
                    (cri::CONTAINER_TYPE, "container"),
                    (cri::SANDBOX_ID, "s"),
                    (SANDBOX, "me"),
                ],
                member.clone(),
            ),
        ] {
            assert_eq!(read(&pairs).unwrap().role, role, "{pairs:?}");
        }
    }

    #[test]
    fn only_our_prefix_makes_it_ours() {
        assert!(!read(&[(cri::CONTAINER_TYPE, "sandbox")]).unwrap().ours);
        assert!(read(&[(RESTORE, "x")]).unwrap().ours);
    }

    #[test]
    fn a_pod_that_comes_with_a_migration_never_starts_cold() {
        let migration = "0123456789abcdef0123456789abcdef";
        let of_pod = (cri::CONTAINER_TYPE, "container");
        let pairs = [of_pod, (RECEIVE, migration), (ON_FAILURE, "cold-start")];
        let read_pod = read(&pairs).unwrap();
        assert_eq!(read_pod.restore, Some(of_migration(migration)));
        assert!(read_pod.receives && read_pod.on_failure == OnFailure::Fail);
        assert!(!read(&[of_pod, (RESTORE, "web")]).unwrap().receives);
        read(&[of_pod, (RECEIVE, "../web")]).unwrap_err();
        read(&[(RECEIVE, migration)]).unwrap_err();
    }

    #[test]
    fn unknown_value_names_the_choices() {
        let error = read(&[(MISSING_NAMESPACES, "maybe")]).unwrap_err();
        assert_eq!(
            error.to_string(),
            r#"annotation dev.transship/missing-namespaces is "maybe"; it can be "fail" or "new""#
        );
    }

    #[test]
    fn options_of_criu_are_read_and_nothing_is_misspelt_in_silence() {
        let read_one = |key, value| read(&[(RESTORE, "web"), (key, value)]);
        let close = read_one("dev.transship/tcp", "close").unwrap();
        let criu = close.criu.over(crate::criu_options::CriuOptions::default());
        assert_eq!(criu.tcp, crate::criu_options::Tcp::Close);
        let error = read_one("dev.transship/ghost-limit", "much").unwrap_err();
        assert_eq!(
            error.to_string(),
            "annotation dev.transship/ghost-limit is \"much\"; it can be a number of bytes below \
             4G, such as \"16M\""
        );
        let error = read_one("dev.transship/lazy-pages", "often").unwrap_err();
        assert!(error.to_string().contains("it can be \"true\""), "{error}");
        let error = read_one("dev.transship/tpc", "close").unwrap_err();
        assert!(
            error
                .to_string()
                .contains("dev.transship/tpc means nothing; there are restore,"),
            "{error}"
        );
    }

    #[test]
    fn container_name_prefers_ours() {
        let both = [(cri::CONTAINER_NAME, "cri"), (RESTORE_CONTAINER, "ours")];
        assert_eq!(read(&both).unwrap().container.as_deref(), Some("ours"));
        assert_eq!(read(&both[..1]).unwrap().container.as_deref(), Some("cri"));
    }
}
