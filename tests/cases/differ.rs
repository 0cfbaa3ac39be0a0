//! Our diff plugin in a real containerd, measured by what containerd's own differ makes of the same
//! snapshots. containerd 1.6 (bookworm) cannot have a diff plugin.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use transship_testbed::{
    CommandRun as _, Containerd, ContainerdConfig, Image, Node, NodeOptions, Storage, Testbed,
    Tree, journey, poll_until,
};

use crate::Case;

mod api;
mod builders;
pub(crate) mod disks;
mod docker;
mod pulls;
mod random_layers;

/// A plain layer: what `ctr snapshots diff` is asked for to look into it.
const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let cases: [(_, fn(&Testbed) -> _); 9] = [
        ("differ_diff", a_diff_applies_as_what_was_changed),
        ("differ_apply", a_layer_is_applied_as_containerd_does),
        ("differ_checkpoint", a_checkpoint_of_ctr_goes_through_it),
        ("differ_fallback", what_is_not_overlay_is_left_to_walking),
        ("differ_killed", whoever_is_killed_nothing_half_stays),
        ("differ_disk_full", a_full_disk_leaves_nothing_half),
        ("differ_direct", layers_go_out_and_in_directly),
        ("differ_api", api::clients_get_what_containerd_promises),
        ("differ_pulls", pulls::every_pull_reaches_our_differ),
    ];
    let on_both = cases.into_iter().flat_map(|(what, run)| {
        [Tree::Trixie, Tree::Forky]
            .into_iter()
            .map(move |tree| Case { what, tree, run })
    });
    let on_forky: [(_, fn(&Testbed) -> _); 5] = [
        (
            "differ_builders",
            builders::images_of_other_builders_are_what_stock_makes_of_them,
        ),
        (
            "long_differ_docker",
            docker::docker_makes_of_images_what_it_makes_on_stock,
        ),
        (
            "random_layers",
            random_layers::random_stacks_become_the_same_trees,
        ),
        (
            "odd_layers",
            random_layers::odd_layers_are_taken_as_containerd_takes_them,
        ),
        (
            "long_damaged_layers",
            random_layers::damaged_layers_are_taken_as_containerd_takes_them,
        ),
    ];
    let on_forky = on_forky.map(|(what, run)| Case {
        what,
        tree: Tree::Forky,
        run,
    });
    on_both.chain(on_forky).chain(disks::cases())
}

/// A node with everything of ours, the differ's decisions in its log, and the counter's image
/// unpacked for containerd's snapshotter and for ours.
fn start(bed: &Testbed, options: &NodeOptions) -> anyhow::Result<(Node, Containerd, Image)> {
    let node = bed.node_with("a", options)?;
    node.start_snapshotter_with(&["--log-level", "debug"])?;
    let containerd = node.start_containerd(&ContainerdConfig::transship())?;
    let image = journey::counter_image(bed)?;
    for snapshotter in ["overlayfs", "transship"] {
        node.import_image(&image, snapshotter)?;
    }
    Ok((node, containerd, image))
}

/// Restarts containerd without our differ.
fn restart_stock(node: &Node, containerd: Containerd) -> anyhow::Result<()> {
    containerd.stop("TERM")?;
    node.start_containerd(&ContainerdConfig {
        transship_diff: false,
        ..ContainerdConfig::transship()
    })?;
    Ok(())
}

fn log_counts(node: &Node, line: &str) -> anyhow::Result<usize> {
    let log = String::from_utf8(node.read_file("/var/log/snapshotter.log")?)?;
    Ok(log.lines().filter(|found| found.contains(line)).count())
}

