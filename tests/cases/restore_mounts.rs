//! What a node has mounted is there after a restore as before it, also below a directory that the container shares; and
//! what is mounted there later comes to a container that asks for it (`rslave`).

use std::time::Duration;

use anyhow::ensure;
use transship_testbed::{CommandRun as _, Node, Testbed, Tree, journey, poll_until};

use crate::Case;

const PATIENCE: Duration = Duration::from_secs(30);
/// A directory with another file system below it; one to which the node adds something later; a file.
const PREPARE: &str = "mkdir -p /srv/tree/sub/dir /srv/late/sub; mount -t tmpfs one /srv/tree/sub
    mkdir /srv/tree/sub/dir; mount -t tmpfs two /srv/tree/sub/dir; echo here >/srv/tree/sub/dir/file
    touch /srv/file /srv/tree/over; mount --bind /srv/file /srv/tree/over";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    Tree::ALL.into_iter().map(|tree| Case {
        what: "restore_node_mounts",
        tree,
        run: mounts_of_the_node_stay,
    })
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
        let run = ["run", "--detach", "--snapshotter", "transship"];
        node.ctr(
            &[
                &run[..],
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
