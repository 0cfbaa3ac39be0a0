//! The journey of the demo on every tree, and every way in which it is refused or breaks off: the
//! source runs on each time, and nothing is left on either node.

use anyhow::{Context as _, ensure};
use transship_testbed::{CommandRun as _, Node, Testbed, journey};

use crate::Case;

const MIGRATE: [&str; 3] = ["migrate", "counter", "--sandbox"];

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    Case::on_all_trees("migration", |bed| {
        a_container_counts_on_in_the_other_node(bed, 200)
    })
    .chain(Case::on_all_trees(
        "refusals",
        a_refused_migration_changes_nothing,
    ))
    .chain(Case::on_all_trees(
        "checkpoint",
        a_checkpoint_is_restored_later_and_elsewhere,
    ))
}

fn start_counter(a: &Node, b: &Node, memory_mb: u32) -> anyhow::Result<()> {
    journey::run_sandbox(a, "sandbox")?;
    journey::run_counter(a, "counter", "sandbox", memory_mb, &[])?;
    journey::run_sandbox(b, "sandbox-b")?;
    journey::wait_for_count(a, "counter", 5)?;
    Ok(())
}

/// CRIU has restored little, the rest was written into the held process.
fn check_memory_was_apart(node: &Node, memory_mb: u32) -> anyhow::Result<()> {
    let log = "/run/containerd/io.containerd.runtime.v2.task/*/counter/work/restore.log";
    let find = format!("grep -h nr_restored_pages {log}");
    let lines = node.shell(&find).read()?;
    let pages = |line: &str| line.rsplit(' ').next()?.parse::<u64>().ok();
    let pages: Option<u64> = lines.lines().map(pages).sum();
    ensure!(
        pages.is_some_and(|pages| pages * 4096 < u64::from(memory_mb) << 18),
        "{lines}"
    );
    Ok(())
}

pub(crate) fn a_container_counts_on_in_the_other_node(
    bed: &Testbed,
    memory_mb: u32,
) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    start_counter(&a, &b, memory_mb)?;
    let before = journey::ask(&a, &journey::sandbox_address(&a, "sandbox")?)?;
    let ssh = bed.ssh(&a, &b)?;
    let report = a
        .command("transship")
        .args(MIGRATE)
        .args(["sandbox-b", "--json", "--to", &ssh, "--before-restore"])
        .arg("ctr t kill -s KILL sandbox; ctr t delete sandbox; ctr c rm sandbox")
        .read()?;
    let report: serde_json::Value = serde_json::from_str(&report)?;
    ensure!(
        report["bytes"].as_u64() > Some(u64::from(memory_mb) << 20),
        "{report}"
    );
    for step in ["image", "dump", "upperdir", "transfer", "restore", "commit"] {
        let steps = report["timeline"]["steps"].as_array().context("no steps")?;
        ensure!(
            steps.iter().any(|found| found["name"] == step),
            "no {step} in {report}"
        );
    }

    let address = journey::sandbox_address(&b, "sandbox-b")?;
    let after = journey::ask(&b, &address)?;
    ensure!(
        after.count >= before.count && after.memory_ok && after.memory_mb == u64::from(memory_mb),
        "{after:?}"
    );
    check_memory_was_apart(&b, memory_mb)?;
    ensure!(
        after.local_ip == address && after.hostname == "node-b",
        "{after:?}"
    );
    ensure!(
        journey::ask(&a, &address)?.local_ip == address,
        "b's answer reaches a"
    );
    journey::wait_for_count(&b, "counter", after.count)?;
    journey::check_files(&b, "counter").map_err(anyhow::Error::msg)?;
    let name = b.shell("nsenter -t $(ctr t ls | awk '$1==\"sandbox-b\"{print $2}') -u hostname");
    ensure!(
        { name }.read()?.trim() == "node-b",
        "the sandbox keeps its name"
    );
    journey::check_nothing_left(&a)?;

    // A restored container is an ordinary one: it stops, and starts anew from its image's program.
    journey::end_task(&b, "counter")?;
    b.ctr(&["tasks", "start", "--detach", "counter"])
        .context("the cold start")?;
    // Its program finds what it has made before and gives up: it did not come from a checkpoint.
    journey::delete_ended_task(&b, "counter")?;
    b.ctr(&["containers", "delete", "counter"])?;
    journey::remove_container(&b, "sandbox-b")?;
    journey::check_nothing_left(&b)
}

