//! Pods that ask for a restore that cannot be: each fails with one sentence that names why, and
//! leaves nothing behind.

use anyhow::ensure;
use transship_testbed::{
    CommandRun as _, Cri, Image, Node, Pod, PodContainer, PodNamespaces, Testbed, journey,
};

use crate::Case;
use crate::pods::{FIRST, SECOND, start};

const STORE: &str = "/var/lib/transship/checkpoints";
const TOKEN_MOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// {"alg":"RS256"} . {"sub":"system:serviceaccount:shop:cart"} . no signature
const CART: &str = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJzeXN0ZW06c2VydmljZWFjY291bnQ6c2hvcDpjYXJ0In0.x";
/// The same of shop:till.
const TILL: &str = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJzeXN0ZW06c2VydmljZWFjY291bnQ6c2hvcDp0aWxsIn0.x";
const CART_VOLUME: &str = "/var/lib/kubelet/pods/u1/volumes/kubernetes.io~projected/cart";
const TILL_VOLUME: &str = "/var/lib/kubelet/pods/u2/volumes/kubernetes.io~projected/till";
const CART_MOUNTS: &[(&str, &str)] = &[("/var/lib/cache", "/cache"), (CART_VOLUME, TOKEN_MOUNT)];
const TILL_MOUNTS: &[(&str, &str)] = &[("/var/lib/cache", "/cache"), (TILL_VOLUME, TOKEN_MOUNT)];

const MOUNTED: PodContainer<'static> = PodContainer {
    mounts: CART_MOUNTS,
    ..FIRST
};

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    Case::on_all_trees("pod_refusals", refusals_name_why_and_leave_nothing)
}

/// As the init container of a service mesh makes them; it does not run again.
fn rules_of_the_network_are_told(node: &Node) -> anyhow::Result<()> {
    const CHECK: &str = "transship check --pod shop/web";
    const TAKE: &str = "transship checkpoint --pod shop/web --name ruled";
    let inside = |command: &str| {
        let each = format!("for it in /run/netns/*; do nsenter --net=$it {command}; done");
        node.shell(&each).run()
    };
    // Who looks makes a table.
    inside("iptables -w -L")?;
    node.shell(CHECK).run()?;
    for (rule, table, away) in [
        (
            "nft 'add table ip mesh; add chain ip mesh out { type filter hook output priority 0; }
                  add rule ip mesh out tcp dport 15001 accept'",
            "mesh",
            "nft delete table ip mesh",
        ),
        (
            "iptables-legacy -w -A OUTPUT -p tcp --dport 15001 -j ACCEPT",
            "filter",
            "iptables-legacy -w -F",
        ),
    ] {
        inside(rule)?;
        let told = node.shell(CHECK).output()?;
        says(&String::from_utf8_lossy(&told.stdout), "network-rules")?;
        says(&String::from_utf8_lossy(&told.stdout), table)?;
        says(
            &node.shell(TAKE).read_failure()?,
            "--allow-lost network-rules",
        )?;
        node.shell(&format!(
            "{TAKE} --allow-lost network-rules; transship rm ruled"
        ))
        .run()?;
        inside(away)?;
    }
    Ok(())
}

