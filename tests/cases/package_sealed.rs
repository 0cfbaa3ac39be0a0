//! Checkpoints that are encrypted when they are taken: nothing of memory comes onto the disk in clear, at the dump, at
//! a restore, or when a command is killed; and who has no key, or another checkpoint's parts, restores nothing.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use transship_testbed::{
    CommandRun as _, ContainerdConfig, Cri, Node, PodNamespaces, Testbed, Tree, journey, poll_until,
};

use crate::Case;
use crate::journey::fails_with;
use crate::package_image::{PUBLIC_KEY, SECRET_KEY, said_that_it_comes};
use crate::package_registry::start_registry;
use crate::pods::{FIRST, import_images, reached};

const POD: (&str, &str) = ("shop", "web");
const NODE_CONFIG: &str = "/etc/transship/node.toml";
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    std::iter::once(Case {
        what: "package_sealed",
        tree: Tree::Forky,
        run: memory_is_never_on_the_disk,
    })
}

fn memory_is_never_on_the_disk(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    node.start_snapshotter()?;
    node.start_containerd(&ContainerdConfig::transship())?;
    import_images(bed, &node, "transship")?;
    node.shell("for key in mine yours; do ssh-keygen -q -t ed25519 -N '' -f /root/$key; done")
        .run()?;
    of_a_container(bed, &node)?;
    let cri = node.cri()?;
    let pod = cri.run_pod(POD, &[], PodNamespaces::Usual)?;
    let id = cri.run_container(&pod, &FIRST)?;
    journey::ask(&node, &cri.pod_ip(&pod)?)?;
    for name in ["secret", "other"] {
        transship(
            &node,
            &format!("checkpoint --pod shop/web --name {name} --encrypt-to /root/mine.pub"),
        )?;
    }
    let before = reached(&cri, &id)?;
    cri.remove_pod(&pod)?;
    nothing_in_clear(&node)?;

    only_with_the_key(&node)?;
    taken_in(&node)?;
    damaged(&node)?;
    by_annotation(&node, &cri, before)?;
    from_a_registry(&node, &cri)?;
    node.shell("transship rm other").run()?;
    nothing_in_clear(&node)?;
    journey::check_no_pod_left(&node)
}

fn transship(node: &Node, line: &str) -> anyhow::Result<String> {
    let mut command = node.command("transship");
    Ok(command.args(line.split(' ')).read()?)
}

/// Of what memory and the images of CRIU have, nothing is found on the disk, and nothing is mounted.
fn nothing_in_clear(node: &Node) -> anyhow::Result<()> {
    let found = node.shell(
        "grep -r -a -l /usr/bin/counter /var/lib/transship/checkpoints /run/transship | xargs
         grep /run/transship/opened /proc/mounts || true",
    );
    let found = { found }.read()?;
    ensure!(found.trim().is_empty(), "{found}");
    Ok(())
}

/// The command ends when it gives the layer that is exported beside the dump its name: in memory there is something then.
fn killed_in_the_middle(bed: &Testbed, node: &Node) -> anyhow::Result<()> {
    let mut inside = node.command("transship");
    inside.args([
        "checkpoint",
        "alone",
        "--name",
        "cut",
        "--encrypt-to",
        "/root/mine.pub",
    ]);
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-e", "trace=rename,renameat,renameat2"]);
    strace.args([
        "-e",
        "inject=rename,renameat,renameat2:signal=SIGKILL",
        "-o",
    ]);
    strace.arg(bed.dir().join("strace"));
    strace.arg(inside.get_program()).args(inside.get_args());
    strace
        .env_clear()
        .envs({ inside.get_envs() }.filter_map(|(name, it)| Some((name, it?))));
    let status = strace.status()?;
    ensure!(!status.success(), "it was not killed");
    Ok(())
}

/// A container outside of a pod; and its dump is cut off.
fn of_a_container(bed: &Testbed, node: &Node) -> anyhow::Result<()> {
    node.import_image(&journey::counter_image(bed)?, "transship")?;
    node.shell(
        "ctr run --detach --snapshotter transship transship.test/counter:1 alone /usr/bin/counter --memory-mb 16",
    )
    .run()?;
    journey::wait_for_count(node, "alone", 3)?;
    killed_in_the_middle(bed, node)?;
    let at = journey::read_counts(node, "alone").map_err(anyhow::Error::msg)?;
    journey::wait_for_count(node, "alone", at)?;
    poll_until(
        "the guard of the freeze to remove the dump",
        PATIENCE,
        || nothing_in_clear(node).map_err(|error| error.to_string()),
    )?;

    let taken = transship(
        node,
        "checkpoint alone --name alone --encrypt-to /root/mine.pub",
    )?;
    ensure!(taken.contains("sealed in"), "{taken}");
    let listed = { node.shell("ls -A /var/lib/transship/checkpoints/alone | xargs") }.read()?;
    ensure!(listed.trim() == "sealed.age sealed.json", "{listed}");
    nothing_in_clear(node)?;
    let count = journey::read_counts(node, "alone").map_err(anyhow::Error::msg)?;
    journey::remove_container(node, "alone")?;
    fails_with(node, &["restore", "alone"], 4, "--identity")?;
    transship(node, "restore alone --identity /root/mine")?;
    nothing_in_clear(node)?;
    let now = journey::wait_for_count(node, "alone", 3)?;
    ensure!(now >= 3, "{now}, and {count} before");
    let listed: Value = serde_json::from_str(&transship(node, "ls --json")?)?;
    ensure!(
        listed[0]["sealed"] == true && listed[0]["restored"] == 1,
        "{listed:#}"
    );
    journey::remove_container(node, "alone")?;
    transship(node, "rm alone")?;
    journey::check_nothing_left(node)
}

