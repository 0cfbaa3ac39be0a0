//! A pod that has been moved away starts nothing any more where it was, whatever kubelet tries: a liveness
//! probe that fails while the pod stands still makes no second, cold copy.

use std::time::Duration;

use anyhow::ensure;
use transship_testbed::{
    CommandRun as _, ContainerdConfig, Cri, Image, Node, Pod, PodContainer, PodNamespaces, Testbed,
    Tree, journey, poll_until,
};

use crate::Case;
use crate::pods::{FIRST, reached, start};

const PATIENCE: Duration = Duration::from_secs(60);
const MARKS: &str = "ls /var/lib/transship/moved 2>/dev/null || true";

/// Waits as long as there is a file.
const SLOW_CRIU: &str = r#"#!/bin/sh
while [ "$1" = swrk ] && [ -e /run/hold ]; do sleep 0.1; done
exec /usr/local/sbin/criu.real "$@"
"#;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let case = |what, run| Case {
        what,
        tree: Tree::Forky,
        run,
    };
    [
        case("pod_moved", a_moved_pod_starts_nothing),
        case(
            "pod_moved_killed",
            what_is_killed_as_it_stands_still_goes_no_further,
        ),
    ]
    .into_iter()
}

/// As kubelet does with a pod whose probes have failed.
fn what_is_killed_as_it_stands_still_goes_no_further(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    start(bed, &node, true)?;
    let spin = Image::spin(bed.settings(), &bed.tree_dir().join("bin/busybox"))?;
    node.import_image_into("k8s.io", &spin, "transship")?;
    let cri = node.cri()?;
    for round in 0..3 {
        node.shell("rm -rf /srv/spin; mkdir /srv/spin").run()?;
        let pod = cri.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
        let id = cri.run_container(
            &pod,
            &PodContainer {
                image: "transship.test/spin:1",
                command: &["/usr/bin/spin", "6", "/spin"],
                mounts: &[("/srv/spin", "/spin")],
                ..FIRST
            },
        )?;
        let counts = "for file in /srv/spin/*; do cat $file; echo; done | tr '\n' ' '";
        poll_until("all children to count", PATIENCE, || {
            let counts = node
                .shell(counts)
                .read()
                .map_err(|error| error.to_string())?;
            let counting = counts.split_whitespace().filter(|count| *count != "0");
            match counting.count() {
                6 => Ok(()),
                _ => Err(counts),
            }
        })?;
        let name = format!("spin-{round}");
        node.shell(&format!(
            "transship checkpoint --pod shop/web --name {name} --moved"
        ))
        .run()?;
        let frozen = node.shell(counts).read()?;
        match round {
            // Without a stop before it, containerd has the runtime delete it by force.
            2 => cri.remove_container(&id)?,
            _ => cri.stop_container(&id, 0)?,
        }
        let last = node.shell(counts).read()?;
        ensure!(frozen == last, "it counted on: {last} after {frozen}");
        cri.remove_pod(&pod)?;
        node.shell(&format!("transship rm {name}")).run()?;
    }
    journey::check_no_pod_left(&node)
}

