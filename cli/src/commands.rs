//! One file a command.

use anyhow::Result;
use serde::Serialize;
use transship_checkpoint::store::{DEFAULT_ROOT, Store};

use crate::args::{Cli, Command, Global};
use transship_containerd::Containerd;
use transship_engine::freeze_guard;

mod check;
pub(crate) mod checkpoint;
mod container_base;
mod inspect;
mod ls;
mod migrate;
mod receive;
mod restore;
mod rm;
mod send;
mod serve;
pub(crate) mod snapshot;

/// Runs the command.
pub(crate) async fn run(cli: Cli) -> Result<()> {
    let global = cli.global;
    match cli.command {
        Command::Check => check::run(&global).await,
        Command::Checkpoint(args) => checkpoint::run(&global, args).await,
        Command::Restore(args) => restore::run(&global, args).await,
        Command::Migrate(args) => migrate::run(&global, args).await,
        Command::Send(args) => send::run(&args),
        Command::Receive(args) => receive::run(&global, args).await,
        Command::Inspect(args) => inspect::run(&global, &args),
        Command::Ls => ls::run(&global),
        Command::Rm(args) => rm::run(&args),
        Command::FreezeGuard => Ok(freeze_guard::run().await?),
        Command::ContainerBase { id } => container_base::run(&global, &id).await,
        Command::Serve { socket } => serve::run(&global, &socket).await,
        Command::Snapshot(command) => snapshot::run(&global, command).await,
    }
}

/// An error that the other side has told, and shows: it is not printed a second time here.
#[derive(Debug, thiserror::Error)]
#[error("told by the other side")]
pub(crate) struct Told(#[source] pub(crate) transship_engine::Error);

fn store() -> Store {
    Store::at(DEFAULT_ROOT)
}

async fn connect(global: &Global) -> Result<Containerd> {
    Ok(Containerd::connect(&global.address, &global.namespace).await?)
}

/// Prints a result for programs, or calls `text` for people.
fn print<T: Serialize>(global: &Global, result: &T, text: impl FnOnce() -> String) -> Result<()> {
    if global.json {
        println!("{}", serde_json::to_string_pretty(result)?);
    } else {
        print!("{}", text());
    }
    Ok(())
}
