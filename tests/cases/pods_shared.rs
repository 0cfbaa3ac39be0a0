//! A pod whose containers share all that a pod can share: a TCP connection over localhost, System V
//! objects, memory in /dev/shm, a unix socket in an emptyDir. It goes on in another pod on another
//! node, under another address, and none of the containers has missed anything.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use transship_testbed::{
    CommandRun as _, Cri, Node, Pod, PodContainer, PodNamespaces, Testbed, Tree, journey,
    poll_until,
};

use crate::Case;
use crate::pods::{send, start, start_two};

const IMAGE: &str = "transship.test/podmate:1";
pub(crate) const ROLES: [&str; 3] = ["server", "client", "sharer"];
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let on_forky = |what, run| Case {
        what,
        tree: Tree::Forky,
        run,
    };
    Case::on_all_trees("pod_shared", |bed| a_pod_shares_everything(bed, true)).chain([
        on_forky("pod_shared_overlayfs", |bed| {
            a_pod_shares_everything(bed, false)
        }),
        on_forky("pod_shared_in_part", who_never_comes_holds_nobody),
        on_forky(
            "pod_shared_host_network",
            no_rules_in_the_network_of_the_node,
        ),
    ])
}

/// One line of podmate, see its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) n: u64,
    peer: u64,
    system5: [u64; 3],
    posix: [u64; 3],
}

impl Step {
    fn parse(line: &str) -> anyhow::Result<Step> {
        let words: Vec<&str> = line.split(' ').collect();
        let [n, peer, system5, posix] = words.as_slice() else {
            anyhow::bail!("{line:?}");
        };
        let slots = |text: &str, name: &str| -> anyhow::Result<[u64; 3]> {
            let values = text.strip_prefix(name).with_context(|| line.to_owned())?;
            let values: Vec<u64> = values
                .split(',')
                .map(str::parse)
                .collect::<Result<_, _>>()?;
            values.try_into().map_err(|_| anyhow::anyhow!("{line:?}"))
        };
        Ok(Step {
            n: n.parse()?,
            peer: peer.strip_prefix("peer=").unwrap_or_default().parse()?,
            system5: slots(system5, "sysv=")?,
            posix: slots(posix, "posix=")?,
        })
    }
}

fn a_pod_shares_everything(bed: &Testbed, transship_snapshotter: bool) -> anyhow::Result<()> {
    let [a, b] = start_two(bed, transship_snapshotter)?;
    let cri = a.cri()?;
    let pod = cri.run_pod(("shop", "mates"), &[], PodNamespaces::Usual)?;
    let containers = run_mates(&a, &cri, &pod)?;
    let address = cri.pod_ip(&pod)?;
    fill_scratch(&a, &pod)?;
    let before = wait_for(&a, &pod, [20; 3])?;
    a.command("transship")
        .args(["checkpoint", "--pod", "shop/mates", "--name", "mates"])
        .args(["--volumes", "emptydir", "--tcp", "established"])
        .run()?;
    // The pod goes on, and nobody has missed anything there either.
    wait_for(&a, &pod, before.map(|step| step.n + 20))?;
    for id in &containers {
        ensure!(cri.runs(id)?, "a checkpoint stops nothing");
    }
    a_half_of_a_stream_is_refused(&a, &cri, &pod, &containers)?;
    remove(&cri, &pod)?;
    send(bed, &a, &b, "mates")?;

    let cri = b.cri()?;
    // Another pod first, so that the new one has another address.
    let other = cri.run_pod(("shop", "other"), &[], PodNamespaces::Usual)?;
    let annotation = [("dev.transship/restore", "mates")];
    let again = cri.run_pod(("shop", "mates-again"), &annotation, PodNamespaces::Usual)?;
    ensure!(cri.pod_ip(&again)? != address, "it has another address");
    a_failed_restore_leaves_no_objects(&b, &cri, &again)?;
    let containers = run_mates(&b, &cri, &again)?;
    let first = wait_for(&b, &again, before.map(|step| step.n + 20))?;
    for (id, role) in containers.iter().zip(ROLES) {
        ensure!(cri.runs(id)?, "{role} runs");
        // From its first step on: no line of the old log is lost, none is there twice.
        let first = steps(&b, &again, role)?[0];
        ensure!(first.n == 1, "{role} begins with {first:?}");
    }
    // Each sees the others go on in the memory that they share, and over the connection, whose ends came back one
    // after the other: TCP waits up to twice as long as that took before it tries again.
    for (role, first) in ROLES.into_iter().zip(first) {
        poll_until("the others to be seen", PATIENCE, || {
            let steps = steps(&b, &again, role).map_err(|error| format!("{error:#}"))?;
            let then = steps.last().copied().unwrap_or(first);
            let all_grown = [(first.system5, then.system5), (first.posix, then.posix)]
                .into_iter()
                .all(|(old, new)| old.iter().zip(new).all(|(old, new)| new > *old));
            match all_grown && then.peer > first.peer {
                true => Ok(()),
                false => Err(format!("{role}: {first:?}, {then:?}")),
            }
        })?;
    }
    check_scratch(&b, &again)?;
    let rules = b
        .shell("ip -all netns exec nft list tables; nft list tables")
        .read()?;
    ensure!(!rules.contains("transship"), "left on b: {rules}");
    remove(&cri, &again)?;
    cri.remove_pod(&other)?;
    journey::check_no_pod_left(&b)
}

