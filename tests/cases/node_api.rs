//! The node's API over its socket: a pod stopped and made again, a snapshot out and in; and what
//! `transship check` says of the node.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use containerd_client::connect;
use containerd_client::tonic::codegen::tokio_stream::iter as stream;
use containerd_client::tonic::transport::Channel;
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, ImageSpec, LinuxContainerConfig,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
    NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
};
use transship_proto::node_api::{
    CheckpointPodRequest, ExportSnapshotRequest, ImportSnapshotRequest, ImportTarget, NodeClient,
    PostCheckpointState, RestorePodRequest,
};
use transship_testbed::{
    CommandRun as _, Cri, Node, Pod, PodNamespaces, Testbed, Tree, journey, poll_until,
};

use crate::Case;
use crate::pods::{FIRST, IMAGE, start};

const SOCKET: &str = "/run/transship/node.sock";
const ELSEWHERE: &str = "/var/lib/elsewhere/web";
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    Case::on_all_trees("node_api", a_pod_is_stopped_and_made_again)
}

/// What `config/transship-node.service` takes away, as setpriv wants it.
fn bounding_set() -> String {
    let unit = include_str!("../../config/transship-node.service");
    let dropped = unit
        .lines()
        .find_map(|line| line.strip_prefix("CapabilityBoundingSet=~"));
    let names = dropped.unwrap_or_default().split(' ');
    let names: Vec<_> = names
        .map(|name| name.to_lowercase().replace("cap_", "-"))
        .collect();
    names.join(",")
}

