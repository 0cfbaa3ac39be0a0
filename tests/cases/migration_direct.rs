//! The bulk of a migration goes before the freeze and through connections of its own, where that can be.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use transship_testbed::{CommandRun as _, Node, Testbed, Tree, journey, poll_until};

use crate::Case;
use crate::package_image::PUBLIC_KEY;

const MEMORY_MB: u32 = 48;

pub(crate) fn cases() -> impl Iterator<Item = Case> {
    [
        Case {
            what: "migration_direct",
            tree: Tree::Forky,
            run: data_goes_the_short_way_where_there_is_one,
        },
        Case {
            what: "migration_slow_link",
            tree: Tree::Forky,
            run: less_goes_over_a_slow_link,
        },
    ]
    .into_iter()
}

/// Bytes of text, which a container has once in a file and once in its memory.
const TEXT: u64 = 24 << 20;
/// 4 MB in a second: zstd is quicker on a machine with much other work, too.
const SLOW: &str = "for link in /sys/class/net/link*; do
        tc qdisc add dev ${link##*/} root tbf rate 30mbit burst 64kb latency 200ms
    done";

fn less_goes_over_a_slow_link(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let (to_b, to_a) = (bed.ssh(&a, &b)?, bed.ssh(&b, &a)?);
    // Without a child, which would have its parent's memory until it runs something else.
    let holds_text = format!(
        "b=/bin/busybox; $b mkdir -p /data
         $b hexdump -v -e '32/1 \"%02x\" \"\\n\"' /dev/urandom | $b head -c {TEXT} >/data/text
         text=$($b cat /data/text)
         $b mkfifo /data/fifo; exec 3<>/data/fifo
         while :; do echo ${{#text}} >/data/length; read -t 1 -u 3 none; done"
    );
    journey::run_program(&a, "text", &["/bin/busybox", "sh", "-c", &holds_text])?;
    has_its_text(&a)?;
    let all = 2 * TEXT;

    // Whether this link is quick depends on what else this machine does: what that decides is a test of the crate.
    for (from, command, to) in [(&a, &to_b, &b), (&b, &to_a, &a)] {
        let told = migrate_text(from, command, &[])?;
        has_its_text(to)?;
        let is_plain = told["compressed"]["bytes"] == 0;
        ensure!(!is_plain || told["bytes"].as_u64() >= Some(all), "{told}");
    }

    for (from, to, command, more) in [
        (&a, &b, &to_b, &[][..]),
        (&b, &a, &to_a, &["--data-address", "none"]),
        // Nothing goes before: the pages come late.
        (
            &a,
            &b,
            &to_b,
            &["--lazy", "--accept-loss", "--max-precopy-rounds", "0"],
        ),
    ] {
        from.shell(SLOW).run()?;
        let before = sent_by(from)?;
        let slowly = migrate_text(from, command, more);
        let went = sent_by(from)? - before;
        from.shell("for link in /sys/class/net/link*; do tc qdisc del dev ${link##*/} root; done")
            .run()?;
        let slowly = slowly?;
        ensure!(
            slowly["compressed"]["bytes"].as_u64() >= Some(TEXT),
            "{slowly}"
        );
        // Half of it is what hexadecimal digits say.
        ensure!(went < all / 4 * 3, "{went} bytes went: {slowly}");
        has_its_text(to)?;
    }
    journey::remove_container(&b, "text")?;
    journey::check_nothing_left(&a)?;
    journey::check_nothing_left(&b)
}

fn migrate_text(from: &Node, to: &str, more: &[&str]) -> anyhow::Result<Value> {
    let mut command = from.command("transship");
    command.args(["migrate", "text", "--to", to, "--json"]);
    let told = command.args(more).read()?;
    serde_json::from_str(&told).with_context(|| format!("no answer: {told:?}"))
}

/// Waits until the container says anew how much text it has in its memory, and looks at the file.
fn has_its_text(node: &Node) -> anyhow::Result<()> {
    let pid = journey::task_pid(node, "text")?;
    let data = format!("/proc/{pid}/root/data");
    node.shell(&format!("rm -f {data}/length")).run()?;
    let expected = format!("{TEXT} {TEXT}");
    Ok(poll_until("the text", Duration::from_secs(60), || {
        let seen = node.shell(&format!(
            "set -e; length=$(cat {data}/length); echo $length $(stat -c %s {data}/text)"
        ));
        let seen = { seen }.read().map_err(|error| error.to_string())?;
        let is_whole = seen.trim() == expected;
        { is_whole.then_some(()) }.ok_or_else(|| format!("{seen:?}, not {expected:?}"))
    })?)
}

/// Bytes that a node has sent over the link.
fn sent_by(node: &Node) -> anyhow::Result<u64> {
    let sent = node
        .shell("cat /sys/class/net/link*/statistics/tx_bytes")
        .read()?;
    Ok(sent.trim().parse()?)
}

fn data_goes_the_short_way_where_there_is_one(bed: &Testbed) -> anyhow::Result<()> {
    let (a, b) = journey::start_nodes(bed)?;
    let ssh = bed.ssh(&a, &b)?;
    let moved = |turn: usize, more: &[&str]| migrate_counter(&a, &b, &ssh, turn, more);
    let usual = moved(1, &[])?;
    ensure!(usual["direct"] == 2, "{usual}");
    let memory = u64::from(MEMORY_MB) << 20;
    let (before, in_freeze) = (bytes_of(&usual, "precopy")?, bytes_of(&usual, "transfer")?);
    ensure!(
        before >= memory && in_freeze < memory / 4,
        "{before} bytes before the freeze, {in_freeze} in it: {usual}"
    );

    let plain = moved(2, &["--data-address", "none", "--max-precopy-rounds", "0"])?;
    ensure!(plain["direct"] == 0, "{plain}");
    ensure!(bytes_of(&plain, "transfer")? >= memory, "{plain}");
    ensure!(bytes_of(&plain, "precopy").is_err(), "{plain}");

    // Memory first, through the command's pipe.
    let by_pipe = moved(3, &["--data-address", "none"])?;
    ensure!(
        by_pipe["direct"] == 0 && bytes_of(&by_pipe, "transfer")? < memory / 4,
        "{by_pipe}"
    );

    // A firewall that lets ssh through alone, and an address that leads nowhere.
    b.shell("iptables -I INPUT -i link+ -p tcp --syn ! --dport 22 -j DROP")
        .run()?;
    let walled = moved(4, &[])?;
    ensure!(walled["direct"] == 0, "{walled}");
    b.shell("iptables -D INPUT -i link+ -p tcp --syn ! --dport 22 -j DROP")
        .run()?;
    // What comes with a migration is signed by nobody.
    let rules = format!("[checkpoints]\nsigned-by = [\"{PUBLIC_KEY}\"]\n");
    b.write_file("/etc/transship/node.toml", rules)?;
    let elsewhere = moved(5, &["--data-address", "192.0.2.1"])?;
    b.shell("rm /etc/transship/node.toml").run()?;
    ensure!(elsewhere["direct"] == 0, "{elsewhere}");
    for node in [&a, &b] {
        journey::check_nothing_left(node)?;
    }
    Ok(())
}

/// Moves a new counter, looks that it is what it was, removes it, and gives what the command has told.
pub(crate) fn migrate_counter(
    a: &Node,
    b: &Node,
    ssh: &str,
    turn: usize,
    more: &[&str],
) -> anyhow::Result<Value> {
    let (here, there, counter) = (
        format!("here-{turn}"),
        format!("there-{turn}"),
        format!("counter-{turn}"),
    );
    journey::run_sandbox(a, &here)?;
    journey::run_counter(a, &counter, &here, MEMORY_MB, &[])?;
    journey::wait_for_count(a, &counter, 3)?;
    journey::run_sandbox(b, &there)?;
    let mut command = a.command("transship");
    command.args([
        "migrate",
        &counter,
        "--to",
        ssh,
        "--sandbox",
        &there,
        "--json",
    ]);
    let told = command.args(more).read()?;
    let reply = journey::ask(b, &journey::sandbox_address(b, &there)?)?;
    ensure!(reply.memory_ok && reply.count >= 3, "{reply:?}");
    for (node, id) in [(a, &here), (b, &counter), (b, &there)] {
        journey::remove_container(node, id)?;
    }
    serde_json::from_str(&told).with_context(|| format!("no answer: {told:?}"))
}

/// What a step of the timeline has moved.
pub(crate) fn bytes_of(told: &Value, name: &str) -> anyhow::Result<u64> {
    let steps = told["timeline"]["steps"].as_array();
    let step = steps
        .into_iter()
        .flatten()
        .find(|step| step["name"] == name);
    let bytes = step.and_then(|step| step["bytes"].as_u64());
    bytes.with_context(|| format!("no step {name:?} with bytes in {told}"))
}
