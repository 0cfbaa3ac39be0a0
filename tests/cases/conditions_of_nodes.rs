//! Conditions of which one container is not enough to see them: huge pages are compared with those of the other node, and a
//! watch on a file that is a mount of its own is found again, or refused.

use anyhow::ensure;
use transship_checkpoint::conditions::Condition;
use transship_testbed::{CommandRun as _, Image, Node, Testbed, Tree, journey, poll_until};

use crate::Case;
use crate::conditions::{HOLDER, PATIENCE, check, names, run, tick_of};

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [
        Case {
            what: "conditions_huge_pages",
            tree: Tree::Forky,
            run: huge_pages_are_looked_for_there,
        },
        Case {
            what: "conditions_watched_mounts",
            tree: Tree::Forky,
            run: a_file_that_is_a_mount_is_watched_on,
        },
    ]
    .into_iter()
}

/// Both nodes have those of one kernel: the copy needs as many again.
fn huge_pages_are_looked_for_there(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let ssh = bed.ssh(&a, &b)?;
    let holder = Image::holder(bed.settings(), &bed.tree_dir().join("bin/busybox"))?;
    a.import_image(&holder, "transship")?;
    let reserve = |pages: u32| {
        let sysctl = "/proc/sys/vm/nr_hugepages";
        a.shell(&format!(
            "echo {pages} >{sysctl}; grep -qx {pages} {sysctl}"
        ))
        .run()
    };
    reserve(1)?;
    run(&a, "huge", &[], &[HOLDER, "huge"])?;
    let mut migrate = a.command("transship");
    migrate.args(["migrate", "huge", "--to", &ssh]);
    let refused = migrate.read_failure()?;
    ensure!(
        refused.contains("it has 2097152 bytes in huge pages, and 0 are free there"),
        "{refused}"
    );
    let before = tick_of(&a, "huge")?;
    reserve(2)?;
    migrate.run()?;
    poll_until("a tick", PATIENCE, || match tick_of(&b, "huge") {
        Ok(now) if now > before => Ok(()),
        other => Err(format!("{other:?}")),
    })?;
    journey::remove_container(&b, "huge")?;
    Ok(reserve(0)?)
}

/// CRIU opens no handle by a mount of a file, and by one of a directory beside it one that has no path.
fn a_file_that_is_a_mount_is_watched_on(bed: &Testbed) -> anyhow::Result<()> {
    let (node, b) = journey::start_nodes(bed)?;
    let ssh = bed.ssh(&node, &b)?;
    b.shell("mkdir -p /var/lib/containerd/volume/dir").run()?;
    let holder = Image::holder(bed.settings(), &bed.tree_dir().join("bin/busybox"))?;
    node.import_image(&holder, "transship")?;
    node.shell(
        "mkdir -p /var/lib/containerd/volume/dir; touch /var/lib/containerd/volume/app.conf /var/lib/containerd/volume/dir/moved",
    )
    .run()?;
    let file = [
        "--mount",
        "type=bind,src=/var/lib/containerd/volume/app.conf,dst=/app/app.conf,options=rbind:ro",
    ];
    let dir = [
        "--mount",
        "type=bind,src=/var/lib/containerd/volume/dir,dst=/dir,options=rbind:rw",
    ];
    let both = [file, dir].concat();
    let mut wrong = Vec::new();
    for (id, mounts) in [("alone", &file[..]), ("beside", &both)] {
        let moved = a_watch_comes_along(&node, id, mounts);
        wrong.extend(moved.err().map(|error| format!("{id}: {error:#}")));
    }
    let refused = a_watch_without_a_path_is_refused(&node, &dir, &ssh);
    wrong.extend(refused.err().map(|error| format!("moved: {error:#}")));
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

fn a_watch_comes_along(node: &Node, id: &str, mounts: &[&str]) -> anyhow::Result<()> {
    run(node, id, mounts, &[HOLDER, "watch=/app/app.conf"])?;
    let found = check(node, id, &[])?;
    ensure!(names(&found).is_empty(), "{found}");
    let mut checkpoint = node.command("transship");
    checkpoint.args(["checkpoint", id, "--name", id]).run()?;
    journey::remove_container(node, id)?;
    let mut restore = node.command("transship");
    restore.args(["restore", id, "--id", id, "--allow", "host-mounts"]);
    restore.run()?;
    let heard = || -> Result<u64, String> {
        let text = journey::read_in_container(node, id, "/data/events")?;
        text.trim().parse().map_err(|_| text)
    };
    let before = poll_until("the events so far", PATIENCE, heard)?;
    node.shell("touch /var/lib/containerd/volume/app.conf")
        .run()?;
    poll_until("an event", PATIENCE, || match heard()? {
        now if now > before => Ok(()),
        now => Err(format!("{now} bytes")),
    })?;
    Ok(journey::remove_container(node, id)?)
}

/// What is watched has left the volume, and CRIU says nothing.
fn a_watch_without_a_path_is_refused(
    node: &Node,
    mounts: &[&str],
    ssh: &str,
) -> anyhow::Result<()> {
    run(node, "moved", mounts, &[HOLDER, "watch=/dir/moved"])?;
    node.shell("mv /var/lib/containerd/volume/dir/moved /var/lib/containerd/volume/")
        .run()?;
    let known = Condition::named("watch");
    let refused: [&[&str]; 2] = [
        &["checkpoint", "moved", "--name", "moved"],
        &["migrate", "moved", "--to", ssh, "--allow", "host-mounts"],
    ];
    for arguments in refused {
        let said = node.command("transship").args(arguments).read_failure()?;
        ensure!(
            said.contains(known.what) && said.contains(known.remedy),
            "{said}"
        );
    }
    node.shell("! transship ls | grep moved").run()?;
    let before = tick_of(node, "moved")?;
    poll_until("a tick", PATIENCE, || match tick_of(node, "moved") {
        Ok(now) if now > before => Ok(()),
        other => Err(format!("{other:?}")),
    })?;
    Ok(journey::remove_container(node, "moved")?)
}
