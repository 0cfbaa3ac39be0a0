//! A pod with an init container moves into a pod that kubelet makes: what had ended ends so again, and is no sign that the
//! migration has come to its end.

use anyhow::ensure;
use transship_testbed::{CommandRun as _, PodContainer, PodNamespaces, Testbed, Tree, journey};

use crate::Case;
use crate::pods::{FIRST, reached, start_two};
use crate::pods_kubelet::{ended, log_of};
use crate::pods_migrated::begin_waiting;
use crate::pods_moved::counts_on;

const INIT: PodContainer<'_> = PodContainer {
    name: "init",
    command: &["sh", "-c", "echo it runs"],
    ..FIRST
};

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    std::iter::once(Case {
        what: "pod_migrated_with_ended",
        tree: Tree::Forky,
        run: what_has_ended_ends_again,
    })
}

fn what_has_ended_ends_again(bed: &Testbed) -> anyhow::Result<()> {
    let [a, b] = start_two(bed, true)?;
    let link = bed.ssh(&a, &b)?;
    let (here, there) = (a.cri()?, b.cri()?);
    let pod = here.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    let init = here.run_container(&pod, &INIT)?;
    ensure!(ended(&here, &init)? == 0, "it makes what it makes");
    let first = here.run_container(&pod, &FIRST)?;
    counts_on(&here, &first, 5)?;
    // Nobody can ask it when it is frozen.
    let last = reached(&here, &first)?;

    b.shell("cp /bin/sleep /run/kubelet").run()?;
    b.start_daemon("kubelet", &["/run/kubelet", "1000"])?;
    let moved = begin_waiting(&there, &a, &link, "web-again", "--pod shop/web")?;
    let init = there.run_container(&moved, &INIT)?;
    ensure!(ended(&there, &init)? == 0, "it has ended so again");
    let log = log_of(&b, &moved, "init")?;
    ensure!(
        log.contains("not run again: it had ended with 0") && !log.contains("it runs"),
        "{log}"
    );
    let first = there.run_container(&moved, &FIRST)?;
    a.wait_for_daemon_end("waits")?;
    journey::check_no_pod_left(&a)?;
    ensure!(reached(&there, &first)? >= last, "it has begun anew");
    counts_on(&there, &first, last + 5)?;
    there.remove_pod(&moved)?;
    journey::check_no_pod_left(&b)?;
    b.stop_daemon("kubelet", "KILL")?;
    Ok(())
}
