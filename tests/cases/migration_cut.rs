//! A migration that is cut off at each of its moments: its command is killed on the source, its
//! `transship receive`, containerd or the runtime on the target, or the link between them. One copy runs in the end, on
//! the side that the moment decides, and counts without a missing or repeated value.
//!
//! ```text
//!  frozen      the checkpoint has arrived, neither copy runs            the source
//!  create      the target restores                                      the source
//!  held        the copy is there, and its caller does not know          the source
//!  start       Commit has been heard, the copy is about to be let go    the target
//!  running     the copy runs, and nobody knows                          the target
//! ```

use std::time::Duration;

use anyhow::{Context as _, ensure};
use transship_testbed::{
    CommandRun as _, ContainerdConfig, Node, Testbed, Tree, journey, poll_until,
};

use crate::Case;
use crate::migration_faults::{counts_on, run_alone};
use crate::moments::{paced_front, tells_how_it_ended};

const PATIENCE: Duration = Duration::from_secs(90);
const RECOVER: &str = "transship recover --once";

/// The moments of the front.
const MOMENTS: &str = r#"    *" create "*)
        stop_at create
        /usr/local/bin/transship-runc "$@" || exit
        stop_at held
        exit
        ;;
    *" start "*)
        stop_at start
        /usr/local/bin/transship-runc "$@" || exit
        stop_at running
        exit
        ;;"#;
const LINK: &str = "#!/bin/sh\n[ ! -e /run/cut ] || exit 255\n\
    [ ! -e /run/mute ] || exec sleep 300\nexec ssh node-b \"$@\"\n";
const MOVE: &str = r#"#!/bin/sh
transship migrate "$@" --to /usr/local/bin/link --link-timeout 3 --max-freeze 30s \
    --runtime-binary /usr/local/bin/paced-front --before-restore "#;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [
        Case {
            what: "migration_cut",
            tree: Tree::Forky,
            run: |bed| one_copy_whatever_is_cut(bed, &SOME, &HANDS[..1]),
        },
        Case {
            what: "long_migration_cut",
            tree: Tree::Forky,
            run: |bed| one_copy_whatever_is_cut(bed, &ALL, &HANDS),
        },
    ]
    .into_iter()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    Source,
    Target,
    Link,
    Containerd,
    Runtime,
}

use Cut::{Containerd, Link, Runtime, Source, Target};

/// Each moment once, and each thing that can be cut.
const SOME: [(&str, Cut); 7] = [
    ("frozen", Target),
    ("create", Source),
    // Memory of the migration is in use, and nobody can take the copy back: the source goes on all the same.
    ("held", Containerd),
    ("start", Link),
    ("start", Containerd),
    ("running", Target),
    ("running", Runtime),
];
const ALL: [(&str, Cut); 19] = [
    ("frozen", Source),
    ("frozen", Target),
    ("frozen", Link),
    ("create", Source),
    ("create", Target),
    ("create", Link),
    ("start", Source),
    ("start", Target),
    ("start", Link),
    ("running", Source),
    ("running", Target),
    ("running", Link),
    ("create", Containerd),
    ("held", Containerd),
    ("start", Containerd),
    ("running", Containerd),
    ("create", Runtime),
    ("start", Runtime),
    ("running", Runtime),
];
/// What a person decides, and of which container.
const HANDS: [(&str, &str); 2] = [
    ("--source-runs", "by-hand-a"),
    ("--target-runs", "by-hand-b"),
];

fn one_copy_whatever_is_cut(
    bed: &Testbed,
    cuts: &[(&str, Cut)],
    hands: &[(&str, &str)],
) -> anyhow::Result<()> {
    let (a, b) = paced_nodes(bed)?;
    for (moment, cut) in cuts {
        cut_at(&a, &b, moment, *cut).with_context(|| format!("{cut:?} cut at: {moment}"))?;
    }
    for (flag, id) in hands {
        a_person_decides(&a, &b, flag, id).with_context(|| (*flag).to_owned())?;
    }
    journey::check_nothing_left(&a)?;
    journey::check_nothing_left(&b)
}