fn a_moved_pod_starts_nothing(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    start(bed, &node, true)?;
    let cri = node.cri()?;
    let pod = cri.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &FIRST)?;

    node.shell("transship checkpoint --pod shop/web --name one --moved")
        .run()?;
    refused(&cri, &pod, 1)?;
    node.shell("transship recover --pod shop/web --source-runs")
        .run()?;
    let before = reached(&cri, &id)?;
    counts_on(&cri, &id, before)?;
    ensure!(node.shell(MARKS).read()?.is_empty(), "the mark is gone");
    let more = PodContainer {
        name: "more",
        command: &["/usr/bin/counter", "--memory-mb", "1", "--port", "7002"],
        ..FIRST
    };
    let more = cri.run_container(&pod, &more)?;
    cri.stop_container(&more, 0)?;

    // One that fails moves nothing.
    let failed = node.command("transship");
    let taken = [
        "checkpoint",
        "--pod",
        "shop/web",
        "--name",
        "one",
        "--moved",
    ];
    let said = { failed }.args(taken).read_failure()?;
    ensure!(said.contains("one"), "{said}");
    ensure!(node.shell(MARKS).read()?.is_empty(), "{said}");
    let before = reached(&cri, &id)?;
    counts_on(&cri, &id, before)?;

    // One that is killed in the freeze moves nothing either.
    node.write_file("/run/slow-criu", SLOW_CRIU)?;
    node.shell(
        "cp $(command -v criu) /usr/local/sbin/criu.real
         install -m 0755 /run/slow-criu /usr/local/sbin/criu; touch /run/hold",
    )
    .run()?;
    let killed = [&["transship"], &taken[..4], &["killed", "--moved"]].concat();
    node.start_daemon("killed", &killed)?;
    poll_until("the freeze", PATIENCE, || {
        let paused = node.shell("ctr -n k8s.io tasks ls | grep PAUSED");
        { paused }.run().map_err(|error| error.to_string())
    })?;
    ensure!(!node.shell(MARKS).read()?.is_empty(), "it is marked");
    node.stop_daemon("killed", "KILL")?;
    node.shell("rm /run/hold").run()?;
    poll_until("the end of the guard", PATIENCE, || {
        let guard = node.shell("! pgrep -f '[f]reeze-guard'");
        { guard }.run().map_err(|error| error.to_string())
    })?;
    node.shell("rm /usr/local/sbin/criu /usr/local/sbin/criu.real")
        .run()?;
    ensure!(node.shell(MARKS).read()?.is_empty(), "the mark is gone");
    let before = reached(&cri, &id)?;
    counts_on(&cri, &id, before)?;

    node.shell("transship checkpoint --pod shop/web --name two --moved")
        .run()?;
    // It has moved, whatever becomes of another attempt.
    let again = node.command("transship");
    let said = { again }
        .args(&taken[..4])
        .args(["two", "--moved"])
        .read_failure()?;
    ensure!(!node.shell(MARKS).read()?.is_empty(), "{said}");
    let said = failing_dump(&node)?;
    ensure!(!node.shell(MARKS).read()?.is_empty(), "{said}");
    // As kubelet does after the third probe without an answer; it makes the sandbox again, too.
    cri.stop_container(&id, 0)?;
    refused(&cri, &pod, 2)?;
    node.shell("transship recover --pod shop/web --target-runs")
        .run()?;
    cri.stop_pod(&pod)?;
    let Err(error) = cri.run_pod_again(&pod) else {
        anyhow::bail!("its sandbox is made again");
    };
    ensure!(error.to_string().contains("has been moved away"), "{error}");
    cri.remove_pod(&pod)?;

    // A pod of the same name is another one.
    let pod = cri.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &FIRST)?;
    ensure!(cri.runs(&id)?, "it runs");
    cri.remove_pod(&pod)?;
    journey::check_no_pod_left(&node)?;
    without_the_front(bed)
}

/// An attempt that fails when the pod has been marked already.
fn failing_dump(node: &Node) -> anyhow::Result<String> {
    node.write_file(
        "/run/failing-criu",
        "#!/bin/sh\n[ \"$1\" = swrk ] && exit 1\nexec /usr/local/sbin/criu.real \"$@\"\n",
    )?;
    node.shell(
        "cp $(command -v criu) /usr/local/sbin/criu.real
         install -m 0755 /run/failing-criu /usr/local/sbin/criu",
    )
    .run()?;
    let again = node.command("transship");
    let said = { again }
        .args([
            "checkpoint",
            "--pod",
            "shop/web",
            "--name",
            "three",
            "--moved",
        ])
        .read_failure()?;
    node.shell("rm /usr/local/sbin/criu /usr/local/sbin/criu.real")
        .run()?;
    Ok(said)
}

fn without_the_front(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("b")?;
    node.start_snapshotter()?;
    let config = ContainerdConfig {
        transship_diff: false,
        runtime_binary: None,
        ..ContainerdConfig::transship()
    };
    node.start_containerd(&config)?;
    for image in [Image::pause(bed.settings())?, journey::counter_image(bed)?] {
        node.import_image_into("k8s.io", &image, "transship")?;
    }
    let cri = node.cri()?;
    let pod = cri.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &FIRST)?;
    let command = [
        "checkpoint",
        "--pod",
        "shop/web",
        "--name",
        "one",
        "--moved",
    ];
    let said = { node.command("transship") }.args(command).read_failure()?;
    ensure!(said.contains("--source-pod-will-be-deleted"), "{said}");
    ensure!(cri.runs(&id)?, "it runs on");
    node.command("transship")
        .args(command)
        .arg("--source-pod-will-be-deleted")
        .run()?;
    cri.remove_pod(&pod)?;
    journey::check_no_pod_left(&node)
}

fn refused(cri: &Cri, pod: &Pod, attempt: u32) -> anyhow::Result<()> {
    let container = PodContainer { attempt, ..FIRST };
    let Err(error) = cri.run_container(pod, &container) else {
        anyhow::bail!("a second copy runs");
    };
    let said = error.to_string();
    ensure!(said.contains("has been moved away"), "{said}");
    Ok(())
}

pub(crate) fn counts_on(cri: &Cri, id: &str, before: u64) -> anyhow::Result<()> {
    poll_until("it counts on", PATIENCE, || match reached(cri, id) {
        Ok(now) if now > before => Ok(()),
        other => Err(format!("{other:?}")),
    })?;
    Ok(())
}
