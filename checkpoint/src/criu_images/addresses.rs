//! `mm-<pid>.img`: where the memory of the processes is.
//!
//! ```text
//! mm_entry   14 vmas: vma_entry   1 start
//! ```

use std::path::Path;

use super::strict::is_ambiguous;
use super::{Image, ImageError, Kind, list};

const VMAS: u64 = 14;
/// Auxiliary vector, mappings, and requests of asynchronous I/O.
const REPEATED: [u64; 3] = [13, VMAS, 16];

#[derive(Clone, PartialEq, prost::Message)]
struct MmEntry {
    #[prost(message, repeated, tag = "14")]
    vmas: Vec<VmaEntry>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
struct VmaEntry {
    #[prost(uint64, required, tag = "1")]
    start: u64,
}

/// The lowest address that a process has memory at.
///
/// # Errors
/// An image that cannot be read or says a thing twice.
pub fn lowest(dir: &Path) -> Result<Option<u64>, ImageError> {
    let mut lowest = None;
    for (_, path) in list(dir, Kind::Mm)? {
        let image = Image::read(&path, Kind::Mm)?;
        let Some(message) = image.entries().next_bytes()? else {
            continue;
        };
        if is_ambiguous(message, &REPEATED) {
            return Err(image.ambiguous());
        }
        let entry: MmEntry = image.decode(message)?;
        lowest = { entry.vmas.into_iter() }
            .map(|vma| vma.start)
            .chain(lowest)
            .min();
    }
    Ok(lowest)
}
