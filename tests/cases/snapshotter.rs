//! The snapshotter under a real containerd: every `ctr snapshots` command, and what happens to it in
//! the life of a node.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use transship_testbed::{
    CommandRun as _, ContainerdConfig, Image, Node, Testbed, Tree, journey, poll_until,
};

use crate::Case;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    Case::on_all_trees("ctr_snapshots", every_ctr_snapshots_command_works)
        .chain(Case::on_all_trees(
            "snapshotter_lifecycle",
            daemon_and_containerd_come_and_go,
        ))
        .chain(Case::on_all_trees(
            "snapshotter_restarts",
            containers_start_while_the_daemon_restarts,
        ))
        .chain(Case::on_all_trees(
            "snapshotter_usage",
            kubelet_learns_what_images_take,
        ))
        .chain([Case {
            what: "snapshotter_remaps_ids",
            tree: Tree::Forky,
            run: user_namespaces_share_the_layers,
        }])
        .chain(Case::on_all_trees(
            "snapshotter_collects",
            garbage_goes_and_nothing_else,
        ))
        .chain(Case::on_all_trees(
            "snapshotter_hostile_annotation",
            an_image_cannot_ask_for_the_files_of_a_checkpoint,
        ))
}

fn snapshots(node: &Node, arguments: &[&str]) -> anyhow::Result<String> {
    Ok(node.ctr(&[&["snapshots", "--snapshotter", "transship"], arguments].concat())?)
}

fn start(bed: &Testbed) -> anyhow::Result<Node> {
    let node = bed.node("a")?;
    journey::start_services(&node)?;
    node.import_image(&journey::counter_image(bed)?, "transship")?;
    Ok(node)
}

fn every_ctr_snapshots_command_works(bed: &Testbed) -> anyhow::Result<()> {
    let node = start(bed)?;
    let listed = snapshots(&node, &["ls"])?;
    let rows: Vec<Vec<&str>> = listed
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().collect())
        .collect();
    ensure!(
        rows.len() == 3 && rows.iter().all(|row| row.last() == Some(&"Committed")),
        "{listed}"
    );
    let parents: Vec<&str> = rows
        .iter()
        .filter(|row| row.len() == 3)
        .map(|row| row[1])
        .collect();
    let top = rows
        .iter()
        .map(|row| row[0])
        .find(|key| !parents.contains(key))
        .context("no top")?;

    let mount = snapshots(&node, &["prepare", "--target", "/mnt", "work", top])?;
    ensure!(
        mount.contains("mount -t overlay") && mount.contains("index=off"),
        "{mount}"
    );
    let info = snapshots(&node, &["info", "work"])?;
    ensure!(
        info.contains("\"Kind\": \"Active\"") && info.contains(top),
        "{info}"
    );
    let mounts = snapshots(&node, &["mounts", "/mnt", "work"])?;
    node.shell(&format!(
        "{}; echo new >/mnt/data/new; rm /mnt/data/keep/a; umount /mnt",
        mounts.trim()
    ))
    .run()?;
    let usage = snapshots(&node, &["usage", "work"])?;
    ensure!(usage.contains("work") && usage.contains("KiB"), "{usage}");
    let changed = "tar -tf - 2>/dev/null | sort | tr '\\n' ' '";
    let diff = "ctr snapshots --snapshotter transship diff work";
    let names =
        { node.shell(&format!("{diff} | (zcat 2>/dev/null || cat) | {changed}")) }.read()?;
    ensure!(
        names.contains("data/new") && names.contains("data/keep/.wh.a"),
        "{names}"
    );

    snapshots(&node, &["commit", "done", "work"])?;
    let tree = snapshots(&node, &["tree"])?;
    ensure!(tree.contains("done"), "{tree}");
    // ctr does not protect a view from garbage collection, so it is looked at in one go. mount(8)
    // passes at most 255 bytes of an option through the new mount API.
    let seen = poll_until("a look at a view", Duration::from_secs(10), || {
        let look = "ctr snapshots --snapshotter transship rm look 2>/dev/null || true
             export LIBMOUNT_FORCE_MOUNT2=always
             eval \"$(ctr snapshots --snapshotter transship view -t /mnt look done)\"
             cat /mnt/data/new; ls /mnt/data/keep; umount /mnt";
        node.shell(look).read().map_err(|error| error.to_string())
    })?;
    ensure!(seen == "new\nb\n", "{seen:?}");
    snapshots(&node, &["prepare", "child", "done"])?;
    let error = node
        .command("ctr")
        .args(["snapshots", "--snapshotter", "transship", "rm", "done"])
        .read_failure()?;
    ensure!(
        error.contains("cannot remove snapshot with child"),
        "{error}"
    );
    // "done" itself stays: when garbage collection takes the view before ctr does, containerd goes
    // on counting it as a child (seen with the built-in overlayfs of 1.7.24, too).
    snapshots(&node, &["rm", "child"])?;
    let left = snapshots(&node, &["ls"])?;
    ensure!(left.contains("done") && !left.contains("child"), "{left}");
    Ok(())
}

