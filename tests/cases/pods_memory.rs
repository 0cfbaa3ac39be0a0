//! A pod with much memory moves: the memory of one container is put in while the next one is restored. Whoever ends that
//! ends the migration, and the pod runs on where it was.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use transship_testbed::{
    CommandRun as _, Cri, Node, Pod, PodNamespaces, Testbed, Tree, journey, poll_until,
};

use crate::Case;
use crate::pods::start_two;

const PATIENCE: Duration = Duration::from_secs(60);
/// Of each container; so much takes a while to be put in.
const MEMORY_MB: [u32; 2] = [300, 60];
const MIGRATE: [&str; 5] = ["migrate", "--pod", "shop/web", "--allow", "unmasked-paths"];
/// Ends the first that puts memory in.
const KILLER: &str = "until pkill -KILL -f '[t]ransship-memory-fill'; do :; done";
/// Has it stand still for longer than a container of a kubelet may be held without a start. The shim of containerd 1.6 has
/// the others wait for this start.
const STOPPER: &str = "until pkill -STOP -f '[t]ransship-memory-fill'; do :; done
     sleep 25
     pkill -CONT -f '[t]ransship-memory-fill'";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let case = |what, tree, run| Case { what, tree, run };
    [
        case(
            "pod_memory",
            Tree::Forky,
            memory_comes_whole_or_not_at_all as fn(&Testbed) -> anyhow::Result<()>,
        ),
        case("pod_memory_slow", Tree::Bookworm, slow_memory_is_waited_for),
    ]
    .into_iter()
}

/// Two nodes, one of which has the pod.
fn start_pod(bed: &Testbed) -> anyhow::Result<([Node; 2], Pod)> {
    let [a, b] = start_two(bed, true)?;
    let image = journey::counter_image(bed)?;
    a.import_image_into("k8s.io", &image, "transship")?;
    let here = a.cri()?;
    let pod = here.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    for (number, memory) in MEMORY_MB.into_iter().enumerate() {
        journey::run_counter_in_pod(&here, &pod, number, memory)?;
    }
    Ok(([a, b], pod))
}

fn slow_memory_is_waited_for(bed: &Testbed) -> anyhow::Result<()> {
    let ([a, b], pod) = start_pod(bed)?;
    let before = ask_all(&a, &a.cri()?, &pod)?;
    b.start_daemon("stopper", &["sh", "-c", STOPPER])?;
    migrate(&a, &bed.ssh(&a, &b)?).read()?;
    b.wait_for_daemon_end("stopper")?;
    journey::check_no_pod_left(&a)?;
    let moved = journey::moved_to(&b, &pod)?;
    let after = ask_all(&b, &b.cri()?, &moved)?;
    ensure!(after >= before, "{after:?} after {before:?}");
    b.cri()?.remove_pod(&moved)?;
    Ok(())
}

fn memory_comes_whole_or_not_at_all(bed: &Testbed) -> anyhow::Result<()> {
    let ([a, b], pod) = start_pod(bed)?;
    let (to_b, to_a) = (bed.ssh(&a, &b)?, bed.ssh(&b, &a)?);
    let here = a.cri()?;
    let before = ask_all(&a, &here, &pod)?;

    b.start_daemon("killer", &["sh", "-c", KILLER])?;
    let said = migrate(&a, &to_b).read_failure()?;
    b.wait_for_daemon_end("killer")?;
    ensure!(
        said.contains("without its memory") && said.contains("was killed"),
        "{said}"
    );
    let after = ask_all(&a, &here, &pod).context("it runs on here")?;
    ensure!(after >= before, "{after:?} after {before:?}");
    journey::check_no_pod_left(&b)?;
    let left = b
        .shell("ls /run/transship/opened 2>/dev/null || true")
        .read()?;
    ensure!(left.is_empty(), "left: {left}");

    // There, and back: what was given back on one way is there on the other.
    let mut pod = pod;
    for (from, to, link) in [(&a, &b, &to_b), (&b, &a, &to_a)] {
        migrate(from, link).read()?;
        journey::check_no_pod_left(from)?;
        pod = journey::moved_to(to, &pod)?;
        let counts = ask_all(to, &to.cri()?, &pod)?;
        ensure!(counts >= after, "{counts:?} after {after:?}");
    }
    here.remove_pod(&pod)?;
    Ok(())
}

fn migrate(from: &Node, to: &str) -> Command {
    let mut command = from.command("transship");
    command.args(MIGRATE).args(["--to", to]);
    command
}

/// What each of them has counted to; their memory is as it was made.
fn ask_all(node: &Node, cri: &Cri, pod: &Pod) -> anyhow::Result<Vec<u64>> {
    let ip = cri.pod_ip(pod)?;
    let mut counts = Vec::new();
    for number in 0..MEMORY_MB.len() {
        let address = format!("{ip}:{}", 7000 + number);
        let reply = poll_until("an answer", PATIENCE, || node.ask_counter(&address))?;
        ensure!(reply.memory_ok, "web-{number}: {reply:?}");
        counts.push(reply.count);
    }
    Ok(counts)
}
