//! Sysctls of a container's own network, which its spec has, are there after a restore.

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use transship_containerd::Containerd;
use transship_testbed::{CommandRun as _, Node, Testbed, Tree, journey};

use crate::Case;
use crate::migration_faults::counts_on;

const SYSCTLS: [(&str, &str); 2] = [
    ("net.core.somaxconn", "777"),
    ("net.ipv4.ip_local_port_range", "40000 40999"),
];

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [Case {
        what: "network_sysctls",
        tree: Tree::Forky,
        run: sysctls_of_the_spec_move,
    }]
    .into_iter()
}

fn sysctls_of_the_spec_move(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    run(&a)?;
    are_set(&a)?;
    let ssh = bed.ssh(&a, &b)?;
    a.command("transship")
        .args(["migrate", "web", "--to", &ssh])
        .run()?;
    counts_on(&b, "web")?;
    are_set(&b)?;
    journey::remove_container(&b, "web")?;
    journey::check_nothing_left(&b)
}

fn run(node: &Node) -> anyhow::Result<()> {
    node.ctr(&[
        "containers",
        "create",
        "--snapshotter",
        "transship",
        "transship.test/counter:1",
        "web",
        "/usr/bin/counter",
    ])?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let socket = node.path_from_outside("/run/containerd/containerd.sock");
        let containerd = Containerd::connect(&socket, "default").await?;
        let spec = containerd.container("web").await?.spec.context("no spec")?;
        let mut spec: Value = serde_json::from_slice(&spec.value)?;
        for (name, value) in SYSCTLS {
            spec["linux"]["sysctl"][name] = json!(value);
        }
        containerd
            .update_spec("web", serde_json::to_vec(&spec)?)
            .await?;
        anyhow::Ok(())
    })?;
    node.ctr(&["tasks", "start", "--detach", "web"])?;
    journey::wait_for_count(node, "web", 3)?;
    Ok(())
}

fn are_set(node: &Node) -> anyhow::Result<()> {
    let pid = journey::task_pid(node, "web")?;
    for (name, value) in SYSCTLS {
        let read = format!("nsenter -t {pid} -n sysctl -n {name} | tr '\\t' ' '");
        let found = node.shell(&read).read()?;
        ensure!(found.trim() == value, "{name} is {found}");
    }
    Ok(())
}
