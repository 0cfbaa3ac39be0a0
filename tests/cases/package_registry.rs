//! Checkpoints in Debian's docker-registry, with and without TLS, for those who have its password.

mod cold;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use transship_testbed::{CommandRun as _, Node, Testbed, Tree, journey};

use self::cold::{change_files, starts_cold};
use crate::Case;
use crate::journey::fails_with;

/// me:secret, by bcrypt.
const PASSWORDS: &str = "me:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";
/// The same for Docker.
const CONFIG: &str = r#"{"auths": {"127.0.0.1:5000": {"auth": "bWU6c2VjcmV0"},
                                   "localhost:5443": {"auth": "bWU6c2VjcmV0"}}}"#;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    std::iter::once(Case {
        what: "package_registry",
        tree: Tree::Forky,
        run: checkpoints_live_in_a_registry,
    })
}

fn checkpoints_live_in_a_registry(bed: &Testbed) -> anyhow::Result<()> {
    let (node, other) = (bed.node("a")?, bed.node("b")?);
    bed.link(&node, &other)?;
    for node in [&node, &other] {
        journey::start_services(node)?;
    }
    node.import_image(&journey::counter_image(bed)?, "transship")?;
    node.shell(
        "ctr run --detach --snapshotter transship transship.test/counter:1 web /usr/bin/counter --memory-mb 16",
    )
    .run()?;
    journey::wait_for_count(&node, "web", 3)?;
    node.shell("transship checkpoint web --name one").run()?;
    change_files(&node, "web")?;
    journey::wait_for_count(&node, "web", 20)?;
    node.shell("transship checkpoint web --name two").run()?;
    start_registries(&node)?;

    let push = ["push", "one", "127.0.0.1:5000/shop/web:one", "--plain-http"];
    fails_with(&node, &push, 1, "401")?;
    fails_with(&node, &["push", "one", "web"], 2, "is no reference")?;
    node.write_file("/root/.docker/config.json", CONFIG)?;
    let first = json(&node, &push)?;
    ensure!(first["blobs"] == first["new_blobs"], "{first}");
    let again = json(&node, &push)?;
    ensure!(again["new_bytes"] == 0, "{again}");
    let second = json(
        &node,
        &["push", "two", "127.0.0.1:5000/shop/web:two", "--plain-http"],
    )?;
    let (all, new) = (second["bytes"].as_u64(), second["new_bytes"].as_u64());
    let (all, new) = (all.context("no bytes")?, new.context("no bytes")?);
    // Most of it is the memory of the first one.
    ensure!(new * 2 < all, "{second}");
    starts_cold(&node, &other, &second)?;

    let pull = ["pull", "127.0.0.1:5000/shop/web:one", "--plain-http"];
    fails_with(&node, &pull, 1, "\"one\" exists already")?;
    node.shell("transship rm one").run()?;
    node.command("transship").args(pull).run()?;
    node.shell("transship inspect one --verify").run()?;
    let absent = [
        "pull",
        "127.0.0.1:5000/shop/web:three",
        "--plain-http",
        "--name",
        "x",
    ];
    fails_with(&node, &absent, 1, "has no 127.0.0.1:5000/shop/web:three")?;
    let inspect = "transship inspect 127.0.0.1:5000/shop/web:two --plain-http";
    let inside = { node.shell(inspect) }.read()?;
    ensure!(
        inside.contains("/usr/bin/counter") && inside.contains("memory was not fetched"),
        "{inside}"
    );
    // What containerd finds there, by the same name.
    node.shell(
        "ctr content fetch --plain-http --user me:secret 127.0.0.1:5000/shop/web:two >/dev/null
         ctr images ls -q | grep -q 127.0.0.1:5000/shop/web:two
         ctr images rm 127.0.0.1:5000/shop/web:two",
    )
    .run()?;

    let tls = ["push", "one", "localhost:5443/shop/web:one"];
    fails_with(&node, &tls, 1, "localhost:5443 cannot")?;
    let known = [&tls[..], &["--tlscacert", "/root/ca.pem"]].concat();
    node.command("transship").args(known).run()?;
    let pull = [
        "pull",
        "localhost:5443/shop/web:one",
        "--tlscacert",
        "/root/ca.pem",
        "--name",
        "three",
    ];
    node.command("transship").args(pull).run()?;
    node.shell("transship rm three").run()?;

    only_who_has_the_key(&node)?;
    who_asks_is_said_by_a_helper(&node)?;
    damage(&node)?;
    node.shell("transship restore one --id again").run()?;
    journey::wait_for_count(&node, "again", 3)?;
    for id in ["again", "web"] {
        journey::remove_container(&node, id)?;
    }
    node.shell("transship rm one two; rm -r /root/.docker")
        .run()?;
    journey::check_nothing_left(&node)
}

