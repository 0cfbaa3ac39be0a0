//! Everything about a restore that can be checked and decided before anything is made.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use containerd_client::types::v1::Status;
use serde_json::Value;
use transship_checkpoint::annotations::{
    MISSING_NAMESPACES, NETWORKS, PREFIX, RESTORE, RESTORE_CONTAINER, ROOTFS, SANDBOX,
};
use transship_checkpoint::criu_options::CriuOptions;
use transship_checkpoint::manifest;
use transship_checkpoint::namespaces::{self, Namespace};
use transship_checkpoint::spec::Spec;
use transship_cni::Networks;
use transship_containerd::{Containerd, unique};
use transship_sandbox::admission::foreign_spec::{self, Allow, Place};
use transship_sandbox::{DEFAULT_RUN_DIR, PodDir, paths_of_process};

use super::client_files::{self, ClientFiles};
use super::networks;
use super::spec::{cgroups_path, joined_kinds, replace_joined, strip_our_annotations};
use super::target::Target;
use crate::error::{Context, Error, Result};
use crate::restart_policy;

/// Labels that mean something to containerd, its CRI, kubelet or this program.
const RESERVED_LABELS: [&str; 4] = [
    "containerd.io/",
    "io.cri-containerd",
    "io.kubernetes.",
    "dev.transship/",
];

/// Output that goes nowhere: a pipe of the shim, which throws away what comes. A process that is given
/// the node's `/dev/null` could not be dumped another time.
const NOWHERE: &str = "file:///dev/null";

/// What a restore on this node will look like; made by [`plan`], which has checked it.
#[derive(Debug)]
pub struct Plan {
    /// Id of the new container.
    pub id: String,
    /// Snapshotter that it will use.
    pub snapshotter: String,
    /// Which restore this is: no other has this word.
    pub made_by: String,
    /// Its OCI spec as it is here, still without the annotations that ask for the restore.
    pub(super) spec: Spec,
    /// What the manifest says of the container.
    pub(super) container: manifest::Container,
    /// CRIU's options of the restore: those of the dump, unless the operator wants others.
    pub(super) criu: CriuOptions,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) runtime_binary: PathBuf,
    pub(super) sandbox: Option<Sandbox>,
    /// What it is put into, if it had networks by itself.
    pub(super) networks: Option<Networks>,
    pub(super) new_namespaces: bool,
    /// Where stdout and stderr go.
    pub(super) output: (String, String),
    /// What its client had made for it on the old node.
    pub(super) client_files: Option<ClientFiles>,
}

/// The sandbox and where its namespaces are.
#[derive(Debug)]
pub(super) struct Sandbox {
    pub(super) id: String,
    namespaces: BTreeMap<Namespace, PathBuf>,
}

impl Plan {
    /// Lets containerd start the copy again as it would have started the source, of which there is nothing any more when
    /// this one runs.
    pub(crate) fn keep_restart_policy(&mut self) {
        let policy = restart_policy::of_copy(&self.container.labels);
        self.labels.extend(policy);
    }

    /// Names the image in the container's record, and the layers that are below its files.
    pub(crate) fn set_image(&mut self, name: &str, chain_id: &str) {
        name.clone_into(&mut self.container.image.name);
        chain_id.clone_into(&mut self.container.image.chain_id);
    }

    /// The spec of the held container: it asks the runtime front for the restore.
    pub(super) fn asking_for_restore(&self, checkpoint: &str) -> Spec {
        let mut spec = self.spec.clone();
        spec.set_annotation(RESTORE, checkpoint);
        spec.set_annotation(RESTORE_CONTAINER, &self.container.name);
        spec.set_annotation(ROOTFS, "filled");
        // For the next dump.
        for (name, value) in self.criu.choices(&self.container.criu) {
            spec.set_annotation(&format!("{PREFIX}{name}"), &value);
        }
        if self.new_namespaces {
            spec.set_annotation(MISSING_NAMESPACES, "new");
        }
        if let Some(sandbox) = &self.sandbox {
            spec.set_annotation(SANDBOX, &sandbox.id);
        }
        if let Some(networks) = &self.networks {
            let json = serde_json::to_string(networks).expect("strings are JSON");
            spec.set_annotation(NETWORKS, &json);
        }
        spec
    }
}

