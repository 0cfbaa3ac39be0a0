//! `transship`: moves running containers from one containerd node to another.
//!
//! ```text
//!  args --> commands/{checkpoint, restore, migrate, receive, push, snapshot, check, serve} --> transship-engine
//!           commands/{send, ls, rm, prune}                                                 --> checkpoint directory
//!           commands/{inspect, diff, export, import, pull}         --> transship-package --> the same, and files
//!  progress: bars and lines while it goes on;  timeline_file: --timeline;  probe: --probe;  report: errors and exit codes
//! ```

mod args;
mod commands;
mod probe;
mod progress;
mod report;
mod timeline_file;

use std::process::ExitCode;

use clap::Parser;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use transship_engine::Error;

/// A migration takes and gives back megabytes for each that it sends (TLS has a buffer for each record). glibc's returns
/// them to the kernel, whose page faults were a seventh of the time of a transfer. It asks for no huge pages: the
/// front calls this program in the middle of a restore, and to clear three of them would take most of its time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// As many as the units allow.
const OPEN_FILES: u64 = 65_536;

/// CRIU and the OCI runtime have the limits of this program, and a dump of many processes opens more files than a login
/// shell allows.
fn allow_many_open_files() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let most = hard.min(OPEN_FILES);
        if soft < most
            && let Err(errno) = setrlimit(Resource::RLIMIT_NOFILE, most, hard)
        {
            tracing::debug!("the limit of open files stays at {soft}: {errno}");
        }
    }
}

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(tracing::Level::INFO)
        .with_target(false)
        .without_time()
        .init();
    allow_many_open_files();
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
