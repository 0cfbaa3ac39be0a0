//! The contents of large files that go to the target before the freeze, while the container writes on: see
//! `transship_layer::send_contents`. In the freeze its layer names those that nobody has changed since.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use transship_checkpoint::manifest::{CONTENTS_DIR, File};
use transship_checkpoint::wire::{Check, WireError};
use transship_layer::{ContentsError, KnownContents, send_contents};

use crate::conversation::Writing;

/// A piece that is read and sent.
const PIECE: usize = 1 << 20;

/// What has been sent of a container.
#[derive(Debug, Default)]
pub(super) struct SentContents {
    pub(super) known: KnownContents,
    /// For the manifest.
    pub(super) files: Vec<File>,
    pub(super) bytes: u64,
}

/// Sends what is below `upperdir`. Of one that cannot be read nothing is known: it is told in the freeze.
///
/// # Errors
/// Those of the stream.
pub(super) fn send(
    sender: &Writing,
    (container, upperdir): (&str, PathBuf),
    most: Duration,
    progress: &mut dyn FnMut(u64),
) -> Result<SentContents, WireError> {
    let until = Instant::now() + most;
    let mut sent = SentContents::default();
    let mut buffer = vec![0; PIECE];
    let known = send_contents(
        &upperdir,
        &|| Instant::now() < until,
        &mut |number, data| {
            let path = format!("{CONTENTS_DIR}/{number}");
            let mut sending = sender.begin_file(container, &path, Check::Xxh3)?;
            loop {
                // One that has become shorter is sent in vain.
                let read = data.read(&mut buffer).unwrap_or(0);
                if read == 0 {
                    break;
                }
                sending.write(&buffer[..read])?;
                progress(read as u64);
            }
            sent.bytes += sending.sent();
            sent.files.push(sending.end()?);
            Ok(())
        },
    );
    match known {
        Ok(known) => sent.known = known,
        Err(ContentsError::Send(error)) => return Err(error),
        Err(error @ ContentsError::Io { .. }) => tracing::info!("no file goes before: {error}"),
    }
    Ok(sent)
}
