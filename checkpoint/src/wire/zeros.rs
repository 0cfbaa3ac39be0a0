//! Pages of zeros, which are not sent.
//!
//! ```text
//!   'd'  what is in the file        'z'  (bytes u32le): so many zeros, at most 1 MiB
//! ```

use super::WireError;

/// Zeros are looked for in pieces of this length, in bytes.
const PAGE: u32 = 4096;
const PAGE_LEN: usize = PAGE as usize;

static NOTHING: [u8; PAGE_LEN] = [0; PAGE_LEN];

/// A part of a piece.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part<'a> {
    Data(&'a [u8]),
    /// So many bytes of zeros.
    Zeros(u32),
}

/// The parts of a piece of at most 1 MiB, in their order.
pub(super) fn parts(piece: &[u8]) -> Vec<Part<'_>> {
    let mut parts = Vec::new();
    let mut data_since = 0;
    for (at, page) in piece.chunks(PAGE_LEN).enumerate() {
        let at = at * PAGE_LEN;
        if page != NOTHING.as_slice() {
            continue;
        }
        if data_since < at {
            parts.push(Part::Data(&piece[data_since..at]));
        }
        data_since = at + PAGE_LEN;
        match parts.last_mut() {
            Some(Part::Zeros(bytes)) => *bytes += PAGE,
            _ => parts.push(Part::Zeros(PAGE)),
        }
    }
    if data_since < piece.len() {
        parts.push(Part::Data(&piece[data_since..]));
    }
    parts
}

/// What a frame says, in bytes.
pub(super) fn count(frame: &[u8], most: usize) -> Result<usize, WireError> {
    let bytes: Option<[u8; 4]> = frame.try_into().ok();
    let count = bytes.and_then(|bytes| usize::try_from(u32::from_le_bytes(bytes)).ok());
    match count {
        Some(count) if count <= most => Ok(count),
        _ => Err(WireError::Protocol {
            what: "a frame of zeros that is none".to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_whole_pages() {
        let page = |byte: u8| vec![byte; PAGE_LEN];
        let piece = [page(0), page(0), page(1), page(2), page(0), vec![0; 7]].concat();
        let expected = [
            Part::Zeros(8192),
            Part::Data(&piece[8192..16384]),
            Part::Zeros(4096),
            Part::Data(&[0; 7]),
        ];
        assert_eq!(parts(&piece), expected);
        assert_eq!(parts(b""), []);
    }

    #[test]
    fn frames_that_lie_are_refused() {
        assert_eq!(count(&8_u32.to_le_bytes(), 8).unwrap(), 8);
        assert!(count(&9_u32.to_le_bytes(), 8).is_err());
        assert!(count(&[0; 5], 8).is_err() && count(&[], 8).is_err());
    }
}