/// A checkpoint `mates`, whose pod is gone.
fn kept(node: &Node, cri: &Cri) -> anyhow::Result<()> {
    let pod = cri.run_pod(("shop", "mates"), &[], PodNamespaces::Usual)?;
    run_mates(node, cri, &pod)?;
    wait_for(node, &pod, [5; 3])?;
    node.shell(
        "transship checkpoint --pod shop/mates --name mates --volumes emptydir --tcp established",
    )
    .run()?;
    remove(cri, &pod)
}

/// The new pod has no third container, which waits in the checkpoint for ever: the connection of the two others goes on.
fn who_never_comes_holds_nobody(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    start(bed, &node, true)?;
    let cri = node.cri()?;
    kept(&node, &cri)?;
    let annotation = [("dev.transship/restore", "mates")];
    let again = cri.run_pod(("shop", "mates-again"), &annotation, PodNamespaces::Usual)?;
    run_mates_of(&node, &cri, &again, &["server", "client"])?;
    poll_until("the end of the rules", PATIENCE, || {
        let tables = node.shell("ip -all netns exec nft list tables").read();
        match tables.map_err(|error| error.to_string())? {
            tables if tables.contains("transship") => Err(tables),
            _ => Ok(()),
        }
    })?;
    remove(&cri, &again)?;
    journey::check_no_pod_left(&node)
}

/// A pod in the node's network has connections between its containers, and one end of them is restored: no
/// packet of the node meets a rule that a checkpoint has chosen, now or when the pod has gone.
fn no_rules_in_the_network_of_the_node(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    start(bed, &node, true)?;
    let cri = node.cri()?;
    let pod = cri.run_pod(("shop", "mates"), &[], PodNamespaces::HostNetwork)?;
    run_mates(&node, &cri, &pod)?;
    wait_for(&node, &pod, [5; 3])?;
    node.shell(
        "transship checkpoint --pod shop/mates --name mates --volumes emptydir --tcp established",
    )
    .run()?;
    remove(&cri, &pod)?;
    let annotation = [("dev.transship/restore", "mates")];
    let again = cri.run_pod(
        ("shop", "mates-again"),
        &annotation,
        PodNamespaces::HostNetwork,
    )?;
    let [work, scratch] = make_volumes(&node, &again)?;
    let mounts = [(work.as_str(), "/work"), (scratch.as_str(), "/scratch")];
    let server = mate("server", &["/usr/bin/podmate", "server"], &mounts);
    // The client waits for ever to be made.
    cri.run_container(&again, &server)?;
    let rules = || node.shell("nft list ruleset").read();
    ensure!(!rules()?.contains("transship"), "{}", rules()?);
    remove(&cri, &again)?;
    ensure!(!rules()?.contains("transship"), "left: {}", rules()?);
    journey::check_no_pod_left(&node)
}

