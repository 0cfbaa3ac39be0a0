//! The body of an answer, read as it comes.

use std::io::{self, Read};
use std::time::Instant;

use super::patience::Patience;

/// Adds what comes to `bytes`, which has `most` at most then.
///
/// # Errors
/// The connection breaks, or is as good as silent; what has come is in `bytes`.
pub(super) fn read_body(
    mut body: impl Read,
    bytes: &mut Vec<u8>,
    most: u64,
    Patience { silence, least, .. }: Patience,
) -> io::Result<()> {
    let mut piece = vec![0; 64 << 10];
    let (mut since, mut came) = (Instant::now(), 0);
    loop {
        let room = most.saturating_sub(bytes.len() as u64);
        let room = usize::try_from(room).unwrap_or(usize::MAX).min(piece.len());
        let read = body.read(&mut piece[..room])?;
        if read == 0 {
            return Ok(());
        }
        bytes.extend_from_slice(&piece[..read]);
        came += read;
        if came >= least {
            (since, came) = (Instant::now(), 0);
        } else if (bytes.len() as u64) < most && since.elapsed() > silence {
            let reason = format!("{came} bytes came in {silence:?}");
            return Err(io::Error::new(io::ErrorKind::TimedOut, reason));
        }
    }
}
