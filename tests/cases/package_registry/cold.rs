//! The image that is pushed with a checkpoint: other tools take it, another node starts it cold with the files as they
//! were, and restores the checkpoint with no other image than this one.

use std::process::Command;
use std::time::Duration;

use anyhow::ensure;
use serde_json::Value;
use transship_testbed::{CommandRun as _, Node, journey, poll_until};

use super::json;
use crate::journey::fails_with;

const PATIENCE: Duration = Duration::from_secs(60);
/// me:secret for Docker, at the first node's address.
const CONFIG: &str = r#"{"auths": {"10.99.0.1:5000": {"auth": "bWU6c2VjcmV0"}}}"#;
/// As node b names it.
const REFERENCE: &str = "10.99.0.1:5000/shop/web:two";

/// What the container changes, such that its program can be started anew.
const CHANGES: &str = "
    touch delete-me; rm -r made keep
    mkdir keep new; echo 3 >keep/c
    echo text >new/file; ln new/file new/link; ln -s file new/sym; chmod 2750 new; chown 5:6 new/file
    truncate -s 1M sparse; echo end >>sparse
    echo odd >.wh.odd";
/// All that an image keeps of the files that nobody changes any more.
const LIST: &str = "
    find . -mindepth 1 ! -name counts ! -type d -printf '%P %y %m %U:%G %n %T@ %s %l\n' | sort
    find . -mindepth 1 -type d -printf '%P %m %U:%G %T@\n' | sort
    find . -type f ! -name counts | sort | xargs sha256sum";

fn in_data(node: &Node, id: &str, script: &str) -> anyhow::Result<String> {
    let pid = journey::task_pid(node, id)?;
    let script = format!("cd /proc/{pid}/root/data\n{script}");
    Ok(node.shell(&script).read()?)
}

pub(super) fn change_files(node: &Node, id: &str) -> anyhow::Result<()> {
    in_data(node, id, CHANGES).map(drop)
}

/// `two` is the checkpoint of `web`, which has changed its files before; it is in the registry of node a as `shop/web:two`.
pub(super) fn starts_cold(a: &Node, b: &Node, pushed: &Value) -> anyhow::Result<()> {
    let image = &pushed["images"][0];
    ensure!(image["container"] == "web", "{pushed:#}");
    let left_out = image["left_out"].to_string();
    ensure!(
        image["left_out_count"] == 1 && left_out.contains("/data/.wh.odd"),
        "{left_out}"
    );
    taken_by_others(a)?;
    mounted(a)?;
    // Docker's registry keeps no lists of artifacts itself.
    let list = image["digest"]
        .as_str()
        .unwrap_or_default()
        .replace(':', "-");
    let inspect = format!("transship inspect 127.0.0.1:5000/shop/web:{list} --plain-http");
    let inside = a.shell(&inspect).read()?;
    ensure!(inside.contains("/usr/bin/counter"), "{inside}");

    let files = in_data(a, "web", LIST)?;
    let files: Vec<_> = files.lines().filter(|it| !it.contains(".wh.odd")).collect();
    ensure!(
        files.iter().any(|it| it.starts_with("keep/c f")),
        "{files:#?}"
    );
    let run = format!("ctr run --detach --snapshotter transship {REFERENCE}");
    b.shell(&format!(
        "ctr images pull --plain-http --user me:secret --snapshotter transship {REFERENCE} >/dev/null
         {run} look /bin/tail -f /dev/null"
    ))
    .run()?;
    let theirs = in_data(b, "look", LIST)?;
    ensure!(
        theirs.lines().eq(files.iter().copied()),
        "{theirs}\ninstead of\n{files:#?}"
    );
    journey::remove_container(b, "look")?;

    // Its own program, on these files.
    b.shell(&format!("{run} cold")).run()?;
    poll_until("its program to start anew", PATIENCE, || {
        let counts = journey::read_in_container(b, "cold", "/data/counts")?;
        let begins = counts.lines().filter(|it| *it == "1").count();
        (begins == 2).then_some(()).ok_or(counts)
    })?;
    journey::remove_container(b, "cold")?;

    b.write_file("/root/.docker/config.json", CONFIG)?;
    b.shell(&format!(
        "transship pull {REFERENCE} --plain-http
         transship restore two --id web"
    ))
    .run()?;
    journey::wait_for_count(b, "web", 20)?;
    let odd = journey::read_in_container(b, "web", "/data/.wh.odd");
    ensure!(odd.as_deref() == Ok("odd\n"), "{odd:?}");
    journey::remove_container(b, "web")?;
    without_blobs(a, b)?;
    without_an_image(b)?;
    b.shell("transship rm two; rm -r /root/.docker").run()?;
    journey::check_nothing_left(b)
}

