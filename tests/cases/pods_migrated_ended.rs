//! A pod moves into a pod that kubelet makes, one container after the other: an init container that had ended ends so again
//! while the source runs, and is no sign that the migration has come to its end; one that cannot be restored ends it at once.

use anyhow::ensure;
use transship_testbed::{CommandRun as _, PodContainer, PodNamespaces, Testbed, Tree, journey};

use crate::Case;
use crate::images_incomplete::layer;
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
    let case = |what, run| Case {
        what,
        tree: Tree::Forky,
        run,
    };
    [
        case(
            "pod_migrated_with_ended",
            what_has_ended_ends_again as fn(&Testbed) -> anyhow::Result<()>,
        ),
        case("pod_migrated_to_other_image", other_layers_are_told_at_once),
        case(
            "pod_migrated_while_one_starts",
            who_starts_meanwhile_is_seen,
        ),
    ]
    .into_iter()
}

/// It is neither frozen nor part of the copy, and would end with the pod.
fn who_starts_meanwhile_is_seen(bed: &Testbed) -> anyhow::Result<()> {
    let [a, b] = start_two(bed, true)?;
    a.import_image_into("k8s.io", &journey::counter_image(bed)?, "transship")?;
    let cri = a.cri()?;
    let pod = cri.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    journey::run_counter_in_pod(&cri, &pod, 0, 1)?;
    let link = bed.ssh(&a, &b)?;
    let waits = "touch /run/stands; until test -e /run/go; do sleep 0.05; done";
    let migrate = format!(
        "exec transship migrate --pod shop/web --to '{link}' --allow unmasked-paths --before-restore '{waits}'"
    );
    a.start_daemon("migrate", &["sh", "-c", &migrate])?;
    a.shell("until test -e /run/stands; do sleep 0.05; done")
        .run()?;
    journey::run_counter_in_pod(&cri, &pod, 1, 1)?;
    a.shell("touch /run/go").run()?;
    a.wait_for_daemon_end("migrate")?;
    let said = a.shell("cat /var/log/migrate.log").read()?;
    ensure!(
        said.contains("the container \"web-1\" of the pod has been started meanwhile"),
        "{said}"
    );
    let address = cri.pod_ip(&pod)?;
    for port in [7000, 7001] {
        let reply = a.ask_counter(&format!("{address}:{port}"));
        ensure!({ reply }.is_ok_and(|it| it.memory_ok), "{port}: {said}");
    }
    journey::check_no_pod_left(&b)
}

/// The name of the image means another one there: the new container is of that.
fn other_layers_are_told_at_once(bed: &Testbed) -> anyhow::Result<()> {
    let [a, b] = start_two(bed, true)?;
    let image = journey::counter_image(bed)?;
    let own = image
        .clone()
        .with_layer(journey::COUNTER_IMAGE, layer("own")?);
    let same = image
        .clone()
        .with_layer("transship.test/same:1", layer("own")?);
    for (node, image) in [(&a, &own), (&b, &same), (&b, &image)] {
        node.import_image_into("k8s.io", image, "transship")?;
    }
    let (here, there) = (a.cri()?, b.cri()?);
    let pod = here.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    journey::run_counter_in_pod(&here, &pod, 0, 1)?;

    b.shell("cp /bin/sleep /run/kubelet").run()?;
    b.start_daemon("kubelet", &["/run/kubelet", "1000"])?;
    let link = bed.ssh(&a, &b)?;
    let moved = begin_waiting(&there, &a, &link, "web-again", "--pod shop/web")?;
    ensure!(
        journey::run_counter_in_pod(&there, &moved, 0, 1).is_err(),
        "it has other layers"
    );
    a.wait_for_daemon_end("waits")?;
    let said = a.shell("cat /var/log/waits.log").read()?;
    ensure!(
        said.contains("is not restored: ") && said.contains("was made of the image"),
        "{said}"
    );
    let reply = journey::ask(&a, &here.pod_ip(&pod)?)?;
    ensure!(reply.memory_ok, "{reply:?}");
    there.remove_pod(&moved)?;
    journey::check_no_pod_left(&b)?;
    Ok(b.stop_daemon("kubelet", "KILL")?)
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
    // Until one that runs is started there is nothing to stand still for.
    let last = reached(&here, &first)? + 5;
    counts_on(&here, &first, last)?;
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
