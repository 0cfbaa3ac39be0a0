//! How much memory the processes of a migration have at most, beside the images.

use anyhow::{Context as _, Result};
use transship_testbed::Node;

use super::{Course, Program};
use crate::report::{Goal, Row};

const SAMPLER: &str = "most-memory";
/// Of each process of transship on a node, until it ends: the kernel keeps the most.
const SAMPLE: &str = "while :; do
    for pid in $(pgrep -x transship); do grep VmHWM /proc/$pid/status || true; done
    sleep 0.02
done 2>/dev/null";

impl Course<'_> {
    /// `transship migrate` and `transship receive`, in one migration.
    pub(super) fn measure_most_memory(&mut self, memory_mb: u32) -> Result<Row> {
        let nodes = [self.a, self.b];
        for node in nodes {
            node.start_daemon(SAMPLER, &["bash", "-c", SAMPLE])?;
        }
        let moved = self.migrate(Program::idle(memory_mb), &[]);
        let mut most = 0.0_f64;
        for node in nodes {
            node.stop_daemon(SAMPLER, "KILL")?;
            most = most.max(most_of(node)?);
        }
        moved?;
        let name = format!("most memory of transship on one node, {memory_mb} MB migrated");
        let row = Row::new(name, "MB", most).goal(Goal::AtMost(64.0));
        Ok(row.note("what is in the tmpfs of the images, and CRIU's own, is not in it"))
    }
}

fn most_of(node: &Node) -> Result<f64> {
    let log = node.read_file(&format!("/var/log/{SAMPLER}.log"))?;
    let log = String::from_utf8_lossy(&log).into_owned();
    let kilobytes = log
        .lines()
        .filter_map(|line| line.split_whitespace().nth(1)?.parse().ok());
    let most: u32 = kilobytes
        .max()
        .context("no process of transship was seen")?;
    Ok(f64::from(most) / 1e3)
}
