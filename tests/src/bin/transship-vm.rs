//! `make test-vm`: boots machines with systemd and cgroup v2 and runs tests of `tests/cases` in them.
//!
//! ```text
//! transship-vm PART...            the cases of the machine whose names contain one of these
//!   target/vm/root                what `make install` has put there, for the machine's root
//!   target/vm/{console,journal}-<boot>.log
//!   TRANSSHIP_VM_MINUTES          how long it may take; 60
//! exit code: 0 when all cases have passed
//! ```

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use transship_testbed::{CommandRun as _, Machine, Settings, Verdict};

const MINUTES: u64 = 60;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("transship-vm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all cases have passed.
fn run() -> anyhow::Result<bool> {
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
    let tests = test_program(&settings)?;
    let cases = case_names(&tests)?;
    let start = Instant::now();
    let machine = Machine {
        settings: &settings,
        tests: &tests,
        installed: &dir.join("root"),
        cases: &cases,
        dir: &dir,
        deadline: start + Duration::from_secs(minutes * 60),
    };
    let verdicts = machine.run(|text| println!("{text}"))?;
    let passed = verdicts.iter().filter(|(_, it)| *it == Verdict::Passed);
    let passed = passed.count();
    println!(
        "\n{passed} of {} cases passed in {} min",
        cases.len(),
        start.elapsed().as_secs().div_ceil(60)
    );
    for (name, verdict) in &verdicts {
        match verdict {
            Verdict::Passed => {}
            Verdict::Failed => println!("  FAILED  {name}"),
            Verdict::Lost(reason) => println!("  LOST    {name}: {reason}"),
        }
    }
    if passed != cases.len() {
        println!("What the machines said: {}", dir.display());
    }
    Ok(passed == cases.len())
}

/// The cases that the arguments name.
fn case_names(tests: &Path) -> anyhow::Result<Vec<String>> {
    let list = Command::new(tests).arg("--list").read()?;
    let parts: Vec<String> = std::env::args().skip(1).collect();
    let names = list.lines().filter_map(|line| line.strip_suffix(": test"));
    let names: Vec<_> = names
        // Those that run elsewhere would be ignored there, which is no failure.
        .filter(|name| name.starts_with("vm_"))
        .filter(|name| parts.iter().any(|part| name.contains(part.as_str())))
        .map(str::to_owned)
        .collect();
    ensure!(!names.is_empty(), "no case is called like {parts:?}");
    Ok(names)
}

/// Builds the tests, of the same features as the binaries, and asks cargo where they are.
fn test_program(settings: &Settings) -> anyhow::Result<PathBuf> {
    let messages = Command::new(&settings.cargo)
        .args(["test", "--no-run", "--quiet", "--workspace"])
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
