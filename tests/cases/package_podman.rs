//! Debian's podman: what it writes is a container of containerd's, and what we write runs under it.
//!
//! ```text
//!  podman container checkpoint --export ──> transship import, restore
//!  transship export --format podman ──> podman container restore --import
//! ```

use anyhow::ensure;
use transship_testbed::{
    CommandRun as _, ContainerdConfig, Image, Node, NodeOptions, Testbed, Tree, journey,
};

use crate::Case;
use crate::journey::fails_with;

/// It counts into a file, has deleted one of its image, and has something in /dev/shm.
const COUNTS: &str = "rm -f /etc/delete-me; echo shared >/dev/shm/x; \
                      i=0; while true; do i=$((i+1)); echo $i >/data/count; sleep 0.2; done";
const IMAGE: &str = "localhost/busybox:1";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    std::iter::once(Case {
        what: "long_package_podman",
        tree: Tree::Forky,
        run: containers_go_to_podman_and_come_back,
    })
}

fn containers_go_to_podman_and_come_back(bed: &Testbed) -> anyhow::Result<()> {
    let options = NodeOptions {
        without_unified_cgroup: true,
        ..NodeOptions::default()
    };
    let node = bed.node_with("a", &options)?;
    node.start_snapshotter()?;
    node.start_containerd(&ContainerdConfig::transship())?;
    node.install_podman(bed.settings())?;
    make_image(&node)?;
    node.import_image(&Image::pause(bed.settings())?, "transship")?;
    from_podman(&node)?;
    to_podman(&node)?;
    journey::check_nothing_left(&node)
}

/// The same image for both engines.
fn make_image(node: &Node) -> anyhow::Result<()> {
    let script = format!(
        "mkdir -p /root/image/bin /root/image/etc /root/image/data
         cp /bin/busybox /root/image/bin/
         for name in sh sleep rm cat ls; do ln -s busybox /root/image/bin/$name; done
         echo image >/root/image/etc/delete-me
         tar -C /root/image -cf /root/image.tar .
         podman import -q /root/image.tar {IMAGE}
         podman save -q --format oci-archive -o /root/image.oci {IMAGE}
         ctr images import /root/image.oci"
    );
    Ok(node.shell(&script).run()?)
}

fn from_podman(node: &Node) -> anyhow::Result<()> {
    let run = format!("podman run -d --name web --network none {IMAGE} /bin/sh -c '{COUNTS}'");
    node.shell(&run).run()?;
    node.shell("until podman exec web cat /data/count | grep -qE '^[0-9]{2}'; do :; done")
        .run()?;
    node.shell("podman container checkpoint --export /root/theirs.tar.zst web; podman rm -f web")
        .run()?;
    let imported = { node.shell("transship import /root/theirs.tar.zst --name theirs") }.read()?;
    ensure!(imported.contains("an archive of podman"), "{imported}");
    let inside = { node.shell("transship inspect theirs --verify --all") }.read()?;
    ensure!(
        inside.contains("container web") && inside.contains("deleted  /etc/delete-me"),
        "{inside}"
    );
    node.shell("transship restore theirs --id web").run()?;
    let seen = "ctr task exec --exec-id look web /bin/sh -c \
                'cat /data/count /dev/shm/x; ls /etc; ls -ld /'";
    let seen = { node.shell(seen) }.read()?;
    let lines: Vec<&str> = seen.lines().collect();
    let count: u64 = lines.first().unwrap_or(&"").parse()?;
    ensure!(count >= 10 && lines.get(1) == Some(&"shared"), "{seen}");
    ensure!(!seen.contains("delete-me"), "{seen}");
    // With rights that CRIU compares.
    ensure!(seen.contains("dr-xr-xr-x"), "{seen}");
    journey::remove_container(node, "web")?;
    Ok(node.shell("transship rm theirs").run()?)
}

fn to_podman(node: &Node) -> anyhow::Result<()> {
    node.shell(&format!(
        "ctr run --detach {IMAGE} web /bin/sh -c '{COUNTS}'
         until ctr task exec --exec-id w web /bin/cat /data/count | grep -qE '^[0-9]{{2}}'; do :; done
         transship checkpoint web --name ours"
    ))
    .run()?;
    let before = { node.shell("ctr task exec --exec-id c web /bin/cat /data/count") }.read()?;
    let before: u64 = before.trim().parse()?;
    journey::remove_container(node, "web")?;
    node.shell("transship export ours /root/ours.tar --format podman")
        .run()?;
    node.shell("podman container restore --import /root/ours.tar")
        .run()?;
    let seen = "podman exec web /bin/sh -c 'cat /data/count /dev/shm/x; ls /etc'";
    let seen = { node.shell(seen) }.read()?;
    let lines: Vec<&str> = seen.lines().collect();
    let count: u64 = lines.first().unwrap_or(&"").parse()?;
    ensure!(
        count + 10 >= before && lines.get(1) == Some(&"shared"),
        "{seen}, {before} before"
    );
    ensure!(!seen.contains("delete-me"), "{seen}");
    // What podman would take is a checkpoint of ours again.
    node.shell(
        "transship import /root/ours.tar --name again
         transship restore again --id again",
    )
    .run()?;
    let again =
        "ctr task exec --exec-id look again /bin/sh -c 'cat /data/count /dev/shm/x; ls -ld /'";
    let again = { node.shell(again) }.read()?;
    let lines: Vec<&str> = again.lines().collect();
    let count: u64 = lines.first().unwrap_or(&"").parse()?;
    ensure!(
        count + 10 >= before && lines.get(1) == Some(&"shared"),
        "{again}, {before} before"
    );
    ensure!(again.contains("drwxr-xr-x"), "{again}");
    journey::remove_container(node, "again")?;
    node.shell("transship rm again").run()?;
    // What it is not for.
    journey::run_sandbox(node, "sandbox")?;
    node.shell(&format!(
        "ctr run --detach --with-ns network:/proc/$(ctr task ls | awk '/sandbox/{{print $2}}')/ns/net \
             {IMAGE} shares /bin/sh -c 'while true; do sleep 1; done'
         transship checkpoint shares --name shares"
    ))
    .run()?;
    let export = ["export", "shares", "/root/no.tar", "--format", "podman"];
    fails_with(node, &export, 1, "shares namespaces")?;
    node.shell(
        "test ! -e /root/no.tar; podman rm -f -t 0 web; transship rm ours shares
         umount /var/lib/containers",
    )
    .run()?;
    journey::remove_container(node, "shares")?;
    Ok(journey::remove_container(node, "sandbox")?)
}
