//! `transship`: moves running containers from one containerd node to another.
//!
//! ```text
//!  args --> commands/{checkpoint, restore, migrate, receive, push, snapshot, check, serve} --> transship-engine
//!           commands/{send, ls, rm, prune}                                                 --> checkpoint directory
//!           commands/{inspect, diff, export, import, pull}         --> transship-package --> the same, and files
//!  progress: bars and lines while it goes on;  timeline_file: --timeline;  report: errors and exit codes
//! ```

mod args;
mod commands;
mod progress;
mod report;
mod timeline_file;

use std::process::ExitCode;

use clap::Parser;
use transship_engine::Error;

/// A migration takes and gives back megabytes for each that it sends (TLS has a buffer for each record). glibc's returns
/// them to the kernel, whose page faults were a seventh of the time of a transfer.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(tracing::Level::INFO)
        .with_target(false)
        .without_time()
        .init();
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
        Err(error) => Err(Error::failed("cannot start this program's threads").because(error)),
    };
    result.unwrap_or_else(|error| report::report(&error))
}