/// Two nodes, between which [`begin`] moves.
pub(crate) fn paced_nodes(bed: &Testbed) -> anyhow::Result<(Node, Node)> {
    let (a, b) = journey::start_nodes(bed)?;
    bed.ssh(&a, &b)?;
    for (node, path, script) in [
        (&b, "/usr/local/bin/paced-front", paced_front(MOMENTS)),
        (&a, "/usr/local/bin/link", LINK.to_owned()),
        (&a, "/usr/local/bin/move", tells_how_it_ended(MOVE)),
    ] {
        node.write_file(path, script)?;
        node.shell(&format!("chmod +x {path}")).run()?;
    }
    Ok((a, b))
}

fn cut_at(a: &Node, b: &Node, moment: &str, cut: Cut) -> anyhow::Result<()> {
    let copy_runs = matches!(moment, "start" | "running");
    let id = format!("{moment}-{cut:?}").to_lowercase();
    begin(a, b, moment, &id)?;
    match cut {
        Cut::Source => a.shell("pkill -KILL -x transship").run()?,
        Cut::Target => b.shell("pkill -KILL -x transship").run()?,
        Cut::Link => a.shell("touch /run/cut; pkill -KILL -x ssh").run()?,
        Cut::Containerd => {
            b.stop_daemon("containerd", "KILL")?;
            let code = wait_for_end(a)?;
            ensure!(code == expected_code(copy_runs), "exit code {code}");
            b.start_containerd(&ContainerdConfig::transship())?;
        }
        Cut::Runtime => {
            b.shell("pkill -KILL -f '[p]aced-front'").run()?;
            // The next call goes through.
            go_on(a, b)?;
            let code = wait_for_end(a)?;
            let expected = if copy_runs { "0" } else { "5" };
            ensure!(code == expected, "exit code {code}");
        }
    }
    go_on(a, b)?;
    if cut == Cut::Link {
        let code = wait_for_end(a)?;
        ensure!(code == expected_code(copy_runs), "exit code {code}");
        if copy_runs {
            check_undecided(a, &id)?;
            a.start_daemon("serve", &["transship", "serve"])?;
        }
        a.shell("rm /run/cut").run()?;
        if copy_runs {
            the_service_decides(a)?;
        }
    }
    let (runs, ended) = if copy_runs { (b, a) } else { (a, b) };
    poll_until("one copy", PATIENCE, || {
        // A command that is still at work has the lock, and decides by itself.
        let recovered = a.shell(RECOVER).read().map_err(|error| error.to_string())?;
        let tasks = |node: &Node| {
            node.ctr(&["tasks", "ls"])
                .map_err(|error| error.to_string())
        };
        let (here, there) = (tasks(runs)?, tasks(ended)?);
        match here.contains(&id) && here.contains("RUNNING") && !there.contains(&id) {
            true => Ok(()),
            false => Err(format!("{recovered}: {here}, and {there}")),
        }
    })?;
    counts_on(runs, &id)?;
    poll_until("the end of all that moved it", PATIENCE, || {
        nobody_is_left(a, b)
    })?;
    journey::remove_container(runs, &id)?;
    journey::check_nothing_left(a)?;
    journey::check_nothing_left(b)
}

/// Nobody who waits can know that the copy runs.
fn expected_code(copy_runs: bool) -> &'static str {
    if copy_runs { "6" } else { "5" }
}

fn begin(a: &Node, b: &Node, moment: &str, id: &str) -> anyhow::Result<()> {
    run_alone(a, id)?;
    begin_of(a, b, moment, &[id])
}

/// Begins to move a container that runs, up to a moment; `what` is its id and how it moves.
pub(crate) fn begin_of(a: &Node, b: &Node, moment: &str, what: &[&str]) -> anyhow::Result<()> {
    let stops = if moment == "frozen" { a } else { b };
    a.shell("rm -f /run/moved").run()?;
    stops
        .shell(&format!("rm -f /run/at-*; touch /run/stop-at-{moment}"))
        .run()?;
    a.start_daemon("move", &[&["/usr/local/bin/move"], what].concat())?;
    let there = format!("test -e /run/at-{moment}");
    poll_until(moment, PATIENCE, || {
        let reached = stops.shell(&there).run();
        reached.map_err(|error| match wait_said(a) {
            Some(code) => format!("it has ended with {code}"),
            None => error.to_string(),
        })
    })?;
    Ok(())
}

