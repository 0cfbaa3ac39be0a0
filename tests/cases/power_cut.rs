//! The power of both nodes goes off: at the moment at which a command says that it is done, and at each moment of a
//! migration. What a disk has at that moment is what the nodes boot from.
//!
//! ```text
//!  checkpoint, import                the checkpoint can be restored
//!  migrate, frozen to start          the source has the container, and the target nothing
//!           running                  nobody knows what the copy has written: a person decides
//!           done                     the target has the container, and the source nothing
//! ```
//!
//! Memory is lost; files are not: whoever has the container has all that it had written when it was frozen.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use transship_testbed::{
    CommandRun as _, Disk, FileSystem, Node, NodeOptions, Storage, Testbed, Tree, journey,
    poll_until,
};

use crate::Case;
use crate::differ::disks;
use crate::migration_cut::{begin_of, go_on, paced_nodes, wait_for_end};
use crate::migration_faults::{counts_on, run_alone};

const PATIENCE: Duration = Duration::from_secs(60);
/// For `find`: a whole one.
const BLOB: [&str; 4] = ["-name", "blob", "-size", "+7M"];

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    let cases: [(_, fn(&Testbed) -> _); 3] = [
        ("power_cut_answered", what_was_answered_is_on_the_disk),
        ("power_cut_migration", |bed| {
            files_are_on_one_side(bed, &["held", "running"])
        }),
        ("long_power_cut_migration", |bed| {
            files_are_on_one_side(bed, &["frozen", "create", "held", "start", "running"])
        }),
    ];
    cases.into_iter().map(|(what, run)| Case {
        what,
        tree: Tree::Forky,
        run,
    })
}

fn what_was_answered_is_on_the_disk(bed: &Testbed) -> anyhow::Result<()> {
    on_a_late_disk(bed, |disk, bed, [a, b]| {
        run_alone(a, "web")?;
        let sum = write_blob(a, "web")?;
        let before = disk.after_power_cut()?;
        let find = Command::new("find").arg(before.path()).args(BLOB).read()?;
        ensure!(find.is_empty(), "the disk is not late: {find}");
        drop(before);
        a.shell("transship checkpoint web --name kept").run()?;
        cut(disk, bed, &["a"], |nodes| {
            is_restored(&nodes[0], "kept", &sum)
        })
        .context("checkpoint")?;

        let sum = write_blob(a, "web")?;
        a.shell("transship rm kept; transship migrate web --to 'ssh node-b'")
            .run()?;
        cut(disk, bed, &["a", "b"], |nodes| {
            only_has(&nodes[1], &nodes[0], "web", &sum)
        })
        .context("migrate")?;

        let sum = write_blob(b, "web")?;
        b.shell("transship checkpoint web --name back; transship export back /root/back.tar")
            .run()?;
        a.write_file("/root/back.tar", b.read_file("/root/back.tar")?)?;
        a.shell("transship import /root/back.tar").run()?;
        cut(disk, bed, &["a"], |nodes| {
            is_restored(&nodes[0], "back", &sum)
        })
        .context("import")
    })
}

fn files_are_on_one_side(bed: &Testbed, moments: &[&str]) -> anyhow::Result<()> {
    on_a_late_disk(bed, |disk, bed, [a, b]| {
        for moment in moments {
            run_alone(a, moment)?;
            let sum = write_blob(a, moment)?;
            a.shell("sync").run()?;
            begin_of(a, b, moment, &[moment])?;
            cut(disk, bed, &["a", "b"], |nodes| {
                after(moment, [&nodes[0], &nodes[1]], &sum)
            })
            .with_context(|| format!("cut at: {moment}"))?;
            go_on(a, b)?;
            let code = wait_for_end(a)?;
            ensure!(code == "0", "exit code {code}");
            counts_on(b, moment)?;
            journey::remove_container(b, moment)?;
        }
        Ok(())
    })
}