/// What is in the content store no more comes out of snapshots.
fn without_blobs(a: &Node, b: &Node) -> anyhow::Result<()> {
    a.shell(
        "manifest=$(ctr images ls name==transship.test/counter:1 | awk 'NR == 2 { print $3 }')
         ctr content get $manifest | jq -r '.layers[].digest' | xargs -n 1 ctr content rm >/dev/null
         transship push two 127.0.0.1:5000/rebuilt/web:two --plain-http",
    )
    .run()?;
    // Here is the base without a name and a config: it lies below the image that was pulled.
    b.shell("transship push two 10.99.0.1:5000/bare/web:two --plain-http")
        .run()?;
    for name in ["rebuilt", "bare"] {
        let reference = format!("10.99.0.1:5000/{name}/web:two");
        let read = b.shell(&format!(
            "ctr images pull --plain-http --user me:secret --snapshotter transship {reference} >/dev/null
             ctr run --rm --snapshotter transship {reference} cold /bin/cat /data/new/link"
        ));
        let read = { read }.read()?;
        ensure!(read == "text\n", "{name}: {read}");
        let config = b.shell(&format!(
            "ctr run --detach --snapshotter transship {reference} cold
             ctr containers info cold | jq -c .Spec.process.args"
        ));
        let program = { config }.read()?;
        ensure!(
            program.starts_with("[\"/usr/bin/counter\""),
            "{name}: {program}"
        );
        journey::remove_container(b, "cold")?;
        b.shell(&format!("ctr images rm {reference} >/dev/null"))
            .run()?;
    }
    Ok(())
}

fn without_an_image(node: &Node) -> anyhow::Result<()> {
    node.shell(&format!("ctr images rm --sync {REFERENCE} >/dev/null"))
        .run()?;
    let alone = "10.99.0.1:5000/alone/web:two";
    let push = ["push", "two", alone, "--plain-http"];
    fails_with(
        node,
        &push,
        4,
        "does not have the image transship.test/counter:1 of web",
    )?;
    fails_with(node, &push, 4, "--artifact-only")?;
    let pushed = json(node, &[&push[..], &["--artifact-only"]].concat())?;
    ensure!(pushed["images"] == serde_json::json!([]), "{pushed:#}");
    ensure!(pushed["artifact"] == pushed["digest"], "{pushed:#}");
    Ok(())
}

/// skopeo, umoci, and a layout in between.
fn taken_by_others(node: &Node) -> anyhow::Result<()> {
    let script = "
        dir=$(mktemp --directory)
        trap 'rm -rf $dir' EXIT
        cd $dir
        ref=docker://127.0.0.1:5000/shop/web:two
        skopeo inspect --tls-verify=false --creds me:secret $ref >inspected
        grep -q '\"Architecture\"' inspected
        from=\"--src-tls-verify=false --src-creds me:secret $ref\"
        skopeo copy --quiet $from oci:one:web
        umoci unpack --image one:web bundle
        cat bundle/rootfs/data/new/link bundle/rootfs/data/keep/c
        test ! -e bundle/rootfs/data/keep/a
        skopeo copy --quiet --all $from oci:both:web
        cp -r both $OUT";
    let network = format!("--net=/proc/{}/ns/net", node.pid());
    let read = Command::new("nsenter")
        .args([&network, "timeout", "240", "sh", "-euc", script])
        .env("OUT", node.path_from_outside("/root/both"))
        .read()?;
    ensure!(read == "text\n3\n", "{read:?}");
    // The whole of it is in what skopeo has copied.
    node.shell(
        "transship inspect oci:/root/both | grep -q /usr/bin/counter
         transship inspect oci:/root/both:web >/dev/null
         transship import /root/both --name copied
         transship inspect copied --verify >/dev/null; transship rm copied; rm -r /root/both",
    )
    .run()?;
    Ok(())
}

/// A repository of the same registry has the base already.
fn mounted(node: &Node) -> anyhow::Result<()> {
    // Of what it pulls containerd remembers from where.
    node.shell(
        "base=127.0.0.1:5000/base/counter:1
         ctr images push --plain-http --user me:secret $base transship.test/counter:1 >/dev/null
         ctr images pull --plain-http --user me:secret --snapshotter transship $base >/dev/null
         ctr images rm $base >/dev/null",
    )
    .run()?;
    let to = "127.0.0.1:5000/other/web:two";
    let pushed = json(node, &["push", "two", to, "--plain-http"])?;
    ensure!(
        pushed["mounted_bytes"].as_u64() > Some(100_000),
        "{pushed:#}"
    );
    Ok(())
}
