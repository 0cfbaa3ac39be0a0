//! What lies unread in a FIFO that two containers of a pod have open is read once, after the pod was restored and then
//! migrated. CRIU, which dumps one container after the other, has it in the images of both.

use std::time::Duration;

use anyhow::ensure;
use transship_testbed::{
    CommandRun as _, Cri, Node, Pod, PodContainer, PodNamespaces, Testbed, Tree, journey,
    poll_until,
};

use crate::Case;
use crate::pods::start_two;
use crate::pods_shared::volume_dir;

const PATIENCE: Duration = Duration::from_secs(30);
/// Holds the FIFO of both and one of its own, and fills them.
const WRITER: &str =
    "[ -p /work/fifo ] || mkfifo /work/fifo; mkfifo /work/own; exec 3<>/work/fifo 4<>/work/own
    printf shared >&3; printf own >&4; touch /work/filled
    until [ -e /work/go ]; do sleep 0.1; done; timeout 1 cat <&4 >/work/own.read; sleep 1000";
const READER: &str = "[ -p /work/fifo ] || mkfifo /work/fifo; exec 3<>/work/fifo; touch /work/open
    until [ -e /work/go ]; do sleep 0.1; done; timeout 1 cat <&3 >/work/fifo.read; touch /work/read; sleep 1000";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    std::iter::once(Case {
        what: "pod_fifo",
        tree: Tree::Forky,
        run: what_lies_unread_is_read_once,
    })
}

fn what_lies_unread_is_read_once(bed: &Testbed) -> anyhow::Result<()> {
    let [a, b] = start_two(bed, true)?;
    let to = bed.ssh(&a, &b)?;
    let cri = a.cri()?;
    let pod = cri.run_pod(("shop", "fifo"), &[], PodNamespaces::Usual)?;
    run_both(&a, &cri, &pod)?;
    let work = volume_dir(&pod, "work");
    poll_until("the FIFOs", PATIENCE, || {
        let mut both = a.shell(&format!("ls {work}/filled {work}/open"));
        both.run().map_err(|error| error.to_string())
    })?;
    a.shell("transship checkpoint --pod shop/fifo --name fifo --volumes emptydir")
        .run()?;
    cri.remove_pod(&pod)?;

    let annotation = [("dev.transship/restore", "fifo")];
    let again = cri.run_pod(("shop", "fifo-again"), &annotation, PodNamespaces::Usual)?;
    run_both(&a, &cri, &again)?;
    a.shell(&format!(
        "transship migrate --pod shop/fifo-again --to '{to}' --volumes emptydir --allow unmasked-paths"
    ))
    .run()?;
    let work = volume_dir(&again, "work");
    b.shell(&format!("touch {work}/go")).run()?;
    poll_until("what is read", PATIENCE, || {
        let read = b.read_file(&format!("{work}/read"));
        read.map_err(|error| error.to_string())
    })?;
    let read = b.shell(&format!("cat {work}/fifo.read; echo; cat {work}/own.read"));
    let read = { read }.read()?;
    ensure!(read == "shared\nown", "read of the FIFOs: {read:?}");
    b.cri()?.remove_all_pods()?;
    journey::check_no_pod_left(&b)
}

fn run_both(node: &Node, cri: &Cri, pod: &Pod) -> anyhow::Result<()> {
    let work = volume_dir(pod, "work");
    node.shell(&format!("mkdir -p {work}; chmod 0777 {work}"))
        .run()?;
    for (name, script) in [("reader", READER), ("writer", WRITER)] {
        cri.run_container(
            pod,
            &PodContainer {
                name,
                image: "transship.test/podmate:1",
                command: &["sh", "-c", script],
                mounts: &[(&work, "/work")],
                ..PodContainer::default()
            },
        )?;
    }
    Ok(())
}
