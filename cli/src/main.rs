//! `transship`: moves running containers from one containerd node to another.
//!
//! ```text
//!  args --> commands/checkpoint --> source, pod (freeze, dump, export) -> checkpoint directory
//!           commands/restore    --> restore_container              <--'
//!           commands/migrate    --> source --> conversation ==pipe==> commands/receive
//!           commands/send, receive        --> checkpoint stream
//!           commands/check      --> check (findings about this node)
//!           commands/serve      --> node_service (the node's API): the same, and restore_pod (CRI)
//!           commands/{inspect,ls,rm}      --> checkpoint directory
//!           freeze_guard: lets them run again if this process is killed;  stuck_dump: ends a dump
//!                       \--> node: containerd's services
//!  problem: errors --> one line, what to do next, exit code
//! ```

mod args;
mod check;
mod commands;
mod conversation;
mod freeze_guard;
mod interrupt;
mod message_queues;
mod node;
mod node_service;
mod oci_runtime;
mod pod;
mod pod_dirs;
mod problem;
mod progress;
mod restore_container;
mod restore_pod;
mod source;
mod stuck_dump;
mod timeline;

use std::process::ExitCode;

use clap::Parser;

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
        Err(error) => problem::report(&error),
    }
}