fn a_refused_migration_changes_nothing(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    start_counter(&a, &b, 16)?;
    let ssh = bed.ssh(&a, &b)?;
    a.ctr(&["containers", "create", "transship.test/counter:1", "idle"])?;
    let limited = format!("{ssh} prlimit --fsize=5000000");
    let failing = ["--before-restore", "exit 7"];
    let to_nowhere = ["--runtime-binary", "/no/such/runc"];
    // What is done, its exit code, and what its one line says.
    let cases: &[(&str, Vec<&str>, i32, &str)] = &[
        (
            "unknown",
            vec!["migrate", "nobody", "--to", &ssh],
            3,
            "there is no container \"nobody\"",
        ),
        (
            "idle",
            vec!["migrate", "idle", "--to", &ssh],
            4,
            "\"idle\" has no task",
        ),
        (
            "unreachable",
            migrate("sandbox-b", "false"),
            5,
            "the connection to the other node",
        ),
        (
            "no sandbox",
            migrate("nobody", &ssh),
            5,
            "the sandbox \"nobody\" does not run",
        ),
        (
            "choice",
            vec!["migrate", "counter", "--to", &ssh],
            5,
            "--new-namespaces",
        ),
        (
            "runtime",
            [migrate("sandbox-b", &ssh), to_nowhere.into()].concat(),
            5,
            "/no/such/runc",
        ),
        (
            "dies",
            migrate("sandbox-b", &limited),
            5,
            "\"counter\" runs on here as before",
        ),
        (
            "command",
            [migrate("sandbox-b", &ssh), failing.into()].concat(),
            1,
            "exit 7",
        ),
    ];
    for (what, arguments, code, message) in cases {
        refused(&a, arguments, *code, message).with_context(|| format!("case {what:?}"))?;
    }
    b.shell("mkdir -p /var/lib/transship; mount -t tmpfs -o size=4m full /var/lib/transship")
        .run()?;
    refused(
        &a,
        &migrate("sandbox-b", &ssh),
        5,
        "not enough room below /var/lib/transship",
    )?;
    b.shell("umount /var/lib/transship").run()?;

    // After all that it still works, and takes along what the broken attempts left to remove.
    a.command("transship")
        .args(migrate("sandbox-b", &ssh))
        .run()?;
    let reached = journey::read_counts(&b, "counter").map_err(anyhow::Error::msg)?;
    journey::wait_for_count(&b, "counter", reached)?;
    journey::remove_container(&b, "counter")?;
    journey::remove_container(&b, "sandbox-b")?;
    journey::check_nothing_left(&b)
}

fn migrate<'a>(sandbox: &'a str, to: &'a str) -> Vec<&'a str> {
    [&MIGRATE[..], &[sandbox, "--to", to]].concat()
}

/// Runs transship in `node`: it fails with `code` and says `message`.
pub(crate) fn fails_with(
    node: &Node,
    arguments: &[&str],
    code: i32,
    message: &str,
) -> anyhow::Result<()> {
    let output = node.command("transship").args(arguments).output()?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        output.status.code() == Some(code),
        "{}: {error}",
        output.status
    );
    ensure!(
        error.contains(message),
        "{error:?} does not say {message:?}"
    );
    Ok(())
}

/// Runs transship in node a: it fails with `code` and says `message`, and the counter counts on.
fn refused(a: &Node, arguments: &[&str], code: i32, message: &str) -> anyhow::Result<()> {
    fails_with(a, arguments, code, message)?;
    let reached = journey::read_counts(a, "counter").map_err(anyhow::Error::msg)?;
    journey::wait_for_count(a, "counter", reached).context("the source stands still")?;
    Ok(())
}

