//! `transship receive`: a checkpoint, or the target of a migration, on stdin.

use std::net::IpAddr;
use std::path::Path;
use std::process::ExitCode;

use transship_engine::data_channel::DataAddress;
use transship_engine::interrupt::Interrupt;
use transship_engine::receive::{self, Received, Request, comes_from_the_other_side};
use transship_engine::restore::allowed_by_node;
use transship_engine::{Kind, Result};
use transship_sandbox::admission::node_config::NODE_CONFIG;

use super::{connect, print, store};
use crate::args::{Global, ReceiveArgs};
use crate::progress::Progress;
use crate::report::exit_code;

/// What the other side has told is not printed: it shows it.
pub(crate) async fn run(global: &Global, args: ReceiveArgs) -> Result<ExitCode> {
    let interrupt = Interrupt::install()?;
    let mut target = args.target.target(args.criu.overrides());
    target
        .allowed
        .extend(allowed_by_node(Path::new(NODE_CONFIG))?.1);
    let request = Request {
        name: args.name,
        target,
        max_size: args.max_size,
        wait_for_pod: args.wait_for_pod,
        link_patience: args.link.patience(),
        data_addresses: data_addresses(args.data_address),
    };
    let store = store();
    // The other side shows how far it is.
    let progress = Progress::new(true);
    let received = receive::receive(
        async || connect(global).await,
        &store,
        request,
        (std::io::stdin(), std::io::stdout()),
        &interrupt,
        &progress,
    );
    match received.await {
        Ok(Received::Checkpoint(checkpoint)) => print(global, &checkpoint.manifest, || {
            format!("{}\n", checkpoint.dir.display())
        })?,
        Ok(Received::Migrated { .. } | Received::Asked(_)) => {}
        Err(error) if comes_from_the_other_side(&error) => return Ok(exit_code(Kind::Target)),
        Err(error) => return Err(error),
    }
    Ok(ExitCode::SUCCESS)
}

/// sshd says by which address it has been reached: "client port server port".
fn data_addresses(said: Option<DataAddress>) -> Vec<IpAddr> {
    let by_ssh = || {
        let connection = std::env::var("SSH_CONNECTION").ok()?;
        connection.split(' ').nth(2)?.parse().ok()
    };
    let address = said.map_or_else(by_ssh, DataAddress::address);
    address.into_iter().collect()
}
