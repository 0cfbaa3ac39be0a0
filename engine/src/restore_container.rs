//! A container made of a checkpoint.
//!
//! ```text
//!  checkpoint --> spec for this node        container record
//!             --> layers of the image       snapshot --> upperdir filled before the first mount
//!             --> task: created             transship-runc restores it and holds it
//!             --> task: started             it runs
//! ```
//!
//! [`Restored`] is the held copy: [`Restored::start`] lets it go, [`Restored::settle`] makes it an
//! ordinary container, [`Restored::undo`] removes all that was made.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use containerd_client::types::v1::Status;
use serde_json::{Value, json};
use transship_checkpoint::annotations::{
    MISSING_NAMESPACES, PREFIX, RESTORE, RESTORE_CONTAINER, ROOTFS, SANDBOX, is_criu_option,
};
use transship_checkpoint::cri_names::annotations::CONTAINER_TYPE;
use transship_checkpoint::criu_options::CriuOptions;
use transship_checkpoint::manifest::{self, ROOTFS_DIFF_FILE, SPEC_FILE};
use transship_checkpoint::namespaces::{self, Namespace};
use transship_checkpoint::spec::Spec;
use transship_checkpoint::store::Checkpoint;
use transship_checkpoint::wire::Target;
use transship_layer::ImportOptions;
use transship_proto::runc_options::Options;
use transship_sandbox::{DEFAULT_RUN_DIR, PodDir, paths_of_process};

use crate::problem::{Kind, Problem};
use transship_containerd::Node;
use transship_containerd::containers::NewContainer;
use transship_containerd::snapshots::OverlayDirs;
use transship_containerd::tasks::Output;

/// How long the garbage collector keeps its hands off a restore.
pub const LEASE: Duration = Duration::from_secs(3600);

/// The path of a shared namespace that is to become the container's own: with
/// `missing-namespaces: new` the runtime front replaces what does not exist, while the old path may
/// by chance be that of another process on this node.
const NOWHERE: &str = "/run/transship/nowhere";

/// What a restore on this node will look like; made by [`plan`], which has checked it.
#[derive(Debug)]
pub struct Plan {
    pub id: String,
    pub snapshotter: String,
    pub namespace: String,
    /// CRIU's options of the restore: those of the dump, unless somebody wants others.
    pub criu: CriuOptions,
    runtime_binary: PathBuf,
    sandbox: Option<Sandbox>,
    new_namespaces: bool,
    output: (String, String),
}

/// The sandbox and where its namespaces are.
#[derive(Debug)]
struct Sandbox {
    id: String,
    namespaces: BTreeMap<Namespace, PathBuf>,
}

/// A container that was restored and does not run yet.
#[derive(Debug)]
pub struct Restored {
    node: Node,
    plan: Plan,
    spec: Vec<u8>,
    pub pid: u32,
}

/// Checks everything that can be checked without the checkpoint's files, and decides.
pub async fn plan(
    node: &Node,
    container: &manifest::Container,
    spec: &[u8],
    target: &Target,
) -> Result<Plan> {
    let namespace = target
        .namespace
        .clone()
        .unwrap_or_else(|| container.namespace.clone());
    let node = node.in_namespace(&namespace)?;
    let id = target.id.clone().unwrap_or_else(|| container.id.clone());
    let mut reasons = Vec::new();
    match node.container(&id).await {
        Err(error) if error.is_not_found() => {}
        Err(error) => return Err(error.into()),
        Ok(_) => reasons.push(format!(
            "a container {id:?} exists in the namespace {namespace:?} already; --id gives the new \
             one another name"
        )),
    }
    let snapshotter = choose_snapshotter(&node, container, target, &mut reasons).await?;
    let runtime_binary = choose_runtime(container, target, &mut reasons);
    let sandbox = find_sandbox(&node, container, target, &mut reasons).await?;
    let parsed: Value = serde_json::from_slice(spec).context("the spec cannot be parsed")?;
    if parsed["annotations"].get(CONTAINER_TYPE).is_some() {
        reasons.push(format!(
            "it belongs to a pod of the CRI: a pod with the annotation {RESTORE} restores it"
        ));
    }
    missing_mount_sources(&parsed, &mut reasons);
    if !reasons.is_empty() {
        let reasons = reasons.join("; ");
        return Err(Problem::new(
            Kind::Refused,
            format!("{id:?} cannot be restored here: {reasons}"),
        )
        .into());
    }
    Ok(Plan {
        criu: container.criu.clone(),
        id,
        snapshotter,
        namespace,
        runtime_binary,
        sandbox,
        new_namespaces: target.new_namespaces,
        output: choose_output(container, target),
    })
}