/// Containers run on while containerd or the daemon is away, and both find everything again.
fn daemon_and_containerd_come_and_go(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    node.start_snapshotter()?;
    let config = ContainerdConfig {
        transship_diff: false,
        ..ContainerdConfig::transship()
    };
    let containerd = node.start_containerd(&config)?;
    let image = journey::counter_image(bed)?;
    for namespace in ["default", "k8s.io"] {
        node.import_image_into(namespace, &image, "transship")?;
        node.ctr(&[
            "-n",
            namespace,
            "run",
            "--detach",
            "--snapshotter",
            "transship",
            image.reference(),
            "web",
            "/usr/bin/counter",
            "--memory-mb",
            "1",
        ])?;
    }
    journey::wait_for_count(&node, "web", 3)?;
    let before = snapshots(&node, &["ls"])?;

    containerd.stop("TERM")?;
    let _containerd = node.start_containerd(&config)?;
    ensure!(snapshots(&node, &["ls"])? == before, "containerd came back");
    for signal in ["TERM", "KILL"] {
        node.stop_daemon("snapshotter", signal)?;
        let reached = journey::read_counts(&node, "web").map_err(anyhow::Error::msg)?;
        journey::wait_for_count(&node, "web", reached).context("without the daemon")?;
        node.start_snapshotter()?;
        // gRPC waits a moment before it connects again.
        poll_until(
            "containerd to find the daemon again",
            Duration::from_secs(30),
            || match snapshots(&node, &["ls"]) {
                Ok(now) if now == before => Ok(()),
                Ok(now) => Err(now),
                Err(error) => Err(error.to_string()),
            },
        )?;
    }
    node.ctr(&[
        "run",
        "--rm",
        "--snapshotter",
        "transship",
        image.reference(),
        "short",
        "/bin/busybox",
        "true",
    ])?;
    Ok(())
}

/// The CRI finds the snapshotter's directory: containerd 1.6 by its place, later ones by
/// `exports.root` of the proxy plugin.
fn kubelet_learns_what_images_take(bed: &Testbed) -> anyhow::Result<()> {
    let node = start(bed)?;
    let image = journey::counter_image(bed)?;
    node.import_image_into("k8s.io", &image, "transship")?;
    let cri = node.cri()?;
    poll_until(
        "the usage of images",
        Duration::from_secs(40),
        || match cri.image_usage() {
            Ok(usage) => {
                let found = usage.iter().any(|usage| {
                    let root = "/var/lib/containerd/io.containerd.snapshotter.v1.transship";
                    let mountpoint = usage.fs_id.as_ref().map(|id| id.mountpoint.as_str());
                    let used = |value: Option<u64>| value.is_some_and(|value| value > 0);
                    mountpoint == Some(root)
                        && used(usage.used_bytes.map(|bytes| bytes.value))
                        && used(usage.inodes_used.map(|inodes| inodes.value))
                });
                if found {
                    Ok(())
                } else {
                    Err(format!("{usage:?}"))
                }
            }
            Err(error) => Err(error.to_string()),
        },
    )?;
    Ok(())
}

/// A container in a user namespace sees the layers as its own, and they stay as they are: containerd
/// maps the mount by the labels that Mounts passes on.
fn user_namespaces_share_the_layers(bed: &Testbed) -> anyhow::Result<()> {
    let node = start(bed)?;
    let image = journey::counter_image(bed)?;
    let script = "stat -c %u /bin/busybox; cut -c1-33 /proc/self/uid_map; echo mine > /file";
    let seen = node.ctr(&[
        "run",
        "--snapshotter",
        "transship",
        "--uidmap",
        "0:100000:65536",
        "--gidmap",
        "0:200000:65536",
        "--remap-labels",
        image.reference(),
        "mapped",
        "/bin/busybox",
        "sh",
        "-c",
        script,
    ])?;
    let words: Vec<_> = seen.split_whitespace().collect();
    ensure!(words == ["0", "0", "100000", "65536"], "{seen}");
    let info = snapshots(&node, &["info", "mapped"])?;
    ensure!(info.contains("containerd.io/snapshot/uidmapping"), "{info}");
    let owners = "cd /var/lib/containerd/io.containerd.snapshotter.v1.transship/snapshots; \
                  stat -c '%u %g' */fs/file; stat -c '%u %g' */fs/bin/busybox";
    let owners = node.shell(owners).read()?;
    ensure!(owners == "100000 200000\n0 0\n", "{owners:?}");
    Ok(())
}

