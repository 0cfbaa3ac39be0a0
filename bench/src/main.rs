//! Benchmarks on real nodes: what is measured, through which parts, in one table.
//!
//! ```text
//! settings from the environment ─> Testbed ─> measure(round) x ROUNDS ─> median, worst ─> stdout
//! ```
//!
//! Each figure stands beside that of the stock part measured in the same run on the same node:
//! machines differ, and one machine differs from hour to hour.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use transship_testbed::{CommandRun as _, ContainerdConfig, Settings, Testbed, Tree};

/// Odd, so that the median is one of the measured values.
const ROUNDS: usize = 5;

fn main() -> ExitCode {
    if let Some(code) = transship_testbed::node_role(std::env::args_os()) {
        return code;
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let settings =
        Settings::from_variables(|name| std::env::var_os(name), std::env::current_exe()?);
    for tree in Tree::ALL {
        let bed = Testbed::new(tree, &settings)?;
        let node = bed.node("a")?;
        node.start_containerd(&ContainerdConfig::default())?;
        // The floor under every figure that is taken through a command in a node.
        report(&format!("{tree}: entering a node"), || {
            Ok(node.command("true").run()?)
        })?;
        report(&format!("{tree}: ctr version"), || {
            Ok(node.command("ctr").arg("version").run()?)
        })?;
        bed.stop()?;
    }
    Ok(())
}

/// Takes `ROUNDS` measures of `round` and prints a line.
fn report(what: &str, mut round: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut taken = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            round().map(|()| start.elapsed())
        })
        .collect::<anyhow::Result<Vec<Duration>>>()?;
    taken.sort();
    println!(
        "{what:<40} median {:>10.1?}   worst {:>10.1?}",
        taken[ROUNDS / 2],
        taken[ROUNDS - 1]
    );
    Ok(())
}