/// The snapshot on which containers of the image are built.
fn top_of_image(node: &Node, snapshotter: &str) -> anyhow::Result<String> {
    let snapshots = node.ctr(&["snapshots", "--snapshotter", snapshotter, "ls"])?;
    let rows = || {
        snapshots
            .lines()
            .skip(1)
            .filter(|row| row.contains("Committed"))
            .map(|row| row.split_whitespace().collect::<Vec<_>>())
    };
    // KEY [PARENT] KIND
    let is_parent = |key: &str| rows().any(|row| row.len() == 3 && row[1] == key);
    rows()
        .map(|row| row[0].to_owned())
        .find(|key| !is_parent(key))
        .with_context(|| format!("no top in {snapshots}"))
}

/// Mounts the snapshot on /mnt, runs the script there, unmounts it.
fn in_snapshot(node: &Node, snapshotter: &str, key: &str, script: &str) -> anyhow::Result<String> {
    let mount = node.ctr(&[
        "snapshots",
        "--snapshotter",
        snapshotter,
        "mounts",
        "/mnt",
        key,
    ])?;
    // mount(8) passes at most 255 bytes of an option through the new mount API.
    let shell = format!(
        "export LIBMOUNT_FORCE_MOUNT2=always; mkdir -p /mnt; {mount}\n(cd /mnt\n{script}\n)\numount /mnt\n"
    );
    Ok(node.shell(&shell).read()?)
}

/// All that a program can see of the files; times in nanoseconds, or in seconds.
fn list_tree(nanoseconds: bool) -> String {
    let time = if nanoseconds { "%T@" } else { "%Ts" };
    format!(
        "find . -mindepth 1 ! -type d -printf '%p %y %m %U:%G %n {time} %s %l\\n' | sort
         find . -mindepth 1 -type d -printf '%p %y %m %U:%G {time}\\n' | sort
         find . -type b,c -exec stat -c '%n %t:%T' {{}} + | sort
         find . -type f -exec sha256sum {{}} + | sort -k 2"
    )
}

/// Every kind of change that a layer can carry.
const CHANGE: &str = "
    mkdir -p new/deep/dir; echo new >new/deep/dir/file; : >new/empty
    echo changed >>data/keep/a
    rm data/delete-me
    rm -r data/keep; mkdir data/keep; echo other >data/keep/other
    mv bin/busybox bin/box; ln -s box bin/busybox
    ln new/deep/dir/file new/hardlink; ln -s ../../etc/passwd 'new/sym link'
    chmod 4755 bin/box; chown 12345:54321 new/empty; chmod 0 new/empty
    chmod 1777 tmp; rmdir root; echo a-file >root
    mkfifo new/fifo; mknod new/null c 1 3
    printf 'spaces and \\n newline' >\"new/odd
name\"
    truncate -s 1M new/sparse; printf x | dd of=new/sparse bs=1 seek=500000 conv=notrunc status=none
    head -c 3000000 /dev/urandom >new/random
    touch -d '2001-02-03 04:05:06.789012345' new/old";

