//! `transship send NAME > FILE`

use std::io::IsTerminal;

use anyhow::{Result, bail};
use transship_engine::restore::open;

use super::store;
use crate::args::SendArgs;
use crate::progress::Progress;

pub(crate) fn run(args: &SendArgs) -> Result<()> {
    let stdout = std::io::stdout();
    if stdout.is_terminal() {
        bail!("a checkpoint is not for a terminal: redirect it, or pipe it to `transship receive`");
    }
    let checkpoint = open(&store(), &args.name)?;
    transship_engine::send::send(&checkpoint, stdout.lock(), &Progress::new(false))?;
    Ok(())
}
