//! What the table of conditions says is to be done, typed as it stands there: then the check passes, and so does the
//! checkpoint.

use anyhow::{Context as _, ensure};
use transship_checkpoint::conditions::Condition;
use transship_testbed::{CommandRun as _, Image, Node, Testbed, Tree, journey};

use crate::Case;
use crate::conditions::{HOLDER, check, names, prepare, run};

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [Case {
        what: "conditions_remedied",
        tree: Tree::Forky,
        run: what_is_to_be_done_does,
    }]
    .into_iter()
}

/// A condition, and the remedy.
struct Row {
    name: &'static str,
    /// Arguments of `ctr run`.
    run: &'static [&'static str],
    command: &'static [&'static str],
    /// Flags that are no remedy.
    flags: &'static [&'static str],
    /// What of the remedy in the table this is about.
    word: &'static str,
    remedy: Remedy,
}

enum Remedy {
    Flags(&'static [&'static str]),
    /// Of a shell on the node, with `PID` for the first process.
    Command(&'static str),
}

const PLAIN: Row = Row {
    name: "",
    run: &[],
    command: &[],
    flags: &[],
    word: "",
    remedy: Remedy::Flags(&[]),
};

const ROWS: &[Row] = &[
    Row {
        name: "tcp",
        command: &[HOLDER, "tcp=7001"],
        word: "--tcp established",
        remedy: Remedy::Flags(&["--tcp", "established"]),
        ..PLAIN
    },
    Row {
        name: "tcp",
        command: &[HOLDER, "tcp=7001"],
        word: "--tcp close",
        remedy: Remedy::Flags(&["--tcp", "close"]),
        ..PLAIN
    },
    Row {
        name: "in-flight",
        command: &[HOLDER, "in-flight=7002"],
        flags: &["--tcp", "established"],
        word: "--skip-in-flight",
        remedy: Remedy::Flags(&["--skip-in-flight"]),
        ..PLAIN
    },
    Row {
        name: "ghost-limit",
        command: &[HOLDER, "ghost=2097152"],
        word: "--ghost-limit",
        remedy: Remedy::Flags(&["--ghost-limit", "4M"]),
        ..PLAIN
    },
    Row {
        name: "link-remap",
        command: &[HOLDER, "semaphore"],
        word: "--link-remap",
        remedy: Remedy::Flags(&["--link-remap"]),
        ..PLAIN
    },
    Row {
        name: "file-locks",
        command: &[HOLDER, "lock"],
        flags: &["--no-file-locks"],
        word: "--file-locks",
        remedy: Remedy::Flags(&["--file-locks"]),
        ..PLAIN
    },
    Row {
        name: "outside-socket",
        run: &[
            "--net-host",
            "--mount",
            "type=bind,src=/run/outside,dst=/outside,options=rbind:rw",
        ],
        command: &[HOLDER, "datagrams=/outside/socket"],
        word: "--ext-unix-sk",
        remedy: Remedy::Flags(&["--ext-unix-sk"]),
        ..PLAIN
    },
    Row {
        name: "descriptor-limit",
        command: &[HOLDER, "descriptors=1"],
        word: "prlimit --pid PID --nofile=N",
        remedy: Remedy::Command("prlimit --pid PID --nofile=512"),
        ..PLAIN
    },
    Row {
        name: "scheduling",
        run: &["--cap-add", "CAP_SYS_NICE"],
        command: &[HOLDER, "deadline"],
        word: "chrt --pid",
        remedy: Remedy::Command(
            "for tid in $(ls /proc/PID/task); do chrt --other --pid 0 $tid; done",
        ),
        ..PLAIN
    },
];

fn what_is_to_be_done_does(bed: &Testbed) -> anyhow::Result<()> {
    let (node, _) = journey::start_nodes(bed)?;
    let holder = Image::holder(bed.settings(), &bed.tree_dir().join("bin/busybox"))?;
    node.import_image(&holder, "transship")?;
    prepare(&node)?;
    let mut wrong = Vec::new();
    for (at, row) in ROWS.iter().enumerate() {
        let done = remedied(&node, &format!("ill{at}"), row);
        wrong.extend(done.err().map(|it| format!("{}: {it:#}", row.word)));
    }
    let stopped = stopped_goes_on(&node);
    wrong.extend(stopped.err().map(|it| format!("kill -CONT: {it:#}")));
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

fn remedied(node: &Node, id: &str, row: &Row) -> anyhow::Result<()> {
    let known = Condition::named(row.name);
    ensure!(known.remedy.contains(row.word), "{}", known.remedy);
    run(node, id, row.run, row.command)?;
    let found = check(node, id, row.flags)?;
    ensure!(names(&found) == [row.name], "{found}");
    let mut flags = row.flags.to_vec();
    match row.remedy {
        Remedy::Flags(more) => {
            flags.retain(|flag| !flag.starts_with("--no-"));
            flags.extend(more);
        }
        Remedy::Command(command) => {
            let pid = journey::task_pid(node, id)?;
            node.shell(&command.replace("PID", &pid.to_string()))
                .run()?;
        }
    }
    passes(node, id, &flags)
}

/// A job in the background of a terminal, and the like.
fn stopped_goes_on(node: &Node) -> anyhow::Result<()> {
    let word = "kill -CONT";
    ensure!(Condition::named("stopped").remedy.contains(word));
    run(node, "halted", &[], &[HOLDER, "lock"])?;
    let pid = journey::task_pid(node, "halted")?;
    node.shell(&format!("kill -STOP {pid}")).run()?;
    let found = check(node, "halted", &[])?;
    ensure!(names(&found) == ["stopped"], "{found}");
    node.shell(&format!("{word} {pid}")).run()?;
    passes(node, "halted", &[])
}

fn passes(node: &Node, id: &str, flags: &[&str]) -> anyhow::Result<()> {
    let found = check(node, id, flags)?;
    ensure!(names(&found).is_empty(), "{found}");
    let mut checkpoint = node.command("transship");
    checkpoint
        .args(["checkpoint", id, "--name", id])
        .args(flags);
    checkpoint.run().context("the checkpoint")?;
    node.shell(&format!("transship rm {id}")).run()?;
    Ok(journey::remove_container(node, id)?)
}
