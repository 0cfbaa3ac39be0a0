//! System V objects that a container has left in its sandbox: it comes back as it was, and not to memory of another time.

use std::time::Duration;

use anyhow::ensure;
use transship_testbed::{CommandRun as _, Image, Node, Testbed, Tree, journey, poll_until};

use crate::Case;

const PATIENCE: Duration = Duration::from_secs(30);
const SHELL: &str = "transship.test/podmate:1";
/// It has a segment, semaphores and a queue, and ends when one of them is not as it has left it.
const PROGRAM: &str = "mkdir -p /work && exec podmate sharer";
const LOG: &str = "/var/log/sharer.log";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    std::iter::once(Case {
        what: "sysv_left",
        tree: Tree::Forky,
        run: what_was_left_gives_way,
    })
}

fn what_was_left_gives_way(bed: &Testbed) -> anyhow::Result<()> {
    let (node, _) = journey::start_nodes(bed)?;
    let busybox = bed.tree_dir().join("bin/busybox");
    let image = Image::podmate(bed.settings(), &busybox)?;
    node.import_image_into("default", &image, "transship")?;
    journey::run_sandbox(&node, "sandbox")?;
    let sandbox = journey::task_pid(&node, "sandbox")?;
    let namespace = format!("ipc:/proc/{sandbox}/ns/ipc");
    run(&node, "sharer", &namespace, PROGRAM)?;
    let reached = wait_for(&node, 20)?;
    node.shell("transship checkpoint sharer --name monday")
        .run()?;
    wait_for(&node, reached + 20)?;
    journey::remove_container(&node, "sharer")?;

    let restore = "transship restore monday --sandbox sandbox";
    for what in ["it has left them itself", "a restore has left them"] {
        let reached = last(&node)?;
        node.shell(&format!("rm -f {LOG}; {restore} --log-uri file://{LOG}"))
            .run()?;
        let begins = wait_for(&node, 1)?;
        ensure!(begins < reached, "{what}: {begins} is not the checkpoint's");
        wait_for(&node, reached + 20)?;
        journey::remove_container(&node, "sharer")?;
    }

    // Nobody knows whether another container uses them.
    run(&node, "other", &namespace, "exec sleep 1000")?;
    let error = node.shell(restore).output()?;
    let error = String::from_utf8_lossy(&error.stderr).into_owned();
    ensure!(
        error.contains("has a System V object with the id or key"),
        "{error}"
    );
    journey::remove_container(&node, "other")?;
    node.shell(restore).run()?;
    journey::remove_container(&node, "sharer")?;
    journey::remove_container(&node, "sandbox")?;
    node.shell("transship rm monday").run()?;
    journey::check_nothing_left(&node)
}

fn run(node: &Node, id: &str, namespace: &str, program: &str) -> anyhow::Result<()> {
    let log = format!("file://{LOG}");
    let mut arguments = vec![
        "run",
        "--detach",
        "--snapshotter",
        "transship",
        "--log-uri",
        &log,
    ];
    arguments.extend(["--with-ns", namespace, SHELL, id, "sh", "-c", program]);
    node.ctr(&arguments)?;
    Ok(())
}

/// The last step, as long as none was wrong.
fn last(node: &Node) -> anyhow::Result<u64> {
    let log = String::from_utf8(node.read_file(LOG)?)?;
    ensure!(!log.contains("BAD"), "{log}");
    let steps = { log.lines() }.filter_map(|line| line.split(' ').next()?.parse().ok());
    Ok(steps.max().unwrap_or_default())
}

fn wait_for(node: &Node, step: u64) -> anyhow::Result<u64> {
    Ok(poll_until("a step", PATIENCE, || match last(node) {
        Ok(reached) if reached >= step => Ok(reached),
        Ok(reached) => Err(reached.to_string()),
        Err(error) => Err(error.to_string()),
    })?)
}