/// What both sides make of what they find, as transship-recover.service asks them after a boot.
fn after(moment: &str, [a, b]: [&Node; 2], sum: &str) -> anyhow::Result<()> {
    let recover = a
        .command("transship")
        .args(["recover", "--once"])
        .output()?;
    let said = String::from_utf8_lossy(&recover.stdout).into_owned();
    if moment == "running" {
        ensure!(recover.status.code() == Some(6), "{recover:?}");
        ensure!(said.contains("not decided"), "{said}");
        a.shell(&format!("transship recover {moment} --source-runs"))
            .run()?;
        // Whoever has decided knows that the other one is not wanted.
        ensure!(blob_sum(a, moment)? == sum, "the source has another file");
        return Ok(());
    }
    ensure!(recover.status.success(), "{recover:?}");
    b.shell("transship recover --once").run()?;
    only_has(a, b, moment, sum)
}

/// On a disk that is written late, two nodes between which a migration stops at moments.
fn on_a_late_disk(
    bed: &Testbed,
    test: impl FnOnce(&Disk, &Testbed, [&Node; 2]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    disks::on(FileSystem::Ext4, bed, |disk, bed| {
        let (a, b) = paced_nodes(bed)?;
        a.shell("sync").run()?;
        disk.write_late()?;
        test(disk, bed, [&a, &b])
    })
}

/// Starts nodes from what the disk has at this moment, linked as they were.
fn cut(
    disk: &Disk,
    bed: &Testbed,
    names: &[&str],
    test: impl FnOnce(&[Node]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let cut = disk.after_power_cut()?;
    let found = cut.path().join("found");
    fs::create_dir(&found)?;
    for dir in fs::read_dir(cut.path())? {
        let dir = dir?.path();
        for name in names {
            let data = dir.join(name).join("data");
            if data.is_dir() {
                fs::rename(&data, found.join(name))?;
            }
        }
    }
    let mut settings = bed.settings().clone();
    settings.work_dir = cut.path().join("booted");
    let again = Testbed::new(bed.tree(), &settings)?;
    let tested = boot(&again, &found, names).and_then(|nodes| test(&nodes));
    if tested.is_err() {
        for node in again.nodes() {
            eprintln!("after the power cut: {}", node.logs());
        }
    }
    again.stop()?;
    tested
}

fn boot(bed: &Testbed, found: &Path, names: &[&str]) -> anyhow::Result<Vec<Node>> {
    let mut nodes = Vec::new();
    for name in names {
        let options = NodeOptions {
            storage: Storage::Found(found.join(name)),
            ..NodeOptions::default()
        };
        nodes.push(bed.node_with(name, &options)?);
    }
    if let [a, b] = nodes.as_slice() {
        bed.link(a, b)?;
        bed.ssh(a, b)?;
    }
    for node in &nodes {
        journey::start_services(node)?;
    }
    Ok(nodes)
}

/// A file of the container that nobody has synced; gives its checksum.
fn write_blob(node: &Node, id: &str) -> anyhow::Result<String> {
    let pid = journey::task_pid(node, id)?;
    let blob = format!("/proc/{pid}/root/blob");
    let write = format!("head -c 8000000 /dev/urandom >{blob}; sha256sum <{blob}");
    Ok(node.shell(&write).read()?)
}

fn is_restored(node: &Node, checkpoint: &str, sum: &str) -> anyhow::Result<()> {
    node.shell(&format!("transship restore {checkpoint} --id again"))
        .run()?;
    counts_on(node, "again")?;
    let pid = journey::task_pid(node, "again")?;
    let found = node.shell(&format!("sha256sum </proc/{pid}/root/blob"));
    let found = { found }.read()?;
    ensure!(found == sum, "{found} is not {sum}");
    Ok(())
}

/// Through its snapshot: nothing of it runs.
fn blob_sum(node: &Node, id: &str) -> anyhow::Result<String> {
    let look = format!(
        r#"key=$(ctr containers info {id} | sed -n 's/.*"SnapshotKey": "\(.*\)",/\1/p')
         mkdir -p /run/look
         ctr snapshots --snapshotter transship mounts /run/look "$key" | sh
         sha256sum </run/look/blob
         umount /run/look"#
    );
    Ok(node.shell(&look).read()?)
}

/// The other one has nothing of the container, and this one all its files.
fn only_has(node: &Node, other: &Node, id: &str, sum: &str) -> anyhow::Result<()> {
    poll_until("one side alone", PATIENCE, || {
        journey::check_nothing_left(other).map_err(|error| error.to_string())
    })?;
    let found = blob_sum(node, id)?;
    ensure!(found == sum, "{found} is not {sum}");
    Ok(())
}