fn a_checkpoint_is_restored_later_and_elsewhere(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    start_counter(&a, &b, 16)?;
    let transship =
        |node: &Node, arguments: &[&str]| node.command("transship").args(arguments).read();
    transship(&a, &["checkpoint", "counter", "--name", "before"])?;
    let listed = transship(&a, &["ls", "--json"])?;
    ensure!(listed.contains("\"before\""), "{listed}");
    let inspected = transship(&a, &["inspect", "before", "--verify"])?;
    ensure!(inspected.contains("of a sandbox"), "{inspected}");
    let taken_at = journey::read_counts(&a, "counter").map_err(anyhow::Error::msg)?;
    journey::wait_for_count(&a, "counter", taken_at).context("a checkpoint kills nothing")?;
    let output = a
        .command("transship")
        .args(["checkpoint", "counter", "--name", "before"])
        .output()?;
    ensure!(!output.status.success(), "a name is taken once");

    // Here, into the same sandbox, beside the original, which keeps its port: another network.
    transship(
        &a,
        &["restore", "before", "--id", "copy", "--new-namespaces"],
    )?;
    let copied = journey::read_counts(&a, "copy").map_err(anyhow::Error::msg)?;
    journey::wait_for_count(&a, "copy", copied)?;
    what_another_has_made_stays(&a)?;

    // On the other node, through a pipe, with the image sent by ctr as anybody would.
    let ssh = bed.ssh(&a, &b)?;
    a.shell(&format!(
        "transship send before | {ssh} transship receive --name arrived"
    ))
    .run()?;
    let missing = b
        .command("transship")
        .args(["restore", "arrived", "--sandbox", "sandbox-b"])
        .output()?;
    let error = String::from_utf8_lossy(&missing.stderr).into_owned();
    ensure!(error.contains("are not on this node"), "{error}");
    b.import_image(&journey::counter_image(bed)?, "transship")?;
    transship(&b, &["restore", "arrived", "--sandbox", "sandbox-b"])?;
    let reply = journey::ask(&b, &journey::sandbox_address(&b, "sandbox-b")?)?;
    ensure!(reply.memory_ok && reply.hostname == "node-b", "{reply:?}");
    journey::wait_for_count(&b, "counter", reply.count)?;

    transship(&a, &["rm", "before"])?;
    transship(&b, &["rm", "arrived"])?;
    for (node, ids) in [
        (&a, ["copy", "counter", "sandbox"].as_slice()),
        (&b, &["counter", "sandbox-b"]),
    ] {
        for id in ids {
            journey::remove_container(node, id)?;
        }
        journey::check_nothing_left(node)?;
    }
    Ok(())
}

/// A restore that fails removes what it has made, and nothing of the same id that another was faster to make.
fn what_another_has_made_stays(node: &Node) -> anyhow::Result<()> {
    let snapshots = |arguments: &[&str]| {
        let all = ["snapshots", "--snapshotter", "transship"];
        node.ctr(&[&all, arguments].concat())
    };
    snapshots(&["prepare", "twin"])?;
    fails_with(
        node,
        &["restore", "before", "--id", "twin", "--new-namespaces"],
        1,
        "already exists",
    )?;
    snapshots(&["info", "twin"]).context("the snapshot of another")?;
    snapshots(&["remove", "twin"])?;

    let twins = "for i in 1 2 3; do
                   transship restore before --id twin --new-namespaces >/dev/null 2>&1 && echo restored &
                 done; wait";
    for round in 1..=3 {
        let restored = node.shell(twins).read()?;
        ensure!(restored == "restored\n", "round {round}: {restored:?}");
        let reached = journey::read_counts(node, "twin").map_err(anyhow::Error::msg)?;
        journey::wait_for_count(node, "twin", reached).context("the one that was restored")?;
        journey::remove_container(node, "twin")?;
    }
    Ok(())
}