async fn choose_snapshotter(
    node: &Node,
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
        match std::process::Command::new(program)
            .arg("--version")
            .output()
        {
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
    node: &Node,
    container: &manifest::Container,
    target: &Target,
    reasons: &mut Vec<String>,
) -> Result<Option<Sandbox>> {
    let Some(id) = &target.sandbox else {
        if !container.joined.is_empty() && !target.new_namespaces {
            reasons.push(format!(
                "it shared the namespaces {} with another container: name the one whose \
                 namespaces it joins now (--sandbox), or make them its own (--new-namespaces)",
                container.joined.join(", ")
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
        namespaces = paths_of_process(i32::try_from(task.pid)?);
    }
    Ok(Some(Sandbox {
        id: id.clone(),
        namespaces,
    }))
}

/// Files and directories of the source that the container has mounted must be on this node, too.
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

/// FIFOs belong to a program on the source; URIs mean something on every node. In the place of a
/// FIFO comes a pipe again, that of a shim which throws away what comes: a process that is given the
/// node's `/dev/null` could not be dumped another time.
fn choose_output(container: &manifest::Container, target: &Target) -> (String, String) {
    if let Some(uri) = &target.log_uri {
        return (uri.clone(), uri.clone());
    }
    let keep = |stream: &String| match stream.as_str() {
        uri if uri.contains("://") => uri.to_owned(),
        "" => String::new(),
        _ if container.stdio.terminal => String::new(),
        _ => "file:///dev/null".to_owned(),
    };
    (keep(&container.stdio.stdout), keep(&container.stdio.stderr))
}

/// Restores one container of a checkpoint, up to the moment before its first instruction.
pub async fn restore(
    node: &Node,
    plan: Plan,
    checkpoint: &Checkpoint,
    container: &manifest::Container,
) -> Result<Restored> {
    let node = node
        .in_namespace(&plan.namespace)?
        .with_lease(LEASE)
        .await?;
    let made = make(&node, &plan, checkpoint, container).await;
    let result = match made {
        Ok((pid, spec)) => Ok(Restored {
            node: node.clone(),
            plan,
            spec,
            pid,
        }),
        Err(error) => {
            let undone = remove(&node, &plan).await;
            Err(match undone {
                Ok(()) => error,
                Err(left) => error.context(format!("and not all of it could be removed: {left:#}")),
            })
        }
    };
    // What was made is referred to by now, or gone. A lease that cannot be dropped ends by itself,
    // and is no reason to leave a held copy to nobody.
    drop(node.drop_lease().await);
    result
}

async fn make(
    node: &Node,
    plan: &Plan,
    checkpoint: &Checkpoint,
    container: &manifest::Container,
) -> Result<(u32, Vec<u8>)> {
    let dir = checkpoint.container_dir(container);
    let path = dir.join(SPEC_FILE);
    let old = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let held = spec_for_restore(&old, plan, &checkpoint.manifest.name, container)?;

    let image = &container.image;
    node.ensure_unpacked(&image.name, &image.chain_id, &plan.snapshotter)
        .await?;
    let labels = HashMap::new();
    let mounts = node
        .prepare(&plan.snapshotter, &plan.id, &image.chain_id, labels)
        .await?;
    let Some(dirs) = OverlayDirs::of(&mounts) else {
        bail!(
            "the snapshotter {:?} does not mount an overlay",
            plan.snapshotter
        );
    };
    let diff = dir.join(ROOTFS_DIFF_FILE);
    tokio::task::spawn_blocking(move || import(&diff, &dirs))
        .await
        .context("the import of the upperdir panicked")??;

    let options = Options {
        binary_name: plan.runtime_binary.display().to_string(),
        systemd_cgroup: container
            .runtime_options
            .as_ref()
            .is_some_and(|o| o.systemd_cgroup),
        ..Options::default()
    };
    node.create_container(NewContainer {
        id: plan.id.clone(),
        labels: container.labels.clone().into_iter().collect(),
        image: image.name.clone(),
        runtime: container.runtime.clone(),
        runtime_options: Some(containerd_client::to_any(&options)),
        spec: held.clone(),
        snapshotter: plan.snapshotter.clone(),
        snapshot_key: plan.id.clone(),
    })
    .await?;
    let (stdout, stderr) = plan.output.clone();
    let pid = node
        .create_task(&plan.id, mounts, Output { stdout, stderr })
        .await?;
    Ok((pid, held))
}

fn import(diff: &Path, dirs: &OverlayDirs) -> Result<()> {
    let file = File::open(diff).with_context(|| format!("cannot open {}", diff.display()))?;
    let layer = transship_layer::decompress(BufReader::with_capacity(1 << 20, file))?;
    let options = ImportOptions::default();
    transship_layer::import_into_upperdir(layer, &dirs.upperdir, &dirs.lowerdirs, &options)
        .with_context(|| format!("cannot fill the upperdir {}", dirs.upperdir.display()))?;
    Ok(())
}

/// The spec of the checkpoint, changed to what it must be here.
fn spec_for_restore(
    old: &[u8],
    plan: &Plan,
    checkpoint: &str,
    container: &manifest::Container,
) -> Result<Vec<u8>> {
    let mut spec: Value = serde_json::from_slice(old).context("the spec cannot be parsed")?;
    if let Some(path) = spec.pointer_mut("/linux/cgroupsPath")
        && let Some(text) = path.as_str()
    {
        *path = json!(cgroups_path(text, container, plan));
    }
    if let Some(annotations) = spec["annotations"].as_object_mut() {
        // Those of an earlier restore, and of the sandbox that it had.
        annotations.retain(|key, _| !key.starts_with(PREFIX));
    }
    if plan.new_namespaces {
        for namespace in joined_namespaces(&mut spec) {
            namespace["path"] = json!(NOWHERE);
        }
    }
    let mut spec = Spec::parse(&serde_json::to_vec(&spec)?)?;
    spec.set_annotation(RESTORE, checkpoint);
    spec.set_annotation(RESTORE_CONTAINER, &container.name);
    spec.set_annotation(ROOTFS, "filled");
    // The next dump has them, too.
    for (name, value) in plan.criu.choices(&container.criu) {
        spec.set_annotation(&format!("{PREFIX}{name}"), &value);
    }
    if plan.new_namespaces {
        spec.set_annotation(MISSING_NAMESPACES, "new");
    }
    if let Some(sandbox) = &plan.sandbox {
        spec.set_annotation(SANDBOX, &sandbox.id);
        let joined = namespaces::joined(&spec);
        let join = namespaces::join_sandbox(&joined, &sandbox.namespaces);
        namespaces::apply(&mut spec, &join);
    }
    Ok(spec.to_json())
}

/// The namespaces of a spec that have a path.
fn joined_namespaces(spec: &mut Value) -> impl Iterator<Item = &mut Value> {
    let namespaces = spec
        .pointer_mut("/linux/namespaces")
        .and_then(Value::as_array_mut);
    let joined = |namespace: &&mut Value| namespace["path"].as_str().is_some_and(|p| !p.is_empty());
    namespaces.into_iter().flatten().filter(joined)
}

/// A cgroup path that names the container or its namespace names the new one: containerd's
/// clients write `/<namespace>/<id>`, with systemd `<slice>:<prefix>:<id>`.
fn cgroups_path(path: &str, container: &manifest::Container, plan: &Plan) -> String {
    if path == format!("/{}/{}", container.namespace, container.id) {
        return format!("/{}/{}", plan.namespace, plan.id);
    }
    match path.strip_suffix(&container.id) {
        Some(front) if front.ends_with(['/', ':']) => format!("{front}{}", plan.id),
        _ => path.to_owned(),
    }
}

impl Restored {
    /// Id of the container.
    pub fn id(&self) -> &str {
        &self.plan.id
    }

    /// Lets the copy run, and gives its process id. If it does not, it is still there to be undone.
    pub async fn start(&self) -> Result<u32> {
        self.node.start_task(&self.plan.id).await?;
        Ok(self.pid)
    }

    /// Makes the running copy a container like any other: started again, it starts its program, so
    /// what asked for the restore leaves its record.
    pub async fn settle(self) -> Result<()> {
        let mut spec: Value = serde_json::from_slice(&self.spec)?;
        if let Some(annotations) = spec["annotations"].as_object_mut() {
            annotations
                .retain(|key, _| !key.starts_with(PREFIX) || key == SANDBOX || is_criu_option(key));
        }
        for namespace in joined_namespaces(&mut spec).filter(|found| found["path"] == NOWHERE) {
            if let Some(fields) = namespace.as_object_mut() {
                fields.remove("path");
            }
        }
        self.node
            .update_spec(&self.plan.id, serde_json::to_vec(&spec)?)
            .await
            .with_context(|| {
                format!(
                    "{:?} runs, but its record still asks for the restore",
                    self.plan.id
                )
            })
    }

    /// Removes all that was made.
    pub async fn undo(self) -> Result<()> {
        remove(&self.node, &self.plan).await
    }
}

async fn remove(node: &Node, plan: &Plan) -> Result<()> {
    node.kill_task(&plan.id).await?;
    match node.delete_container(&plan.id).await {
        Err(error) if !error.is_not_found() => return Err(error.into()),
        _ => {}
    }
    node.remove_snapshot(&plan.snapshotter, &plan.id).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_paths_follow_the_id() {
        let container = manifest::Container {
            id: "web".into(),
            namespace: "default".into(),
            ..manifest::Container::default()
        };
        let plan = Plan {
            criu: CriuOptions::default(),
            id: "web2".into(),
            snapshotter: String::new(),
            namespace: "moved".into(),
            runtime_binary: PathBuf::new(),
            sandbox: None,
            new_namespaces: false,
            output: Default::default(),
        };
        for (path, expected) in [
            ("/default/web", "/moved/web2"),
            ("/other/web", "/other/web2"),
            ("system.slice:nerdctl:web", "system.slice:nerdctl:web2"),
            ("/fixed/cobweb", "/fixed/cobweb"),
        ] {
            assert_eq!(cgroups_path(path, &container, &plan), expected);
        }
    }

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
}