fn a_diff_applies_as_what_was_changed(bed: &Testbed) -> anyhow::Result<()> {
    let (node, containerd, image) = start(bed, &NodeOptions::default())?;
    let mut made = Vec::new();
    for snapshotter in ["overlayfs", "transship"] {
        let snapshots = |arguments: &[&str]| {
            node.ctr(&[&["snapshots", "--snapshotter", snapshotter], arguments].concat())
        };
        let diff = format!("ctr snapshots --snapshotter {snapshotter} diff --media-type {PLAIN}");
        let written = log_counts(&node, "layer written")?;
        snapshots(&["prepare", "active", &top_of_image(&node, snapshotter)?])?;
        in_snapshot(&node, snapshotter, "active", CHANGE)?;
        let truth = in_snapshot(&node, snapshotter, "active", &list_tree(true))?;
        // All three kinds of blob hold the same tar, in the eyes of other people's tools.
        node.shell(&format!(
            "{diff} active >/root/plain
             ctr snapshots --snapshotter {snapshotter} diff active >/root/gzip
             {diff}+zstd active >/root/zstd
             gzip -dc /root/gzip | cmp - /root/plain
             zstd -dc /root/zstd | cmp - /root/plain
             tar --list --file /root/plain >/dev/null"
        ))
        .run()?;
        // A committed snapshot against its parent.
        snapshots(&["commit", "committed", "active"])?;
        node.shell(&format!("{diff} committed | cmp - /root/plain"))
            .run()?;
        // And one that has no parent.
        snapshots(&["prepare", "base", ""])?;
        in_snapshot(
            &node,
            snapshotter,
            "base",
            "mkdir d; echo x >d/f; chmod 2750 d",
        )?;
        let list = node
            .shell(&format!(
                "{diff} base | tar --list --verbose --numeric-owner"
            ))
            .read()?;
        ensure!(
            list.contains("drwxr-s---") && list.contains(" d/f"),
            "{list}"
        );
        ensure!(log_counts(&node, "layer written")? == written + 5);
        let blob = |name: &str| node.read_file(&format!("/root/{name}"));
        let blobs = [
            ("", blob("plain")?),
            ("+gzip", blob("gzip")?),
            ("+zstd", blob("zstd")?),
        ];
        made.push((snapshotter, blobs, truth));
    }
    ensure!(log_counts(&node, "WARN")? == 0);
    restart_stock(&node, containerd)?;
    for (snapshotter, blobs, truth) in made {
        let plain = blobs[0].1.clone();
        for (suffix, blob) in blobs {
            // A base of its own for each: a chain that is there would not be applied again.
            let tag = format!("transship.test/{snapshotter}:1{}", suffix.replace('+', "-"));
            let own = own_base(&image, &tag)?;
            let image = own.with_compressed_layer(&tag, &plain, (suffix, blob));
            node.import_image(&image, "overlayfs")?;
            let tree = list_image(&node, image.reference(), "overlayfs", true)?;
            ensure!(tree == truth, "{tag}:\n{}", difference(&truth, &tree));
        }
    }
    Ok(())
}

/// The image with an empty layer more, which no other has: only the tar's end, and `tag` behind it.
fn own_base(image: &Image, tag: &str) -> anyhow::Result<Image> {
    let mut layer = vec![0; 1024];
    layer.extend(tag.bytes());
    layer.resize(2048, 0);
    Ok(image.clone().with_layer(tag, layer))
}

fn list_image(
    node: &Node,
    reference: &str,
    snapshotter: &str,
    nanoseconds: bool,
) -> anyhow::Result<String> {
    let mount = [
        "images",
        "mount",
        "--snapshotter",
        snapshotter,
        reference,
        "/mnt",
    ];
    node.shell("mkdir -p /mnt").run()?;
    node.ctr(&mount)?;
    let tree = node
        .shell(&format!("cd /mnt; {}", list_tree(nanoseconds)))
        .read()?;
    node.ctr(&[
        "images",
        "unmount",
        "--rm",
        "--snapshotter",
        snapshotter,
        "/mnt",
    ])?;
    Ok(tree)
}