fn only_with_the_key(node: &Node) -> anyhow::Result<()> {
    let listed = transship(node, "ls")?;
    ensure!(
        listed.contains("(sealed)") && listed.contains("shop/web"),
        "{listed}"
    );
    fails_with(node, &["inspect", "secret"], 4, "\"secret\" is sealed")?;
    let yours = ["inspect", "secret", "--identity", "/root/yours"];
    fails_with(node, &yours, 1, "none of the identities")?;
    let inside = transship(node, "inspect secret --verify --identity /root/mine")?;
    ensure!(
        inside.contains("/usr/bin/counter") && inside.contains("sealed"),
        "{inside}"
    );
    nothing_in_clear(node)?;
    // Nobody makes it readable without saying so.
    for line in [
        "send secret --identity /root/mine",
        "export secret - --identity /root/mine",
        "export secret /root/layout --format oci --identity /root/mine",
        "push secret 127.0.0.1:5000/shop/web:clear --plain-http --identity /root/mine",
    ] {
        let line: Vec<_> = line.split(' ').collect();
        fails_with(node, &line, 4, "would leave this node in clear").context(line.join(" "))?;
    }
    // As it lies; and opened.
    node.shell(
        "transship export secret /root/package
         cmp /root/package /var/lib/transship/checkpoints/secret/sealed.age
         transship inspect /root/package --identity /root/mine >/dev/null
         transship export secret - --identity /root/mine --in-clear | zstd -dc | tar -t | grep -q first/checkpoint/inventory.img
         transship send secret --identity /root/mine --in-clear | transship receive --name sent
         transship inspect sent --verify >/dev/null; transship rm sent; rm /root/package",
    )
    .run()?;
    nothing_in_clear(node)
}

/// What comes encrypted lies sealed, under whatever name; unless it is to lie in clear.
fn taken_in(node: &Node) -> anyhow::Result<()> {
    node.shell("transship export secret /root/package").run()?;
    for (key, said) in [
        ("/root/yours", "none of the identities"),
        ("/root/mine", "\"secret\" exists already"),
    ] {
        let import = ["import", "/root/package", "--identity", key];
        fails_with(node, &import, 1, said)?;
        nothing_in_clear(node).context(said)?;
    }
    fails_with(node, &["import", "/root/package"], 1, "--identity")?;
    let taken = transship(
        node,
        "import /root/package --identity /root/mine --name file",
    )?;
    ensure!(taken.contains("sealed in"), "{taken}");
    node.shell("transship import - --identity /root/mine --name stream </root/package")
        .run()?;
    nothing_in_clear(node)?;
    fails_with(node, &["inspect", "stream"], 4, "is sealed")?;
    // The same package under three names; each is opened by itself.
    for name in ["file", "stream", "secret"] {
        let inspect = format!("inspect {name} --verify --identity /root/mine");
        let inside = transship(node, &inspect)?;
        ensure!(inside.contains("/usr/bin/counter"), "{inside}");
        nothing_in_clear(node)?;
    }
    node.shell("cmp /root/package /var/lib/transship/checkpoints/file/sealed.age")
        .run()?;
    let clear = transship(
        node,
        "import /root/package --identity /root/mine --name clear --in-clear",
    )?;
    ensure!(!clear.contains("sealed"), "{clear}");
    node.shell(
        "grep -r -a -q /usr/bin/counter /var/lib/transship/checkpoints/clear
         transship inspect clear --verify >/dev/null
         transship rm clear file stream; rm /root/package",
    )
    .run()?;
    nothing_in_clear(node)
}

/// Each fault is found before anything is restored, and leaves nothing.
fn damaged(node: &Node) -> anyhow::Result<()> {
    node.shell("cp -r /var/lib/transship/checkpoints/secret /root/kept")
        .run()?;
    for (spoil, said) in [
        (
            "printf not-random | dd of=sealed.age bs=1 seek=300000 conv=notrunc status=none",
            "cannot be opened",
        ),
        ("truncate -s 200000 sealed.age", "cannot be opened"),
        ("printf x >>sealed.age", "cannot be opened"),
        ("cp ../other/sealed.json .", "of another checkpoint"),
        ("cp ../other/sealed.age .", "cannot be opened"),
        ("cp ../other/sealed.* .", "of another checkpoint"),
        (
            "sed -i 's/\"created\": [0-9]*/\"created\": 1/' sealed.json",
            "of another checkpoint",
        ),
        ("rm sealed.age", "sealed.age"),
    ] {
        node.shell(&format!(
            "cd /var/lib/transship/checkpoints/secret; {spoil}"
        ))
        .run()?;
        let inspect = ["inspect", "secret", "--identity", "/root/mine"];
        fails_with(node, &inspect, 1, said).context(spoil)?;
        nothing_in_clear(node).context(spoil)?;
        node.shell("cp /root/kept/* /var/lib/transship/checkpoints/secret")
            .run()?;
    }
    Ok(())
}

