//! The units of `config/` under a real systemd, installed as `make install` does it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use containerd_client::connect;
use transship_proto::node_api::{CheckpointPodRequest, NodeClient, PostCheckpointState};
use transship_testbed::{
    CommandRun as _, Image, Node, PodNamespaces, Testbed, TestbedError, Tree, journey, poll_until,
};

use crate::Case;
use crate::pods::{FIRST, reached};
use crate::vm_cgroups::{start_services, stop_services};

const PATIENCE: Duration = Duration::from_secs(30);
const RESTARTS: usize = 3;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [
        Case {
            what: "units",
            tree: Tree::Trixie,
            run: the_snapshotter_is_a_unit,
        },
        Case {
            what: "node_unit",
            tree: Tree::Trixie,
            run: the_node_api_is_a_unit,
        },
    ]
    .into_iter()
}

fn the_snapshotter_is_a_unit(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.machine()?;
    node.shell(
        "cd /usr/local/lib/systemd/system; systemd-analyze verify --man=no transship-* 2>&1 | tee /dev/stderr \
         | { ! grep -i transship; }",
    )
    .run()
    .context("systemd reads the units without a word")?;
    start_services(bed, &node, false)?;
    ensure!(property(&node, "ActiveState")? == "active", "it is active");
    ensure!(property(&node, "NRestarts")? == "0", "at once");
    it_says_more_after_a_reload(&node)?;
    layers_go_in_and_out(bed, &node)?;
    stop_leaves_nothing(&node)?;

    node.shell("systemctl start transship-snapshotter.socket")
        .run()?;
    ensure!(
        property(&node, "ActiveState")? == "inactive",
        "nobody has called"
    );
    node.shell("systemctl start containerd").run()?;
    answered(|| node.ctr(&["snapshots", "--snapshotter", "transship", "ls"]))
        .context("the first call starts it")?;
    ensure!(property(&node, "ActiveState")? == "active", "it was called");
    containers_start_while_it_restarts(&node)?;
    stop_services(&node)
}

fn property(node: &Node, name: &str) -> anyhow::Result<String> {
    let show = format!("systemctl show --value -p {name} transship-snapshotter");
    Ok({ node.shell(&show) }.read()?.trim().to_owned())
}

fn journal(node: &Node, since: &str) -> anyhow::Result<String> {
    let show = format!("journalctl -u transship-snapshotter --no-pager --after-cursor={since:?}");
    Ok({ node.shell(&show) }.read()?)
}

/// The place in the journal after which the next lines come.
fn cursor(node: &Node) -> anyhow::Result<String> {
    let show = "journalctl -n 0 --show-cursor | sed -n 's/^-- cursor: //p'";
    Ok({ node.shell(show) }.read()?.trim().to_owned())
}

fn run_true(node: &Node, name: &str) -> Result<(), TestbedError> {
    node.ctr(&[
        "run",
        "--rm",
        "--snapshotter",
        "transship",
        "--runc-binary",
        journey::FRONT,
        "transship.test/counter:1",
        name,
        "/bin/busybox",
        "true",
    ])?;
    Ok(())
}

/// The result of a call that may have to wait for the daemon's start. systemd takes the connection at
/// once, but containerd gives a server one second for its first frame (gRPC's first backoff), and
/// emulated the start takes two: that alone is tried again.
fn answered<T>(call: impl Fn() -> Result<T, TestbedError>) -> anyhow::Result<T> {
    let answer = poll_until("an answer", PATIENCE, || match call() {
        Err(error) if error.to_string().contains("error reading server preface") => {
            Err(error.to_string())
        }
        other => Ok(other),
    })?;
    Ok(answer?)
}

fn it_says_more_after_a_reload(node: &Node) -> anyhow::Result<()> {
    let config = "/etc/transship/snapshotter.toml";
    let before = cursor(node)?;
    run_true(node, "quiet")?;
    let said = journal(node, &before)?;
    ensure!(!said.contains("rpc"), "no calls at info: {said}");
    node.shell(&format!(
        "sed -i 's/^log_level = .*/log_level = \"debug\"/' {config}
         systemctl reload transship-snapshotter"
    ))
    .run()?;
    poll_until("the new level", PATIENCE, || match journal(node, &before) {
        Ok(said) if said.contains("log level") => Ok(()),
        other => Err(format!("{other:?}")),
    })?;
    run_true(node, "loud")?;
    let said = journal(node, &before)?;
    ensure!(said.contains("prepare") && said.contains("loud"), "{said}");
    Ok(())
}