/// An image whose last layer has deletions, opaque directories and the rest, made by walking, goes
/// through our Apply into both snapshotters, and through containerd's.
fn a_layer_is_applied_as_containerd_does(bed: &Testbed) -> anyhow::Result<()> {
    let (node, containerd, image) = start(bed, &NodeOptions::default())?;
    restart_stock(&node, containerd)?;
    let applied = log_counts(&node, "layer applied")?;
    let top = top_of_image(&node, "overlayfs")?;
    node.ctr(&["snapshots", "prepare", "active", &top])?;
    in_snapshot(&node, "overlayfs", "active", CHANGE)?;
    node.shell(&format!(
        "ctr snapshots diff --media-type {PLAIN} active >/root/walking"
    ))
    .run()?;
    if bed.tree() == Tree::Forky {
        let media_type = "application/vnd.oci.image.layer.v1.tar+zstd";
        node.shell(&format!(
            "ctr snapshots diff --media-type {media_type} active >/root/packed.zst"
        ))
        .run()?;
    }
    let walking = node.read_file("/root/walking")?;
    let changed = image
        .clone()
        .with_layer("transship.test/changed:1", walking);
    node.import_image(&changed, "overlayfs")?;
    let truth = list_image(&node, changed.reference(), "overlayfs", true)?;
    ensure!(log_counts(&node, "layer applied")? == applied);

    for (snapshotter, suffix) in [("overlayfs", "+gzip"), ("transship", "+zstd")] {
        // As containerd's own differ compresses it.
        let pack = match suffix {
            // Of 1.7 no two are equal: deletions have the time of the diff.
            "+gzip" => {
                "ctr snapshots diff active >/root/packed; gzip -dc /root/packed >/root/walking"
            }
            _ if bed.tree() == Tree::Forky => {
                "mv /root/packed.zst /root/packed; zstd -dcf /root/packed >/root/walking"
            }
            // The walking differ of 1.7 knows no zstd.
            _ => "zstd -q -f /root/walking -o /root/packed",
        };
        node.shell(pack).run()?;
        let packed = node.read_file("/root/packed")?;
        let plain = node.read_file("/root/walking")?;
        let image = |blob: Vec<u8>| {
            let name = format!("transship.test/changed:1{}", suffix.replace('+', "-"));
            image
                .clone()
                .with_compressed_layer(&name, &plain, (suffix, blob))
        };
        // From nothing: a chain that is there would not be applied again.
        node.stop_daemon("containerd", "TERM")?;
        node.shell("rm -rf /var/lib/containerd/io.containerd.{metadata,snapshotter}*")
            .run()?;
        node.stop_daemon("snapshotter", "TERM")?;
        node.shell("rm -rf /var/lib/containerd/*").run()?;
        node.start_snapshotter_with(&["--log-level", "debug"])?;
        node.start_containerd(&ContainerdConfig::transship())?;
        let warned = log_counts(&node, "WARN")?;
        // --local: by the client, through the diff service, as the CRI does it.
        let import = |image: &Image| -> anyhow::Result<String> {
            node.write_file("/root/image.tar", image.to_archive()?)?;
            Ok(format!(
                "ctr images import --local --snapshotter {snapshotter} /root/image.tar"
            ))
        };
        // Cut off, and with a wrong checksum at the end (gzip: CRC and length; zstd: XXH64): an
        // error, and neither a layer nor half of one.
        let mut wrong = packed.clone();
        let checksum = wrong.len() - if suffix == "+gzip" { 6 } else { 2 };
        wrong[checksum] ^= 1;
        for damaged in [packed[..packed.len() / 2].to_vec(), wrong] {
            let damaged = image(damaged);
            let error = node.shell(&import(&damaged)?).read_failure()?;
            ensure!(error.contains("cannot apply the layer"), "{error}");
            // Nothing holds the layers below it. They go now, not while the next import, which has
            // seen them, prepares a snapshot on one.
            collect_garbage(&node)?;
            let list = node.ctr(&["snapshots", "--snapshotter", snapshotter, "ls"])?;
            ensure!(list.lines().count() == 1, "{list}");
        }
        ensure!(log_counts(&node, "WARN")? == warned + 2);
        let whole = image(packed);
        // containerd has compared the diff ids; all layers went through ours.
        let applied = log_counts(&node, "layer applied")?;
        node.shell(&import(&whole)?).run()?;
        ensure!(log_counts(&node, "layer applied")? == applied + whole.layers());
        let tree = list_image(&node, whole.reference(), snapshotter, true)?;
        ensure!(
            tree == truth,
            "{snapshotter}:\n{}",
            difference(&truth, &tree)
        );
    }
    Ok(())
}

/// The end of a lease that is waited for runs containerd's collector.
fn collect_garbage(node: &Node) -> anyhow::Result<()> {
    node.ctr(&["leases", "create", "--id", "sweep"])?;
    node.ctr(&["leases", "rm", "--sync", "sweep"])?;
    Ok(())
}

