//! The restore of a small container through the CRI beside `runc restore` of the same images.
//!
//! ```text
//!   pod with dev.transship/restore ── CreateContainer, StartContainer ──> runs      (ours)
//!        │ its sandbox, its config.json
//!        └── files of the checkpoint put in place, untimed ── runc restore ──> runs (bare)
//! ```
//!
//! The bare command is given the smaller job: its root is ready, and nobody holds, checks or watches
//! what it restores.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use transship_testbed::{
    CommandRun as _, Cri, Node, PodContainer, PodNamespaces, PodSecurity, Testbed, journey,
    poll_until,
};

use crate::node_clock::time_in_node;
use crate::pod_node;
use crate::report::{Better, Goal, Row};
use crate::sizes::Sizes;
use crate::statistics::millis;

/// How many times longer than the bare restore one through the CRI may take.
const MOST: Goal = Goal::RatioAtMost(1.3);
const BARE: &str = "runc restore";
const PATIENCE: Duration = Duration::from_secs(30);
const COUNTER: PodContainer<'static> = PodContainer {
    name: "counter",
    attempt: 0,
    image: "transship.test/counter:1",
    command: &["/usr/bin/counter", "--memory-mb", "16"],
    mounts: &[],
    read_only_mounts: &[],
    security: PodSecurity::NONE,
    tty: false,
    memory_limit: 0,
};

/// Measures the part.
///
/// # Errors
/// When a restore fails.
pub(crate) fn measure(bed: &Testbed, sizes: &Sizes) -> Result<Vec<Row>> {
    let node = bed.node("restore")?;
    pod_node::start(bed, &node)?;
    let cri = node.cri()?;
    let pod = cri.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &COUNTER)?;
    journey::ask(&node, &cri.pod_ip(&pod)?)?;
    // The image's own files, for the bare restore.
    node.shell(&format!(
        "mkdir -p {BUNDLE}; cp -a /run/containerd/io.containerd.runtime.v2.task/k8s.io/{id}/rootfs {BUNDLE}/"
    ))
    .run()?;
    node.shell("transship checkpoint --pod shop/web --name web")
        .run()?;
    cri.remove_pod(&pod)?;

    let (mut created, mut started, mut bare) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=sizes.restores {
        let times = restore_twice(&node, &cri)?;
        // The first finds everything cold.
        if round > 0 {
            created.push(millis(times.create + times.start));
            started.push(millis(times.start));
            bare.push(millis(times.bare));
        }
    }
    let row = |name, ours: &[f64]| Row::of_pairs(name, "ms", ours, BARE, &bare, Better::Growth);
    Ok(vec![
        row("StartContainer to running, 16 MB in memory", &started).goal(MOST),
        row(
            "CreateContainer and StartContainer, 16 MB in memory",
            &created,
        ),
    ])
}

struct Times {
    create: Duration,
    start: Duration,
    bare: Duration,
}

fn restore_twice(node: &Node, cri: &Cri) -> Result<Times> {
    let pod = cri.run_pod(
        ("shop", "again"),
        &[("dev.transship/restore", "web")],
        PodNamespaces::Usual,
    )?;
    let began = Instant::now();
    let id = cri.create_container(&pod, &COUNTER)?;
    let create = began.elapsed();
    let began = Instant::now();
    cri.start_container(&id)?;
    let start = began.elapsed();
    let reply = journey::ask(node, &cri.pod_ip(&pod)?)?;
    ensure!(reply.memory_ok, "{reply:?}");
    node.shell(&format!(
        "jq '.root.path = \"{BUNDLE}/rootfs\" | .linux.cgroupsPath = \"/bare\" | .annotations = {{}}' \
         /run/containerd/io.containerd.runtime.v2.task/k8s.io/{id}/config.json >{BUNDLE}/config.json"
    ))
    .run()?;
    cri.stop_container(&id, 0)?;
    cri.remove_container(&id)?;
    let times = time_in_node(node, &format!("{PREPARE}\ntimed bare\n{CLEAN}"))?;
    poll_until("the end of the pod", PATIENCE, || {
        cri.remove_pod(&pod).map_err(|error| error.to_string())
    })?;
    let bare = times.first().copied().context("nothing was timed")?;
    Ok(Times {
        create,
        start,
        bare,
    })
}

const BUNDLE: &str = "/var/lib/transship/bare";
/// Files as they were dumped; the container's output goes where ours does: into pipes.
const PREPARE: &str = "
cd /var/lib/transship/bare
checkpoint=/var/lib/transship/checkpoints/web/counter
tar -x -C rootfs --exclude '.wh.*' -f $checkpoint/rootfs-diff.tar
rm -f out; mkfifo out; cat out >/dev/null 2>&1 & exec 5>out
bare() {
  runc restore --detach --pid-file pid --bundle . --image-path $checkpoint/checkpoint --work-path work bare 1>&5 2>&5 </dev/null
}";
const CLEAN: &str = "exec 5>&-; runc delete --force bare";