fn refusals_name_why_and_leave_nothing(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    start(bed, &node, true)?;
    let other = other_image(journey::counter_image(bed)?)?;
    node.import_image_into("k8s.io", &other, "transship")?;
    node.shell(&format!(
        "mkdir -p /var/lib/cache {CART_VOLUME} {TILL_VOLUME}"
    ))
    .run()?;
    node.write_file(&format!("{CART_VOLUME}/token"), CART)?;
    node.write_file(&format!("{TILL_VOLUME}/token"), TILL)?;
    let cri = node.cri()?;
    let pod = cri.run_pod(("shop", "web"), &[], PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &MOUNTED)?;
    journey::ask(&node, &cri.pod_ip(&pod)?)?;
    cri.exec(&id, &["true"])?;
    rules_of_the_network_are_told(&node)?;
    node.shell("transship checkpoint --pod shop/web --name web")
        .run()?;
    cri.remove_pod(&pod)?;
    copies_of_the_checkpoint(&node)?;

    // The sandbox is refused.
    for (name, said) in [
        ("nothing", "there is no checkpoint \"nothing\""),
        (
            "alien",
            "was taken on s390x and cannot be restored on x86_64",
        ),
        ("twice", "has the container \"first\" twice"),
    ] {
        let Err(error) = cri.run_pod(
            ("shop", name),
            &[("dev.transship/restore", name)],
            PodNamespaces::Usual,
        ) else {
            anyhow::bail!("{name} is restored");
        };
        says(&error.to_string(), said)?;
        journey::check_no_pod_left(&node)?;
    }
    // The container is refused.
    let other_image = PodContainer {
        image: "transship.test/other:1",
        ..MOUNTED
    };
    refused(
        &node,
        &cri,
        &[],
        &other_image,
        "was made of the image \"transship.test/counter:1\"",
    )?;
    refused(&node, &cri, &[], &FIRST, "has something mounted on /cache")?;

    node.write_file("/etc/transship/node.toml", "strict = true\n")?;
    let till = PodContainer {
        mounts: TILL_MOUNTS,
        ..FIRST
    };
    refused(
        &node,
        &cri,
        &[],
        &till,
        "service account \"cart\", and the pod's is \"till\"",
    )?;
    // A pod that may not have it starts nothing, whatever it asks for.
    let cold = ("dev.transship/on-failure", "cold-start");
    refused(&node, &cri, &[cold], &till, "this node is strict")?;
    restored(&cri, &[], &MOUNTED)?;
    node.write_file("/etc/transship/node.toml", "strikt = true\n")?;
    let restore = ("dev.transship/restore", "web");
    let Err(error) = cri.run_pod(("shop", "misspelt"), &[restore], PodNamespaces::Usual) else {
        anyhow::bail!("a rule that is misspelt is no rule");
    };
    says(
        &error.to_string(),
        "cannot be parsed, so nothing is restored",
    )?;
    node.write_file(
        "/etc/transship/node.toml",
        "[may_restore]\nbank = [\"shop\"]\n",
    )?;
    let pod = cri.run_pod(("bank", "guest"), &[restore], PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &MOUNTED)?;
    ensure!(cri.runs(&id)?, "an exception is named");
    cri.remove_pod(&pod)?;

    one_container_is_restored_once(&node, &cri)?;
    a_failed_restore_may_start_cold(&node, &cri)?;
    journey::check_no_pod_left(&node)
}

/// Checkpoints that no dump makes.
fn copies_of_the_checkpoint(node: &Node) -> anyhow::Result<()> {
    node.shell(&format!(
        "cd {STORE}
         for name in alien twice broken; do cp -a web $name; done
         sed -i 's/\"architecture\": .*/\"architecture\": \"s390x\",/' alien/transship.json
         jq '.containers += .containers' web/transship.json >twice/transship.json
         for name in alien twice broken; do sed -i \"s/\\\"name\\\": \\\"web\\\"/\\\"name\\\": \\\"$name\\\"/\" $name/transship.json; done
         cp -a broken cut; sed -i 's/\"name\": \"broken\"/\"name\": \"cut\"/' cut/transship.json
         truncate -s 4096 cut/first/checkpoint/pages-1.img
         printf broken | dd conv=notrunc status=none of=broken/first/checkpoint/inventory.img"
    ))
    .run()?;
    Ok(())
}

fn refused(
    node: &Node,
    cri: &Cri,
    more: &[(&str, &str)],
    container: &PodContainer<'_>,
    said: &str,
) -> anyhow::Result<()> {
    let annotations = [&[("dev.transship/restore", "web")], more].concat();
    let pod = cri.run_pod(("shop", "refused"), &annotations, PodNamespaces::Usual)?;
    let Err(error) = cri.run_container(&pod, container) else {
        anyhow::bail!("restored although {said}");
    };
    says(&error.to_string(), said)?;
    cri.remove_pod(&pod)?;
    journey::check_no_pod_left(node)
}

fn restored(cri: &Cri, more: &[(&str, &str)], container: &PodContainer<'_>) -> anyhow::Result<()> {
    let annotations = [&[("dev.transship/restore", "web")], more].concat();
    let pod = cri.run_pod(("shop", "restored"), &annotations, PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, container)?;
    ensure!(cri.runs(&id)?, "it runs");
    Ok(cri.remove_pod(&pod)?)
}

