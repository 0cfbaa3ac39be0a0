//! The large files of an emptyDir go before the freeze: a pod finds each as it was written last, and nothing of them is left
//! on a node where it does not come to run.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use transship_testbed::{
    CommandRun as _, Node, Pod, PodContainer, PodNamespaces, Testbed, TestbedError, Tree, Workload,
    journey, poll_until,
};

use crate::Case;
use crate::migration_files::{ROUND, wait_for};
use crate::pods::start_two;
use crate::pods_shared::volume_dir;

const WRITER: &str = "transship.test/writer:1";
const SHELL: &str = "transship.test/podmate:1";
const PATIENCE: Duration = Duration::from_secs(90);
const MIB: u64 = 1 << 20;
/// The file that nobody changes.
const STILL: u64 = 200 * MIB;
/// `grown` and `replaced` have the numbers of their lines, from 1 on.
const FILL: &str = "head -c 200M /dev/urandom >still; chown 12:34 still; chmod 0640 still
    mkdir -m 0700 d keep; ln still d/link
    truncate -s 64M holes; echo middle | dd of=holes bs=1M seek=32 conv=notrunc status=none
    seq 200000 >grown; cp grown replaced";
/// Each rests for longer than a file that goes before, and is changed while others go.
const CHANGE: &[&str] = &[
    "sh",
    "-c",
    "cd /data; exec 3<still; n=200000
     while :; do
         n=$((n + 1)); echo $n >>grown
         cp replaced new; echo $n >>new; mv new replaced
         sleep 3
     done",
];
/// What is as it was, and how many lines the others have, which are all there.
const LOOK: &str = "sha256sum still holes | cut -c 1-64
    stat -c '%n %a %u:%g %h %s' still d/link d holes
    [ still -ef d/link ]; [ $(stat -c %b holes) -lt 4096 ]
    awk '$1 != NR { exit 1 }' grown; awk '$1 != NR { exit 1 }' replaced
    [ $(stat -c %s grown) -gt 1288894 ]; [ $(stat -c %s replaced) -gt 1288894 ]";

/// What a container may do that has the emptyDir, too: a link in the place of the directory that takes the files, and a
/// FIFO in that of a file.
const THIEVES: [&str; 2] = [
    "for d in .transship-contents-*; do [ -d $d ] && mv $d taken && ln -s /srv/trap $d && echo stolen && exit; done",
    "for f in .transship-contents-*/*; do [ -f $f ] && rm $f && mkfifo $f && echo stolen && exit; done",
];

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let case = |what, run| Case {
        what,
        tree: Tree::Forky,
        run,
    };
    [
        case("pod_migration_volumes", files_of_volumes_go_before),
        case("pod_migration_thieves", thieves_in_a_volume_get_nothing),
    ]
    .into_iter()
}

fn start_with_writer(bed: &Testbed) -> anyhow::Result<([Node; 2], Pod)> {
    let [a, b] = start_two(bed, true)?;
    for node in [&a, &b] {
        // The root of a node is an overlay, on which no file goes before.
        node.shell(
            "mkdir -p /var/lib/transship/kubelet /var/lib/kubelet
             mount --bind /var/lib/transship/kubelet /var/lib/kubelet",
        )
        .run()?;
        let image = journey::counter_image(bed)?;
        let image = image.with_program(WRITER, Workload::Writer, bed.settings())?;
        node.import_image_into("k8s.io", &image, "transship")?;
    }
    let pod = a
        .cri()?
        .run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    let dir = volume_dir(&pod, "work");
    a.shell(&format!(
        "mkdir -p {dir}; chmod 0777 {dir}; cd {dir}; {FILL}"
    ))
    .run()?;
    run_containers(&a, &pod)?;
    wait_for(&a, ROUND + 10)?;
    Ok(([a, b], pod))
}

