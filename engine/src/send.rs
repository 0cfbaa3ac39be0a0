//! A checkpoint as a stream.

use std::fs;
use std::io::Write;

use transship_checkpoint::manifest::MANIFEST_FILE;
use transship_checkpoint::store::Checkpoint;
use transship_checkpoint::wire::{Check, How, Message, Sender, Signed};
use transship_package::export::signature_of;

use crate::error::{Context as _, Result};
use crate::progress::Progress;

/// Writes the checkpoint to `out`. The receiver compares what arrives with the digests of the
/// manifest: damage here is found there.
///
/// # Errors
/// A file cannot be read, or `out` not be written.
pub fn send(checkpoint: &Checkpoint, out: impl Write, progress: &dyn Progress) -> Result<()> {
    let _in_use = checkpoint.lock_for_reading()?;
    let manifest = &checkpoint.manifest;
    progress.bytes("send", manifest.size());
    let mut count = progress.counter();
    let sender = Sender::new(out);
    sender.send(&Message::Begin {
        name: manifest.name.clone(),
    })?;
    for (name, files) in manifest.directories() {
        let dir = checkpoint.dir.join(name);
        for file in files {
            let mut how = How::whole(Check::Sha256, &mut *count);
            sender.send_file(name, &dir, &file.path, &mut how)?;
        }
    }
    sender.send(&Message::End {
        manifest: Box::new(manifest.clone()),
        signed: signed(checkpoint)?.map(Box::new),
    })?;
    Ok(())
}

/// The manifest's bytes and the signature of them; none: nobody has signed it.
fn signed(checkpoint: &Checkpoint) -> Result<Option<Signed>> {
    let Some(signature) = signature_of(&checkpoint.dir)? else {
        return Ok(None);
    };
    let path = checkpoint.dir.join(MANIFEST_FILE);
    let json = fs::read_to_string(&path);
    Ok(Some(Signed {
        json: json.with_context(|| format!("cannot read {}", path.display()))?,
        signature,
    }))
}
