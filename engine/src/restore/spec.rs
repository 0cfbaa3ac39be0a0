//! The spec of a checkpoint, changed to what it must be on this node: pure functions.

use serde_json::{Value, json};
use transship_checkpoint::annotations::{PREFIX, SANDBOX, is_criu_option};
use transship_checkpoint::manifest;
use transship_sandbox::admission::foreign_spec::{Allow, Allowed};

use crate::error::{Context, Result};

/// The path of a shared namespace that is to become the container's own: with
/// `missing-namespaces: new` the runtime front replaces what does not exist, while the old path may
/// by chance be that of another process on this node.
const NOWHERE: &str = "/run/transship/nowhere";

/// The namespaces of a spec that have a path.
pub(super) fn joined_namespaces(spec: &mut Value) -> impl Iterator<Item = &mut Value> {
    let namespaces = spec
        .pointer_mut("/linux/namespaces")
        .and_then(Value::as_array_mut);
    let joined = |namespace: &&mut Value| namespace["path"].as_str().is_some_and(|p| !p.is_empty());
    namespaces.into_iter().flatten().filter(joined)
}

/// The kinds of these namespaces.
pub(super) fn joined_kinds(spec: &mut Value) -> impl Iterator<Item = String> {
    joined_namespaces(spec).filter_map(|it| it["type"].as_str().map(str::to_owned))
}

/// Removes the annotations of an earlier restore, and of the sandbox that it had.
pub(super) fn strip_our_annotations(spec: &mut Value) {
    if let Some(annotations) = spec["annotations"].as_object_mut() {
        annotations.retain(|key, _| !key.starts_with(PREFIX));
    }
}

/// Namespaces that were shared become the container's own.
pub(super) fn replace_joined(spec: &mut Value) {
    for namespace in joined_namespaces(spec) {
        namespace["path"] = json!(NOWHERE);
    }
}

/// Names the container in its cgroup path: containerd's clients write `/<namespace>/<id>`, with
/// systemd `<slice>:<prefix>:<id>`. Others are there only when they are allowed.
pub(super) fn cgroups_path(
    spec: &mut Value,
    old: &manifest::Container,
    (namespace, id): (&str, &str),
    allowed: &Allowed,
) {
    let Some(path) = spec.pointer_mut("/linux/cgroupsPath") else {
        return;
    };
    let text = path.as_str().unwrap_or_default();
    let new = match text.strip_suffix(&old.id) {
        _ if text == format!("/{}/{}", old.namespace, old.id) => format!("/{namespace}/{id}"),
        Some(front) if front.ends_with(':') => format!("{front}{id}"),
        Some(front) if front.ends_with('/') && allowed.contains(&Allow::CgroupPath) => {
            format!("{front}{id}")
        }
        _ => return,
    };
    *path = json!(new);
}

/// Whether the runtime asks systemd for cgroups: their paths have another form then.
pub(super) fn has_systemd_cgroup(spec: &Value) -> bool {
    let path = spec.pointer("/linux/cgroupsPath").and_then(Value::as_str);
    path.is_some_and(|path| path.split(':').count() == 3)
}

/// The spec of an ordinary container: started again, it starts its program.
pub(super) fn without_restore(held: &[u8]) -> Result<Vec<u8>> {
    let mut spec: Value = serde_json::from_slice(held).context("our own spec cannot be parsed")?;
    if let Some(annotations) = spec["annotations"].as_object_mut() {
        annotations
            .retain(|key, _| !key.starts_with(PREFIX) || key == SANDBOX || is_criu_option(key));
    }
    for namespace in joined_namespaces(&mut spec).filter(|found| found["path"] == NOWHERE) {
        if let Some(fields) = namespace.as_object_mut() {
            fields.remove("path");
        }
    }
    serde_json::to_vec(&spec).context("our own spec cannot be written")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_paths_follow_the_id() {
        let old = manifest::Container {
            id: "web".into(),
            namespace: "default".into(),
            ..manifest::Container::default()
        };
        let cases = [
            ("/default/web", "/moved/web2", "/moved/web2"),
            ("/other/web", "/other/web", "/other/web2"),
            (
                "system.slice:nerdctl:web",
                "system.slice:nerdctl:web2",
                "system.slice:nerdctl:web2",
            ),
            ("/fixed/cobweb", "/fixed/cobweb", "/fixed/cobweb"),
        ];
        for (path, expected, expected_if_allowed) in cases {
            for (allowed, expected) in [
                (Allowed::new(), expected),
                ([Allow::CgroupPath].into(), expected_if_allowed),
            ] {
                let mut spec = json!({"linux": {"cgroupsPath": path}});
                cgroups_path(&mut spec, &old, ("moved", "web2"), &allowed);
                assert_eq!(spec["linux"]["cgroupsPath"], expected);
            }
        }
    }
}
