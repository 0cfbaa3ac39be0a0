//! `transship send NAME > FILE`

use std::io::IsTerminal;

use transship_engine::restore::open;
use transship_engine::{Error, Result};

use super::store;
use crate::args::SendArgs;
use crate::progress::Progress;

pub(crate) fn run(args: &SendArgs) -> Result<()> {
    let stdout = std::io::stdout();
    if stdout.is_terminal() {
        return Err(
            Error::refused("a checkpoint cannot be written to a terminal")
                .hint("redirect it to a file, or pipe it to `transship receive`"),
        );
    }
    let checkpoint = open(&store(), &args.name)?;
    transship_engine::send::send(&checkpoint, stdout.lock(), &Progress::new(false))?;
    Ok(())
}