/// Containers start while the daemon is restarted again and again: containerd waits for it.
fn containers_start_while_the_daemon_restarts(bed: &Testbed) -> anyhow::Result<()> {
    const RESTARTS: usize = 5;
    let node = start(bed)?;
    let image = journey::counter_image(bed)?;
    let restarting = AtomicBool::new(true);
    let run_containers = |starter: usize| {
        let mut count = 0;
        while restarting.load(Ordering::Relaxed) {
            let name = format!("short-{starter}-{count}");
            node.ctr(&[
                "run",
                "--rm",
                "--snapshotter",
                "transship",
                image.reference(),
                &name,
                "/bin/busybox",
                "true",
            ])
            .with_context(|| name)?;
            count += 1;
        }
        Ok::<_, anyhow::Error>(count)
    };
    let started = thread::scope(|scope| {
        let run_containers = &run_containers;
        let starters = [0, 1].map(|n| scope.spawn(move || run_containers(n)));
        let restart = || {
            for _ in 0..RESTARTS {
                node.stop_daemon("snapshotter", "TERM")?;
                node.start_snapshotter()?;
                // Some work in between: reconnecting is part of it.
                snapshots(&node, &["ls"])?;
            }
            Ok::<_, anyhow::Error>(())
        };
        let restarted = restart();
        restarting.store(false, Ordering::Relaxed);
        let mut started = 0;
        for starter in starters {
            started += starter.join().expect("a starter does not panic")?;
        }
        restarted.map(|()| started)
    })?;
    ensure!(started >= RESTARTS, "only {started} containers ran");
    Ok(())
}

/// Removing an image while a container runs on it keeps what the container needs; removing the
/// container frees the rest, on disk too.
fn garbage_goes_and_nothing_else(bed: &Testbed) -> anyhow::Result<()> {
    let node = start(bed)?;
    let image = Image::counter(bed.settings(), &bed.tree_dir().join("bin/busybox"))?;
    node.ctr(&[
        "run",
        "--detach",
        "--snapshotter",
        "transship",
        image.reference(),
        "web",
        "/usr/bin/counter",
        "--memory-mb",
        "1",
    ])?;
    node.ctr(&["images", "rm", "--sync", image.reference()])?;
    let reached = journey::wait_for_count(&node, "web", 3)?;
    ensure!(
        snapshots(&node, &["ls"])?.contains("web"),
        "its snapshot stays"
    );
    let directories = "ls /var/lib/containerd/io.containerd.snapshotter.v1.transship/snapshots";
    let count =
        || -> anyhow::Result<usize> { Ok({ node.shell(directories) }.read()?.lines().count()) };
    ensure!(count()? == 4, "three layers and the container");
    journey::wait_for_count(&node, "web", reached)?;
    journey::remove_container(&node, "web")?;
    // Any synchronous removal collects garbage to its end.
    node.import_image(&Image::pause(bed.settings())?, "transship")?;
    node.ctr(&["images", "rm", "--sync", "transship.test/pause:1"])?;
    poll_until(
        "the directories to go",
        Duration::from_secs(20),
        || match count() {
            Ok(0) => Ok(()),
            Ok(left) => Err(format!("{left} are left")),
            Err(error) => Err(error.to_string()),
        },
    )?;
    ensure!(
        snapshots(&node, &["ls"])?.lines().count() == 1,
        "no snapshot is left"
    );
    Ok(())
}

/// containerd passes annotations `containerd.io/snapshot/*` of a layer's descriptor to Prepare as labels, and commits
/// the snapshot under a name that depends on the layers' content alone.
fn an_image_cannot_ask_for_the_files_of_a_checkpoint(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    journey::start_services(&node)?;
    let checkpoint = "/var/lib/transship/checkpoints/shop-db/db";
    node.shell(&format!(
        "mkdir -p {checkpoint}; echo secret >/root/stolen
         tar -C /root -cf {checkpoint}/rootfs-diff.tar stolen"
    ))
    .run()?;
    let honest = journey::counter_image(bed)?;
    let key = "containerd.io/snapshot/transship.import";
    let mut hostile = honest.clone();
    for (key, value) in [
        (key, checkpoint),
        // Whose the root of every container with this layer is.
        ("containerd.io/snapshot/uidmapping", "0:1000:65536"),
        ("containerd.io/snapshot/gidmapping", "0:1000:65536"),
    ] {
        hostile = hostile.with_annotated_top("transship.test/hostile:1", key, value);
    }
    for image in [&hostile, &honest] {
        node.import_image(image, "transship")?;
        let look = "ls /; stat -c owner=%u:%g /; cat /data/keep/a";
        let run = ["run", "--rm", "--snapshotter", "transship"];
        let files =
            node.ctr(&[&run[..], &[image.reference(), "look", "sh", "-c", look]].concat())?;
        ensure!(
            files.ends_with("owner=0:0\na\n") && !files.contains("stolen"),
            "{}: {files}",
            image.reference()
        );
    }
    Ok(())
}