pub(crate) fn go_on(a: &Node, b: &Node) -> anyhow::Result<()> {
    for node in [a, b] {
        node.shell("rm -f /run/stop-at-*").run()?;
    }
    Ok(())
}

fn wait_said(a: &Node) -> Option<String> {
    let code = a.shell("cat /run/moved 2>/dev/null").read().ok()?;
    (!code.is_empty()).then(|| code.trim().to_owned())
}

pub(crate) fn wait_for_end(a: &Node) -> anyhow::Result<String> {
    let end = "the end of the migration";
    Ok(poll_until(end, PATIENCE, || {
        wait_said(a).ok_or_else(|| "it goes on".to_owned())
    })?)
}

/// The source is paused, and its record says what to do.
fn check_undecided(a: &Node, id: &str) -> anyhow::Result<()> {
    let tasks = a.ctr(&["tasks", "ls"])?;
    ensure!(tasks.contains("PAUSED"), "{tasks}");
    let again = a
        .command("transship")
        .args(["migrate", id, "--to", "/usr/local/bin/link"])
        .read_failure()?;
    ensure!(again.contains("has not been decided"), "{again}");
    let asked = a
        .command("transship")
        .args(["recover", "--once"])
        .output()?;
    let said = String::from_utf8_lossy(&asked.stdout).into_owned();
    ensure!(
        asked.status.code() == Some(6) && said.contains("not decided; paused here"),
        "{asked:?}"
    );
    let listed = a.shell("transship ls").read()?;
    let recover = format!("transship -n default recover {id}");
    ensure!(
        listed.contains(&format!("default/{id} ")) && listed.contains(&recover),
        "{listed}"
    );
    Ok(())
}

/// The node's service goes on asking, and ends what is decided.
fn the_service_decides(a: &Node) -> anyhow::Result<()> {
    poll_until("the service", PATIENCE, || {
        let left = a.shell("ls /var/lib/transship/migrations").read();
        match left.map_err(|error| error.to_string())? {
            left if left.is_empty() => Ok(()),
            left => Err(left),
        }
    })?;
    let listed = a.shell("transship ls").read()?;
    ensure!(!listed.contains("not decided"), "{listed}");
    Ok(a.stop_daemon("serve", "TERM")?)
}

/// Neither a command, nor a guard of one.
pub(crate) fn nobody_is_left(a: &Node, b: &Node) -> Result<(), String> {
    for node in [a, b] {
        let left = node.shell("pgrep -af '[f]reeze-guard|[c]ommit-guard|[r]eceive' || true");
        let left = { left }.read().map_err(|error| error.to_string())?;
        if !left.is_empty() {
            return Err(left);
        }
    }
    Ok(())
}

/// When the other node does not answer any more.
fn a_person_decides(a: &Node, b: &Node, flag: &str, id: &str) -> anyhow::Result<()> {
    begin(a, b, "start", id)?;
    a.shell("touch /run/cut; pkill -KILL -x ssh").run()?;
    go_on(a, b)?;
    wait_for_end(a)?;
    poll_until("the copy", PATIENCE, || {
        counts_on(b, id).map_err(|error| error.to_string())
    })?;
    poll_until("the end of the other side", PATIENCE, || {
        nobody_is_left(b, b)
    })?;
    if flag == "--source-runs" {
        journey::remove_container(b, id)?;
    }
    let decide = ["recover", id, flag];
    let said = a.command("transship").args(decide).read()?;
    let gone = a.command("transship").args(decide).read_failure()?;
    ensure!(gone.contains("no migration of"), "{said} {gone}");
    let runs = if flag == "--source-runs" {
        a
    } else {
        ensure!(a.ctr(&["tasks", "ls", "-q"])?.is_empty(), "{said}");
        a.ctr(&["containers", "delete", id])?;
        b
    };
    counts_on(runs, id)?;
    journey::remove_container(runs, id)?;
    Ok(a.shell("rm /run/cut").run()?)
}