/// `ctr containers checkpoint --rw` asks for the diff, `restore --rw` applies it, both unchanged.
fn a_checkpoint_of_ctr_goes_through_it(bed: &Testbed) -> anyhow::Result<()> {
    let (node, _containerd, image) = start(bed, &NodeOptions::default())?;
    let run = [
        "run",
        "--detach",
        "--snapshotter",
        "transship",
        image.reference(),
        "web",
    ];
    node.ctr(&[&run[..], &["/usr/bin/counter", "--memory-mb", "16"]].concat())?;
    let before = journey::wait_for_count(&node, "web", 5)?;
    let checkpoint = "transship.test/checkpoint:1";
    node.ctr(&[
        "containers",
        "checkpoint",
        "--rw",
        "--task",
        "web",
        checkpoint,
    ])?;
    ensure!(log_counts(&node, "layer written")? == 1);
    journey::remove_container(&node, "web")?;
    let applied = log_counts(&node, "layer applied")?;
    node.ctr(&["containers", "restore", "--live", "--rw", "web", checkpoint])?;
    ensure!(log_counts(&node, "layer applied")? == applied + 1);
    journey::wait_for_count(&node, "web", before + 5)?;
    journey::check_files(&node, "web").map_err(anyhow::Error::msg)
}

/// The built-in native snapshotter copies trees: nothing that the mounts would tell.
fn what_is_not_overlay_is_left_to_walking(bed: &Testbed) -> anyhow::Result<()> {
    let (node, _containerd, image) = start(bed, &NodeOptions::default())?;
    // --local: the transfer service of 2.x unpacks for no snapshotter that is not configured there.
    node.write_file("/root/image.tar", image.to_archive()?)?;
    node.ctr(&[
        "images",
        "import",
        "--local",
        "--snapshotter",
        "native",
        "/root/image.tar",
    ])?;
    let top = top_of_image(&node, "native")?;
    node.ctr(&[
        "snapshots",
        "--snapshotter",
        "native",
        "prepare",
        "active",
        &top,
    ])?;
    in_snapshot(
        &node,
        "native",
        "active",
        "echo x >etc/new; rm data/delete-me",
    )?;
    let list = node
        .shell("ctr snapshots --snapshotter native diff active | tar --list --gzip")
        .read()?;
    for name in ["etc/new", "data/.wh.delete-me"] {
        ensure!(list.lines().any(|line| line == name), "{list}");
    }
    ensure!(log_counts(&node, "left to the next differ")? >= 1);
    ensure!(log_counts(&node, "layer written")? == 0);
    Ok(())
}

/// Makes a snapshot whose layer takes a while to write.
fn prepare_large(node: &Node, megabytes: u32) -> anyhow::Result<()> {
    let top = top_of_image(node, "transship")?;
    node.ctr(&[
        "snapshots",
        "--snapshotter",
        "transship",
        "prepare",
        "large",
        &top,
    ])?;
    let fill = format!("head -c {megabytes}M /dev/urandom >large");
    in_snapshot(node, "transship", "large", &fill)?;
    Ok(())
}

/// What containerd is writing.
fn half_content(node: &Node) -> Result<String, String> {
    let active = node.ctr(&["content", "active"]);
    let active = active.map_err(|error| error.to_string())?;
    Ok(active.lines().skip(1).collect::<Vec<_>>().join("\n"))
}

fn nothing_half_stays(node: &Node) -> anyhow::Result<()> {
    poll_until(
        "the end of what was half written",
        PATIENCE,
        || match half_content(node)? {
            left if left.is_empty() => Ok(()),
            left => Err(left),
        },
    )?;
    Ok(())
}