/// A pod asks for it, and this node has a key, or none.
fn by_annotation(node: &Node, cri: &Cri, before: u64) -> anyhow::Result<()> {
    let wants = [("dev.transship/restore", "secret")];
    let refused = |said: &str| {
        let asked = cri.run_pod(POD, &wants, PodNamespaces::Usual);
        match asked.map_err(|error| format!("{:#}", anyhow::Error::from(error))) {
            Err(error) if error.contains(said) => Ok(()),
            other => Err(anyhow::anyhow!("{other:?} instead of {said:?}")),
        }
    };
    refused("this node has no key")?;
    node.write_file(NODE_CONFIG, "[checkpoints]\nidentity = \"/root/mine\"\n")?;
    node.shell("chmod 644 /root/mine").run()?;
    refused("others than its owner may read")?;
    node.shell("chmod 600 /root/mine").run()?;
    let pod = cri.run_pod(POD, &wants, PodNamespaces::Usual)?;
    let mounted = { node.shell("grep /run/transship/opened /proc/mounts") }.read()?;
    ensure!(mounted.contains("noswap"), "{mounted}");
    // What is looked for elsewhere is found where it is.
    node.shell("grep -r -a -q /usr/bin/counter /run/transship/opened")
        .run()?;
    // It is opened as long as the pod needs it, whoever else looks.
    transship(node, "inspect secret --identity /root/mine")?;
    let id = cri.run_container(&pod, &FIRST)?;
    let reply = journey::ask(node, &cri.pod_ip(&pod)?)?;
    ensure!(reply.memory_ok, "{reply:?}");
    let now = reached(cri, &id)?;
    ensure!(
        now >= before.saturating_sub(1000) && now > 0,
        "{now}, and {before} before"
    );
    nothing_in_clear(node)?;
    cri.remove_pod(&pod)?;
    // A pod that never makes its containers leaves nothing either.
    let pod = cri.run_pod(POD, &wants, PodNamespaces::Usual)?;
    cri.remove_pod(&pod)?;
    nothing_in_clear(node)
}

/// What comes encrypted out of a registry lies sealed here.
fn from_a_registry(node: &Node, cri: &Cri) -> anyhow::Result<()> {
    start_registry(node, "registry", 5000, "", "")?;
    node.write_file("/root/minisign.key", SECRET_KEY)?;
    let push = "transship push secret 127.0.0.1:5000/shop/web:1 --plain-http --identity /root/mine \
                    --encrypt-to /root/mine.pub --sign /root/minisign.key --json | jq -r .digest";
    let digest = { node.shell(push) }.read()?;
    let reference = format!("127.0.0.1:5000/shop/web@{}", digest.trim());
    transship(node, "rm secret")?;
    let pull = format!("pull {reference} --plain-http --identity /root/mine");
    let pulled = transship(node, &pull)?;
    ensure!(pulled.contains("sealed in"), "{pulled}");
    nothing_in_clear(node)?;
    transship(node, "rm secret")?;
    node.write_file(
        NODE_CONFIG,
        format!(
            "[images]\nregistries = [\"127.0.0.1:5000\"]\nplain-http = [\"127.0.0.1:5000\"]\n\
             [checkpoints]\nidentity = \"/root/mine\"\nsigned-by = [\"{PUBLIC_KEY}\"]\n"
        ),
    )?;
    node.start_daemon("transship-serve", &["transship", "serve"])?;
    let wants = [("dev.transship/restore-image", reference.as_str())];
    let pod = poll_until("the pod's checkpoint", PATIENCE, || {
        let asked = cri.run_pod(POD, &wants, PodNamespaces::Usual);
        let asked = asked.map_err(|error| format!("{:#}", anyhow::Error::from(error)));
        asked.inspect_err(|error| assert!(said_that_it_comes(error), "{error}"))
    })?;
    cri.run_container(&pod, &FIRST)?;
    let reply = journey::ask(node, &cri.pod_ip(&pod)?)?;
    ensure!(reply.memory_ok, "{reply:?}");
    nothing_in_clear(node)?;
    cri.remove_pod(&pod)?;
    let listed = transship(node, "ls")?;
    ensure!(
        listed.contains("secret") && listed.contains("(sealed)"),
        "{listed}"
    );
    node.stop_daemon("transship-serve", "TERM")?;
    node.shell(&format!("rm {NODE_CONFIG}; transship rm secret"))
        .run()?;
    Ok(())
}