/// Whoever changes the emptyDir while it is filled: no file of the node is made or opened, and nothing hangs.
fn thieves_in_a_volume_get_nothing(bed: &Testbed) -> anyhow::Result<()> {
    let ([a, b], _) = start_with_writer(bed)?;
    let link = bed.ssh(&a, &b)?;
    b.shell("mkdir /srv/trap").run()?;
    for thief in THIEVES {
        let prepare = |dir: &str| {
            let thief = format!("cd {dir}; while :; do {thief}; done 2>/dev/null");
            b.start_daemon("thief", &["sh", "-c", &thief])
        };
        let (pod, started, said) = begin_in_a_pod_of_another(&a, &b, &link, prepare)?;
        let stolen = b.shell("cat /var/log/thief.log; rm /var/log/thief.log");
        let stolen = { stolen }.read()?;
        ensure!(stolen == "stolen\n", "{thief}: {stolen}: {said}");
        ensure!(started.is_err(), "{thief}: it is started: {said}");
        let trap = b.shell("find /srv/trap -mindepth 1").read()?;
        ensure!(trap.is_empty(), "{thief}: {trap}");
        b.cri()?.remove_pod(&pod)?;
        let dir = volume_dir(&pod, "work");
        b.shell(&format!("rm -rf {dir}")).run()?;
        runs_only_on(&a, &b)?;
    }
    Ok(())
}

fn files_of_volumes_go_before(bed: &Testbed) -> anyhow::Result<()> {
    let ([a, b], pod) = start_with_writer(bed)?;
    let (to_b, to_a) = (bed.ssh(&a, &b)?, bed.ssh(&b, &a)?);
    let before = look(&a, &pod)?;

    given_up_leaves_nothing(&a, &b, &to_b)?;
    let left = b.shell("find /var/lib/kubelet/pods -mindepth 1").read()?;
    ensure!(left.is_empty(), "left: {left}");
    killed_target_leaves_nothing(&a, &b, &to_b)?;

    goes_before(&migrate(&a, &to_b, &[]).read()?)?;
    ensure!(look(&b, &pod)? == before, "{before}");
    runs_only_on(&b, &a)?;

    // The emptyDir is still there, with what the pod had left behind.
    given_up_leaves_nothing(&b, &a, &to_a)?;
    killed_target_leaves_nothing(&b, &a, &to_a)?;
    let again = into_a_pod_of_another(&b, &a, &to_a)?;
    ensure!(look(&a, &again)? == before, "{before}");
    runs_only_on(&a, &b)
}

fn run_containers(node: &Node, pod: &Pod) -> anyhow::Result<()> {
    let cri = node.cri()?;
    let dir = volume_dir(pod, "work");
    let mounts = [(dir.as_str(), "/data")];
    for (name, image, command) in [
        (
            "writer",
            WRITER,
            &["/usr/local/bin/writer", "/data/keep"][..],
        ),
        ("changer", SHELL, CHANGE),
    ] {
        let container = PodContainer {
            name,
            image,
            command,
            mounts: &mounts,
            ..PodContainer::default()
        };
        cri.run_container(pod, &container)?;
    }
    Ok(())
}

fn look(node: &Node, pod: &Pod) -> anyhow::Result<String> {
    let dir = volume_dir(pod, "work");
    Ok(node.shell(&format!("set -e; cd {dir}; {LOOK}")).read()?)
}

fn migrate(from: &Node, to: &str, more: &[&str]) -> std::process::Command {
    let mut migrate = from.command("transship");
    migrate.args(["migrate", "--pod", "shop/web", "--to", to, "--json"]);
    migrate.args(["--volumes", "emptydir", "--allow", "unmasked-paths"]);
    migrate.args(more);
    migrate
}

/// What nobody changes has gone before the freeze, and not once more in it.
fn goes_before(report: &str) -> anyhow::Result<()> {
    let report: Value = serde_json::from_str(report)?;
    let sent = |name: &str| {
        let steps = report["timeline"]["steps"].as_array();
        let step = steps.into_iter().flatten().find(|it| it["name"] == name);
        step.and_then(|it| it["bytes"].as_u64())
            .with_context(|| format!("no {name} in {report}"))
    };
    ensure!(sent("files")? >= STILL, "{report}");
    // Memory and files that have changed meanwhile.
    ensure!(sent("transfer")? < STILL / 2, "{report}");
    Ok(())
}

