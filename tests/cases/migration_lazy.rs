//! Memory that comes when the copy runs already: all of it comes, from the source and from what came before the freeze;
//! and where it cannot come any more the copy is ended, and the source is still there.

use std::time::Duration;

use anyhow::ensure;
use serde_json::Value;
use transship_testbed::{CommandRun as _, Testbed, Tree, journey, poll_until};

use crate::Case;
use crate::migration_cut::nobody_is_left;
use crate::migration_direct::{bytes_of, migrate_counter};
use crate::migration_faults::{counts_on, refused, run_alone};

/// What `transship recover` says of a copy that was lost.
pub(crate) const IS_LOST: &str = "is not there any more";
const PATIENCE: Duration = Duration::from_secs(60);
const LAZY: [&str; 2] = ["--lazy", "--accept-loss"];
const NO_ROUNDS: [&str; 2] = ["--max-precopy-rounds", "0"];
/// Bytes of a counter's memory of which most has to come late.
const MUCH: u64 = 16 << 20;
/// 12 MB in a second from then on. Two seconds after the source has written down that it commits itself the copy runs,
/// and lacks most of its memory.
const KILL_SOURCE: &str = "for link in /sys/class/net/link*; do
        tc qdisc add dev ${link##*/} root tbf rate 100mbit burst 64kb latency 200ms
    done
    (until [ -e /var/lib/transship/migrations/default:lost ]; do sleep 0.01; done
    sleep 2; pkill -KILL -x transship) </dev/null >/dev/null 2>&1 &";

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [
        Case {
            what: "migration_lazy",
            tree: Tree::Forky,
            run: memory_comes_late,
        },
        Case {
            what: "migration_lazy_lost",
            tree: Tree::Forky,
            run: a_copy_without_its_memory_is_ended,
        },
    ]
    .into_iter()
}

fn memory_comes_late(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let ssh = bed.ssh(&a, &b)?;
    let moved = |turn, more: &[&str]| migrate_counter(&a, &b, &ssh, turn, more);
    // Nothing goes before: all comes late.
    let late = moved(1, &[&LAZY[..], &NO_ROUNDS].concat())?;
    ensure!(bytes_of(&late, "transfer")? < MUCH, "{late}");
    ensure!(has_step(&late, "pages"), "{late}");
    // Most of it is on the other node, in images of several rounds.
    let both = moved(2, &LAZY)?;
    ensure!(bytes_of(&both, "precopy")? > MUCH, "{both}");
    // All of it is there, and comes when it is touched.
    let here = moved(3, &["--lazy-pages"])?;
    ensure!(!has_step(&here, "pages"), "{here}");
    ensure!(bytes_of(&here, "transfer")? < MUCH, "{here}");
    for node in [&a, &b] {
        journey::check_nothing_left(node)?;
    }

    run_alone(&a, "counter")?;
    let migrate = ["migrate", "counter", "--to", ssh.as_str()];
    let lazily = |more: &[&'static str]| [&migrate[..], more].concat();
    refused(&a, &lazily(&["--lazy"]), 4, "--accept-loss")?;
    let by_pipe = ["--data-address", "none"];
    let by_pipe = lazily(&[&LAZY[..], &by_pipe].concat());
    refused(&a, &by_pipe, 4, "without a direct connection")?;
    // It is given up in the freeze.
    let fails = ["--max-freeze", "1ms"];
    refused(
        &a,
        &lazily(&[&LAZY[..], &fails].concat()),
        1,
        "--max-freeze",
    )?;
    journey::remove_container(&a, "counter")?;
    for node in [&a, &b] {
        journey::check_nothing_left(node)?;
    }
    Ok(())
}

fn a_copy_without_its_memory_is_ended(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let ssh = bed.ssh(&a, &b)?;
    a.shell(
        "ctr run --detach --snapshotter transship transship.test/counter:1 lost \
         /usr/bin/counter --memory-mb 128",
    )
    .run()?;
    let reached = journey::wait_for_count(&a, "lost", 3)?;
    let mut migrate = vec!["migrate", "lost", "--to", &ssh];
    migrate.extend([&LAZY[..], &NO_ROUNDS, &["--before-restore", KILL_SOURCE]].concat());
    let killed = a.command("transship").args(&migrate).output()?;
    ensure!(!killed.status.success(), "{killed:?}");

    poll_until("the end of the copy", PATIENCE, || {
        let tasks = b.ctr(&["tasks", "ls"]).map_err(|error| error.to_string())?;
        let guards = b.shell("pgrep -af '[r]eceive|[l]azy-pages' || true").read();
        let guards = guards.map_err(|error| error.to_string())?;
        match tasks.contains("RUNNING") || !guards.is_empty() {
            true => Err(format!("{tasks}{guards}")),
            false => Ok(()),
        }
    })?;
    // The guard of the command has asked, too.
    poll_until("the end of who asks", PATIENCE, || nobody_is_left(&a, &b))?;
    let tasks = a.ctr(&["tasks", "ls"])?;
    ensure!(tasks.contains("PAUSED"), "{tasks}");
    let mut asked = a.command("transship");
    let asked = asked.args(["recover", "--once"]).output()?;
    let said = String::from_utf8_lossy(&asked.stderr).into_owned();
    ensure!(
        asked.status.code() == Some(6) && said.contains(IS_LOST),
        "{asked:?}"
    );
    a.command("transship")
        .args(["recover", "lost", "--source-runs"])
        .run()?;
    counts_on(&a, "lost")?;
    let now = journey::read_counts(&a, "lost").map_err(anyhow::Error::msg)?;
    ensure!(now >= reached, "it went back to {now}");
    // Its files may say what it has done.
    b.ctr(&["containers", "delete", "lost"])?;

    // Who looks after the copy that was lost leaves alone what has its id now.
    a.shell("for link in /sys/class/net/link*; do tc qdisc del dev ${link##*/} root; done")
        .run()?;
    a.command("transship").args(&migrate[..4]).run()?;
    b.shell("transship recover --once || true").run()?;
    counts_on(&b, "lost")?;
    journey::remove_container(&b, "lost")?;
    journey::check_nothing_left(&a)?;
    journey::check_nothing_left(&b)
}

fn has_step(told: &Value, name: &str) -> bool {
    let steps = told["timeline"]["steps"].as_array();
    steps.into_iter().flatten().any(|step| step["name"] == name)
}
