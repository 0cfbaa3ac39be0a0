//! Measurements on real nodes, beside the stock parts, in the same run: what `make bench` prints.
//!
//! ```text
//!  sizes.rs ─┬─> snapshots/   gRPC load: our socket | soci-snapshotter-grpc (peer.rs) | both through containerd
//!            ├─> layers/      Diff and Apply: ours | containerd's walking differ | tar | cat
//!            ├─> migration.rs transship migrate | ctr containers checkpoint
//!            ├─> restore.rs   a restore through the CRI | runc restore
//!            ├─> front.rs     transship-runc | runc
//!            └─> package.rs   transship export, import | tar and zstd
//!                   │ rows: ours, the peer's, the goal
//!                   v
//!               report.rs ──> results.json, results.md       <── why.toml, where a goal is not reached
//! ```
//!
//! pod_node: a node with pods;  namespace: where in containerd;  node_clock: times taken inside of a node;  daemon: memory and
//! processor time of one;  statistics: medians.
//!
//! Only ratios within one run mean something: machines differ, and one machine differs from hour to
//! hour. So ours and the peer take turns, on the same disk, and medians are compared. No time is
//! ever asserted: the exit code tells whether everything was measured, not how fast it was.

mod daemon;
mod front;
mod layers;
mod migration;
mod namespace;
mod node_clock;
mod package;
mod peer;
mod pod_node;
mod report;
mod restore;
mod sizes;
mod snapshots;
mod statistics;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result};
use clap::{Parser, ValueEnum};
use transship_testbed::{Disk, FileSystem, Settings, Testbed, Tree};

use crate::report::{Results, Row, Run};
use crate::sizes::Sizes;

/// Measures Transship beside stock tools on throwaway nodes (needs root).
#[derive(Debug, Parser)]
struct Arguments {
    /// Measure these parts alone; the results of the others stay as they are
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Small sizes, to try the program itself; writes no results unless --out is given
    #[arg(long)]
    quick: bool,
    /// Only put load on a running snapshots socket for five seconds and print what it took: something
    /// for a profiler to look at
    #[arg(long, value_name = "SOCK", conflicts_with_all = ["only", "quick", "out"])]
    load: Option<PathBuf>,
    /// Clients of --load
    #[arg(long, value_name = "N", default_value_t = 16, requires = "load")]
    clients: usize,
    /// Where results.json and results.md go [default: the crate's directory]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// What is measured together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    Snapshots,
    Layers,
    Migration,
    Restore,
    Front,
    Package,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Part::Snapshots => "snapshots",
            Part::Layers => "layers",
            Part::Migration => "migration",
            Part::Restore => "restore",
            Part::Front => "front",
            Part::Package => "package",
        }
    }

    fn measure(self, bed: &Testbed, sizes: &Sizes) -> Result<Vec<Row>> {
        match self {
            Part::Snapshots => snapshots::measure(bed, sizes),
            Part::Layers => layers::measure(bed, sizes),
            Part::Migration => migration::measure(bed, sizes),
            Part::Restore => restore::measure(bed, sizes),
            Part::Front => front::measure(bed, sizes),
            Part::Package => package::measure(bed, sizes),
        }
    }
}

fn main() -> ExitCode {
    if let Some(code) = transship_testbed::node_role(std::env::args_os()) {
        return code;
    }
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    if let Some(socket) = arguments.load {
        println!("{}", snapshots::load_socket(socket, arguments.clients)?);
        return Ok(());
    }
    let executable = std::env::current_exe().context("cannot find this program")?;
    let settings = Settings::from_variables(|name| std::env::var_os(name), executable);
    let sizes = if arguments.quick {
        Sizes::quick()
    } else {
        Sizes::full()
    };
    let out = match (arguments.out, arguments.quick) {
        (Some(out), _) => Some(out),
        (None, true) => None,
        (None, false) => Some(PathBuf::from(env!("CARGO_MANIFEST_DIR"))),
    };
    let mut results = match &out {
        Some(out) => Results::read(out)?,
        None => Results::default(),
    };
    let parts = match &arguments.only {
        none if none.is_empty() => Part::value_variants(),
        only => only,
    };
    for part in parts {
        eprintln!("== {}", part.name());
        let (run, began) = (Run::begin()?, Instant::now());
        let mut settings = settings.clone();
        let disk = match part {
            // These make and remove hundreds of thousands of files.
            Part::Snapshots | Part::Layers => {
                Some(Disk::make(&settings.work_dir, FileSystem::Ext4)?)
            }
            _ => None,
        };
        if let Some(disk) = &disk {
            disk.path().clone_into(&mut settings.work_dir);
        }
        let bed = Testbed::new(Tree::Forky, &settings)?;
        let rows = part.measure(&bed, &sizes);
        if rows.is_err() {
            for node in bed.nodes() {
                eprintln!("{}", node.logs());
            }
        }
        bed.stop()?;
        drop(disk);
        let rows = rows.with_context(|| format!("cannot measure {}", part.name()))?;
        results.replace(part.name(), run.took(began.elapsed()), rows);
        println!("{}", results.table(part.name()));
        // After each part: a later one that fails must not take the earlier ones' figures along.
        if let Some(out) = &out {
            results.write(out)?;
        }
    }
    Ok(())
}
