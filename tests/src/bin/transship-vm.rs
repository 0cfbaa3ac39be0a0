//! `make test-vm`: boots a machine with systemd and cgroup v2 and runs tests of `tests/cases` in it.
//!
//! ```text
//! transship-vm ARGUMENT...        arguments of the test program: parts of names
//!   target/vm/root                what `make install` has put there, for the machine's root
//!   target/vm/{console,journal}.log
//!   TRANSSHIP_VM_MINUTES          how long it may take; 60
//! exit code: that of the tests; 1 when they did not end
//! ```

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use transship_testbed::{CommandRun as _, Machine, Settings};

const MINUTES: u64 = 60;
/// Lines of the console that are shown when the machine did not come as far as the tests.
const CONSOLE_LINES: usize = 40;

fn main() -> ExitCode {
    match run() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("transship-vm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<u8> {
    let settings =
        Settings::from_variables(|name| std::env::var_os(name), std::env::current_exe()?);
    let minutes = match std::env::var("TRANSSHIP_VM_MINUTES") {
        Ok(text) => text.parse().context("TRANSSHIP_VM_MINUTES")?,
        Err(_) => MINUTES,
    };
    let target = settings
        .binaries_dir
        .parent()
        .context("no target directory")?;
    let dir = target.join("vm");
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let tests = test_program(&settings)?;
    let machine = Machine {
        settings: &settings,
        tests: &tests,
        installed: &dir.join("root"),
        arguments: &arguments,
        dir: &dir,
        deadline: Duration::from_secs(minutes * 60),
    };
    let start = Instant::now();
    let exit = machine.run(|line| println!("{line}"))?;
    println!("the machine ran for {} s", start.elapsed().as_secs());
    let (console, journal) = (machine.console_log(), machine.journal_log());
    match exit {
        Some(0) => {}
        Some(_) => println!(
            "its console: {}, its journal: {}",
            console.display(),
            journal.display()
        ),
        None => println!(
            "it ended before the tests; the end of {}:\n{}",
            console.display(),
            tail(&console)
        ),
    }
    Ok(exit.unwrap_or(1))
}

/// Builds the tests and asks cargo where they are.
fn test_program(settings: &Settings) -> anyhow::Result<PathBuf> {
    let messages = Command::new(&settings.cargo)
        .args([
            "test",
            "--no-run",
            "--quiet",
            "--package",
            "transship-testbed",
        ])
        .args(["--test", "node", "--message-format", "json"])
        .read()?;
    for message in messages.lines() {
        let message: serde_json::Value = serde_json::from_str(message)?;
        if message["target"]["name"] == "node"
            && let Some(path) = message["executable"].as_str()
        {
            return Ok(path.into());
        }
    }
    bail!("cargo names no test program")
}

fn tail(path: &Path) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n")
}
