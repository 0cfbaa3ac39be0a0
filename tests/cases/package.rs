//! A checkpoint as a thing: looked into, compared, packed, encrypted, read again, restored from, pruned; as the
//! commands are typed.

use anyhow::{Context as _, ensure};
use serde_json::Value;
use transship_testbed::{CommandRun as _, Node, Testbed, Tree, journey};

use crate::Case;
use crate::journey::fails_with;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    std::iter::once(Case {
        what: "package",
        tree: Tree::Forky,
        run: a_checkpoint_is_a_thing,
    })
}

fn a_checkpoint_is_a_thing(bed: &Testbed) -> anyhow::Result<()> {
    let node = bed.node("a")?;
    journey::start_services(&node)?;
    for image in [
        transship_testbed::Image::pause(bed.settings())?,
        journey::counter_image(bed)?,
    ] {
        node.import_image(&image, "transship")?;
    }
    journey::run_sandbox(&node, "sandbox")?;
    journey::run_counter(&node, "web", "sandbox", 16, &[])?;
    journey::wait_for_count(&node, "web", 5)?;
    transship(&node, "checkpoint web --name one")?;
    let at_one = journey::read_counts(&node, "web").map_err(anyhow::Error::msg)?;
    journey::wait_for_count(&node, "web", at_one)?;
    transship(&node, "checkpoint web --name two")?;

    look_inside(&node)?;
    compare(&node)?;
    pack(&node)?;
    encrypt(&node)?;
    restore_from_a_package(&node)?;
    prune(&node)?;
    journey::remove_container(&node, "web")?;
    journey::remove_container(&node, "sandbox")?;
    journey::check_nothing_left(&node)
}

fn transship(node: &Node, line: &str) -> anyhow::Result<String> {
    let mut command = node.command("transship");
    Ok(command.args(line.split(' ')).read()?)
}

fn json(node: &Node, line: &str) -> anyhow::Result<Value> {
    Ok(serde_json::from_str(&transship(node, line)?)?)
}

fn look_inside(node: &Node) -> anyhow::Result<()> {
    let contents = json(node, "inspect two --json")?;
    let inside = &contents["containers"][0];
    let process = &inside["processes"][0];
    ensure!(process["name"] == "counter", "{inside:#}");
    ensure!(
        process["arguments"][0] == "/usr/bin/counter" && process["state"] == "running",
        "{process:#}"
    );
    // 16 MB of its own, and a little.
    ensure!(
        process["memory_bytes"].as_u64() > Some(16 << 20),
        "{process:#}"
    );
    ensure!(
        inside["dump"]["pages_written"].as_u64() > Some(4096),
        "{}",
        inside["dump"]
    );
    let has = |list: &str, key: &str, value: &str| {
        let entries = inside[list].as_array().into_iter().flatten();
        entries.into_iter().any(|entry| entry[key] == value)
    };
    ensure!(
        has("sockets", "state", "listening"),
        "{}",
        inside["sockets"]
    );
    ensure!(has("files", "path", "/data/counts"), "{}", inside["files"]);
    ensure!(
        has("mounts", "destination", "/proc"),
        "{}",
        inside["mounts"]
    );
    ensure!(
        has("requirements", "kind", "image"),
        "{}",
        inside["requirements"]
    );
    let changes = inside["changes"]["changes"]
        .as_array()
        .context("no changes")?;
    let changed = |path: &str, change: &str| {
        let mut all = changes.iter();
        all.any(|it| it["path"] == path && it["change"] == change)
    };
    ensure!(changed("/data/counts", "put"), "{changes:#?}");
    ensure!(changed("/data/delete-me", "deleted"), "{changes:#?}");
    let source = &contents["manifest"]["source"];
    for program in ["criu", "runc", "containerd"] {
        ensure!(
            source[program].is_string(),
            "no version of {program}: {source:#}"
        );
    }
    ensure!(source["processor"]["features"].is_array(), "{source:#}");
    let text = transship(node, "inspect two --all")?;
    for line in [
        "processes",
        "largest mappings",
        "/usr/bin/counter",
        "tcp  listening",
    ] {
        ensure!(text.contains(line), "no {line:?} in\n{text}");
    }
    Ok(())
}

fn compare(node: &Node) -> anyhow::Result<()> {
    let difference = json(node, "diff one two --json")?;
    let container = &difference["containers"][0];
    let files = container["files"].as_array().context("no files")?;
    ensure!(
        files
            .iter()
            .any(|it| it["path"] == "/data/counts" && it["change"] == "changed"),
        "{files:#?}"
    );
    let pages = &container["processes"][0];
    // It counts on, in memory that is otherwise as it was.
    let (same, changed) = (
        pages["pages_same"].as_u64(),
        pages["pages_changed"].as_u64(),
    );
    ensure!(
        same > Some(4000) && changed > Some(0) && changed < Some(400),
        "{pages:#}"
    );
    let text = transship(node, "diff one one")?;
    ensure!(!text.contains("changed   /"), "{text}");
    fails_with(
        node,
        &["diff", "one", "three"],
        3,
        "no checkpoint \"three\"",
    )
}

