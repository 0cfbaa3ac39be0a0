//! Links and FIFOs among what somebody else has filled: an image directory, the volume of a service
//! account's token. Nothing is read or written through them, and nobody waits.

use anyhow::ensure;
use transship_testbed::{CommandRun as _, PodContainer, PodNamespaces, Testbed, Tree, journey};

use crate::Case;
use crate::pods::{FIRST, start};

const TOKEN_MOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const PODS: &str = "/var/lib/kubelet/pods/u-fifo/volumes";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let run: [(_, fn(&Testbed) -> _); 2] = [
        ("images_with_links", links_among_the_images_are_refused),
        ("token_fifo", a_fifo_for_a_token_blocks_nobody),
    ];
    run.into_iter().map(|(what, run)| Case {
        what,
        tree: Tree::Forky,
        run,
    })
}

/// `transship-runc restore` as containerd calls it for `ctr containers restore`, with images that came
/// in an image whose author put links among them.
fn links_among_the_images_are_refused(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    start(bed, &node, true)?;
    let cri = node.cri()?;
    let pod = cri.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &FIRST)?;
    journey::ask(&node, &cri.pod_ip(&pod)?)?;
    node.shell("transship checkpoint --pod shop/web --name web")
        .run()?;
    ensure!(cri.runs(&id)?, "a checkpoint stops nothing");
    cri.remove_pod(&pod)?;
    node.shell(
        r#"mkdir -p /root/a/b/rootfs /root/a/w; cd /root/a
           echo untouched >/etc/victim
           cat >b/config.json <<END
{"ociVersion":"1.0.2","root":{"path":"rootfs"},"process":{"args":["x"],"cwd":"/"},
 "annotations":{"dev.transship/tcp":"close"},
 "linux":{"namespaces":[{"type":"uts","path":"/proc/1/ns/uts"},{"type":"mount"},{"type":"pid"}]}}
END"#,
    )
    .run()?;
    for (what, make, name) in [
        (
            "the draft of an edited image",
            "u=$(ls img | grep utsns | head -1); ln -s /etc/victim img/$u.new",
            ".img.new\"",
        ),
        (
            "memory",
            "rm img/pages-1.img; ln -s /etc/victim img/pages-1.img",
            "\"pages-1.img\"",
        ),
        ("a FIFO", "mkfifo img/core-99999.img", "\"core-99999.img\""),
    ] {
        let run = format!(
            "cd /root/a; rm -rf img; cp -a /var/lib/transship/checkpoints/web/first/checkpoint img; {make}
             timeout -s KILL 60 transship-runc --root /root/a/r restore --bundle b --image-path img \
             --work-path w --pid-file p x 2>&1; cat /etc/victim; ls -a /root/a"
        );
        let said = node.shell(&format!("({run}) || true")).read()?;
        let refused = format!("{name} among the images is no image of a container");
        ensure!(
            said.contains(&refused) && said.contains("untouched"),
            "{what}: {said}"
        );
        ensure!(!said.contains(".staged-"), "{what}: {said}");
    }
    journey::check_no_pod_left(&node)
}

/// The pod's author makes the volume of the token one that its processes can write to.
fn a_fifo_for_a_token_blocks_nobody(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    start(bed, &node, true)?;
    let cri = node.cri()?;
    for kind in ["kubernetes.io~empty-dir", "kubernetes.io~projected"] {
        let volume = format!("{PODS}/{kind}/t");
        node.shell(&format!("mkdir -p {volume}; mkfifo {volume}/token"))
            .run()?;
        let mounts = [(volume.as_str(), TOKEN_MOUNT)];
        let container = PodContainer {
            mounts: &mounts,
            ..FIRST
        };
        let pod = cri.run_pod(("shop", "fifo"), &[], PodNamespaces::Usual)?;
        cri.run_container(&pod, &container)?;
        journey::ask(&node, &cri.pod_ip(&pod)?)?;
        node.shell(
            "timeout -s KILL 60 transship checkpoint --pod shop/fifo --name fifo
             test -s /var/lib/transship/checkpoints/fifo/transship.json
             ! grep service_account /var/lib/transship/checkpoints/fifo/transship.json || exit 1
             transship rm fifo",
        )
        .run()?;
        cri.remove_pod(&pod)?;
    }
    journey::check_no_pod_left(&node)
}
