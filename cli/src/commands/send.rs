//! `transship send NAME > FILE`

use std::io::IsTerminal;

use anyhow::{Result, bail};
use transship_checkpoint::wire::{Message, Sender};

use super::restore::open;
use super::store;
use crate::args::SendArgs;
use crate::progress::Progress;
use transship_engine::Progress as _;

pub(crate) fn run(args: &SendArgs) -> Result<()> {
    let stdout = std::io::stdout();
    if stdout.is_terminal() {
        bail!("a checkpoint is not for a terminal: redirect it, or pipe it to `transship receive`");
    }
    let checkpoint = open(&store(), &args.name)?;
    let manifest = &checkpoint.manifest;
    let progress = Progress::new(false);
    progress.bytes("send", manifest.size());
    let mut count = progress.counter();
    let mut sender = Sender::new(stdout.lock());
    sender.send(&Message::Begin {
        name: manifest.name.clone(),
    })?;
    for (name, files) in manifest.directories() {
        let dir = checkpoint.dir.join(name);
        for file in files {
            sender.send_file(name, &dir, &file.path, &|| true, &mut count)?;
        }
    }
    // The receiver compares what arrives with these digests: damage here is found there.
    sender.send(&Message::End {
        manifest: Box::new(manifest.clone()),
    })?;
    Ok(())
}
