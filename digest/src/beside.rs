//! A digest that another thread takes.
//!
//! ```text
//!  Pieces ──> piece ─┬──> channel (4 pieces) ──> the thread: Sha256 ─┐
//!     ^              └──> the caller goes on with the same piece     │
//!     └──────────── filled again when nobody has it any more <───────┘
//! ```

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use crate::Sha256;

/// What has gone through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Through {
    /// Bytes.
    pub size: u64,
    /// Their SHA-256, lower-case hexadecimal.
    pub sha256: String,
}

/// Bytes of a piece.
pub const PIECE: usize = 128 << 10;
/// A piece, which several may read.
pub type Piece = Arc<Vec<u8>>;

/// Pieces that wait for the thread: the caller does not stand still for each that takes longer.
const WAITING: usize = 4;
/// Those that wait, one at each end, and one that the thread lets go just then.
const PIECES: usize = WAITING + 3;
/// From so many bytes on a thread is worth it.
const LARGE: u64 = 4 << 20;

/// Takes the digest of bytes while the caller goes on with them: of many, on a thread, which ends when this is dropped.
#[derive(Debug)]
pub struct HashedBeside {
    place: Place,
    /// In bytes.
    size: u64,
    /// Bytes that are no whole piece yet.
    rest: Vec<u8>,
}

#[derive(Debug)]
enum Place {
    Here(Sha256),
    Thread {
        pieces: SyncSender<Piece>,
        thread: JoinHandle<Sha256>,
    },
}

impl HashedBeside {
    /// Of nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            place: Place::Here(Sha256::new()),
            size: 0,
            rest: Vec::new(),
        }
    }

    /// Goes on with a piece, which is not copied.
    pub fn update_shared(&mut self, piece: &Piece) {
        self.count(piece.len());
        self.send_rest();
        match &mut self.place {
            Place::Here(hasher) => hasher.update(&**piece),
            Place::Thread { pieces, .. } => send(pieces, Piece::clone(piece)),
        }
    }

    /// Goes on with these bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        self.count(bytes.len());
        if let Place::Here(hasher) = &mut self.place {
            return hasher.update(bytes);
        }
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(PIECE - self.rest.len()));
            self.rest.extend_from_slice(now);
            if self.rest.len() == PIECE {
                self.send_rest();
            }
            bytes = later;
        }
    }

    /// How many bytes there were, and their digest in lower-case hexadecimal.
    ///
    /// # Panics
    /// When the thread has.
    #[must_use]
    pub fn finish(mut self) -> Through {
        self.send_rest();
        let hasher = match self.place {
            Place::Here(hasher) => hasher,
            Place::Thread { pieces, thread } => {
                drop(pieces);
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            }
        };
        Through {
            size: self.size,
            sha256: hasher.finish_hex(),
        }
    }

    /// Starts the thread when there are many.
    fn count(&mut self, bytes: usize) {
        self.size += bytes as u64;
        if let Place::Here(hasher) = &mut self.place
            && self.size >= LARGE
        {
            let mut hasher = std::mem::take(hasher);
            let (pieces, queue) = sync_channel::<Piece>(WAITING);
            let thread = thread::spawn(move || {
                for piece in queue {
                    hasher.update(&*piece);
                }
                hasher
            });
            self.place = Place::Thread { pieces, thread };
        }
    }

    fn send_rest(&mut self) {
        if let (Place::Thread { pieces, .. }, false) = (&self.place, self.rest.is_empty()) {
            let next = Vec::with_capacity(PIECE);
            send(pieces, Piece::new(std::mem::replace(&mut self.rest, next)));
        }
    }
}

impl Default for HashedBeside {
    fn default() -> Self {
        Self::new()
    }
}

/// The thread takes pieces until there are none; if it has panicked, `finish` says so.
fn send(pieces: &SyncSender<Piece>, piece: Piece) {
    drop(pieces.send(piece));
}

/// Pieces of what is read, which others may have for a while.
#[derive(Debug, Default)]
pub struct Pieces {
    given: VecDeque<Piece>,
}

impl Pieces {
    /// What `read` puts into the next one; none at the end.
    ///
    /// # Errors
    /// Those of `read`.
    pub fn next<E>(
        &mut self,
        read: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<Option<Piece>, E> {
        let oldest = (self.given.len() == PIECES).then(|| self.given.pop_front());
        let mut piece = oldest
            .flatten()
            .and_then(Arc::into_inner)
            .unwrap_or_default();
        piece.resize(PIECE, 0);
        let length = read(&mut piece)?;
        piece.truncate(length);
        if length == 0 {
            return Ok(None);
        }
        let piece = Arc::new(piece);
        self.given.push_back(Arc::clone(&piece));
        Ok(Some(piece))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::sha256_hex;

    fn digest_in_pieces(bytes: &[u8], copied: bool) -> (Through, usize) {
        let (mut pieces, mut rest) = (Pieces::default(), bytes);
        let mut hasher = HashedBeside::new();
        let mut buffers = std::collections::BTreeSet::new();
        while let Some(piece) = pieces.next(|piece| rest.read(piece)).unwrap() {
            buffers.insert(piece.as_ptr());
            match copied && piece[0].is_multiple_of(2) {
                true => hasher.update(&piece),
                false => hasher.update_shared(&piece),
            }
        }
        (hasher.finish(), buffers.len())
    }

    #[test]
    fn pieces_are_hashed_in_their_order_and_filled_again() {
        let bytes: Vec<u8> = (0..20 << 20).map(|n: u32| n.to_le_bytes()[2]).collect();
        for length in [0, 1, PIECE, PIECE + 1, 5 << 20, bytes.len() - 7] {
            let wanted = Through {
                size: length as u64,
                sha256: sha256_hex(&bytes[..length]),
            };
            for copied in [false, true] {
                let (found, buffers) = digest_in_pieces(&bytes[..length], copied);
                assert_eq!(found, wanted);
                assert!(buffers <= PIECES, "{buffers}");
            }
        }
    }
}