/// CRIU has made the System V objects of the pod when it finds that an image is none, which nobody has read before it.
fn a_failed_restore_leaves_no_objects(node: &Node, cri: &Cri, pod: &Pod) -> anyhow::Result<()> {
    let images = "/var/lib/transship/checkpoints/mates/server/checkpoint";
    node.shell(&format!(
        "cd {images}; cp -a fs-1.img /run/whole
         head -c $(stat -c %s fs-1.img) /dev/zero | dd conv=notrunc status=none of=fs-1.img"
    ))
    .run()?;
    let [work, scratch] = make_volumes(node, pod)?;
    let mounts = [(work.as_str(), "/work"), (scratch.as_str(), "/scratch")];
    let id = cri.create_container(
        pod,
        &mate("server", &["/usr/bin/podmate", "server"], &mounts),
    )?;
    let Err(error) = cri.start_container(&id) else {
        anyhow::bail!("restored without its memory");
    };
    let error = error.to_string().replace('\\', "");
    ensure!(error.contains("cannot restore \"server\""), "{error}");
    cri.remove_container(&id)?;
    let ipc = format!("/run/transship/pods/{}/ns/ipc", pod.id);
    let objects = node.shell(&format!(
        "nsenter --ipc={ipc} sh -c 'tail -q -n +2 /proc/sysvipc/*'; cp /run/whole {images}/fs-1.img"
    ));
    let objects = { objects }.read()?;
    ensure!(objects.is_empty(), "left in the sandbox: {objects}");
    Ok(())
}

/// Until it succeeds, as kubelet: a container that ends by itself while it is killed (the client,
/// whose server has gone) can cost containerd the connection to its shim.
fn remove(cri: &Cri, pod: &Pod) -> anyhow::Result<()> {
    Ok(poll_until("the end of the pod", PATIENCE, || {
        cri.remove_pod(pod).map_err(|error| error.to_string())
    })?)
}

/// CRIU can dump no stream of a unix socket whose other end is in another container: that is said, and
/// the pod goes on.
fn a_half_of_a_stream_is_refused(
    node: &Node,
    cri: &Cri,
    pod: &Pod,
    containers: &[String],
) -> anyhow::Result<()> {
    for (id, role) in containers.iter().zip(["listener", "connector"]) {
        let program = format!("podmate {role} </dev/null >/dev/null 2>&1 &");
        cri.exec(id, &["sh", "-c", &program])?;
    }
    let connected = volume_dir(pod, "work") + "/connected";
    poll_until("the stream", PATIENCE, || {
        let read = node.read_file(&connected);
        read.map_err(|error| error.to_string())
    })?;
    let error = node
        .command("transship")
        .args(["checkpoint", "--pod", "shop/mates", "--name", "half"])
        .args(["--volumes", "emptydir", "--tcp", "established"])
        .read_failure()?;
    ensure!(
        ["server", "client"]
            .iter()
            .any(|name| error.contains(&format!("container {name:?}")))
            && error.contains("unix socket"),
        "{error}"
    );
    let list = node.command("transship").args(["ls", "--json"]).read()?;
    ensure!(!list.contains("half"), "{list}");
    let now = wait_for(node, pod, [1; 3])?;
    wait_for(node, pod, now.map(|step| step.n + 10))?;
    Ok(())
}

/// Runs the three containers with their volumes, which are made as kubelet makes them.
pub(crate) fn run_mates(node: &Node, cri: &Cri, pod: &Pod) -> anyhow::Result<Vec<String>> {
    run_mates_of(node, cri, pod, &ROLES)
}

/// The same, of some of them.
pub(crate) fn run_mates_of(
    node: &Node,
    cri: &Cri,
    pod: &Pod,
    roles: &[&'static str],
) -> anyhow::Result<Vec<String>> {
    let [work, scratch] = make_volumes(node, pod)?;
    let mounts = [(work.as_str(), "/work"), (scratch.as_str(), "/scratch")];
    let run = |role: &&'static str| {
        cri.run_container(pod, &mate(role, &["/usr/bin/podmate", *role], &mounts))
    };
    Ok(roles.iter().map(run).collect::<Result<_, _>>()?)
}

/// As a kubelet has them before there is a sandbox: nobody finds a directory that is mounted over later.
fn make_volumes(node: &Node, pod: &Pod) -> anyhow::Result<[String; 2]> {
    let [work, scratch] = ["work", "scratch"].map(|volume| volume_dir(pod, volume));
    node.shell(&format!(
        "all=$(dirname {work})
         if ! [ -d $all ]; then
             mkdir -p $all.new/work $all.new/scratch; mount -t tmpfs tmpfs $all.new/scratch; mv -T $all.new $all
         fi
         mkdir -p {work} {scratch}
         mountpoint -q {scratch} || mount -t tmpfs tmpfs {scratch}; chmod 0777 {work} {scratch}"
    ))
    .run()?;
    Ok([work, scratch])
}

