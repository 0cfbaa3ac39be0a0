//! Which namespaces a restored container joins.
//!
//! A spec says for each namespace: `{"type": "network"}`, a new one, or `{"type": "network",
//! "path": P}`, the one at that path. The CRI writes `/proc/<pid of the sandbox>/ns/net`; when the
//! sandbox is gone runc fails with "Requested network namespace ... does not exist", and when its
//! pid has been given to another process the container joins a stranger. So the paths are
//! replaced by those of the sandbox that is there now.
//!
//! ```text
//! joined(spec) --> resolve(joined, sandbox, policy) --> Plan --> apply(spec, plan) --> [Change]
//!                          (nothing here touches the system)
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::annotations::MissingNamespaces;
use crate::spec::Spec;

/// Whether the spec has a network that is not the node's.
#[must_use]
pub fn has_own_network(spec: &Spec) -> bool {
    let mut kinds = spec.namespaces().iter();
    kinds.any(|namespace| namespace["type"] == Namespace::Network.oci_name())
}

/// A kind of namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Namespace {
    /// Network.
    Network,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Host name.
    Uts,
    /// Process ids.
    Pid,
    /// Users.
    User,
    /// Mounts.
    Mount,
    /// Control groups.
    Cgroup,
    /// Clocks.
    Time,
}

impl Namespace {
    /// All kinds.
    pub const ALL: [Self; 8] = [
        Self::Network,
        Self::Ipc,
        Self::Uts,
        Self::Pid,
        Self::User,
        Self::Mount,
        Self::Cgroup,
        Self::Time,
    ];

    /// The name in an OCI spec.
    #[must_use]
    pub fn oci_name(self) -> &'static str {
        match self {
            Self::Network => "network",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::Pid => "pid",
            Self::User => "user",
            Self::Mount => "mount",
            Self::Cgroup => "cgroup",
            Self::Time => "time",
        }
    }

    /// The name in `/proc/<pid>/ns`.
    #[must_use]
    pub fn proc_name(self) -> &'static str {
        match self {
            Self::Network => "net",
            Self::Mount => "mnt",
            other => other.oci_name(),
        }
    }

    fn from_oci(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|namespace| namespace.oci_name() == name)
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.oci_name())
    }
}

/// How the namespaces that have a path are replaced.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan(BTreeMap<Namespace, Action>);

/// How one namespace that has a path is replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Join the one at this path instead.
    Join(PathBuf),
    /// A new one, made by CRIU as it was dumped.
    OwnFromImages,
    /// A new one that must exist before the restore, because CRIU only takes it as an open file.
    MakeBefore,
    /// The one that has been made and pinned here.
    JoinMade(PathBuf),
}

/// What [`apply`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The kind of namespace.
    pub namespace: Namespace,
    /// The path that it had.
    pub from: PathBuf,
    /// The path that it has now; `None`: a new namespace.
    pub to: Option<PathBuf>,
}

/// Why no plan can be made.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum NamespaceError {
    /// A path is gone and nobody has said what to do.
    #[error(
        "the {namespace} namespace {path} of the container is gone: name the container whose \
         namespaces it joins with the annotation dev.transship/sandbox=<id>, or restore it into \
         new ones with dev.transship/missing-namespaces=new"
    )]
    Gone {
        /// The kind of namespace.
        namespace: Namespace,
        /// The path in the spec.
        path: PathBuf,
    },
    /// A path is gone and cannot be replaced by a new namespace.
    #[error(
        "the {namespace} namespace {path} of the container is gone and a new one cannot take its \
         place, because the images hold a part of it only: name the container whose namespaces it \
         joins with the annotation dev.transship/sandbox=<id>"
    )]
    NotReplaceable {
        /// The kind of namespace.
        namespace: Namespace,
        /// The path in the spec.
        path: PathBuf,
    },
}

/// The namespaces of a spec that have a path.
#[must_use]
pub fn joined(spec: &Spec) -> BTreeMap<Namespace, PathBuf> {
    spec.namespaces().iter().filter_map(joined_entry).collect()
}

fn joined_entry(entry: &Value) -> Option<(Namespace, PathBuf)> {
    let namespace = Namespace::from_oci(entry["type"].as_str()?)?;
    let path = entry["path"].as_str().filter(|path| !path.is_empty())?;
    Some((namespace, PathBuf::from(path)))
}

/// Every joined namespace is that of the sandbox, whose paths are given; a kind that the sandbox
/// has no path for stays as it is.
#[must_use]
pub fn join_sandbox(
    joined: &BTreeMap<Namespace, PathBuf>,
    sandbox: &BTreeMap<Namespace, PathBuf>,
) -> Plan {
    let join = |namespace: &Namespace| Some(Action::Join(sandbox.get(namespace)?.clone()));
    Plan(
        joined
            .keys()
            .filter_map(|key| Some((*key, join(key)?)))
            .collect(),
    )
}

/// What to do without a sandbox about the joined namespaces, of which `missing` have no file any
/// more. The others stay as they are.
///
/// # Errors
/// See [`NamespaceError`].
pub fn replace_missing(
    joined: &BTreeMap<Namespace, PathBuf>,
    missing: impl Fn(&Path) -> bool,
    policy: MissingNamespaces,
) -> Result<Plan, NamespaceError> {
    let mut plan = Plan::default();
    for (namespace, path) in joined.iter().filter(|(_, path)| missing(path)) {
        let (namespace, path) = (*namespace, path.clone());
        let action = match (policy, namespace) {
            (MissingNamespaces::Fail, _) => return Err(NamespaceError::Gone { namespace, path }),
            (MissingNamespaces::New, Namespace::Ipc | Namespace::Uts) => Action::OwnFromImages,
            (MissingNamespaces::New, Namespace::Network) => Action::MakeBefore,
            (MissingNamespaces::New, _) => {
                return Err(NamespaceError::NotReplaceable { namespace, path });
            }
        };
        plan.0.insert(namespace, action);
    }
    Ok(plan)
}