fn whoever_is_killed_nothing_half_stays(bed: &Testbed) -> anyhow::Result<()> {
    let (node, _containerd, _image) = start(bed, &NodeOptions::default())?;
    prepare_large(&node, 600)?;
    let diff = "ctr snapshots --snapshotter transship diff large";
    let start_diff = || -> anyhow::Result<()> {
        node.start_daemon("diff", &["sh", "-c", &format!("exec {diff} >/dev/null")])?;
        poll_until(
            "the start of the upload",
            PATIENCE,
            || match half_content(&node)?.contains("transship-diff") {
                true => Ok(()),
                false => Err("nothing is being written".to_owned()),
            },
        )?;
        Ok(())
    };
    start_diff()?;
    node.stop_daemon("diff", "KILL")?;
    nothing_half_stays(&node)?;

    // A differ that is killed cannot clean up; the next one of its place does.
    start_diff()?;
    node.stop_daemon("snapshotter", "KILL")?;
    poll_until("the end of the caller", PATIENCE, || {
        let running = node.shell("kill -0 \"$(cat /run/diff.pid)\"").run();
        running.map_or(Ok(()), |()| Err("it runs".to_owned()))
    })?;
    node.start_snapshotter_with(&["--log-level", "debug"])?;
    // containerd waits for up to 3 s before it connects anew.
    let top = poll_until("the snapshotter", PATIENCE, || {
        top_of_image(&node, "transship").map_err(|error| error.to_string())
    })?;
    node.ctr(&[
        "snapshots",
        "--snapshotter",
        "transship",
        "prepare",
        "small",
        &top,
    ])?;
    poll_until("a diff by the next differ", PATIENCE, || {
        node.shell("ctr snapshots --snapshotter transship diff small >/dev/null")
            .run()
            .map_err(|error| error.to_string())
    })?;
    poll_until("the end of what was half written", PATIENCE, || {
        let active = node
            .ctr(&["content", "active"])
            .map_err(|error| error.to_string())?;
        match active.lines().count() {
            1 => Ok(()),
            _ => Err(active),
        }
    })?;
    Ok(())
}

fn a_full_disk_leaves_nothing_half(bed: &Testbed) -> anyhow::Result<()> {
    let options = NodeOptions {
        storage: Storage::Tmpfs("128m".to_owned()),
        ..NodeOptions::default()
    };
    let (node, _containerd, _image) = start(bed, &options)?;
    prepare_large(&node, 70)?;
    let free = "df --output=avail /var/lib/containerd | tail -1";
    let before = node.shell(free).read()?;
    let error = node
        .shell(&format!(
            "ctr snapshots --snapshotter transship diff --media-type {PLAIN} large >/dev/null"
        ))
        .read_failure()?;
    ensure!(error.contains("no space left on device"), "{error}");
    nothing_half_stays(&node)?;
    let free_again = || -> Result<u64, String> {
        let text = node.shell(free).read().map_err(|error| error.to_string())?;
        text.trim().parse().map_err(|_| text)
    };
    let before: u64 = before.trim().parse()?;
    poll_until("the room that it took", PATIENCE, || match free_again()? {
        now if now + 1024 >= before => Ok(()),
        now => Err(format!("{now} of {before} KiB")),
    })?;
    Ok(())
}

/// The lines that only one of the two has.
fn difference(truth: &str, tree: &str) -> String {
    let only = |of: &str, other: &str, mark| {
        of.lines()
            .filter(|line| !other.lines().any(|found| found == *line))
            .map(|line| format!("{mark} {line}\n"))
            .collect::<String>()
    };
    only(truth, tree, '-') + &only(tree, truth, '+')
}