fn only_who_has_the_key(node: &Node) -> anyhow::Result<()> {
    const SECRET: &str = "127.0.0.1:5000/shop/web:secret";
    node.shell(&format!(
        "ssh-keygen -q -t ed25519 -N '' -f /root/mine
         transship push two {SECRET} --plain-http --encrypt-to /root/mine.pub"
    ))
    .run()?;
    let pull = ["pull", SECRET, "--plain-http", "--name", "opened"];
    fails_with(node, &pull, 1, "--identity")?;
    let mut inside = node.shell(&format!(
        "transship pull {SECRET} --plain-http --name opened --identity /root/mine
         transship inspect opened --verify --identity /root/mine >/dev/null; transship rm opened
         transship inspect {SECRET} --plain-http --identity /root/mine"
    ));
    let inside = inside.read()?;
    ensure!(
        inside.contains("/usr/bin/counter") && inside.contains("encrypted"),
        "{inside}"
    );
    Ok(())
}

/// A program that keeps the password, for one host or for all.
fn who_asks_is_said_by_a_helper(node: &Node) -> anyhow::Result<()> {
    let helper = "#!/bin/sh
        [ \"$1\" = get ] && read -r host
        case $host in
            127.0.0.1:5000) echo '{\"ServerURL\": \"\", \"Username\": \"me\", \"Secret\": \"secret\"}' ;;
            *) echo 'credentials not found in native keychain'; exit 1 ;;
        esac";
    node.write_file("/usr/local/bin/docker-credential-test", helper)?;
    node.shell("chmod 755 /usr/local/bin/docker-credential-test; mkdir /root/helped")
        .run()?;
    let inspect = |reference| {
        [
            "inspect",
            reference,
            "--plain-http",
            "--docker-config",
            "/root/helped",
        ]
    };
    let known = inspect("127.0.0.1:5000/shop/web:two");
    for config in [
        r#"{"credHelpers": {"127.0.0.1:5000": "test"}}"#,
        r#"{"credsStore": "test"}"#,
    ] {
        node.write_file("/root/helped/config.json", config)?;
        node.command("transship").args(known).run()?;
    }
    // One that it does not know, and a helper that is not there.
    fails_with(node, &inspect("localhost:5000/shop/web:two"), 1, "401")?;
    node.write_file("/root/helped/config.json", r#"{"credsStore": "absent"}"#)?;
    fails_with(node, &known, 1, "docker-credential-absent")
}

/// A registry whose disk has rotted.
fn damage(node: &Node) -> anyhow::Result<()> {
    node.shell(
        "cd /var/lib/registry/docker/registry/v2/blobs/sha256
         # Manifests are compared by the registry itself, and nobody asks for the image here.
         for blob in $(find . -name data -size +20k); do
             case $(head -c 4 $blob | od -An -tx1) in
                 *'28 b5 2f fd'*) dd if=/dev/zero of=$blob bs=1 seek=5000 count=8 conv=notrunc status=none ;;
             esac
         done",
    )
    .run()?;
    let pull = [
        "pull",
        "127.0.0.1:5000/shop/web:one",
        "--plain-http",
        "--name",
        "bad",
    ];
    fails_with(node, &pull, 1, "digest differs")?;
    let left = { node.shell("ls -A /var/lib/transship/checkpoints | xargs") }.read()?;
    ensure!(left.trim() == "one two", "{left}");
    Ok(())
}

fn json(node: &Node, arguments: &[&str]) -> anyhow::Result<Value> {
    let mut command = node.command("transship");
    Ok(serde_json::from_str(
        &command.args(arguments).arg("--json").read()?,
    )?)
}

fn start_registries(node: &Node) -> anyhow::Result<()> {
    node.write_file("/root/passwords", PASSWORDS)?;
    node.shell(
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost \
             -addext subjectAltName=DNS:localhost -addext basicConstraints=critical,CA:FALSE \
             -keyout /root/tls.key -out /root/ca.pem 2>/dev/null",
    )
    .run()?;
    let auth = "auth: {htpasswd: {realm: test, path: /root/passwords}}";
    start_registry(node, "registry", 5000, auth, "")?;
    let tls = ", tls: {certificate: /root/ca.pem, key: /root/tls.key}";
    start_registry(node, "registry-tls", 5443, auth, tls)
}

/// Starts Debian's registry, with these parts of its configuration.
pub(crate) fn start_registry(
    node: &Node,
    name: &str,
    port: u16,
    auth: &str,
    http: &str,
) -> anyhow::Result<()> {
    let program =
        std::fs::read("/usr/bin/docker-registry").context("apt install docker-registry")?;
    if !node.has_binary("docker-registry") {
        node.write_file("/usr/local/bin/docker-registry", program)?;
        node.shell("chmod 755 /usr/local/bin/docker-registry")
            .run()?;
    }
    let config = format!(
        "version: 0.1
storage: {{filesystem: {{rootdirectory: /var/lib/registry}}}}
http: {{addr: ':{port}'{http}}}
{auth}
"
    );
    let path = format!("/root/{name}.yml");
    node.write_file(&path, config)?;
    node.start_daemon(name, &["docker-registry", "serve", &path])?;
    let probe = format!("</dev/tcp/127.0.0.1/{port}");
    Ok(node.wait_for_daemon(name, &["bash", "-c", &probe])?)
}
