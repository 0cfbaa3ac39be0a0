//! One file a command.

use std::io::{self, Write as _};
use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;
use transship_checkpoint::shown_text::{printable_json, printable_lines};
use transship_checkpoint::store::Store;

use crate::args::{Cli, Command, Global, IdentityArgs, LeavingArgs};
use crate::progress::Progress;
use transship_containerd::Containerd;
use transship_engine::origin::Origins;
use transship_engine::sealed::{Opened, open, open_for_pod};
use transship_engine::{Context as _, Error, Result, freeze_guard};
use transship_sandbox::admission::node_config::NODE_CONFIG;

mod check;
pub(crate) mod checkpoint;
mod container_base;
mod diff;
mod export;
mod has_container;
mod import;
mod inspect;
mod keys;
mod ls;
mod migrate;
mod prune;
mod publish;
mod pull;
mod push;
mod receive;
mod recover;
mod restore;
mod rm;
mod send;
mod serve;
pub(crate) mod snapshot;

/// Runs the command, and gives the exit code of one that has succeeded or has told why not.
pub(crate) async fn run(cli: Cli) -> Result<ExitCode> {
    let global = cli.global;
    let done = match cli.command {
        Command::Receive(args) => return receive::run(&global, args).await,
        Command::Check(args) => check::run(&global, args).await,
        Command::Checkpoint(args) => checkpoint::run(&global, args).await,
        Command::Restore(args) => restore::run(&global, args).await,
        Command::Migrate(args) => migrate::run(&global, *args).await,
        Command::Recover(args) => recover::run(&global, &args).await,
        Command::Send(args) => send::run(&args),
        Command::Inspect(args) => inspect::run(&global, &args),
        Command::Diff(args) => diff::run(&global, &args),
        Command::Export(args) => export::run(&global, args).await,
        Command::Import(args) => import::run(&global, args).await,
        Command::Push(args) => push::run(&global, args).await,
        Command::Pull(args) => pull::run(&global, args),
        Command::Ls => ls::run(&global),
        Command::Rm(args) => rm::run(&args),
        Command::Prune(args) => prune::run(&global, &args),
        Command::FreezeGuard(args) => freeze_guard::run(args.alone).await,
        Command::CommitGuard(args) => transship_engine::migrate::run_guard(args.alone).await,
        Command::ReceiveGuard(args) => transship_engine::receive::run_guard(args.alone).await,
        Command::CopyGuard(args) => transship_engine::restore::run_guard(args.alone).await,
        Command::DeleteTask { id } => Ok(connect(&global).await?.kill_task(&id).await?),
        Command::HasContainer { id } => has_container::run(&global, &id).await,
        Command::OpenSealed { name } => open_for_pod(&store(), &name, Path::new(NODE_CONFIG)),
        Command::CheckSignature { name } => Origins::of_node().require(&store().open(&name)?),
        Command::ContainerBase { id, expected } => {
            container_base::run(&global, &id, expected.as_deref()).await
        }
        Command::DumpLinks { dir, to } => transship_engine::dump_links::write(&dir, &to),
        Command::Publish(args) => publish::run(&global, args).await,
        Command::Serve { socket } => serve::run(&global, &socket).await,
        Command::Snapshot(command) => snapshot::run(&global, command).await,
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// A checkpoint of this node, opened with the keys that were named when it is sealed.
fn opened(name: &str, keys: &IdentityArgs, json: bool) -> Result<Opened> {
    open(
        &store(),
        name,
        keys::identities(keys)?,
        &Progress::new(json),
    )
}

/// The same, to leave this node; unless it is encrypted then, one that is sealed leaves only when somebody has said so.
fn opened_to_leave(
    name: &str,
    keys: &LeavingArgs,
    is_encrypted: bool,
    json: bool,
) -> Result<Opened> {
    let is_sealed = || store().find(name).is_ok_and(|it| it.sealed.is_some());
    if !keys.in_clear && !is_encrypted && is_sealed() {
        let message =
            format!("the checkpoint {name:?} is sealed, and would leave this node in clear");
        return Err(Error::refused(message)
            .hint("--encrypt-to KEY, of export and push: those who have it can read it")
            .hint("--identity FILE --in-clear: whoever gets it can read its memory"));
    }
    opened(name, &keys.keys, json)
}

fn store() -> Store {
    Store::of_node()
}

async fn connect(global: &Global) -> Result<Containerd> {
    Ok(Containerd::connect(&global.address, &global.namespace).await?)
}

/// Prints a result for programs, or calls `text` for people.
fn print<T: Serialize>(global: &Global, result: &T, text: impl FnOnce() -> String) -> Result<()> {
    match global.json {
        true => print_line(&json(result)?),
        false => write_stdout(&printable_lines(&text())),
    }
}

fn print_line(line: &str) -> Result<()> {
    write_stdout(&format!("{line}\n"))
}

/// What has been done is done, also where nobody reads of it any more (`| head`).
fn write_stdout(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    let written = { stdout.write_all(text.as_bytes()) }.and_then(|()| stdout.flush());
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written.context("cannot write to stdout")?),
    }
}

fn json<T: Serialize>(result: &T) -> Result<String> {
    let json = serde_json::to_string_pretty(result).context("cannot write JSON")?;
    Ok(printable_json(&json))
}
