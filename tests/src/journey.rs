//! The journey that the demo shows and the tests check: a container leaves node a in mid-count and
//! counts on in node b.
//!
//! ```text
//!   node a                                        node b
//!   ┌ sandbox ─────────────┐                      ┌ sandbox-b ───────────┐
//!   │ net, ipc, uts        │   transship migrate  │ net, ipc, uts (new)  │
//!   │   ┌ counter ───────┐ │ ───────────────────> │   ┌ counter ───────┐ │
//!   │   │ 200 MB, files, │ │       ssh node-b     │   │ the same one   │ │
//!   │   │ TCP socket     │ │                      │   │                │ │
//!   └───┴────────────────┴─┘                      └───┴────────────────┴─┘
//! ```

use std::time::Duration;

use anyhow::Context as _;

use crate::run::CommandRun as _;
use crate::{
    ContainerdConfig, CounterReply, Cri, Image, Node, Pod, PodContainer, PodSecurity, Testbed,
    TestbedError, poll_until,
};

/// The OCI runtime front in a node.
pub const FRONT: &str = "/usr/local/bin/transship-runc";
/// Of [`counter_image`].
pub const COUNTER_IMAGE: &str = "transship.test/counter:1";
const COUNTER: &str = "/usr/bin/counter";
const PATIENCE: Duration = Duration::from_secs(30);

/// Starts the snapshotter and containerd in `node`, both as the README says.
///
/// # Errors
/// When one of them does not come up.
pub fn start_services(node: &Node) -> Result<(), TestbedError> {
    node.start_snapshotter()?;
    node.start_containerd(&ContainerdConfig::transship())?;
    Ok(())
}

/// Two linked nodes with everything running and the images that the journey begins with: node b
/// has no image of the counter.
///
/// # Errors
/// When a node does not come up.
pub fn start_nodes(bed: &Testbed) -> Result<(Node, Node), TestbedError> {
    let (a, b) = (bed.node("a")?, bed.node("b")?);
    bed.link(&a, &b)?;
    let pause = Image::pause(bed.settings())?;
    for node in [&a, &b] {
        start_services(node)?;
        node.import_image(&pause, "transship")?;
    }
    a.import_image(&counter_image(bed)?, "transship")?;
    Ok((a, b))
}

/// The counter's image.
///
/// # Errors
/// When the counter cannot be built.
pub fn counter_image(bed: &Testbed) -> Result<Image, TestbedError> {
    Image::counter(bed.settings(), &bed.tree_dir().join("bin/busybox"))
}

/// Runs a sandbox that others can join by its name, with an address of its own.
///
/// # Errors
/// When ctr fails.
pub fn run_sandbox(node: &Node, id: &str) -> Result<(), TestbedError> {
    let itself = format!("dev.transship/sandbox={id}");
    node.ctr(&[
        "run",
        "--detach",
        "--cni",
        "--snapshotter",
        "transship",
        "--runc-binary",
        FRONT,
        "--annotation",
        &itself,
        "transship.test/pause:1",
        id,
    ])?;
    Ok(())
}

/// Runs another program of the counter's image, in namespaces of its own.
///
/// # Errors
/// When ctr fails.
pub fn run_program(node: &Node, id: &str, program: &[&str]) -> Result<(), TestbedError> {
    let run = ["run", "--detach", "--snapshotter", "transship"];
    node.ctr(&[&run[..], &[COUNTER_IMAGE, id], program].concat())?;
    Ok(())
}

/// Runs the counter in the network, IPC and UTS namespaces of the sandbox, as ctr does it.
///
/// # Errors
/// When ctr fails.
pub fn run_counter(
    node: &Node,
    id: &str,
    sandbox: &str,
    memory_mb: u32,
    more: &[&str],
) -> Result<(), TestbedError> {
    let memory = memory_mb.to_string();
    let image = COUNTER_IMAGE;
    run_counter_as(node, image, id, sandbox, &["--memory-mb", &memory], more)
}

/// The same with options of the program; `more` are those of `ctr run`.
///
/// # Errors
/// When ctr fails.
pub fn run_counter_as(
    node: &Node,
    image: &str,
    id: &str,
    sandbox: &str,
    options: &[&str],
    more: &[&str],
) -> Result<(), TestbedError> {
    let pid = task_pid(node, sandbox)?;
    let namespaces: Vec<String> = [("network", "net"), ("ipc", "ipc"), ("uts", "uts")]
        .iter()
        .map(|(kind, file)| format!("{kind}:/proc/{pid}/ns/{file}"))
        .collect();
    let mut arguments = vec!["run", "--detach", "--snapshotter", "transship"];
    arguments.extend(
        namespaces
            .iter()
            .flat_map(|path| ["--with-ns", path.as_str()]),
    );
    arguments.extend(more);
    arguments.extend([image, id, COUNTER]);
    arguments.extend(options);
    node.ctr(&arguments)?;
    Ok(())
}