/// Into a file and out of it; what is damaged, and what is there already, changes nothing.
fn pack(node: &Node) -> anyhow::Result<()> {
    transship(node, "export two /root/two.package")?;
    let size = node.shell("stat -c %s /root/two.package; stat -c %a /root/two.package");
    let size = { size }.read()?;
    ensure!(size.trim().ends_with("600"), "{size}");
    let text = transship(node, "inspect /root/two.package")?;
    ensure!(
        text.contains("every digest is right") && text.contains("counter"),
        "{text}"
    );
    // Any tar reads it.
    let list = node
        .shell("zstd -dc /root/two.package | tar -t | head -1")
        .read()?;
    ensure!(list.trim() == "transship.json", "{list}");
    fails_with(
        node,
        &["import", "/root/two.package"],
        1,
        "\"two\" exists already",
    )?;
    transship(node, "import /root/two.package --name three")?;
    transship(node, "inspect three --verify")?;
    node.shell(
        "cmp /var/lib/transship/checkpoints/{two,three}/web/checkpoint/pages-1.img || \
                cmp /var/lib/transship/checkpoints/two/web/checkpoint/pages-1.img \
                    /var/lib/transship/checkpoints/three/web/checkpoint/pages-1.img",
    )
    .run()?;
    transship(node, "rm three")?;
    node.shell("head -c 100000 /root/two.package >/root/cut; echo hello >/root/none")
        .run()?;
    fails_with(
        node,
        &["import", "/root/cut", "--name", "cut"],
        1,
        "package",
    )?;
    fails_with(node, &["inspect", "/root/cut"], 1, "package")?;
    fails_with(
        node,
        &["import", "/root/none", "--name", "none"],
        1,
        "package",
    )?;
    fails_with(
        node,
        &["import", "/root/absent"],
        1,
        "cannot open /root/absent",
    )?;
    fails_with(
        node,
        &[
            "import",
            "/root/two.package",
            "--name",
            "small",
            "--max-size",
            "1M",
        ],
        1,
        "--max-size",
    )?;
    // Through a pipe, to a node that a stranger has the key of.
    node.shell("transship export one - | transship import - --name piped && transship rm piped")
        .run()?;
    nothing_but(node, "one two")
}

fn nothing_but(node: &Node, names: &str) -> anyhow::Result<()> {
    let left = { node.shell("ls -A /var/lib/transship/checkpoints | xargs") }.read()?;
    ensure!(left.trim() == names, "{left}");
    Ok(())
}

/// For the owner of a key of ssh, and nobody else.
fn encrypt(node: &Node) -> anyhow::Result<()> {
    node.shell(
        "ssh-keygen -q -t ed25519 -N '' -f /root/mine; ssh-keygen -q -t ed25519 -N '' -f /root/yours
         transship export two /root/secret --encrypt-to /root/mine.pub
         ! grep -a -q -e transship.json -e counter /root/secret",
    )
    .run()?;
    let import = |key: &'static str| {
        [
            "import",
            "/root/secret",
            "--name",
            "opened",
            "--identity",
            key,
        ]
    };
    fails_with(node, &["import", "/root/secret"], 1, "--identity")?;
    fails_with(node, &import("/root/yours"), 1, "none of the identities")?;
    fails_with(node, &import("/root/cut"), 1, "has no identity")?;
    node.shell(
        "cp /root/secret /root/flipped
         printf not-random | dd of=/root/flipped bs=1 seek=300000 conv=notrunc status=none
         head -c 200000 /root/secret >/root/short",
    )
    .run()?;
    for file in ["/root/flipped", "/root/short"] {
        let arguments = ["import", file, "--name", "bad", "--identity", "/root/mine"];
        fails_with(node, &arguments, 1, "package")?;
    }
    nothing_but(node, "one two")?;
    let text = transship(node, "inspect /root/secret --identity /root/mine")?;
    ensure!(text.contains("encrypted"), "{text}");
    node.command("transship").args(import("/root/mine")).run()?;
    transship(node, "inspect opened --verify --identity /root/mine")?;
    transship(node, "rm opened")?;
    Ok(())
}

/// What was packed counts on from where it was.
fn restore_from_a_package(node: &Node) -> anyhow::Result<()> {
    let taken_at = journey::read_counts(node, "web").map_err(anyhow::Error::msg)?;
    journey::remove_container(node, "web")?;
    transship(node, "rm two")?;
    transship(node, "import /root/two.package")?;
    transship(node, "restore two --sandbox sandbox")?;
    let now = journey::wait_for_count(node, "web", 5)?;
    ensure!(now > 5, "{now}, and {taken_at} before");
    journey::check_files(node, "web").map_err(anyhow::Error::msg)?;
    let listed = json(node, "ls --json")?;
    let two = &listed[1];
    ensure!(two["name"] == "two" && two["restored"] == 1, "{listed:#}");
    Ok(())
}

fn prune(node: &Node) -> anyhow::Result<()> {
    fails_with(node, &["prune"], 4, "nothing says which checkpoints go")?;
    let would = transship(node, "prune --max-per-pod 1 --dry-run")?;
    ensure!(would.contains("one") && !would.contains("two"), "{would}");
    nothing_but(node, "one two")?;
    node.write_file(
        "/etc/transship/node.toml",
        "[checkpoints]\nkeep-per-pod = 1\n",
    )?;
    transship(node, "prune")?;
    nothing_but(node, "two")?;
    // The quota is told before anything is frozen.
    node.write_file(
        "/etc/transship/node.toml",
        "[checkpoints]\nquota-gigabytes = 1\n",
    )?;
    let manifest = "/var/lib/transship/checkpoints/two/transship.json";
    node.shell(&format!(
        "sed -i '0,/\"size\": [0-9]*/s//\"size\": 999999999/' {manifest}"
    ))
    .run()?;
    let arguments = ["checkpoint", "web", "--name", "much"];
    fails_with(node, &arguments, 4, "quota-gigabytes")?;
    node.shell("rm /etc/transship/node.toml").run()?;
    transship(node, "rm two")?;
    fails_with(node, &["rm", "two"], 3, "no checkpoint \"two\"")
}
