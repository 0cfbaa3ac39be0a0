//! `transship receive`: a checkpoint, or the target of a migration, on stdin.

use std::path::Path;

use anyhow::Result;
use transship_engine::interrupt::Interrupt;
use transship_engine::receive::{self, Received, Request, comes_from_the_other_side};
use transship_engine::restore::allowed_by_node;
use transship_sandbox::admission::node_config::NODE_CONFIG;

use super::{connect, print, store};
use crate::args::{Global, ReceiveArgs};
use crate::progress::Progress;

pub(crate) async fn run(global: &Global, args: ReceiveArgs) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let mut target = args.target.target(args.criu.overrides());
    target
        .allowed
        .extend(allowed_by_node(Path::new(NODE_CONFIG))?.1);
    let request = Request {
        name: args.name,
        target,
        max_size: args.max_size,
        link_patience: args.link.patience(),
    };
    let store = store();
    // The other side shows how far it is.
    let progress = Progress::new(true);
    let received = receive::receive(
        async || Ok(connect(global).await?),
        &store,
        request,
        (std::io::stdin(), std::io::stdout()),
        &interrupt,
        &progress,
    );
    match received.await {
        Ok(Received::Checkpoint(checkpoint)) => print(global, &checkpoint.manifest, || {
            format!("{}\n", checkpoint.dir.display())
        }),
        Ok(Received::Migrated { .. }) => Ok(()),
        Err(error) if comes_from_the_other_side(&error) => Err(super::Told(error).into()),
        Err(error) => Err(error.into()),
    }
}