/// Process id of the container's first process, as its node sees it.
///
/// # Errors
/// When it has no task.
pub fn task_pid(node: &Node, id: &str) -> Result<u32, TestbedError> {
    poll_until("the task's process id", Duration::from_secs(5), || {
        let tasks = node
            .ctr(&["tasks", "ls"])
            .map_err(|error| error.to_string())?;
        let row = tasks
            .lines()
            .map(str::split_whitespace)
            .map(Iterator::collect::<Vec<_>>);
        row.filter(|row| row.first() == Some(&id))
            .find_map(|row| row.get(1)?.parse().ok())
            .ok_or_else(|| format!("no task {id} in {tasks}"))
    })
}

/// The address of the sandbox's network.
///
/// # Errors
/// When it has none.
pub fn sandbox_address(node: &Node, sandbox: &str) -> Result<String, TestbedError> {
    let pid = task_pid(node, sandbox)?.to_string();
    poll_until("the sandbox's address", PATIENCE, || {
        let text = node
            .command("nsenter")
            .args([
                "-t", &pid, "-n", "ip", "-4", "-o", "address", "show", "eth0",
            ])
            .read()
            .map_err(|error| error.to_string())?;
        let net = text.split_whitespace().nth(3).unwrap_or_default();
        net.split_once('/')
            .map(|(address, _)| address.to_owned())
            .ok_or(text)
    })
}

/// Runs the counter as the container `web-<number>` of a pod, with so much memory; it listens at port 7000 + `number`.
///
/// # Errors
/// The CRI refuses it.
pub fn run_counter_in_pod(
    cri: &Cri,
    pod: &Pod,
    number: usize,
    memory_mb: u32,
) -> Result<(), TestbedError> {
    let (name, memory) = (format!("web-{number}"), memory_mb.to_string());
    let port = (7000 + number).to_string();
    let command = [COUNTER, "--memory-mb", &memory, "--port", &port];
    cri.run_container(
        pod,
        &PodContainer {
            name: &name,
            image: COUNTER_IMAGE,
            command: &command,
            security: PodSecurity::NONE,
            ..PodContainer::default()
        },
    )?;
    Ok(())
}

/// The pod as it is on the node that it has moved to, which has no other.
///
/// # Errors
/// There is none, or containerd does not answer.
pub fn moved_to(node: &Node, pod: &Pod) -> anyhow::Result<Pod> {
    let filter = r#"labels."io.cri-containerd.kind"==sandbox"#;
    let sandboxes = node.ctr(&["-n", "k8s.io", "containers", "ls", "-q", filter])?;
    let sandbox = sandboxes.lines().next().context("no pod has arrived")?;
    Ok(pod.under(sandbox.to_owned()))
}

/// Asks a counter, waiting for it to listen.
///
/// # Errors
/// When it does not answer.
pub fn ask(node: &Node, address: &str) -> Result<CounterReply, TestbedError> {
    poll_until("an answer of the counter", PATIENCE, || {
        node.ask_counter(&format!("{address}:7000"))
    })
}

/// The values that the counter in container `id` has written so far: all that it ever counted.
///
/// # Errors
/// When a value is missing or repeated, or the file cannot be read.
pub fn read_counts(node: &Node, id: &str) -> Result<u64, String> {
    let text = read_in_container(node, id, "/data/counts")?;
    let mut last = 0;
    for line in text.lines() {
        let value: u64 = line
            .parse()
            .map_err(|error| format!("{error} in {line:?}"))?;
        if value != last + 1 {
            return Err(format!(
                "{value} follows {last}: a value is missing or repeated"
            ));
        }
        last = value;
    }
    Ok(last)
}

/// Waits until the counter has counted beyond `count`, with no value missing or repeated.
///
/// # Errors
/// When it has not after a while.
pub fn wait_for_count(node: &Node, id: &str, count: u64) -> Result<u64, TestbedError> {
    poll_until("the counter to count on", PATIENCE, || {
        match read_counts(node, id)? {
            now if now > count => Ok(now),
            now => Err(format!("it is at {now}")),
        }
    })
}