/// `transship snapshot export`, `import` and `diff`, on both snapshotters and on a running container.
fn layers_go_out_and_in_directly(bed: &Testbed) -> anyhow::Result<()> {
    let (node, _containerd, image) = start(bed, &NodeOptions::default())?;
    for snapshotter in ["overlayfs", "transship"] {
        let top = top_of_image(&node, snapshotter)?;
        let in_all = format!("--snapshotter {snapshotter}");
        node.ctr(&[
            "snapshots",
            "--snapshotter",
            snapshotter,
            "prepare",
            "active",
            &top,
        ])?;
        in_snapshot(&node, snapshotter, "active", CHANGE)?;
        let truth = in_snapshot(&node, snapshotter, "active", &list_tree(true))?;
        node.shell(&format!(
            "cd /root
             transship snapshot export {in_all} active -o out.tar
             transship snapshot export {in_all} active | cmp - out.tar
             transship snapshot diff {in_all} {top} active | cmp - out.tar
             zstd -q -f out.tar
             transship snapshot import {in_all} --parent {top} copy out.tar.zst
             transship snapshot export {in_all} copy | cmp - out.tar
             ctr snapshots --snapshotter {snapshotter} commit committed copy
             transship snapshot export {in_all} committed | cmp - out.tar
             ctr snapshots --snapshotter {snapshotter} prepare fresh {top}
             gzip -c out.tar | transship snapshot import {in_all} fresh
             # No parent and child: containerd compares them, and they are equal.
             transship snapshot diff {in_all} active fresh -o equal.tar
             test -z \"$(tar --list --file equal.tar)\"
             ctr leases ls -q | grep -v transship-diff | grep . && exit 1 || true"
        ))
        .run()?;
        for key in ["committed", "fresh"] {
            let key = if key == "committed" {
                node.ctr(&[
                    "snapshots",
                    "--snapshotter",
                    snapshotter,
                    "prepare",
                    "again",
                    key,
                ])?;
                "again"
            } else {
                key
            };
            let tree = in_snapshot(&node, snapshotter, key, &list_tree(true))?;
            ensure!(tree == truth, "{key}:\n{}", difference(&truth, &tree));
        }
        // Refused, and broken: nothing half made.
        for (import, reason) in [
            (format!("{in_all} fresh out.tar"), "has changes of its own"),
            (format!("{in_all} committed out.tar"), "is not active"),
            (
                format!("{in_all} --parent {top} broken half.tar"),
                "layer is damaged",
            ),
        ] {
            let script = format!(
                "cd /root; head -c 100000 out.tar >half.tar; transship snapshot import {import}"
            );
            let error = node.shell(&script).read_failure()?;
            ensure!(error.contains(reason), "{error}");
        }
        let list = node.ctr(&["snapshots", "--snapshotter", snapshotter, "ls"])?;
        ensure!(!list.contains("broken"), "{list}");
    }
    // A container that writes all the time stands still meanwhile, and goes on.
    let writing = "while :; do date >>/tmp/log; cat /tmp/log >/tmp/copy; rm /tmp/copy; done";
    let run = [
        "run",
        "--detach",
        "--snapshotter",
        "transship",
        image.reference(),
        "busy",
    ];
    node.ctr(&[&run[..], &["sh", "-c", writing]].concat())?;
    let log = || journey::read_in_container(&node, "busy", "/tmp/log").map(|log| log.len());
    poll_until("the container to write", PATIENCE, || match log()? {
        0 => Err("nothing yet".to_owned()),
        _ => Ok(()),
    })?;
    let goes_on = || -> anyhow::Result<()> {
        let before = log().map_err(anyhow::Error::msg)?;
        poll_until("the container to go on", PATIENCE, || match log()? {
            now if now > before => Ok(()),
            now => Err(format!("{now} bytes")),
        })?;
        Ok(())
    };
    for _ in 0..5 {
        let export =
            "transship snapshot export busy | tar --list --verbose >/root/list; cat /root/list";
        let list = node.shell(export).read()?;
        ensure!(list.contains("tmp/log"), "{list}");
    }
    goes_on()?;
    // A reader that leaves ends the export, not the container.
    node.shell("head -c 20000000 /dev/urandom >/proc/$(pgrep -o -f 'while :')/root/tmp/big")
        .run()?;
    let error = node
        .shell(
            "set +e
             { transship snapshot export busy; echo $? >/root/status; } 2>/root/error |
               head -c 10 >/dev/null
             cat /root/error >&2
             exit \"$(cat /root/status)\"",
        )
        .read_failure()?;
    ensure!(error.contains("cannot"), "{error}");
    goes_on()?;
    Ok(())
}