fn mate<'a>(
    name: &'a str,
    command: &'a [&'a str],
    mounts: &'a [(&'a str, &'a str)],
) -> PodContainer<'a> {
    PodContainer {
        name,
        image: IMAGE,
        command,
        mounts,
        ..PodContainer::default()
    }
}

pub(crate) fn volume_dir(pod: &Pod, volume: &str) -> String {
    let uid = pod.uid();
    format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/{volume}")
}

pub(crate) fn fill_scratch(node: &Node, pod: &Pod) -> anyhow::Result<()> {
    let dir = volume_dir(pod, "scratch");
    let script = format!(
        "cd {dir}; mkdir -m 0750 d; echo content >d/file; ln d/file link; ln -s d/file symlink; \
         mkfifo fifo; chown 12:34 d/file; truncate -s 1M hole"
    );
    Ok(node.shell(&script).run()?)
}

fn check_scratch(node: &Node, pod: &Pod) -> anyhow::Result<()> {
    let dir = volume_dir(pod, "scratch");
    let script = format!("cd {dir}; cat symlink; stat -c '%n %F %a %u:%g %h %s' d link fifo hole");
    let text = node.shell(&script).read()?;
    let expected = "content\nd directory 750 0:0 2 60\nlink regular file 644 12:34 2 8\n\
                    fifo fifo 644 0:0 1 0\nhole regular file 644 0:0 1 1048576\n";
    ensure!(text == expected, "{text}");
    Ok(())
}

/// Waits until each container has made the given number of steps, and gives the last of each.
pub(crate) fn wait_for(node: &Node, pod: &Pod, counts: [u64; 3]) -> anyhow::Result<[Step; 3]> {
    let mut last = Vec::new();
    for (role, count) in ROLES.into_iter().zip(counts) {
        let step = poll_until("the steps of a container", PATIENCE, || {
            let steps = steps(node, pod, role).map_err(|error| format!("{error:#}"))?;
            match steps.last() {
                Some(step) if step.n >= count => Ok(*step),
                other => Err(format!("{role} is at {other:?}, not {count}")),
            }
        })?;
        last.push(step);
    }
    Ok(last.try_into().expect("there are three roles"))
}

/// Whether what containers have written has to be in their logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lines {
    AllThere,
    /// Who reads them was killed.
    MayBeLost,
}

/// The steps in a container's log, in which every number follows the one before.
pub(crate) fn steps(node: &Node, pod: &Pod, role: &'static str) -> anyhow::Result<Vec<Step>> {
    steps_with(Lines::AllThere, node, pod, role)
}

/// The same; where lines may be lost, every number is above the one before.
pub(crate) fn steps_with(
    lines: Lines,
    node: &Node,
    pod: &Pod,
    role: &'static str,
) -> anyhow::Result<Vec<Step>> {
    let container = PodContainer {
        name: role,
        ..PodContainer::default()
    };
    let text = String::from_utf8(node.read_file(&pod.log_path(&container))?)?;
    let mut steps: Vec<Step> = Vec::new();
    // 2026-01-01T00:00:00.000000000Z stdout F <line>
    // The last line may be on its way.
    for line in text
        .split_inclusive('\n')
        .filter_map(|line| line.strip_suffix('\n'))
    {
        let line = line.splitn(4, ' ').nth(3).unwrap_or_default();
        // What the runtime front says on stderr.
        if line.starts_with("transship: restored from the checkpoint ") {
            continue;
        }
        ensure!(!line.starts_with("BAD"), "{role}: {line}");
        let step = Step::parse(line).with_context(|| format!("{role}: {line:?}"))?;
        if let Some(last) = steps.last() {
            let is_next = match lines {
                Lines::AllThere => step.n == last.n + 1,
                Lines::MayBeLost => step.n > last.n,
            };
            ensure!(is_next, "{role}: {} follows {}", step.n, last.n);
        }
        steps.push(step);
    }
    Ok(steps)
}
