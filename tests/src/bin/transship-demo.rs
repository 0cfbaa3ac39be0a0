//! `make demo`: a running container leaves one containerd node in mid-count and goes on counting
//! on another.
//!
//! ```text
//!  Testbed ─> two nodes ─> journey: sandbox and counter on a ─> transship migrate ─> checks on b
//! ```
//!
//! Each step is a command that a person could type on the node; it is printed before it runs.

use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use transship_testbed::{Settings, Testbed, Tree, journey};

const MEMORY_MB: u32 = 200;

fn main() -> ExitCode {
    if let Some(code) = transship_testbed::node_role(std::env::args_os()) {
        return code;
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nThe demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let executable = std::env::current_exe().context("cannot find this program")?;
    let settings = Settings::from_variables(|name| std::env::var_os(name), executable);
    let tree = Tree::Forky;
    say("Two nodes, each with its own containerd, runc, CRIU and network");
    let began = Instant::now();
    let bed = Testbed::new(tree, &settings)?;
    let result = journey(&bed);
    if result.is_err() {
        for node in bed.nodes() {
            eprintln!("{}", node.logs());
        }
    }
    bed.stop()?;
    let proved = result?;
    println!("\n{proved} ({:.0} s in all)", began.elapsed().as_secs_f64());
    Ok(())
}

fn journey(bed: &Testbed) -> Result<String> {
    let (a, b) = journey::start_nodes(bed)?;
    println!(
        "  node-a and node-b run containerd {}",
        bed.tree().containerd_version()
    );

    say("On node-a: a sandbox, and a counter that joins its network, IPC and host name");
    journey::run_sandbox(&a, "sandbox")?;
    journey::run_counter(&a, "counter", "sandbox", MEMORY_MB, &[])?;
    let address = journey::sandbox_address(&a, "sandbox")?;
    let before = journey::ask(&a, &address)?;
    println!(
        "  it counts ({} so far), keeps {} MB in memory, appends to a file of its image, has \
         deleted another,\n  and answers on {address}:7000 as {:?}",
        before.count, before.memory_mb, before.hostname
    );

    say("On node-b: a new sandbox; the counter's image is not there");
    journey::run_sandbox(&b, "sandbox-b")?;
    let address = journey::sandbox_address(&b, "sandbox-b")?;

    let ssh = bed.ssh(&a, &b)?;
    let remove_sandbox = "ctr tasks kill --signal KILL sandbox && ctr tasks delete sandbox && ctr containers rm sandbox";
    let migrate = [
        "migrate",
        "counter",
        "--to",
        &ssh,
        "--sandbox",
        "sandbox-b",
        "--before-restore",
    ];
    say("On node-a: the migration; the old sandbox is removed before the restore");
    println!(
        "  $ transship migrate counter --to '{ssh}' --sandbox sandbox-b \\\n      \
         --before-restore '{remove_sandbox}'\n"
    );
    show(a.command("transship").args(migrate).arg(remove_sandbox))?;

    say("On node-b: the same process");
    let after = journey::ask(&b, &address)?;
    ensure!(after.count > before.count, "it began anew: {after:?}");
    ensure!(after.memory_ok, "its memory is not what it was: {after:?}");
    ensure!(
        after.local_ip == address,
        "the answer does not come from b: {after:?}"
    );
    let counted = journey::wait_for_count(&b, "counter", after.count)?;
    journey::check_files(&b, "counter").map_err(anyhow::Error::msg)?;
    println!(
        "  it counts on ({counted} now), its memory is as it was, its files are as they were left,\n  \
         and it answers on {address}:7000 as {:?}",
        after.hostname
    );
    journey::check_nothing_left(&a)?;
    println!("  on node-a nothing runs and nothing is left");
    Ok(format!(
        "Proved: one process, counted 1 to {counted} on two nodes without a missing or repeated \
         value, and only one copy of it ever ran."
    ))
}

fn say(what: &str) {
    println!("\n{what}");
}

/// Runs a command of which the person sees everything.
fn show(command: &mut Command) -> Result<()> {
    let status = command
        .stdin(Stdio::null())
        .status()
        .context("cannot run the command")?;
    if !status.success() {
        bail!("the command failed ({status})");
    }
    Ok(())
}
