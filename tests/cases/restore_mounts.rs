//! What a node has mounted is there after a restore as before it, also below a directory that the container shares; and
//! what is mounted there later comes to a container that asks for it (`rslave`). A socket that somebody has there stays his.

use std::time::Duration;

use anyhow::ensure;
use transship_testbed::{CommandRun as _, Image, Node, Testbed, Tree, journey, poll_until};

use crate::Case;
use crate::conditions::{HOLDER, run};

const PATIENCE: Duration = Duration::from_secs(30);
/// A directory with another file system below it; one to which the node adds something later; a file.
const PREPARE: &str = "mkdir -p /srv/tree/sub/dir /srv/late/sub; mount -t tmpfs one /srv/tree/sub
    mkdir /srv/tree/sub/dir; mount -t tmpfs two /srv/tree/sub/dir; echo here >/srv/tree/sub/dir/file
    touch /srv/file /srv/tree/over; mount --bind /srv/file /srv/tree/over";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let mounts = Tree::ALL.into_iter().map(|tree| Case {
        what: "restore_node_mounts",
        tree,
        run: mounts_of_the_node_stay,
    });
    mounts.chain([Case {
        what: "restore_node_sockets",
        tree: Tree::Forky,
        run: sockets_of_others_stay,
    }])
}

/// CRIU removes what socket has the name, and binds its own there.
fn sockets_of_others_stay(bed: &Testbed) -> anyhow::Result<()> {
    let (node, _) = journey::start_nodes(bed)?;
    let holder = Image::holder(bed.settings(), &bed.tree_dir().join("bin/busybox"))?;
    node.import_image(&holder, "transship")?;
    node.shell("mkdir -p /srv/app").run()?;
    let mount = [
        "--mount",
        "type=bind,src=/srv/app,dst=/app,options=rbind:rw",
    ];
    run(&node, "server", &mount, &[HOLDER, "receive=/app/socket"])?;
    { node.command("transship") }
        .args(["checkpoint", "server", "--name", "server"])
        .run()?;
    let restore = |id: &str| {
        let mut restore = node.command("transship");
        restore.args(["restore", "server", "--id", id, "--allow", "host-mounts"]);
        restore
    };
    let socket = || node.shell("stat -c %i /srv/app/socket").read();
    let before = socket()?;
    let said = restore("again").read_failure()?;
    ensure!(
        said.contains("is the socket of a program that runs here"),
        "{said}"
    );
    ensure!(socket()? == before, "the socket is another one");
    journey::remove_container(&node, "server")?;
    restore("again").run()?;
    // Who was bound to it before has ended.
    node.shell("test -S /srv/app/socket").run()?;
    Ok(journey::remove_container(&node, "again")?)
}

fn mounts_of_the_node_stay(bed: &Testbed) -> anyhow::Result<()> {
    let (node, _) = journey::start_nodes(bed)?;
    node.shell(PREPARE).run()?;
    let before = mounts(&node)?;
    for id in ["first", "second"] {
        let mounts_of_container = [
            "--mount",
            "type=bind,src=/srv/tree,dst=/tree,options=bind:rw",
            "--mount",
            "type=bind,src=/srv/late,dst=/late,options=rbind:rslave:rw",
        ];
        let arguments = ["run", "--detach", "--snapshotter", "transship"];
        node.ctr(
            &[
                &arguments[..],
                &mounts_of_container,
                &["transship.test/counter:1", id],
            ]
            .concat(),
        )?;
        journey::wait_for_count(&node, id, 2)?;
        { node.command("transship") }
            .args(["checkpoint", id, "--name", id])
            .run()?;
        journey::remove_container(&node, id)?;
        { node.command("transship") }
            .args(["restore", id, "--id", id, "--allow", "host-mounts"])
            .run()?;
        let after = mounts(&node)?;
        ensure!(after == before, "{before}\nbecame\n{after}");
        node.shell("test -s /srv/tree/sub/dir/file").run()?;
    }
    node.shell("mount -t tmpfs late /srv/late/sub").run()?;
    let pid = journey::task_pid(&node, "second")?;
    poll_until("the mount in the container", PATIENCE, || {
        let seen = node.shell(&format!("grep ' /late/sub ' /proc/{pid}/mountinfo"));
        { seen }.run().map_err(|error| error.to_string())
    })?;
    node.shell("umount /srv/late/sub; umount -R /srv/tree/sub; umount /srv/tree/over")
        .run()?;
    for id in ["first", "second"] {
        journey::remove_container(&node, id)?;
    }
    Ok(())
}

/// All that is mounted on the node below /srv, and which of it is shared.
fn mounts(node: &Node) -> anyhow::Result<String> {
    Ok(node.shell("grep ' /srv/' /proc/1/mountinfo").read()?)
}
