//! `transship`: moves running containers from one containerd node to another.
//!
//! ```text
//!  args --> commands/{checkpoint, restore, migrate, receive, snapshot, check, serve} --> transship-engine
//!           commands/{send, inspect, ls, rm}                                         --> checkpoint directory
//!  progress: bars and lines while it goes on
//! ```

mod args;
mod commands;
mod node_service;
mod progress;

use std::process::ExitCode;

use clap::Parser;
use transship_engine::problem;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(commands::run(cli));
            // A step that was given up may still sit in a read.
            runtime.shutdown_background();
            result
        }
        Err(error) => Err(error.into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Its words come from the other side, which shows them.
        Err(error) if error.is::<commands::Told>() => ExitCode::from(5),
        Err(error) => problem::report(&error),
    }
}
