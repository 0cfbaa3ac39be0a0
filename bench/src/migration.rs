//! A migration beside the stock checkpoint of the same container.
//!
//! ```text
//!   node a: sandbox, counter ── ctr containers checkpoint --rw --task ──> an image; frozen from
//!                    │                                                    /tasks/paused to /tasks/resumed
//!                    └── transship migrate ──> node b: runs there
//! ```
//!
//! The stock command is given the smaller job: its checkpoint stays on the node (`ctr images export`
//! of it fails, which is tried and told), and the container is not restored.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use transship_testbed::{CommandRun as _, Node, Testbed, journey, poll_until};

use crate::node_clock::time_in_node;
use crate::report::{Better, Row};
use crate::sizes::Sizes;
use crate::statistics::{median, median_millis, millis};

const STOCK: &str = "ctr containers checkpoint";
const EVENTS: &str = "events";
const PATIENCE: Duration = Duration::from_secs(30);

/// What `transship migrate --json` says, as far as it is used.
#[derive(Debug, Deserialize)]
struct Migrated {
    timeline: Timeline,
}

#[derive(Debug, Deserialize)]
struct Timeline {
    total_seconds: f64,
    frozen_seconds: f64,
}

/// Measures the part.
///
/// # Errors
/// When a step of the journey fails.
pub(crate) fn measure(bed: &Testbed, sizes: &Sizes) -> Result<Vec<Row>> {
    let (a, b) = journey::start_nodes(bed)?;
    let ssh = bed.ssh(&a, &b)?;
    // Lines of stdout, one an event: time, zone, topic.
    a.start_daemon(EVENTS, &["ctr", "events"])?;
    let (mut total, mut frozen, mut checkpoint, mut stock_frozen) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut exported = String::new();
    for round in 0..sizes.slow_rounds {
        eprintln!("   round {}", round + 1);
        let (here, there) = (format!("sandbox-{round}"), format!("sandbox-b{round}"));
        let counter = format!("counter-{round}");
        journey::run_sandbox(&a, &here)?;
        journey::run_counter(&a, &counter, &here, sizes.memory_mb, &[])?;
        journey::ask(&a, &journey::sandbox_address(&a, &here)?)?;
        journey::run_sandbox(&b, &there)?;

        let image = format!("transship.test/stock:{round}");
        let command = format!("timed ctr containers checkpoint --rw --task {counter} {image}");
        checkpoint.extend(time_in_node(&a, &command)?);
        stock_frozen.push(last_pause(&a)?);
        let export = format!("ctr images export /dev/null {image}");
        exported = match a.shell(&export).run() {
            Ok(()) => "its image could be exported".to_owned(),
            Err(error) => format!("its image cannot leave the node: {}", last_line(&error)),
        };
        a.ctr(&["images", "rm", "--sync", &image])?;

        let mut migrate = a.command("transship");
        migrate.args([
            "migrate",
            &counter,
            "--to",
            &ssh,
            "--sandbox",
            &there,
            "--json",
        ]);
        let text = migrate.read()?;
        let migrated: Migrated = serde_json::from_str(&text)
            .with_context(|| format!("cannot parse the answer of transship migrate: {text:?}"))?;
        total.push(migrated.timeline.total_seconds * 1e3);
        frozen.push(migrated.timeline.frozen_seconds * 1e3);
        let reply = journey::ask(&b, &journey::sandbox_address(&b, &there)?)?;
        ensure!(
            reply.memory_ok,
            "the copy's memory is not what it was: {reply:?}"
        );
        for (node, id) in [(&a, &here), (&b, &counter), (&b, &there)] {
            remove_container(node, id)?;
        }
    }
    a.stop_daemon(EVENTS, "TERM")?;
    let middle = |values: &[f64]| median(values).unwrap_or(f64::NAN);
    let size = format!("{} MB in memory", sizes.memory_mb);
    Ok(vec![
        Row::new(
            format!("frozen, {size}: the migration beside a checkpoint alone"),
            "ms",
            middle(&frozen),
        )
        .beside(STOCK, middle(&stock_frozen), Better::Less)
        .note(exported),
        Row::new(
            format!("whole command, {size}: the migration beside a checkpoint alone"),
            "ms",
            middle(&total),
        )
        .beside(STOCK, median_millis(&checkpoint), Better::Less),
    ])
}

/// How long the last pause of a task on the node was, in milliseconds.
fn last_pause(node: &Node) -> Result<f64> {
    let pause = poll_until("the events of the pause", PATIENCE, || {
        let log = node
            .read_file(&format!("/var/log/{EVENTS}.log"))
            .map_err(|error| error.to_string())?;
        let log = String::from_utf8_lossy(&log).into_owned();
        let at = |topic: &str| {
            let line = log.lines().rfind(|line| line.contains(topic))?;
            // "2026-01-02 03:04:05.678901234 +0000 UTC default /tasks/paused {...}"
            seconds_of_day(line.split_whitespace().nth(1)?)
        };
        match (at("/tasks/paused"), at("/tasks/resumed")) {
            (Some(paused), Some(resumed)) if resumed >= paused => Ok(resumed - paused),
            _ => Err(log),
        }
    })?;
    Ok(millis(pause))
}

/// "03:04:05.678901234" as the time since midnight.
fn seconds_of_day(text: &str) -> Option<Duration> {
    let mut parts = text.split(':');
    let (hours, minutes) = (
        parts.next()?.parse::<u32>().ok()?,
        parts.next()?.parse::<u32>().ok()?,
    );
    let seconds: f64 = parts.next()?.parse().ok()?;
    Duration::try_from_secs_f64(f64::from(hours * 3600 + minutes * 60) + seconds).ok()
}

fn remove_container(node: &Node, id: &str) -> Result<()> {
    node.shell(&format!(
        "ctr tasks rm --force {id} >/dev/null && ctr containers rm {id}"
    ))
    .run()?;
    Ok(())
}

fn last_line(error: &transship_testbed::TestbedError) -> String {
    let text = error.to_string();
    text.trim().lines().last().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_events_are_read() {
        assert_eq!(
            seconds_of_day("01:02:03.5"),
            Some(Duration::from_millis(3_723_500))
        );
        assert_eq!(seconds_of_day("x"), None);
    }
}
