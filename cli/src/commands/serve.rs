//! `transship serve`: the node's API on a socket that only root can open.

use std::path::Path;

use transship_engine::Result;
use transship_engine::interrupt::Interrupt;

use super::{connect, store};
use crate::args::Global;

pub(crate) async fn run(global: &Global, socket: &Path) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let node = connect(global).await?;
    transship_engine::serve::serve(node, &store(), socket, interrupt).await
}