/// Whatever the modes are: who calls is asked of the kernel.
fn another_user_is_not_served(node: &Node) -> anyhow::Result<()> {
    const CALL: &str = r#"
        use IO::Socket::UNIX; $SIG{PIPE} = "IGNORE"; $| = 1;
        $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die "$!";
        syswrite($s, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0");
        print sysread($s, $b, 9) || 0;"#;
    node.shell(&format!("chmod 755 /run/transship; chmod 666 {SOCKET}"))
        .run()?;
    let answered = |user: &str| {
        let mut call = node.command("setpriv");
        call.args([
            "--reuid",
            user,
            "--clear-groups",
            "perl",
            "-e",
            CALL,
            SOCKET,
        ]);
        call.read()
    };
    ensure!(answered("0")? == "9", "root gets a frame of HTTP/2");
    ensure!(answered("65534")? == "0", "another user is served");
    Ok(node
        .shell(&format!("chmod 700 /run/transship; chmod 600 {SOCKET}"))
        .run()?)
}

/// A client that does not wait for the answer, as at a deadline.
fn who_gives_up_leaves_a_whole_pod(
    node: &Node,
    cri: &Cri,
    runtime: &tokio::runtime::Runtime,
    client: &NodeClient<Channel>,
    request: &RestorePodRequest,
) -> anyhow::Result<()> {
    const SANDBOXES: &str =
        "ctr -n k8s.io containers ls -q 'labels.\"io.cri-containerd.kind\"==sandbox'";
    let mut client = client.clone();
    let sandbox_is_there = async {
        loop {
            match node.shell(SANDBOXES).read()?.trim() {
                "" => tokio::time::sleep(Duration::from_millis(20)).await,
                sandbox => return anyhow::Ok(sandbox.to_owned()),
            }
        }
    };
    let sandbox = runtime.block_on(async {
        let sandbox = tokio::select! {
            answer = client.restore_pod(request.clone()) => anyhow::bail!("answered: {answer:?}"),
            sandbox = sandbox_is_there => sandbox,
        };
        // That nobody waits is told from here as well.
        tokio::time::sleep(Duration::from_millis(200)).await;
        sandbox
    })?;
    poll_until("the end of the restore", PATIENCE, || {
        let running = node
            .shell("ctr -n k8s.io tasks ls | grep -c RUNNING || true")
            .read();
        match running.map_err(|error| error.to_string())?.trim() {
            "2" => Ok(()),
            other => Err(format!("{other} tasks")),
        }
    })?;
    let pod = Pod::of(sandbox, request.config.clone().unwrap_or_default());
    let reply = journey::ask(node, &cri.pod_ip(&pod)?)?;
    ensure!(reply.memory_ok, "{reply:?}");
    Ok(cri.remove_pod(&pod)?)
}

fn a_pod_is_stopped_and_made_again(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    start(bed, &node, true)?;
    check_says_what_is_there(&node)?;
    // With the capabilities that its unit leaves it.
    let kept = format!("--bounding-set={}", bounding_set());
    let serve = ["setpriv", "--no-new-privs", &kept, "transship", "serve"];
    node.start_daemon("transship-serve", &serve)?;
    let mode = poll_until("the socket", PATIENCE, || {
        let stat = node.command("stat").args(["-c", "%a %u", SOCKET]).read();
        stat.map_err(|error| error.to_string())
    })?;
    ensure!(mode.trim() == "600 0", "{mode}");
    another_user_is_not_served(&node)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let path = node.path_from_outside(SOCKET);
    let client = NodeClient::new(runtime.block_on(connect(path))?);

    let cri = node.cri()?;
    let pod = cri.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &FIRST)?;
    let before = journey::ask(&node, &cri.pod_ip(&pod)?)?.count;
    let checkpoint = |pod: &str, options: &[(&str, &str)], state: PostCheckpointState| {
        let request = CheckpointPodRequest {
            pod_sandbox_id: pod.to_owned(),
            path: ELSEWHERE.to_owned(),
            options: options
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
            post_checkpoint_state: state.into(),
        };
        let mut client = client.clone();
        runtime.block_on(async move { client.checkpoint_pod(request).await })
    };
    for (pod, options, said) in [
        ("shop/nobody", [("tcp", "close")], "there is no pod"),
        (pod.id.as_str(), [("tcp", "maybe")], "\"established\""),
    ] {
        let status = checkpoint(pod, &options, PostCheckpointState::Running)
            .err()
            .context("taken all the same")?;
        ensure!(status.message().contains(said), "{status}");
    }
    checkpoint(&pod.id, &[("tcp", "close")], PostCheckpointState::Stopped)?;
    poll_until("the end of the pod", PATIENCE, || match cri.runs(&id) {
        Ok(false) => Ok(()),
        Ok(true) => Err("it runs".to_owned()),
        Err(error) => Err(error.to_string()),
    })?;
    let again = checkpoint(&pod.id, &[], PostCheckpointState::Running);
    ensure!(again.is_err(), "a pod that is stopped has nothing to dump");

    // What a snapshot changes, out and into another one.
    let mut exporter = client.clone();
    let layer = runtime.block_on(async {
        let request = ExportSnapshotRequest {
            namespace: "k8s.io".to_owned(),
            snapshotter: String::new(),
            key: id.clone(),
        };
        let mut chunks = exporter.export_snapshot(request).await?.into_inner();
        let mut layer = Vec::new();
        while let Some(chunk) = chunks.message().await? {
            layer.extend(chunk.data);
        }
        Ok::<_, anyhow::Error>(layer)
    })?;
    cri.remove_pod(&pod)?;
    import_copy(&node, &client, &runtime, &layer)?;

    let config = sandbox("web-again");
    let request = RestorePodRequest {
        path: ELSEWHERE.to_owned(),
        config: Some(config.clone()),
        container_configs: vec![container("first")],
        ..RestorePodRequest::default()
    };
    let mut restorer = client.clone();
    let unknown = RestorePodRequest {
        container_configs: vec![ContainerConfig::default()],
        ..request.clone()
    };
    let failed = runtime.block_on(async { restorer.restore_pod(unknown).await });
    ensure!(failed.is_err(), "a container without an image");
    let pods = node.shell("ctr -n k8s.io containers ls -q").read()?;
    ensure!(pods.is_empty(), "a pod that failed leaves {pods}");

    who_gives_up_leaves_a_whole_pod(&node, &cri, &runtime, &client, &request)?;
    let answer = runtime.block_on(restorer.restore_pod(request))?;
    let pod = Pod::of(answer.into_inner().pod_sandbox_id, config);
    let reply = journey::ask(&node, &cri.pod_ip(&pod)?)?;
    ensure!(
        reply.count >= before && reply.memory_ok && reply.hostname == "web-again",
        "{reply:?}, and before {before}"
    );
    cri.remove_pod(&pod)?;
    node.stop_daemon("transship-serve", "TERM")?;
    let left = node.shell(&format!(
        "set +e; find {SOCKET} 2>/dev/null; find /var/lib/transship/checkpoints -mindepth 1
         rm -r /var/lib/elsewhere; true"
    ));
    let left = { left }.read()?;
    ensure!(left.is_empty(), "left: {left}");
    journey::check_nothing_left(&node)
}

