//! Times taken inside a node: the way into it (several exec calls) is not part of the figure.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use transship_testbed::{CommandRun as _, Node};

/// Runs a bash script in the node that calls `timed COMMAND...` some times; gives the times.
///
/// The command's output is dropped; one that fails fails the script, with what it wrote to stderr.
pub(crate) fn time_in_node(node: &Node, script: &str) -> Result<Vec<Duration>> {
    let whole = format!("{TIMED}\n{script}");
    let text = node.command("bash").args(["-eu", "-c", &whole]).read()?;
    let times = text.lines().map(|line| {
        let micros: Vec<u64> = line
            .split_whitespace()
            .map(|word| word.parse().with_context(|| format!("no time in {line:?}")))
            .collect::<Result<_>>()?;
        ensure!(micros.len() == 2, "no two times in {line:?}");
        Ok(Duration::from_micros(micros[1].saturating_sub(micros[0])))
    });
    times.collect()
}

/// `EPOCHREALTIME` is read by the shell itself: no fork is timed but the command's.
const TIMED: &str = "export LC_ALL=C
timed() {
  local from=${EPOCHREALTIME/./}
  \"$@\" >/dev/null
  echo \"$from ${EPOCHREALTIME/./}\"
}";
