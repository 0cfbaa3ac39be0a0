//! A pod that shares its process namespace (`shareProcessNamespace`), or has that of the node (`hostPID`): a process is restored with the
//! id that it had, and somebody else may have it by now. CRIU would fail with "File exists".

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use transship_checkpoint::criu_images::tasks;
use transship_checkpoint::namespaces::{self, Namespace};
use transship_checkpoint::spec::Spec;
use transship_sandbox::Request;

use transship_path_error::During as _;
use transship_sandbox::TaskStatus;

use super::bundle::Config;
use super::{FitError, FrontError};

/// The front runs in the process namespace of the node.
const OF_NODE: &str = "/proc/self/ns/pid";

/// Checks that the ids of the container's processes and threads are free in the process namespace
/// that it shares, if it has none of its own.
pub(super) fn check_pids(config: &Config, request: &Request) -> Result<(), FrontError> {
    let Some(namespace) = others_namespace(&config.spec) else {
        return Ok(());
    };
    let namespace = namespace.as_path();
    let wanted: HashSet<u32> = tasks::ids(&request.images)?.into_iter().collect();
    match taken(&wanted, namespace).during("look for processes in", namespace)? {
        None => Ok(()),
        Some((id, taken_by)) => Err(FrontError::from(FitError::PidTaken {
            checkpoint: request.checkpoint.clone(),
            container: request.container.clone(),
            id,
            taken_by,
        })),
    }
}

/// The process namespace that the container shares with others: the one that it joins, or without an entry that of the
/// node.
fn others_namespace(spec: &Spec) -> Option<PathBuf> {
    let joined = namespaces::joined(spec).remove(&Namespace::Pid);
    let entries = spec.get("/linux/namespaces").and_then(Value::as_array);
    let mut entries = entries.into_iter().flatten();
    let has_entry = entries.any(|entry| entry["type"] == Namespace::Pid.oci_name());
    joined.or_else(|| (!has_entry).then(|| PathBuf::from(OF_NODE)))
}

/// One of the ids that a task of the namespace has, and the name of that task.
fn taken(wanted: &HashSet<u32>, namespace: &Path) -> io::Result<Option<(u32, String)>> {
    let identity = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    let own = identity(namespace)?;
    for process in fs::read_dir("/proc")? {
        let process = process?.path();
        // What is no process, or has ended, is in no namespace.
        if identity(&process.join("ns/pid")).ok() != Some(own) {
            continue;
        }
        for task in fs::read_dir(process.join("task")).into_iter().flatten() {
            let Ok(status) = TaskStatus::of(task?.path()) else {
                continue;
            };
            let id = status.id_in_container().filter(|id| wanted.contains(id));
            if let Some(id) = id {
                let name = status.field("Name").unwrap_or_default();
                return Ok(Some((id, name.to_owned())));
            }
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_an_entry_the_ids_are_those_of_the_node() {
        let of = |namespaces: &str| {
            let spec = format!(r#"{{"linux":{{"namespaces":[{namespaces}]}}}}"#);
            others_namespace(&Spec::parse(spec.as_bytes()).unwrap())
        };
        assert_eq!(of(r#"{"type":"pid"}"#), None);
        assert_eq!(of(r#"{"type":"pid","path":"/x"}"#), Some("/x".into()));
        assert_eq!(of(r#"{"type":"mount"}"#), Some(OF_NODE.into()));
    }

    #[test]
    fn the_ids_of_a_namespace_are_found() {
        let own = Path::new("/proc/self/ns/pid");
        let wanted = HashSet::from([std::process::id(), u32::MAX]);
        let (id, name) = taken(&wanted, own).unwrap().unwrap();
        assert_eq!(id, std::process::id());
        assert!(!name.is_empty());
        assert_eq!(taken(&HashSet::from([u32::MAX]), own).unwrap(), None);
    }
}