impl Plan {
    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The namespaces that must be made before the restore.
    pub fn to_make(&self) -> impl Iterator<Item = Namespace> {
        self.0
            .iter()
            .filter(|(_, action)| **action == Action::MakeBefore)
            .map(|(key, _)| *key)
    }

    /// Tells where a namespace is that has been made.
    pub fn made(&mut self, namespace: Namespace, path: PathBuf) {
        self.0.insert(namespace, Action::JoinMade(path));
    }

    /// Whether a namespace was made for this plan; its pin goes with the container.
    #[must_use]
    pub fn has_made(&self) -> bool {
        self.0
            .values()
            .any(|action| matches!(action, Action::JoinMade(_)))
    }
}

/// Carries out a plan.
///
/// # Panics
/// When a namespace that must be made before has not been made.
pub fn apply(spec: &mut Spec, plan: &Plan) -> Vec<Change> {
    let mut changes = Vec::new();
    for entry in spec.namespaces_mut() {
        let Some((namespace, from)) = joined_entry(entry) else {
            continue;
        };
        let Some(action) = plan.0.get(&namespace) else {
            continue;
        };
        let fields = entry.as_object_mut().expect("it has a type and a path");
        let to = match action {
            Action::Join(path) | Action::JoinMade(path) => Some(path.clone()),
            Action::OwnFromImages => None,
            Action::MakeBefore => unreachable!("Plan::made is called before apply"),
        };
        if to.as_ref() == Some(&from) {
            continue;
        }
        match &to {
            Some(path) => fields.insert("path".to_owned(), path.to_string_lossy().into()),
            None => fields.remove("path"),
        };
        changes.push(Change {
            namespace,
            from,
            to,
        });
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> Spec {
        Spec::parse(
            br#"{"linux":{"namespaces":[
                {"type":"mount"},
                {"type":"pid","path":""},
                {"type":"network","path":"/proc/7/ns/net"},
                {"type":"ipc","path":"/proc/7/ns/ipc"},
                {"type":"uts","path":"/proc/7/ns/uts"},
                {"type":"novel","path":"/x"}
            ]}}"#,
        )
        .unwrap()
    }

    fn paths(pairs: &[(Namespace, &str)]) -> BTreeMap<Namespace, PathBuf> {
        pairs
            .iter()
            .map(|(key, path)| (*key, PathBuf::from(path)))
            .collect()
    }

    #[test]
    fn only_paths_count_as_joined() {
        assert_eq!(
            joined(&spec()),
            paths(&[
                (Namespace::Network, "/proc/7/ns/net"),
                (Namespace::Ipc, "/proc/7/ns/ipc"),
                (Namespace::Uts, "/proc/7/ns/uts"),
            ])
        );
        assert!(joined(&Spec::parse(b"{}").unwrap()).is_empty());
    }

    #[test]
    fn a_sandbox_replaces_what_is_joined_and_nothing_else() {
        let mut spec = spec();
        let sandbox = paths(&[
            (Namespace::Network, "/ns/net"),
            (Namespace::Ipc, "/proc/7/ns/ipc"),
            (Namespace::Pid, "/ns/pid"),
        ]);
        let plan = join_sandbox(&joined(&spec), &sandbox);
        let changes = apply(&mut spec, &plan);
        assert_eq!(
            changes,
            [Change {
                namespace: Namespace::Network,
                from: "/proc/7/ns/net".into(),
                to: Some("/ns/net".into()),
            }]
        );
        assert_eq!(
            joined(&spec),
            paths(&[
                (Namespace::Network, "/ns/net"),
                (Namespace::Ipc, "/proc/7/ns/ipc"),
                (Namespace::Uts, "/proc/7/ns/uts"),
            ])
        );
    }

    #[test]
    fn missing_ones_are_refused_with_both_choices() {
        let error =
            replace_missing(&joined(&spec()), |_| true, MissingNamespaces::Fail).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("/proc/7/ns/net"), "{text}");
        assert!(text.contains("dev.transship/sandbox=<id>"), "{text}");
        assert!(
            text.contains("dev.transship/missing-namespaces=new"),
            "{text}"
        );
        assert!(!text.contains('\n'), "{text}");
    }

    #[test]
    fn missing_ones_become_new() {
        let mut spec = spec();
        let gone = |path: &Path| path != Path::new("/proc/7/ns/uts");
        let mut plan = replace_missing(&joined(&spec), gone, MissingNamespaces::New).unwrap();
        assert_eq!(plan.to_make().collect::<Vec<_>>(), [Namespace::Network]);
        plan.made(Namespace::Network, "/made/net".into());
        apply(&mut spec, &plan);
        assert_eq!(
            joined(&spec),
            paths(&[
                (Namespace::Network, "/made/net"),
                (Namespace::Uts, "/proc/7/ns/uts")
            ])
        );
    }

    #[test]
    fn a_pid_namespace_cannot_be_new() {
        let joined = paths(&[(Namespace::Pid, "/proc/7/ns/pid")]);
        let error = replace_missing(&joined, |_| true, MissingNamespaces::New).unwrap_err();
        assert!(
            matches!(error, NamespaceError::NotReplaceable { .. }),
            "{error}"
        );
    }

    #[test]
    fn nothing_missing_nothing_done() {
        let plan = replace_missing(&joined(&spec()), |_| false, MissingNamespaces::Fail).unwrap();
        assert!(plan.is_empty());
        assert!(apply(&mut spec(), &plan).is_empty());
    }
}