/// Into a new snapshot without parent, in messages of different sizes.
fn import_copy(
    node: &Node,
    client: &NodeClient<Channel>,
    runtime: &tokio::runtime::Runtime,
    layer: &[u8],
) -> anyhow::Result<()> {
    let target = ImportTarget {
        namespace: "default".to_owned(),
        snapshotter: "transship".to_owned(),
        key: "copy".to_owned(),
        parent: Some(String::new()),
    };
    let first = ImportSnapshotRequest {
        snapshot: Some(target),
        data: Vec::new(),
    };
    let parts = |layer: &[u8]| {
        let parts = layer.chunks(70_000).map(|part| ImportSnapshotRequest {
            snapshot: None,
            data: part.to_vec(),
        });
        std::iter::once(first.clone())
            .chain(parts)
            .collect::<Vec<_>>()
    };
    let mut importer = client.clone();
    let cut_off = parts(&layer[..layer.len() / 2]);
    let failed = runtime.block_on(importer.import_snapshot(stream(cut_off)));
    ensure!(failed.is_err(), "half a layer is none");
    let whole = parts(layer);
    let answer = runtime.block_on(importer.import_snapshot(stream(whole)))?;
    let answer = answer.into_inner();
    ensure!(answer.entries >= 3, "{answer:?}");
    node.ctr(&["snapshots", "--snapshotter", "transship", "rm", "copy"])?;
    Ok(())
}

fn sandbox(name: &str) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            namespace: "shop".to_owned(),
            attempt: 0,
        }),
        hostname: name.to_owned(),
        log_directory: format!("/var/log/pods/{name}"),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: format!("/kubepods/{name}"),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(own_processes()),
                ..LinuxSandboxSecurityContext::default()
            }),
            ..LinuxPodSandboxConfig::default()
        }),
        ..PodSandboxConfig::default()
    }
}

/// The default would be the pod's processes.
fn own_processes() -> NamespaceOption {
    NamespaceOption {
        pid: NamespaceMode::Container.into(),
        ..NamespaceOption::default()
    }
}

fn container(name: &str) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: name.to_owned(),
            attempt: 0,
        }),
        image: Some(ImageSpec {
            image: IMAGE.to_owned(),
            ..ImageSpec::default()
        }),
        command: vec!["/bin/true".to_owned()],
        log_path: format!("{name}.log"),
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(own_processes()),
                ..LinuxContainerSecurityContext::default()
            }),
            ..LinuxContainerConfig::default()
        }),
        ..ContainerConfig::default()
    }
}

/// The nodes of the tests have no problem but those that their versions have.
fn check_says_what_is_there(node: &Node) -> anyhow::Result<()> {
    let output = node.command("transship").arg("check").output()?;
    let said = String::from_utf8(output.stdout)?;
    let has = |verdict: &str, what: &str, found: &str| {
        said.lines()
            .any(|line| line.starts_with(verdict) && line.contains(what) && line.contains(found))
    };
    for (verdict, what, found) in [
        ("ok", "containerd", node.tree().containerd_version()),
        ("ok", "CRIU", "4.2"),
        ("ok", "snapshotter", "transship"),
        ("ok", "runtime", "runc is /usr/local/bin/transship-runc"),
        ("ok", "network lock", "nft"),
        ("ok", "node.toml", "namespace"),
    ] {
        ensure!(
            has(verdict, what, found),
            "no {verdict} {what} {found} in\n{said}"
        );
    }
    let trap = has("note", "runc exec", "time namespace");
    ensure!(trap == (node.tree() != Tree::Forky), "{said}");
    ensure!(
        has("note", "crun", "libcriu2") || node.tree() == Tree::Forky,
        "{said}"
    );
    let problems = said
        .lines()
        .filter(|line| line.starts_with("problem"))
        .count();
    ensure!(
        output.status.code() == Some(i32::from(problems > 0)),
        "{} with\n{said}",
        output.status
    );
    node.write_file("/etc/transship/node.toml", "strikt = true\n")?;
    let output = node
        .command("transship")
        .args(["check", "--json"])
        .output()?;
    let findings: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout)?;
    ensure!(
        output.status.code() == Some(1)
            && findings
                .iter()
                .any(|it| it["what"] == "node.toml" && it["verdict"] == "problem"),
        "{findings:?}"
    );
    node.shell("rm /etc/transship/node.toml").run()?;
    Ok(())
}
