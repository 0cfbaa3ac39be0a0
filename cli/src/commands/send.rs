//! `transship send NAME > FILE`

use std::io::IsTerminal;

use transship_engine::{Error, Result};

use super::opened_to_leave;
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
    let opened = opened_to_leave(&args.name, &args.keys, false, false)?;
    transship_engine::send::send(&opened.checkpoint, stdout.lock(), &Progress::new(false))?;
    Ok(())
}