/// Checks everything that can be checked without the checkpoint's images, and decides.
///
/// # Errors
/// [`crate::error::Kind::Refused`] with all reasons in one line.
pub async fn plan(
    node: &Containerd,
    container: &manifest::Container,
    spec: &[u8],
    target: &Target,
) -> Result<Plan> {
    let id = target.id.clone().unwrap_or_else(|| container.id.clone());
    let mut reasons = Vec::new();
    match node.container(&id).await {
        Err(error) if error.is_not_found() => {}
        Err(error) => return Err(error.into()),
        Ok(_) => reasons.push(format!(
            "a container {id:?} exists in the namespace {:?} already; --id gives the new one \
             another name",
            node.namespace()
        )),
    }
    let mut parsed: Value =
        serde_json::from_slice(spec).context("the spec of the checkpoint cannot be parsed")?;
    let new = (node.namespace(), id.as_str());
    let client_files = client_files::take_out(&mut parsed, container, new, &target.allowed);
    let snapshotter = choose_snapshotter(node, container, target, &mut reasons).await?;
    let runtime_binary = choose_runtime(container, target, &mut reasons);
    let sandbox = find_sandbox(node, &mut parsed, target, &mut reasons).await?;
    if parsed
        .pointer("/annotations/io.kubernetes.cri.container-type")
        .is_some()
    {
        reasons.push(format!(
            "it belongs to a pod of the CRI: a pod with the annotation {RESTORE} restores it"
        ));
    }
    let joined = match &sandbox {
        Some(sandbox) => sandbox.namespaces.keys().map(kind_name).collect(),
        // Their paths are replaced, or have a reason of their own.
        None => joined_kinds(&mut parsed).collect(),
    };
    let networks = match client_files::hooks_make_network(&parsed) {
        true => None,
        false => networks::choose(container, new, target, &mut reasons),
    };
    let asked = foreign(&parsed, container, target, &joined).into_iter();
    let refused = asked.filter(|refusal| !target.allowed.contains(&refusal.allow));
    reasons.extend(refused.map(|refusal| refusal.to_string()));
    if reasons.is_empty() {
        // Only now: which paths are on this node is not for the maker of a checkpoint to know.
        missing_mount_sources(&parsed, &mut reasons);
    }
    if !reasons.is_empty() {
        let reasons = reasons.join("; ");
        return Err(Error::refused(format!(
            "{id:?} cannot be restored here: {reasons}"
        )));
    }
    strip_our_annotations(&mut parsed);
    cgroups_path(&mut parsed, container, new, &target.allowed);
    if let Some(files) = &client_files {
        files.put_back(&mut parsed);
    }
    if target.new_namespaces {
        replace_joined(&mut parsed);
    }
    let mut spec = Spec::parse(&serde_json::to_vec(&parsed).context("the spec cannot be written")?)
        .context("the spec of the checkpoint is no OCI runtime spec")?;
    if let Some(sandbox) = &sandbox {
        let joined = namespaces::joined(&spec);
        let join = namespaces::join_sandbox(&joined, &sandbox.namespaces);
        namespaces::apply(&mut spec, &join);
    }
    Ok(Plan {
        criu: target.criu.over(container.criu.clone()),
        labels: kept_labels(container, target),
        output: choose_output(container, target),
        container: container.clone(),
        id,
        snapshotter,
        made_by: unique(),
        spec,
        runtime_binary,
        sandbox,
        networks,
        new_namespaces: target.new_namespaces,
        client_files,
    })
}

fn kind_name(namespace: &Namespace) -> String {
    namespace.oci_name().to_owned()
}

/// What the checkpoint asks of this node beyond an ordinary container.
fn foreign(
    spec: &Value,
    container: &manifest::Container,
    target: &Target,
    joined: &BTreeSet<String>,
) -> Vec<foreign_spec::Refusal> {
    let place = Place {
        old: (&container.namespace, &container.id),
        joined,
    };
    let mut asked = foreign_spec::refusals(spec, &place);
    asked.extend(foreign_spec::option_refusals(&container.criu, &target.criu));
    asked
}

async fn choose_snapshotter(
    node: &Containerd,
    container: &manifest::Container,
    target: &Target,
    reasons: &mut Vec<String>,
) -> Result<String> {
    let loaded = node.snapshotters().await?;
    let wanted = target.snapshotter.clone().unwrap_or_else(|| {
        let ours = "transship".to_owned();
        if loaded.contains(&ours) {
            ours
        } else {
            container.snapshotter.clone()
        }
    });
    if !loaded.contains(&wanted) {
        reasons.push(format!(
            "containerd has no snapshotter {wanted:?}; it has {}",
            loaded.join(", ")
        ));
    }
    Ok(wanted)
}

/// The front that turns `create` into a restore. It must work before anything is frozen: both it
/// and the OCI runtime behind it answer `--version`.
fn choose_runtime(
    container: &manifest::Container,
    target: &Target,
    reasons: &mut Vec<String>,
) -> PathBuf {
    // Which of the two fronts is all that the checkpoint decides.
    let options = container.runtime_options.clone().unwrap_or_default();
    let front = match Path::new(&options.binary_name)
        .file_name()
        .and_then(|name| name.to_str())
    {
        Some("crun" | "transship-crun") => "transship-crun",
        _ => "transship-runc",
    };
    let binary = target.runtime_binary.clone().map_or_else(
        || {
            let beside = std::env::current_exe()
                .ok()
                .map(|exe| exe.with_file_name(front));
            beside
                .filter(|path| path.is_file())
                .unwrap_or_else(|| front.into())
        },
        PathBuf::from,
    );
    for (program, what) in [
        (binary.as_path(), "the runtime front"),
        (Path::new("criu"), "CRIU"),
    ] {
        match Command::new(program).arg("--version").output() {
            Ok(output) if output.status.success() => {}
            Ok(output) => reasons.push(format!(
                "{what} {} does not work: {}",
                program.display(),
                String::from_utf8_lossy(&output.stderr).trim()
            )),
            Err(error) => {
                reasons.push(format!(
                    "{what} {} cannot be run: {error}",
                    program.display()
                ));
            }
        }
    }
    binary
}

