//! The contents of large files that go to the target before the freeze, while the container writes on: see
//! `transship_layer::send_contents`. In the freeze its layer names those that nobody has changed since.

use std::path::Path;
use std::time::Instant;

use transship_checkpoint::manifest::File;
use transship_checkpoint::wire::{Check, WireError};
use transship_layer::{ContentsError, KnownContents, send_contents};

use crate::conversation::Writing;

/// A piece that is read and sent.
const PIECE: usize = 1 << 20;

/// Where contents go.
#[derive(Debug)]
pub(super) struct Directory {
    /// A directory of the checkpoint: that of a container, or of what they share.
    pub(super) part: String,
    /// A directory in it.
    pub(super) contents: String,
}

/// What has been sent of a directory.
#[derive(Debug, Default)]
pub(super) struct SentContents {
    pub(super) known: KnownContents,
    /// For the manifest.
    pub(super) files: Vec<File>,
    pub(super) bytes: u64,
}

/// Sends what is below `from`. Of a directory that cannot be read nothing is known: it is told in the freeze.
///
/// # Errors
/// Those of the stream.
pub(super) fn send(
    sender: &Writing,
    to: &Directory,
    from: &Path,
    until: Instant,
    progress: &mut dyn FnMut(u64),
) -> Result<SentContents, WireError> {
    let mut sent = SentContents::default();
    let mut buffer = vec![0; PIECE];
    let known = send_contents(from, &|| Instant::now() < until, &mut |number, data| {
        let path = format!("{}/{number}", to.contents);
        let mut sending = sender.begin_file(&to.part, &path, Check::Xxh3)?;
        loop {
            // One that has become shorter is sent in vain.
            let read = data.read(&mut buffer).unwrap_or(0);
            if read == 0 {
                break;
            }
            sending.write(&buffer[..read])?;
            progress(read as u64);
        }
        sent.files.push(sending.end(&mut sent.bytes)?);
        Ok(())
    });
    match known {
        Ok(known) => sent.known = known,
        Err(ContentsError::Send(error)) => return Err(error),
        Err(error @ ContentsError::Io { .. }) => tracing::info!("no file goes before: {error}"),
    }
    Ok(sent)
}