/// Every call of both services, through containerd, with all fences up: a layer of what is not plain
/// (device nodes, foreign owners, set-uid, capabilities) is unpacked, packed again, and removed.
fn layers_go_in_and_out(bed: &Testbed, node: &Node) -> anyhow::Result<()> {
    const NAME: &str = "transship.test/special:1";
    let before = cursor(node)?;
    let image = Image::pause(bed.settings())?.with_layer(NAME, special_layer()?);
    let list =
        "ctr snapshots --snapshotter transship ls | awk '$NF == \"Committed\" {print $1}' | sort";
    node.shell(&format!("{list} >/run/before")).run()?;
    node.import_image(&image, "transship")?;
    let files = "cd /var/lib/containerd/io.containerd.snapshotter.v1.transship/snapshots
         stat -c '%A %t:%T %u:%g %n' */fs/special/* | sed 's,[0-9]*/fs/,,'";
    let files = { node.shell(files) }.read()?;
    let wanted = "brw-rw---- 8:0 0:0 special/disk\n\
                  crw--w---- 5:1 0:0 special/console\n\
                  prw------- 0:0 0:0 special/pipe\n\
                  -rwsr-xr-x 0:0 1234:4321 special/tool\n";
    let mut lines: Vec<_> = files.lines().collect();
    let mut wanted: Vec<_> = wanted.lines().collect();
    lines.sort_unstable();
    wanted.sort_unstable();
    ensure!(lines == wanted, "{files}");

    // Of its two layers the first was there.
    let diff = format!(
        "top=$({list} | comm -13 /run/before -)
         eval \"$(ctr snapshots --snapshotter transship prepare --target /mnt work $top)\"
         mkdir -p /mnt/more; rm -rf /mnt/pause; mknod /mnt/more/disk b 8 1; umount /mnt
         ctr snapshots --snapshotter transship diff work | (zcat 2>/dev/null || cat) | tar -tvf -
         ctr snapshots --snapshotter transship rm work"
    );
    let listed = { node.shell(&diff) }.read()?;
    ensure!(
        listed.contains("8,1") && listed.contains("more/disk") && listed.contains(".wh.pause"),
        "{listed}"
    );
    node.ctr(&["images", "rm", "--sync", NAME])?;
    let said = journal(node, &before)?;
    let rpcs = said.to_lowercase();
    for rpc in ["apply", "diff", "prepare", "commit", "remove"] {
        ensure!(rpcs.contains(rpc), "no {rpc} in {said}");
    }
    ensure!(!said.contains("WARN"), "{said}");
    Ok(())
}

fn special_layer() -> anyhow::Result<Vec<u8>> {
    // vfs_cap_data (linux/capability.h): revision 2, effective; cap_net_raw permitted.
    let capability: [u8; 20] = [
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let mut layer = tar::Builder::new(Vec::new());
    let mut add = |name: &str,
                   kind: tar::EntryType,
                   mode: u32,
                   owner: (u64, u64),
                   device: (u32, u32)| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_size(0);
        header.set_mode(mode);
        header.set_uid(owner.0);
        header.set_gid(owner.1);
        header.set_mtime(1_600_000_000);
        header.set_device_major(device.0)?;
        header.set_device_minor(device.1)?;
        if name == "special/tool" {
            layer.append_pax_extensions([("SCHILY.xattr.security.capability", &capability[..])])?;
        }
        layer.append_data(&mut header, name, std::io::empty())
    };
    let root = (0, 0);
    add("special", tar::EntryType::Directory, 0o755, root, (0, 0))?;
    add("special/disk", tar::EntryType::Block, 0o660, root, (8, 0))?;
    add("special/console", tar::EntryType::Char, 0o620, root, (5, 1))?;
    add("special/pipe", tar::EntryType::Fifo, 0o600, root, (0, 0))?;
    add(
        "special/tool",
        tar::EntryType::Regular,
        0o4755,
        (1234, 4321),
        (0, 0),
    )?;
    Ok(layer.into_inner()?)
}

/// Without the socket unit containerd finds no socket for as long as systemd takes, and says so.
fn containers_start_while_it_restarts(node: &Node) -> anyhow::Result<()> {
    let restarting = AtomicBool::new(true);
    let started = thread::scope(|scope| {
        let starter = scope.spawn(|| {
            let mut count = 0;
            while restarting.load(Ordering::Relaxed) || count == 0 {
                let name = format!("short-{count}");
                answered(|| run_true(node, &name)).with_context(|| name)?;
                count += 1;
            }
            Ok::<_, anyhow::Error>(count)
        });
        let restarted = (0..RESTARTS).try_for_each(|_| {
            node.shell("systemctl restart transship-snapshotter")
                .run()?;
            answered(|| node.ctr(&["snapshots", "--snapshotter", "transship", "ls"]))?;
            Ok::<_, anyhow::Error>(())
        });
        restarting.store(false, Ordering::Relaxed);
        let started = starter.join().expect("the starter does not panic")?;
        restarted.map(|()| started)
    })?;
    ensure!(started > 0, "no container ran");
    Ok(())
}

/// `systemctl stop` of containerd and the daemon: no mount, no socket, no process.
fn stop_leaves_nothing(node: &Node) -> anyhow::Result<()> {
    stop_services(node)?;
    let left =
        "grep -e /run/transship -e /run/containerd -e /var/lib/containerd /proc/mounts || true
         find /run/transship -type s; pidof transship-snapshotter || true";
    let left = { node.shell(left) }.read()?;
    ensure!(left.is_empty(), "left: {left}");
    ensure!(property(node, "Result")? == "success", "it ended well");
    Ok(())
}

/// CRIU and the OCI runtime run below it, within its fences.
fn the_node_api_is_a_unit(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.machine()?;
    start_services(bed, &node, true)?;
    node.shell("systemctl start transship-node").run()?;
    let cri = node.cri()?.with_slices();
    let pod = cri.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &FIRST)?;
    let before = reached(&cri, &id)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut client = poll_until("the node's API", PATIENCE, || {
        runtime
            .block_on(connect("/run/transship/node.sock"))
            .map(NodeClient::new)
            .map_err(|error| error.to_string())
    })?;
    let request = CheckpointPodRequest {
        pod_sandbox_id: pod.id.clone(),
        path: "/var/lib/transship/checkpoints/web".to_owned(),
        options: HashMap::new(),
        post_checkpoint_state: PostCheckpointState::Running.into(),
    };
    runtime.block_on(client.checkpoint_pod(request))?;
    ensure!(cri.runs(&id)?, "it runs on");
    node.shell("systemctl stop transship-node").run()?;
    ensure!(cri.runs(&id)?, "it is no part of the unit");
    cri.remove_pod(&pod)?;

    let annotation = [("dev.transship/restore", "web")];
    let pod = cri.run_pod(("shop", "web-again"), &annotation, PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &FIRST)?;
    ensure!(reached(&cri, &id)? >= before, "it was restored");
    cri.remove_pod(&pod)?;
    stop_services(&node)
}