/// A file as the container sees it.
///
/// # Errors
/// When it cannot be read.
pub fn read_in_container(node: &Node, id: &str, path: &str) -> Result<String, String> {
    // Through the root of its process: also where `runc exec` cannot follow into a restored
    // container (runc before 1.2.7 does not join its time namespace).
    let pid = task_pid(node, id).map_err(|error| error.to_string())?;
    let bytes = node
        .command("cat")
        .arg(format!("/proc/{pid}/root{path}"))
        .read()
        .map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// Checks the files that the counter has made, deleted and left alone.
///
/// # Errors
/// Names the first that is not as it was left.
pub fn check_files(node: &Node, id: &str) -> Result<(), String> {
    for (path, content) in [
        ("/data/made/note", "made at the start\n"),
        ("/data/keep/a", "a\n"),
        ("/data/keep/b", "b\n"),
    ] {
        let found = read_in_container(node, id, path)?;
        if found != content {
            return Err(format!("{path} holds {found:?}"));
        }
    }
    match read_in_container(node, id, "/data/delete-me") {
        Ok(_) => Err("/data/delete-me is back".to_owned()),
        Err(_) => Ok(()),
    }
}

/// Kills the container's task and waits until it is deleted.
///
/// # Errors
/// When it has no task, or the task does not end.
pub fn end_task(node: &Node, id: &str) -> Result<(), TestbedError> {
    node.ctr(&["tasks", "kill", "--signal", "KILL", id])?;
    delete_ended_task(node, id)
}

/// Deletes the container's task as soon as it has ended by itself.
///
/// # Errors
/// When it does not end.
pub fn delete_ended_task(node: &Node, id: &str) -> Result<(), TestbedError> {
    poll_until("the end of the task", PATIENCE, || {
        node.ctr(&["tasks", "delete", id])
            .map(drop)
            .map_err(|error| error.to_string())
    })
}

/// Kills and deletes a container as a person does.
///
/// # Errors
/// When ctr fails.
pub fn remove_container(node: &Node, id: &str) -> Result<(), TestbedError> {
    end_task(node, id)?;
    node.ctr(&["containers", "delete", id])?;
    Ok(())
}

/// Checks that a node has nothing of containers, checkpoints and pins.
///
/// # Errors
/// Names what is left.
pub fn check_nothing_left(node: &Node) -> anyhow::Result<()> {
    let left = leftovers(node)?;
    anyhow::ensure!(
        left.is_empty(),
        "left on node {}: {}",
        node.name(),
        left.join(", ")
    );
    Ok(())
}

/// Checks that a node has nothing of a pod any more; checkpoints may stay.
///
/// Waits for it: containerd removes a pod before the shim, that it may have lost, has ended the
/// sandbox.
///
/// # Errors
/// Names what is left.
pub fn check_no_pod_left(node: &Node) -> anyhow::Result<()> {
    let gone = poll_until("the end of all that pods had", PATIENCE, || {
        let left = node.shell(
            "set +e
             ctr -n k8s.io containers ls -q; ctr -n k8s.io tasks ls -q
             ctr -n k8s.io snapshots --snapshotter transship ls | awk 'NR > 1 && $NF != \"Committed\"'
             # crun keeps a directory of that name for itself.
             find /run/transship/pods /run/containerd/runc/k8s.io -mindepth 1 \
                 ! -name .empty-directory 2>/dev/null
             find /var/lib/transship -name '.staged-*' -o -name '.new-*'
             grep -E '/run/transship|/criu' /proc/mounts
             iptables-save 2>/dev/null | grep -i criu; nft list tables 2>/dev/null | grep -i criu
             true",
        );
        match { left }.read() {
            Ok(left) if left.is_empty() => Ok(()),
            Ok(left) => Err(left),
            Err(error) => Err(error.to_string()),
        }
    });
    Ok(gone?)
}

/// What a node still has of containers, checkpoints and pins; empty when nothing is left.
///
/// # Errors
/// When it cannot be asked.
fn leftovers(node: &Node) -> Result<Vec<String>, TestbedError> {
    let mut left = Vec::new();
    for (what, arguments) in [
        ("container", ["containers", "ls", "-q"].as_slice()),
        ("task", &["tasks", "ls", "-q"]),
        ("lease", &["leases", "ls", "-q"]),
    ] {
        let names = node.ctr(arguments)?;
        left.extend(
            names
                .lines()
                // The differ's hold what it has written until the caller refers to it; containerd
                // ends them after an hour.
                .filter(|name| !name.starts_with("transship-diff-"))
                .map(|name| format!("{what} {name}")),
        );
    }
    let snapshots = node.ctr(&["snapshots", "--snapshotter", "transship", "ls"])?;
    left.extend(
        snapshots
            .lines()
            .skip(1)
            .filter(|line| !line.trim_end().ends_with("Committed"))
            .map(|line| format!("snapshot {line}")),
    );
    let files = node
        .shell(
            "set +e
             # The record of a layer that is gone goes with the next one that is written, and a source may
             # ask for weeks what became of a migration. That of a checkpoint goes with the next one that is removed.
             find /run/transship/pods /var/lib/transship -mindepth 2 ! -path '*/consumed/*' \
                 ! -path '*/arrivals/*' ! -path '*/origins/*' 2>/dev/null
             awk '$2 ~ \"^/run/transship\" {print \"mount \" $2}' /proc/mounts
             iptables-save 2>/dev/null | grep -i criu
             nft list tables 2>/dev/null | grep -i criu
             true",
        )
        .read()?;
    left.extend(files.lines().map(str::to_owned));
    Ok(left)
}