/// In the freeze, when all has come.
fn given_up_leaves_nothing(from: &Node, to: &Node, link: &str) -> anyhow::Result<()> {
    migrate(from, link, &["--before-restore", "false"]).read_failure()?;
    runs_only_on(from, to)
}

/// In the middle of the files.
fn killed_target_leaves_nothing(from: &Node, to: &Node, link: &str) -> anyhow::Result<()> {
    let migrate = format!(
        "exec transship migrate --pod shop/web --to '{link}' --volumes emptydir --allow unmasked-paths"
    );
    from.start_daemon("cut", &["sh", "-c", &migrate])?;
    poll_until("a file in the emptyDir", PATIENCE, || {
        let came = to.shell("ls -d /var/lib/kubelet/pods/*/*/*/*/.transship-contents-*/0");
        { came }.run().map_err(|error| error.to_string())
    })?;
    to.shell("pkill -KILL -x transship").run()?;
    from.wait_for_daemon_end("cut")?;
    runs_only_on(from, to)
}

/// All of it runs on one node, and on neither is anything left of files that went before.
fn runs_only_on(node: &Node, other: &Node) -> anyhow::Result<()> {
    let ended = poll_until("the end of the other one", PATIENCE, || {
        let left = other.shell(
            "set +e; pgrep -x writer; find /var/lib/kubelet -name '.transship*'
             pgrep -af '[r]eceive-guard'; true",
        );
        match { left }.read() {
            Ok(left) if left.is_empty() => Ok(()),
            Ok(left) => Err(left),
            Err(error) => Err(error.to_string()),
        }
    });
    ended?;
    let left = node
        .shell("find /var/lib/kubelet -name '.transship*'")
        .read()?;
    ensure!(left.is_empty(), "left: {left}");
    journey::check_no_pod_left(other)?;
    // The next one finds files that have rested.
    let reached = wait_for(node, 1)?;
    wait_for(node, reached + ROUND + 1)?;
    Ok(())
}

/// Its emptyDir is there before its sandbox, as kubelet makes them.
fn into_a_pod_of_another(from: &Node, to: &Node, link: &str) -> anyhow::Result<Pod> {
    let (pod, started, said) = begin_in_a_pod_of_another(from, to, link, |_| Ok(()))?;
    started.with_context(|| said.clone())?;
    let report = said.find('{').map(|at| &said[at..]);
    goes_before(report.with_context(|| said.clone())?)?;
    Ok(pod)
}

/// The pod, whether its containers were started, and what the migration said; `prepare` gets the emptyDir.
fn begin_in_a_pod_of_another(
    from: &Node,
    to: &Node,
    link: &str,
    prepare: impl FnOnce(&str) -> Result<(), TestbedError>,
) -> anyhow::Result<(Pod, anyhow::Result<()>, String)> {
    let migrate = format!(
        "exec transship migrate --pod shop/web --to '{link}' --volumes emptydir --wait-for-pod --json"
    );
    let log = "/var/log/waits.log";
    from.shell(&format!("rm -f {log}")).run()?;
    from.start_daemon("waits", &["sh", "-c", &migrate])?;
    let migration = poll_until("the name of the migration", PATIENCE, || {
        let said = from.shell(&format!("cat {log}")).read();
        let said = said.map_err(|error| error.to_string())?;
        let named = said.split_once("dev.transship/receive: ");
        named.map(|(_, name)| name[..32].to_owned()).ok_or(said)
    })?;
    let annotation = [("dev.transship/receive", migration.as_str())];
    let make_volume = |pod: &Pod| {
        let dir = volume_dir(pod, "work");
        to.shell(&format!("mkdir -p {dir}; chmod 0777 {dir}"))
            .run()?;
        prepare(&dir)
    };
    let cri = to.cri()?;
    let pod = cri.run_pod_after(
        make_volume,
        ("shop", "web-again"),
        &annotation,
        PodNamespaces::Usual,
    )?;
    let started = run_containers(to, &pod);
    from.wait_for_daemon_end("waits")?;
    let said = from.shell(&format!("cat {log}")).read()?;
    Ok((pod, started, said))
}