/// Two containers of a pod cannot both be the same one.
fn one_container_is_restored_once(node: &Node, cri: &Cri) -> anyhow::Result<()> {
    let annotations = [
        ("dev.transship/restore", "web"),
        ("dev.transship/restore-container", "first"),
    ];
    let pod = cri.run_pod(("shop", "double"), &annotations, PodNamespaces::Usual)?;
    cri.run_container(&pod, &MOUNTED)?;
    let second = PodContainer {
        mounts: CART_MOUNTS,
        ..SECOND
    };
    let Err(error) = cri.run_container(&pod, &second) else {
        anyhow::bail!("it is there twice");
    };
    says(
        &error.to_string(),
        "is restored as \"first\" of this pod, so \"second\" cannot be it",
    )?;
    cri.remove_pod(&pod)?;
    journey::check_no_pod_left(node)
}

/// With `fail` the call says why; with `cold-start` the container's stderr and the node's log do.
fn a_failed_restore_may_start_cold(node: &Node, cri: &Cri) -> anyhow::Result<()> {
    let pod = cri.run_pod(
        ("shop", "cut"),
        &[("dev.transship/restore", "cut")],
        PodNamespaces::Usual,
    )?;
    let Err(error) = cri.run_container(&pod, &MOUNTED) else {
        anyhow::bail!("half of the memory is restored");
    };
    says(
        &error.to_string(),
        "pages-1.img of the checkpoint is damaged: it has 4096 bytes",
    )?;
    cri.remove_pod(&pod)?;
    journey::check_no_pod_left(node)?;

    let restore = ("dev.transship/restore", "broken");
    let pod = cri.run_pod(("shop", "fails"), &[restore], PodNamespaces::Usual)?;
    let Err(error) = cri.run_container(&pod, &MOUNTED) else {
        anyhow::bail!("a broken image is restored");
    };
    says(
        &error.to_string(),
        "cannot restore \"first\" from the checkpoint \"broken\": ",
    )?;
    cri.remove_pod(&pod)?;
    journey::check_no_pod_left(node)?;

    let cold = ("dev.transship/on-failure", "cold-start");
    for checkpoint in ["broken", "nothing"] {
        let annotations = [("dev.transship/restore", checkpoint), cold];
        let pod = cri.run_pod(("shop", "cold"), &annotations, PodNamespaces::Usual)?;
        let id = cri.run_container(&pod, &MOUNTED)?;
        let reply = journey::ask(node, &cri.pod_ip(&pod)?)?;
        ensure!(reply.count < 400 && reply.memory_ok, "{reply:?}");
        let log = log_of(node, &pod)?;
        says(&log, "transship: not restored, starts cold: ")?;
        says(&log, checkpoint)?;
        let all = node.read_file("/var/log/transship/restores.log")?;
        let line = format!("container={id} outcome=started-cold");
        says(&String::from_utf8(all)?, &line)?;
        if checkpoint == "nothing" {
            stays_without(node, cri, &pod, &id)?;
        }
        cri.remove_pod(&pod)?;
        journey::check_no_pod_left(node)?;
    }
    Ok(())
}

/// The checkpoint comes when the pod runs already.
fn stays_without(node: &Node, cri: &Cri, pod: &Pod, id: &str) -> anyhow::Result<()> {
    node.shell(&format!(
        "cd {STORE}; cp -a web nothing; sed -i 's/\"name\": \"web\"/\"name\": \"nothing\"/' nothing/transship.json"
    ))
    .run()?;
    cri.stop_container(id, 0)?;
    let again = PodContainer {
        attempt: 1,
        ..MOUNTED
    };
    cri.run_container(pod, &again)?;
    let reply = journey::ask(node, &cri.pod_ip(pod)?)?;
    ensure!(reply.count < 400 && reply.memory_ok, "{reply:?}");
    let log = node.read_file(&pod.log_path(&again))?;
    says(
        &String::from_utf8(log)?,
        "it has started from its image before",
    )?;
    node.shell("transship rm nothing").run()?;
    Ok(())
}

fn log_of(node: &Node, pod: &Pod) -> anyhow::Result<String> {
    let text = node.shell(&format!("cat {}/first/0.log", pod.log_directory()));
    Ok({ text }.read()?)
}

/// The message may have gone through quoting on its way.
fn says(text: &str, said: &str) -> anyhow::Result<()> {
    ensure!(
        text.replace('\\', "").contains(said),
        "{text:?} does not say {said:?}"
    );
    Ok(())
}

/// The counter's image with one more layer: another base.
fn other_image(counter: Image) -> anyhow::Result<Image> {
    let mut layer = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(5);
    header.set_mode(0o644);
    layer.append_data(&mut header, "data/other", &b"other"[..])?;
    Ok(counter.with_layer("transship.test/other:1", layer.into_inner()?))
}