async fn find_sandbox(
    node: &Containerd,
    spec: &mut Value,
    target: &Target,
    reasons: &mut Vec<String>,
) -> Result<Option<Sandbox>> {
    let Some(id) = &target.sandbox else {
        let joined: Vec<_> = joined_kinds(spec).collect();
        if !joined.is_empty() && !target.new_namespaces {
            reasons.push(format!(
                "it shared the namespaces {} with another container: name the one whose \
                 namespaces it joins now (--sandbox), or make them its own (--new-namespaces)",
                joined.join(", ")
            ));
        }
        return Ok(None);
    };
    let task = match node.task(id).await {
        Err(error) if error.is_not_found() => {
            reasons.push(format!("the sandbox {id:?} does not run"));
            return Ok(None);
        }
        task => task?,
    };
    if task.status() != Status::Running {
        reasons.push(format!("the sandbox {id:?} does not run"));
        return Ok(None);
    }
    // Pins outlive a sandbox whose process id is taken by another process.
    let mut namespaces = PodDir::at(Path::new(DEFAULT_RUN_DIR), id)?.pins();
    if namespaces.is_empty() {
        let pid = i32::try_from(task.pid).context("the sandbox has no process id")?;
        namespaces = paths_of_process(pid);
    }
    Ok(Some(Sandbox {
        id: id.clone(),
        namespaces,
    }))
}

/// Files and directories of the source that the container has mounted must exist on this node as well.
fn missing_mount_sources(spec: &Value, reasons: &mut Vec<String>) {
    for mount in spec["mounts"].as_array().into_iter().flatten() {
        let bind = mount["options"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|option| matches!(option.as_str(), Some("bind" | "rbind")));
        let source = mount["source"].as_str().unwrap_or_default();
        if bind && Path::new(source).symlink_metadata().is_err() {
            reasons.push(format!(
                "the container mounts {source} of its node on {}, and this node has no {source}",
                mount["destination"].as_str().unwrap_or_default()
            ));
        }
    }
}

/// Labels are the container's own, but for those that make others act on it.
fn kept_labels(container: &manifest::Container, target: &Target) -> BTreeMap<String, String> {
    let is_kept = |name: &str| {
        let mut reserved = RESERVED_LABELS.iter();
        !reserved.any(|prefix| name.starts_with(prefix))
            && client_files::keeps_label(name, &target.allowed)
    };
    let labels = container.labels.clone().into_iter();
    labels.filter(|(name, _)| is_kept(name)).collect()
}

/// Of the old streams counts only whether there were any: a URI leads to a file or a program, which
/// the operator names, or allows.
fn choose_output(container: &manifest::Container, target: &Target) -> (String, String) {
    if let Some(uri) = &target.log_uri {
        return (uri.clone(), uri.clone());
    }
    let stream = |old: &String| match container.stdio.terminal || old.is_empty() {
        true => String::new(),
        false if old.contains("://") && target.allowed.contains(&Allow::LogUri) => old.clone(),
        false => NOWHERE.to_owned(),
    };
    (
        stream(&container.stdio.stdout),
        stream(&container.stdio.stderr),
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_missing_mount_source_is_a_reason() {
        let spec = json!({"mounts": [
            {"destination": "/proc", "source": "proc", "type": "proc"},
            {"destination": "/data", "source": "/no/such/dir", "options": ["rbind"]},
            {"destination": "/tmp", "source": "/tmp", "options": ["bind", "ro"]},
        ]});
        let mut reasons = Vec::new();
        missing_mount_sources(&spec, &mut reasons);
        assert_eq!(reasons.len(), 1);
        assert!(reasons[0].contains("/no/such/dir") && reasons[0].contains("/data"));
    }

    #[test]
    fn labels_of_containerd_and_uris_stay_behind() {
        let mut container = manifest::Container::default();
        for name in [
            "containerd.io/restart.status",
            "dev.transship/suspended-restart.status",
            "io.kubernetes.pod.name",
            "mine",
        ] {
            container.labels.insert(name.into(), "x".into());
        }
        let nobody = Target::default();
        let kept: Vec<_> = kept_labels(&container, &nobody).into_keys().collect();
        assert_eq!(kept, ["mine"]);
        container.stdio.stdout = "binary:///bin/sh".into();
        assert_eq!(
            choose_output(&container, &nobody),
            (NOWHERE.into(), String::new())
        );
        let allowing = Target {
            allowed: [Allow::LogUri].into(),
            ..nobody.clone()
        };
        let (stdout, _) = choose_output(&container, &allowing);
        assert_eq!(stdout, "binary:///bin/sh");
        let named = Target {
            log_uri: Some("file:///var/log/x".into()),
            ..nobody
        };
        assert_eq!(choose_output(&container, &named).1, "file:///var/log/x");
    }
}
